"""Writing a shortened or pruned Hugging Face model as a checkpoint that loads again.

Where the architecture can say it (fewer layers, one narrower feed-forward width, fewer heads of the same size), what is
written is an ordinary checkpoint: ``AutoModel...from_pretrained`` and every other tool read it. Otherwise the sizes of
each layer stand beside it in ``fxsparse.json``, and `from_pretrained` here builds the module that has them. Either way
the result is an ordinary module of its class: ``generate()``, training and saving work.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import SymInt, Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fxsparse import graph as fx
from fxsparse.errors import CheckpointError
from fxsparse.integrations.resizing import resize, sizes_of
from fxsparse.state import dense_state_dict

_SIZES = "fxsparse.json"
_FEED_FORWARD = ("inner", "intermediate", "ffn")


def save_pretrained(gm: GraphModule, model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Writes what a rewritten graph computes as a Hugging Face checkpoint.

    Layers are numbered anew without gaps, per-layer settings of the configuration (``layer_types``) follow, and the
    first layer left of a T5 stack takes over its position bias. Pruned N:M weights are written dense, with their zeros.

    Args:
        gm: the rewritten model.
        model: the Hugging Face model it was made from, or a fresh one; its configuration, class and generation settings
            are used.
        path: a folder.

    Returns:
        the module that was written, in evaluation mode.

    Raises:
        CheckpointError: no module of the model's class computes what the graph does.
    """
    if not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        raise CheckpointError(f"{type(model).__name__} is no Hugging Face model; write it with fxsparse.save")
    state = {name: tensor.detach().cpu() for name, tensor in dense_state_dict(gm).items()}
    original = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    kept = _kept_layers(model, original, state)
    config = _with_layers(model, kept)
    state = _renumbered(state, kept, _shapes(type(model), config))
    narrower = _with_widths(type(model), config, state)
    candidates = [(narrower, False)] if narrower is not None else []
    for chosen, resized in (*candidates, (config, True)):
        written = _build(type(model), chosen, state, resized)
        if _agree(gm, written):
            written.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
            written.save_pretrained(path)
            beside = Path(path) / _SIZES
            beside.unlink(missing_ok=True)
            if resized:
                beside.write_text(json.dumps({"class": type(model).__name__, "sizes": sizes_of(state)}, indent=1))
            return written
    raise CheckpointError(
        f"no {type(model).__name__} computes what the graph does: it holds more than smaller weights and fewer layers; "
        "write it with fxsparse.save and read it with fxsparse.load"
    )


def from_pretrained(path: str | os.PathLike[str]) -> nn.Module:
    """Reads a checkpoint that `save_pretrained` wrote, or any other that names its class in the configuration.

    Args:
        path: the folder.

    Returns:
        the model, in evaluation mode.

    Raises:
        CheckpointError: the folder holds no such checkpoint.
    """
    import transformers

    folder = Path(path)
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} holds no config.json; it was not written by fxsparse.save_pretrained")
    config = transformers.AutoConfig.from_pretrained(folder)
    recorded = json.loads((folder / _SIZES).read_text()) if (folder / _SIZES).exists() else None
    name = recorded["class"] if recorded else next(iter(config.architectures or ()), None)
    cls = getattr(transformers, str(name), None)
    if cls is None:
        raise CheckpointError(f"{folder}: transformers {transformers.__version__} has no class {name}")
    if recorded is None:
        return cls.from_pretrained(folder).eval()
    model: Any = cls(config)
    resize(model, {name: tuple(shape) for name, shape in recorded["sizes"].items()})
    state = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    _load(model, state)
    if (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.eval()


# --- depth ------------------------------------------------------------------------------------------------------------


def _kept_layers(
    model: nn.Module, original: Mapping[str, Any], state: Mapping[str, Any]
) -> dict[str, tuple[list[int], int]]:
    """For every list of layers that lost some, by its path: the numbers that are left, and how many there were."""
    kept: dict[str, tuple[list[int], int]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{outer}.") for outer in kept):
            continue
        # A layer counts as there when more of it is left than a position bias that outlived it.
        there = [i for i in range(len(module)) if _is_left(f"{path}.{i}.", original, state)]
        if there and len(there) < len(module):
            kept[path] = (there, len(module))
    return kept


def _is_left(prefix: str, original: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    names = [name for name in original if name.startswith(prefix)]
    return not names or any(name in state for name in names if "relative_attention_bias" not in name)


def _with_layers(model: Any, kept: Mapping[str, tuple[list[int], int]]) -> Any:
    """The configuration with fewer layers: the number that, changed, makes the list shorter."""
    config = copy.deepcopy(model.config)
    for path, (numbers, before) in kept.items():
        for part in _parts(config):
            for name, setting in list(vars(part).items()):
                if isinstance(setting, (list, tuple)) and len(setting) == before:
                    setattr(part, name, [setting[number] for number in numbers])
        if not any(
            _shortens(type(model), config, part, name, path, len(numbers)) for part, name in _counts(config, before)
        ):
            raise CheckpointError(f"{path}: no setting of {type(config).__name__} gives it {len(numbers)} layers")
    return config


def _parts(config: Any) -> list[Any]:
    """A configuration and those inside it (of a model with a text part)."""
    return [config, *(part for part in vars(config).values() if hasattr(part, "to_diff_dict"))]


def _counts(config: Any, number: int) -> list[tuple[Any, str]]:
    return [
        (part, name)
        for part in _parts(config)
        for name, setting in vars(part).items()
        if isinstance(setting, int) and not isinstance(setting, bool) and setting == number
    ]


def _shortens(cls: Any, config: Any, part: Any, name: str, path: str, layers: int) -> bool:
    before = getattr(part, name)
    setattr(part, name, layers)
    try:
        with torch.device("meta"):
            if len(cls(copy.deepcopy(config)).get_submodule(path)) == layers:
                return True
    except Exception:
        pass  # a setting that means something else
    setattr(part, name, before)
    return False


def _renumbered(
    state: Mapping[str, Tensor], kept: Mapping[str, tuple[list[int], int]], expected: Mapping[str, Any]
) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for path, (numbers, _) in kept.items():
            if name.startswith(f"{path}."):
                number, _, rest = name[len(path) + 1 :].partition(".")
                # What outlived its layer (T5's position bias) belongs to the first one now.
                place = numbers.index(int(number)) if int(number) in numbers else 0
                name = f"{path}.{place}.{rest}"
                break
        renamed[name] = tensor
    return {name: tensor for name, tensor in renamed.items() if name in expected}


# --- width ------------------------------------------------------------------------------------------------------------


def _shapes(cls: Any, config: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = cls(copy.deepcopy(config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _misfits(cls: Any, config: Any, state: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes that the configuration gives and those that are wanted, where they differ; absent ones are empty."""
    given = _shapes(cls, config)
    wanted = {name: tuple(state[name].shape) if name in state else () for name in given}
    return {name: (given[name], wanted[name]) for name in given if given[name] != wanted[name]}


def _with_widths(cls: Any, config: Any, state: Mapping[str, Tensor]) -> Any | None:
    """The configuration whose model has exactly these shapes; None where the architecture cannot say them."""
    config = copy.deepcopy(config)
    misfits = _misfits(cls, config, state)
    while misfits:
        if not all(wanted for _, wanted in misfits.values()):
            return None
        better = None
        for part, name, number in _narrower(config, misfits):
            before = getattr(part, name)
            setattr(part, name, number)
            try:
                left = _misfits(cls, config, state)
            except Exception:
                left = misfits  # sizes that the architecture refuses
            if len(left) < len(misfits):
                better = left
                break
            setattr(part, name, before)
        if better is None:
            return None
        misfits = better
    return config


def _narrower(
    config: Any, misfits: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
) -> list[tuple[Any, str, int]]:
    """Settings that might explain the sizes: the size itself, or a count (of heads) in proportion to it."""
    pairs = {
        pair for given, wanted in misfits.values() for pair in zip(given, wanted, strict=False) if pair[0] != pair[1]
    }
    found = []
    for part in _parts(config):
        for name, setting in list(vars(part).items()):
            for given, wanted in sorted(pairs):
                if setting is None and any(word in name for word in _FEED_FORWARD):
                    found.append((part, name, wanted))
                elif type(setting) is int and setting > 0 and setting * wanted % given == 0:
                    found.append((part, name, setting * wanted // given))
    return found


# --- building and checking --------------------------------------------------------------------------------------------


def _build(cls: Any, config: Any, state: Mapping[str, Tensor], resized: bool) -> Any:
    with torch.random.fork_rng(devices=[]):
        model = cls(copy.deepcopy(config))
    if resized:
        resize(model, sizes_of(state))
    _load(model, state)
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    return (model.to(dtypes.pop()) if len(dtypes) == 1 else model).eval()


def _load(model: Any, state: Mapping[str, Tensor]) -> None:
    missing, unexpected = model.load_state_dict(dict(state), strict=False)
    tied = {id(tensor) for name, tensor in model.state_dict(keep_vars=True).items() if name in state}
    missing = [name for name in missing if id(fx.attribute(model, name)) not in tied]
    if missing or unexpected:
        what = ", ".join(
            [*(f"{name} is missing" for name in missing), *(f"{name} is not its own" for name in unexpected)][:4]
        )
        raise CheckpointError(f"the tensors do not fit {type(model).__name__}: {what}")


@torch.no_grad()
def _agree(gm: GraphModule, model: Any) -> bool:
    """Whether module and graph compute the same on a batch of the traced sizes."""
    args, kwargs = _batch(gm)
    was_training = {module: module.training for module in gm.modules()}
    device = next(gm.parameters()).device
    outputs = []
    try:
        for module in (gm.eval(), model.to(device)):
            outputs.append([leaf for leaf in pytree.tree_leaves(_plain(module(*args, **kwargs))) if _is_float(leaf)])
    except Exception:
        return False  # sizes that the class cannot run with
    finally:
        for module, training in was_training.items():
            module.training = training
    return len(outputs[0]) == len(outputs[1]) and all(
        mine.shape == theirs.shape and torch.allclose(mine, theirs, rtol=1e-2, atol=1e-3 * float(theirs.abs().max()))
        for mine, theirs in zip(*outputs, strict=True)
    )


def _plain(output: Any) -> Any:
    return dict(output) if isinstance(output, Mapping) else output


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _batch(gm: GraphModule) -> tuple[tuple[Any, ...], dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    device = next(gm.parameters()).device
    leaves = []
    for node in gm.graph.find_nodes(op="placeholder"):
        value = fx.value(node)
        if isinstance(value, Tensor):
            sizes = [size.node.hint if isinstance(size, SymInt) else size for size in value.shape]
            if value.is_floating_point():
                value = torch.randn(sizes, generator=generator).to(device, value.dtype)
            elif "mask" in node.name:
                value = torch.ones(sizes, dtype=value.dtype, device=device)
            else:  # ids and classes alike: every vocabulary has two
                value = torch.randint(0, 2, sizes, generator=generator).to(device, value.dtype)
        leaves.append(value)
    args, kwargs = pytree.tree_unflatten(leaves, gm._in_spec)
    return tuple(args), dict(kwargs)
