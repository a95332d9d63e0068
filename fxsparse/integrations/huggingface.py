"""Writes a shortened or pruned Hugging Face model as a checkpoint, and reads it again.

If a configuration can express the new sizes (fewer layers, one narrower feed-forward width, fewer heads of the same
size), the checkpoint is an ordinary one: ``AutoModel...from_pretrained`` and every other tool read it. Otherwise the
differing sizes stand in its configuration under ``fxsparse``, and `from_pretrained` of this module builds a module with
these sizes. In both cases the result is a module of the model's class: ``generate()``, training and its own
``save_pretrained`` work.

`save_pretrained` goes through three steps: depth (`shortened_lists`, `with_layers`), width (`narrower_configs`), and
building the module and comparing it with the graph (`_build`, `difference`). How a folder is written so that nothing is
lost, and read so that nothing is believed unchecked, is in `fxsparse.conversion.folders`.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.conversion import folders
from fxsparse.conversion.comparison import difference
from fxsparse.conversion.depth import CONFIG_KEY, renumbered, shortened_lists, with_layers
from fxsparse.conversion.heads import Heads, choose_heads
from fxsparse.conversion.notes import described, restored
from fxsparse.conversion.numbers import heads_to_try
from fxsparse.conversion.resizing import resize, sizes_of
from fxsparse.conversion.width import misfits_of, narrower_configs, shapes_of
from fxsparse.dense_state import dense_state_dict
from fxsparse.errors import CheckpointError
from fxsparse.graph.added_state import added_state_of, set_aside
from fxsparse.graph.record import FORMAT
from fxsparse.graph.wrapped import unwrapped_module
from fxsparse.modules.sites import module_sites
from fxsparse.ops.nm import validate


def save_pretrained(
    gm: nn.Module, model: nn.Module | str | os.PathLike[str], path: str | os.PathLike[str] | None = None
) -> nn.Module:
    """Writes a rewritten graph as a Hugging Face checkpoint; ``save_pretrained(module, path)`` writes a module.

    A module that `fxsparse.to_module` made is written as it is, with compressed weights, branches and record, for
    `from_pretrained` to read. Of a graph, a dense model of the original's class is written:

    The remaining layers are numbered without gaps, and per-layer settings of the configuration (``layer_types``) are
    cut accordingly. The first remaining layer of a T5 stack takes over the position bias. Pruned N:M weights are
    written dense, with their zeros. The module is compared with the graph on a batch of the traced sizes before it is
    written.

    Args:
        gm: the rewritten model, its module form, or what ``torch.compile(model, backend="fxsparse", ...)`` returned.
        model: of a graph, the original Hugging Face model or a fresh instance; its class, configuration and generation
            settings are used. Of a module or a compiled model, nothing: the folder comes second.
        path: a folder. The model is written beside what is there, read back and compared, and then put in its place,
            all or nothing. Weights of an earlier save in it go, other files stay.

    Returns:
        the written module, in evaluation mode if it was made of a graph here.

    Raises:
        CheckpointError: no module of the model's class computes the same as the graph, or the folder cannot be
            written.
    """
    form = fx.module_form_of(gm)
    if form is not None:
        return _save_module(form, model if path is None else path)
    compiled, gm = gm, fx.graph_module_of(gm, "fxsparse.save_pretrained", whole=True, error=CheckpointError)
    if path is None and added_state_of(unwrapped_module(compiled)) is not None:
        model, path = compiled, cast(str, model)
    if path is None:
        raise CheckpointError("a graph is written as a model of the original's class: save_pretrained(gm, model, path)")
    model = unwrapped_module(model)
    with set_aside(cast(nn.Module, model)):
        return _save_graph(gm, model, path)


def _save_graph(gm: GraphModule, model: Any, path: str | os.PathLike[str]) -> nn.Module:
    if not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        raise CheckpointError(f"{type(model).__name__} is no Hugging Face model; write it with fxsparse.save")
    model = copy.copy(model)
    model.config = copy.deepcopy(model.config)
    before = vars(model.config).pop(CONFIG_KEY, {"heads": {}})
    state = {name: tensor.detach().cpu() for name, tensor in dense_state_dict(gm).items()}
    original = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shortened = shortened_lists(model, original, state)
    config = with_layers(model, shortened)
    state = renumbered(state, shortened, shapes_of(type(model), config))
    narrower = narrower_configs(type(model), config, state, gm)
    heads = heads_to_try(gm, model, before["heads"], shortened)
    candidates: list[tuple[Any, Heads | None]] = [(fitting, None) for fitting in narrower]
    candidates += [(config, each) for each in heads]
    differs: str | None = None
    for chosen, choices in candidates:
        try:
            written = _build(type(model), chosen, state, choices)
        except CheckpointError as error:
            differs = str(error)
            continue
        differs = difference(gm, written)
        if differs is None:
            written.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
            if choices is not None:
                sizes = {name: list(wanted) for name, (_, wanted) in misfits_of(type(model), chosen, state).items()}
                setattr(written.config, CONFIG_KEY, {"format": FORMAT, "sizes": sizes, "heads": choices})
            folders.write(written, Path(path), functools.partial(_check_read, written, gm), plain=choices is None)
            folders.save_readably(written)
            return cast(nn.Module, written)
    raise CheckpointError(
        f"no {type(model).__name__} computes what the graph does ({differs}): it holds more than smaller weights and "
        "fewer layers; write it with fxsparse.save and read it with fxsparse.load"
    )


def _save_module(module: Any, path: Any) -> nn.Module:
    fx.rewritten_of(module, "fxsparse.save_pretrained", whole=True, error=CheckpointError)
    if not hasattr(module, "config") or not hasattr(module, "save_pretrained"):
        raise CheckpointError(f"{type(module).__name__} is no Hugging Face model; write it with fxsparse.save")
    setattr(module.config, CONFIG_KEY, described(module))
    folders.write(module, Path(path), functools.partial(_check_read, module, None), plain=False)
    return cast(nn.Module, module)


@torch.no_grad()
def _check_read(written: Any, gm: GraphModule | None, folder: Path) -> None:
    """Reads a folder back: the same tensors as were written, and, of a graph, the same outputs."""
    read = from_pretrained(folder)
    mine, theirs = fx.tensors_of(written), fx.tensors_of(read)
    persistent = written.state_dict().keys()
    wrong = [name for name in persistent if name not in theirs or not _rounds_to(mine[name], theirs[name])]
    differs = None if wrong or gm is None else difference(gm, read)
    if wrong or differs:
        reason = f"another {', '.join(wrong[:4])}" if wrong else differs
        raise CheckpointError(
            f"{type(written).__name__} reads {reason} than was written, so that the folder would hold another model; "
            "write it with fxsparse.save and read it with fxsparse.load"
        )


def _rounds_to(written: Tensor, read: Tensor) -> bool:
    """Whether these are the same values; transformers reads all of a model in one dtype."""
    return written.shape == read.shape and torch.equal(written.to(read), read)


def from_pretrained(path: str | os.PathLike[str], **options: Any) -> nn.Module:
    """Reads a checkpoint written by `save_pretrained`, or any other whose configuration names a transformers class.

    Args:
        path: the folder.
        options: passed to transformers' ``from_pretrained``: ``dtype``, ``device_map``, ``attn_implementation``, ...

    Returns:
        the model, in evaluation mode.

    Raises:
        CheckpointError: the folder holds no such checkpoint, is damaged, or its tensors do not fit.
    """
    folder = folders.check(Path(path))
    cls, record = folder.model_class, folder.description
    loads = cls
    if record is not None:
        loads, options = _sized(cls, record), {"config": folder.config, "variant": folder.variant, **options}
    try:
        model, loading = loads.from_pretrained(folder.path, output_loading_info=True, **options)
    except Exception as error:
        raise CheckpointError(f"{folder.path}: transformers cannot build {cls.__name__} from it: {error}") from error
    if record is None:
        return cast(nn.Module, model.eval())
    wrong = [f"{key} is {state}" for state in ("missing", "unexpected") for key in sorted(loading[f"{state}_keys"])]
    if wrong:
        raise CheckpointError(f"{folder.path}: the tensors do not fit {cls.__name__}: {', '.join(wrong[:4])}")
    model.__class__ = cls
    try:
        _check_indices(model)
        choose_heads(model, record["heads"])
    except (CheckpointError, AttributeError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{folder.path}: {error}") from error
    folders.save_readably(model)
    return cast(nn.Module, model.eval())


def _check_indices(model: nn.Module) -> None:
    """Kernels read where the indices of compressed weights say."""
    for site in module_sites(model):
        if site.compressed:
            parts = (site["values"], site["indices"], site.pattern, site.in_features, site["column_mask"])
            validate(*parts, name=site.name)


def _sized(cls: Any, record: Mapping[str, Any]) -> Any:
    """A subclass of ``cls`` whose new instances have the recorded sizes."""

    class Sized(cls):
        def __init__(self, config: Any, *args: Any, **kwargs: Any):
            super().__init__(config, *args, **kwargs)
            recorded = {name: tuple(shape) for name, shape in record["sizes"].items()}
            if recorded:
                resize(self, {**sizes_of(self.state_dict()), **recorded}, record["heads"])
            if "modules" in record:
                restored(self, record)

    Sized.__name__, Sized.__module__ = cls.__name__, cls.__module__  # transformers looks up weight names by these
    return Sized


def _build(cls: Any, config: Any, state: Mapping[str, Tensor], heads: Heads | None) -> Any:
    """The module of a configuration with the values of ``state``; resized to its shapes if ``heads`` is not None."""
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
        problems = ", ".join(
            [*(f"{name} is missing" for name in missing), *(f"{name} is not its own" for name in unexpected)][:4]
        )
        raise CheckpointError(f"the tensors do not fit {type(model).__name__}: {problems}")
