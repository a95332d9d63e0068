"""Writing a shortened or pruned Hugging Face model as a checkpoint that loads again.

Where the architecture can say it (fewer layers, one narrower feed-forward width, fewer heads of the same size), what is
written is an ordinary checkpoint: ``AutoModel...from_pretrained`` and every other tool read it. Otherwise the sizes
that differ stand in its configuration, under ``fxsparse``, and `from_pretrained` here builds the module that has them.
Either way the result is a module of its class: ``generate()``, training and ``save_pretrained`` of its own work.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import SymInt, Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fxsparse import graph as fx
from fxsparse.checkpoint import dense_state_dict
from fxsparse.errors import CheckpointError
from fxsparse.integrations.heads import Heads, attention_calls, choose_heads, heads_of
from fxsparse.integrations.resizing import resize, sizes_of

_RECORD = "fxsparse"
"""The setting that holds the sizes, and the variant of the weights' file: transformers finds none under the plain name,
instead of drawing at random what a smaller model lacks."""
_FEED_FORWARD = ("inner", "intermediate", "ffn")


def save_pretrained(gm: GraphModule, model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Writes what a rewritten graph computes as a Hugging Face checkpoint.

    Layers are numbered anew without gaps, per-layer settings of the configuration (``layer_types``) follow, and the
    first layer left of a T5 stack takes over its position bias. Pruned N:M weights are written dense, with their zeros.
    What is written was compared with the graph on a batch of the traced sizes.

    Args:
        gm: the rewritten model.
        model: the Hugging Face model it was made from, or a fresh one; its configuration, class and generation settings
            are used.
        path: a folder; weights in it are replaced.

    Returns:
        the module that was written, in evaluation mode.

    Raises:
        CheckpointError: no module of the model's class computes what the graph does.
    """
    if not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        raise CheckpointError(f"{type(model).__name__} is no Hugging Face model; write it with fxsparse.save")
    model = copy.copy(model)
    model.config = copy.deepcopy(model.config)
    before = vars(model.config).pop(_RECORD, {"heads": {}})
    state = {name: tensor.detach().cpu() for name, tensor in dense_state_dict(gm).items()}
    original = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    kept = _kept_layers(model, original, state)
    config = _with_layers(model, kept)
    heads = {_renumber(name, kept): chosen for name, chosen in heads_of(gm, model, before["heads"]).items()}
    state = _renumbered(state, kept, _shapes(type(model), config))
    narrower = _narrower_configs(type(model), config, state, gm)
    candidates: list[tuple[Any, Heads | None]] = [*((fitting, None) for fitting in narrower), (config, heads)]
    for chosen, choices in candidates:
        written = _build(type(model), chosen, state, choices)
        differs = _difference(gm, written)
        if differs is None:
            written.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
            if choices is not None:
                sizes = {name: list(wanted) for name, (_, wanted) in _misfits(type(model), chosen, state).items()}
                setattr(written.config, _RECORD, {"sizes": sizes, "heads": heads})
            for old in Path(path).glob("model*.safetensors*"):
                old.unlink()
            written.save_pretrained(path, variant=None if choices is None else _RECORD)
            return written
    raise CheckpointError(
        f"no {type(model).__name__} computes what the graph does ({differs}): it holds more than smaller weights and "
        "fewer layers; write it with fxsparse.save and read it with fxsparse.load"
    )


def from_pretrained(path: str | os.PathLike[str], **options: Any) -> nn.Module:
    """Reads a checkpoint that `save_pretrained` wrote, or any other that names its class in the configuration.

    Args:
        path: the folder.
        options: of transformers' ``from_pretrained``: ``dtype``, ``device_map``, ``attn_implementation``, ...

    Returns:
        the model, in evaluation mode.

    Raises:
        CheckpointError: the folder holds no such checkpoint, or not the tensors it should.
    """
    import transformers

    folder = Path(path)
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} holds no config.json; it was not written by fxsparse.save_pretrained")
    config = transformers.AutoConfig.from_pretrained(folder)
    name = next(iter(config.architectures or ()), None)
    cls = getattr(transformers, str(name), None)
    if cls is None:
        raise CheckpointError(f"{folder}: transformers {transformers.__version__} has no class {name}")
    record = getattr(config, _RECORD, None)
    if record is None:
        return cls.from_pretrained(folder, **options).eval()
    # Files of plain names come from a later save_pretrained of the model's own, which leaves the others where they are.
    plain = any(_RECORD not in file.name for file in folder.glob("model*.safetensors"))
    sized = _sized(cls, record)
    model, found = sized.from_pretrained(
        folder, variant=None if plain else _RECORD, output_loading_info=True, **options
    )
    wrong = [f"{name} is {what}" for what in ("missing", "unexpected") for name in sorted(found[f"{what}_keys"])]
    if wrong:
        raise CheckpointError(f"{folder}: the tensors do not fit {name}: {', '.join(wrong[:4])}")
    model.__class__ = cls
    choose_heads(model, record["heads"])
    return model.eval()


def _sized(cls: Any, record: Mapping[str, Any]) -> Any:
    """The class, whose new modules have the recorded sizes."""

    class Sized(cls):
        def __init__(self, config: Any, *args: Any, **kwargs: Any):
            super().__init__(config, *args, **kwargs)
            recorded = {name: tuple(shape) for name, shape in record["sizes"].items()}
            resize(self, {**sizes_of(self.state_dict()), **recorded}, record["heads"])

    Sized.__name__, Sized.__module__ = cls.__name__, cls.__module__  # what transformers knows names of weights by
    return Sized


# --- depth ------------------------------------------------------------------------------------------------------------


def _kept_layers(
    model: nn.Module, original: Mapping[str, Any], state: Mapping[str, Any]
) -> dict[str, tuple[list[int], int]]:
    """For every list of layers that lost some, by its path: the numbers that are left, and how many there were."""
    kept: dict[str, tuple[list[int], int]] = {}
    lists: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{outer}.") for outer in lists):
            continue  # the parts of a layer (T5's) are no layers
        lists.append(path)
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
        if getattr(config, "num_decoder_layers", None):
            # T5's own name for them is not the one by which `generate` finds how many layers a cache has.
            config.decoder_layers = config.num_decoder_layers
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
    renamed = {_renumber(name, kept): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in renamed.items() if name in expected}


def _renumber(name: str, kept: Mapping[str, tuple[list[int], int]]) -> str:
    for path, (numbers, _) in kept.items():
        if name.startswith(f"{path}."):
            number, _, rest = name[len(path) + 1 :].partition(".")
            # What outlived its layer (T5's position bias) belongs to the first one now.
            place = numbers.index(int(number)) if int(number) in numbers else 0
            return f"{path}.{place}.{rest}"
    return name


# --- width ------------------------------------------------------------------------------------------------------------


def _shapes(cls: Any, config: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = cls(copy.deepcopy(config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _misfits(cls: Any, config: Any, state: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes that the configuration gives and those that are wanted, where they differ; absent ones are empty."""
    given, wanted = _shapes(cls, config), sizes_of(state)
    pairs = {name: (given.get(name, ()), wanted.get(name, ())) for name in (*given, *wanted)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _narrower_configs(cls: Any, config: Any, state: Mapping[str, Tensor], gm: GraphModule) -> list[Any]:
    """The configurations whose modules have exactly these shapes, the likeliest first."""
    heads_first = _with_widths(cls, _with_heads(config, gm), state)
    plain = _with_widths(cls, config, state)
    heads_last = None if plain is None else _with_widths(cls, _with_heads(plain, gm), state)
    found: list[Any] = []
    for fitting in (heads_first, heads_last, plain):
        if fitting is not None and fitting not in found:
            found.append(fitting)
    return found


def _with_heads(config: Any, gm: GraphModule) -> Any:
    """The configuration with fewer heads, where all attentions have the same number; no shape says it where the size of
    heads follows from it."""
    counts = {fx.value(sdpa.all_input_nodes[0]).shape[1] for sdpa in attention_calls(gm)}
    before = getattr(config, "num_attention_heads", None)
    config = copy.deepcopy(config)
    for part in _parts(config) if len(counts) == 1 else []:
        for name, setting in list(vars(part).items()):
            if name.endswith(("heads", "n_head")) and type(setting) is int and setting == before:
                setattr(part, name, *counts)
    return config


def _with_widths(cls: Any, config: Any, state: Mapping[str, Tensor]) -> Any | None:
    """The configuration whose model has exactly these shapes; None where the architecture cannot say them."""
    config = copy.deepcopy(config)
    try:
        misfits = _misfits(cls, config, state)
    except Exception:
        return None  # sizes that the architecture refuses
    if not all(all(pair) for pair in misfits.values()):
        return None  # no width makes a part of a layer come or go
    while misfits:
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
    try:  # sizes that a module can have and its configuration refuses: hidden states that heads do not divide
        type(config).from_dict(config.to_dict())
    except Exception:
        return None
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


def _build(cls: Any, config: Any, state: Mapping[str, Tensor], heads: Heads | None) -> Any:
    """The module of a configuration; of the sizes of ``state`` where ``heads`` are given."""
    with torch.random.fork_rng(devices=[]):
        model = cls(copy.deepcopy(config))
    if heads is not None:
        resize(model, sizes_of(state), heads)
    _load(model, state)
    choose_heads(model, heads or {})
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
def _difference(gm: GraphModule, model: Any) -> str | None:
    """What is not the same in what module and graph compute, on a batch of the traced sizes; None where all is."""
    args, kwargs = _batch(gm)
    was_training = {module: module.training for module in gm.modules()}
    device = next(gm.parameters()).device
    outputs = []
    try:
        for module in (gm.eval(), model.to(device)):
            outputs.append([leaf for leaf in pytree.tree_leaves(_plain(module(*args, **kwargs))) if _is_float(leaf)])
    except Exception as error:  # sizes that the class cannot run with
        return f"it cannot run: {error}"
    finally:
        for module, training in was_training.items():
            module.training = training
    theirs, mine = outputs
    if len(theirs) != len(mine):
        return f"outputs of {len(mine)} tensors are not those of {len(theirs)}"
    for wanted, got in zip(theirs, mine, strict=True):
        if wanted.shape != got.shape and wanted.dim() > 1:
            # Hidden states of a graph that became narrower are as wide as before, with zeros for what is gone.
            wanted = wanted[..., wanted.flatten(0, -2).any(0)]
        if wanted.shape != got.shape:
            return f"an output of shape {tuple(got.shape)} is not that of {tuple(wanted.shape)}"
        largest = float(wanted.abs().max()) if wanted.numel() else 0.0
        off = float((wanted - got).abs().max()) if wanted.numel() else 0.0
        if not off <= _tolerance(wanted.dtype) * largest:
            return f"outputs of up to {largest:.3g} differ by {off:.3g}"
    return None


def _tolerance(dtype: torch.dtype) -> float:
    """Relative to the largest output: sums may run in another order, and half precision rounds in every layer."""
    return 1e-5 if torch.finfo(dtype).bits >= 32 else 4 * torch.finfo(dtype).eps


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
            else:
                value = torch.randint(0, _classes(node), sizes, generator=generator).to(device, value.dtype)
        leaves.append(value)
    args, kwargs = pytree.tree_unflatten(leaves, gm._in_spec)
    return tuple(args), dict(kwargs)


def _classes(ids: Node) -> int:
    """How many values a placeholder of numbers may take: rows of the embedding that reads it, else two, as every
    task has."""
    embedding = torch.ops.aten.embedding.default
    tables = [user.args[0] for user in ids.users if user.target is embedding]
    return min((int(fx.value(table).shape[0]) for table in tables if isinstance(table, Node)), default=2)
