"""Writes a shortened or pruned Hugging Face model as a checkpoint, and reads it again.

If a configuration can express the new sizes (fewer layers, one narrower feed-forward width, fewer heads of the same
size), the checkpoint is an ordinary one: ``AutoModel...from_pretrained`` and every other tool read it. Otherwise the
differing sizes stand in its configuration under ``fxsparse``, and `from_pretrained` of this module builds a module with
these sizes. In both cases the result is a module of the model's class: ``generate()``, training and its own
``save_pretrained`` work.

`save_pretrained` goes through three steps: depth (`shortened_lists`, `with_layers`), width (`narrower_configs`), and
building the module and comparing it with the graph (`_build`, `difference`).
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.checkpoint import dense_state_dict
from fxsparse.conversion.notes import described, restored
from fxsparse.errors import CheckpointError
from fxsparse.integrations.comparison import difference
from fxsparse.integrations.depth import CONFIG_KEY, renumber, renumbered, shortened_lists, with_layers
from fxsparse.integrations.heads import Heads, choose_heads, heads_of
from fxsparse.integrations.resizing import resize, sizes_of
from fxsparse.integrations.width import misfits_of, narrower_configs, shapes_of

_VARIANT = "fxsparse"
"""In the names of weight files. Transformers alone finds no file of that name; under the plain name it would initialise
the tensors of other sizes at random."""
_WEIGHTS = "transformers_weights"
"""The setting that names the file of the weights to transformers, which repeats a name it cannot read in its error."""
_READ_WITH = "these weights have other shapes, or are compressed; read this folder with fxsparse.from_pretrained"


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
        gm: the rewritten model, or its module form.
        model: of a graph, the original Hugging Face model or a fresh instance; its class, configuration and generation
            settings are used. Of a module, nothing: the folder comes second.
        path: a folder; weights in it are replaced.

    Returns:
        the written module, in evaluation mode if it was made of a graph here.

    Raises:
        CheckpointError: no module of the model's class computes the same as the graph.
    """
    form = fx.module_form_of(gm)
    if form is not None:
        return _save_module(form, model if path is None else path)
    gm = fx.graph_module_of(gm, "fxsparse.save_pretrained", whole=True, error=CheckpointError)
    if path is None:
        raise CheckpointError("a graph is written as a model of the original's class: save_pretrained(gm, model, path)")
    return _save_graph(gm, fx.unwrapped(model), path)


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
    heads = {renumber(name, shortened): chosen for name, chosen in heads_of(gm, model, before["heads"]).items()}
    state = renumbered(state, shortened, shapes_of(type(model), config))
    narrower = narrower_configs(type(model), config, state, gm)
    candidates: list[tuple[Any, Heads | None]] = [*((fitting, None) for fitting in narrower), (config, heads)]
    for chosen, choices in candidates:
        written = _build(type(model), chosen, state, choices)
        differs = difference(gm, written)
        if differs is None:
            written.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
            if choices is not None:
                sizes = {name: list(wanted) for name, (_, wanted) in misfits_of(type(model), chosen, state).items()}
                setattr(written.config, CONFIG_KEY, {"sizes": sizes, "heads": heads})
            _clear(path)
            written.save_pretrained(path, variant=None if choices is None else _VARIANT)
            if choices is not None:
                _refuse_transformers(Path(path))
            return written
    raise CheckpointError(
        f"no {type(model).__name__} computes what the graph does ({differs}): it holds more than smaller weights and "
        "fewer layers; write it with fxsparse.save and read it with fxsparse.load"
    )


def _save_module(module: Any, path: Any) -> nn.Module:
    fx.rewritten_of(module, "fxsparse.save_pretrained", whole=True, error=CheckpointError)
    if not hasattr(module, "config") or not hasattr(module, "save_pretrained"):
        raise CheckpointError(f"{type(module).__name__} is no Hugging Face model; write it with fxsparse.save")
    setattr(module.config, CONFIG_KEY, described(module))
    _clear(path)
    module.save_pretrained(path, variant=_VARIANT)
    _refuse_transformers(Path(path))
    return cast(nn.Module, module)


def _clear(path: str | os.PathLike[str]) -> None:
    for old in Path(path).glob("model*.safetensors*"):
        old.unlink()


def from_pretrained(path: str | os.PathLike[str], **options: Any) -> nn.Module:
    """Reads a checkpoint written by `save_pretrained`, or any other whose configuration names a transformers class.

    Args:
        path: the folder.
        options: passed to transformers' ``from_pretrained``: ``dtype``, ``device_map``, ``attn_implementation``, ...

    Returns:
        the model, in evaluation mode.

    Raises:
        CheckpointError: the folder holds no such checkpoint, or its tensors do not fit.
    """
    import transformers

    folder = Path(path)
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} holds no config.json; it was not written by fxsparse.save_pretrained")
    config = transformers.AutoConfig.from_pretrained(folder)
    vars(config).pop(_WEIGHTS, None)
    name = next(iter(config.architectures or ()), None)
    cls = getattr(transformers, str(name), None)
    if cls is None:
        raise CheckpointError(f"{folder}: transformers {transformers.__version__} has no class {name}")
    record = getattr(config, CONFIG_KEY, None)
    if record is None:
        return cls.from_pretrained(folder, **options).eval()
    # Files with plain names come from a later call of the model's own save_pretrained, which leaves the other files.
    plain = any(_VARIANT not in file.name for file in folder.glob("model*.safetensors"))
    sized = _sized(cls, record)
    model, loading = sized.from_pretrained(
        folder, config=config, variant=None if plain else _VARIANT, output_loading_info=True, **options
    )
    wrong = [f"{key} is {state}" for state in ("missing", "unexpected") for key in sorted(loading[f"{state}_keys"])]
    if wrong:
        raise CheckpointError(f"{folder}: the tensors do not fit {name}: {', '.join(wrong[:4])}")
    model.__class__ = cls
    choose_heads(model, record["heads"])
    return model.eval()


def _refuse_transformers(folder: Path) -> None:
    """Lets transformers alone refuse a folder with a message that names `from_pretrained`."""
    file = folder / "config.json"
    settings = {**json.loads(file.read_text()), _WEIGHTS: _READ_WITH}
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


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
