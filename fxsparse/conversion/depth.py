"""Layers that a graph has lost, in the lists of the model's modules and in its configuration."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.errors import CheckpointError

COUNT_OF_LAYERS = re.compile(r"(num_|n_)?\w*layers?")
"""The names of settings that say how many layers there are."""
CONFIG_KEY = "fxsparse"
"""The setting of a configuration that holds what no other of its settings can express."""

Shortened = Mapping[str, tuple[list[int], int]]
"""For every list that lost layers, by path: the numbers of the remaining layers, and the original count."""


def shortened_lists(
    model: nn.Module,
    original: Mapping[str, Any],
    state: Mapping[str, Any],
    kinds: tuple[type[nn.ModuleList | nn.Sequential], ...] = (nn.ModuleList,),
) -> dict[str, tuple[list[int], int]]:
    """For every list that lost layers, by path: the numbers of the remaining layers, and the original count.

    Args:
        model: the original.
        original: the names of its tensors.
        state: the names of those that the graph has left.
        kinds: the classes of lists.
    """
    shortened: dict[str, tuple[list[int], int]] = {}
    lists: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, kinds) or any(path.startswith(f"{outer}.") for outer in lists):
            continue  # a list inside a layer (T5) holds parts of the layer
        lists.append(path)
        # A position bias alone does not make a layer: it stays for later layers when its own is dropped.
        remaining = [i for i in range(len(module)) if _is_left(f"{path}.{i}.", original, state)]
        if remaining and len(remaining) < len(module):
            shortened[path] = (remaining, len(module))
    return shortened


def _is_left(prefix: str, original: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    names = [name for name in original if name.startswith(prefix)]
    return not names or any(name in state for name in names if "relative_attention_bias" not in name)


def with_layers(model: Any, shortened: Shortened) -> Any:
    """The configuration with fewer layers; tries each setting of the original count until the list becomes shorter.

    Settings for each layer (``layer_types``) are cut accordingly.
    """
    config = copy.deepcopy(model.config)
    for path, (numbers, before) in shortened.items():
        if not any(
            _shortens(type(model), config, part, name, path, numbers, scope)
            for part, name in _counts(config, before)
            for scope in (parts(config), [part])  # an encoder may be as deep as its decoder (T5Gemma)
        ):
            raise CheckpointError(f"{path}: no setting of {type(config).__name__} gives it {len(numbers)} layers")
        for part in parts(config):
            _rename_stages(part, numbers, before)
        is_derived = isinstance(getattr(type(config), "num_hidden_layers", None), property)  # ProphetNet
        if getattr(config, "num_decoder_layers", None) and not is_derived:
            # `generate` sizes the cache by decoder_layers, but T5 configurations only have num_decoder_layers.
            config.decoder_layers = config.num_decoder_layers
    return config


def _is_per_layer(part: Any, name: str, before: int) -> bool:
    """Whether a list has an entry for each layer, and not as many by chance: that of a default configuration, which has
    another number of layers, then has another length."""
    try:
        default = type(part)()
    except Exception:  # a class that asks for settings
        return True
    setting = setting_of(default, name)
    counts = {setting_of(default, count) for _, count in _counts(part, before) if COUNT_OF_LAYERS.fullmatch(count)}
    counts.discard(before)  # of another kind of layers, of which there are always so many
    return not counts or not isinstance(setting, (list, tuple)) or len(setting) in counts


def _rename_stages(part: Any, numbers: list[int], before: int) -> None:
    """Names the stages of a backbone, a stem perhaps and the layers, anew, and keeps those that it gives out."""
    names = getattr(part, "stage_names", None)
    if not isinstance(names, list) or len(names) - before not in (0, 1):
        return
    stem = len(names) - before
    left = [*range(stem), *(stem + number for number in numbers)]
    given = [left.index(index % len(names)) for index in part.out_indices or () if index % len(names) in left]
    part.stage_names = names[: len(left)]
    part.set_output_features_output_indices(out_features=None, out_indices=given or None)


def parts(config: Any) -> list[Any]:
    """A configuration and its sub-configurations, such as that of the text part of a model."""
    return [config, *(part for part in vars(config).values() if hasattr(part, "to_diff_dict"))]


def setting_of(config: Any, name: str) -> Any:
    """A setting under any of its names; None if there is none, or layers differ in it and the whole has none."""
    try:
        return getattr(config, name, None)
    except Exception:  # transformers refuses what each layer has of its own
        return None


def _counts(config: Any, number: int) -> list[tuple[Any, str]]:
    return [
        (part, name)
        for part in parts(config)
        for name, setting in vars(part).items()
        if isinstance(setting, int) and not isinstance(setting, bool) and setting == number
    ]


def _shortens(cls: Any, config: Any, part: Any, name: str, path: str, numbers: list[int], scope: Iterable[Any]) -> bool:
    """Whether a setting of ``part`` gives a list so many layers, once the settings for each layer in ``scope`` are cut;
    if so, they are."""
    before = vars(part)[name]
    changed: list[tuple[Any, str, Any, Any]] = [(part, name, before, len(numbers))]
    for other in scope:
        for key, setting in vars(other).items():
            if isinstance(setting, (list, tuple)) and len(setting) == before and _is_per_layer(other, key, before):
                changed.append((other, key, setting, [setting[number] for number in numbers]))
    for owner, key, _, new in changed:
        setattr(owner, key, new)
    try:
        with torch.device("meta"):
            if len(cls(copy.deepcopy(config)).get_submodule(path)) == len(numbers):
                return True
    except Exception:
        pass  # a setting that means something else
    for owner, key, old, _ in changed:
        setattr(owner, key, old)
    return False


def renumbered(state: Mapping[str, Tensor], shortened: Shortened, expected: Mapping[str, Any]) -> dict[str, Tensor]:
    renamed = {renumber(name, shortened): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in renamed.items() if name in expected}


def renumber(name: str, shortened: Shortened) -> str:
    for path, (numbers, _) in shortened.items():
        if name.startswith(f"{path}."):
            number, _, rest = name[len(path) + 1 :].partition(".")
            # A tensor of a dropped layer (T5's position bias) moves to the first remaining layer.
            place = numbers.index(int(number)) if int(number) in numbers else 0
            return f"{path}.{place}.{rest}"
    return name
