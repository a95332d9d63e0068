"""Configurations that express the sizes of smaller weights: of one feed-forward width, one number of heads."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.conversion.depth import parts, setting_of
from fxsparse.conversion.heads import attention_calls
from fxsparse.conversion.resizing import sizes_of

_FEED_FORWARD = ("inner", "intermediate", "ffn")


def shapes_of(cls: Any, config: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = cls(copy.deepcopy(config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def misfits_of(
    cls: Any, config: Any, state: Mapping[str, Tensor]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The shapes (by the configuration, wanted) of tensors for which the two differ; an absent tensor's is empty."""
    shapes, wanted = shapes_of(cls, config), sizes_of(state)
    pairs = {name: (shapes.get(name, ()), wanted.get(name, ())) for name in (*shapes, *wanted)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def narrower_configs(cls: Any, config: Any, state: Mapping[str, Tensor], gm: GraphModule) -> list[Any]:
    """The configurations whose modules have exactly the shapes of ``state``, the likeliest first."""
    heads_first = _with_widths(cls, _with_heads(config, gm), state)
    plain = _with_widths(cls, config, state)
    heads_last = None if plain is None else _with_widths(cls, _with_heads(plain, gm), state)
    configs: list[Any] = []
    for fitting in (heads_first, heads_last, plain):
        if fitting is not None and all(fitting.to_dict() != known.to_dict() for known in configs):
            configs.append(fitting)
    return configs


def _with_heads(config: Any, gm: GraphModule) -> Any:
    """The configuration with the graph's number of heads, if all attentions have the same number.

    The number is read from the graph, because shapes do not show it if the head size is derived from it.
    """
    queries = [fx.value(sdpa.all_input_nodes[0]).shape for sdpa in attention_calls(gm)]
    # Where heads and the batch are one dimension, it tells of neither.
    counts = {shape[1] if len(shape) == 4 and isinstance(shape[1], int) else None for shape in queries}
    before = setting_of(config, "num_attention_heads")
    config = copy.deepcopy(config)
    for part in parts(config) if len(counts) == 1 and None not in counts else []:
        for name, setting in list(vars(part).items()):
            if name.endswith(("heads", "n_head")) and type(setting) is int and setting == before:
                setattr(part, name, *counts)
    return config


def _with_widths(cls: Any, config: Any, state: Mapping[str, Tensor]) -> Any | None:
    """The configuration whose model has exactly the shapes of ``state``; None if there is none."""
    config = copy.deepcopy(config)
    try:
        misfits = misfits_of(cls, config, state)
    except Exception:
        return None  # the class refuses these sizes
    if not all(all(pair) for pair in misfits.values()):
        return None  # no width adds or removes a part of a layer
    while misfits:
        better = None
        for part, name, number in _narrower(config, misfits):
            before = vars(part)[name]
            setattr(part, name, number)
            try:
                left = misfits_of(cls, config, state)
            except Exception:
                left = misfits  # the class refuses these sizes
            if len(left) < len(misfits):
                better = left
                break
            setattr(part, name, before)
        if better is None:
            return None
        misfits = better
    try:  # a configuration may refuse sizes that its module accepts, such as a width that the heads do not divide
        type(config).from_dict(config.to_dict())
    except Exception:
        return None
    return config


def _narrower(
    config: Any, misfits: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
) -> list[tuple[Any, str, int]]:
    """Settings to try, each with a new number: the size itself, or a count (of heads) in proportion to it."""
    pairs = {
        pair for shape, wanted in misfits.values() for pair in zip(shape, wanted, strict=False) if pair[0] != pair[1]
    }
    changes = []
    for part in parts(config):
        for name, setting in list(vars(part).items()):
            for size, wanted in sorted(pairs):
                if setting is None and any(word in name for word in _FEED_FORWARD):
                    changes.append((part, name, wanted))
                elif type(setting) is int and setting > 0 and setting * wanted % size == 0:
                    changes.append((part, name, setting * wanted // size))
    return changes
