"""What a module takes along of its graph: the record, the flags of branches, names; also in its configuration."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse import typed
from fxsparse.conversion import folders
from fxsparse.conversion.depth import CONFIG_KEY
from fxsparse.conversion.heads import Heads
from fxsparse.conversion.width import misfits_of
from fxsparse.errors import RewriteError
from fxsparse.graph import live
from fxsparse.graph.graph_state import STATES, end_state, follow, register_state, state_buffers
from fxsparse.graph.record import FORMAT, META_KEY, NAMES_KEY, Record, record_of
from fxsparse.modules.held import Form
from fxsparse.modules.sites import STARTED
from fxsparse.modules.spec import dense_shapes, put_in, specs_of
from fxsparse.passes.nm.branch import Branch
from fxsparse.passes.nm.low_rank import start_branches


def is_pretrained(model: nn.Module) -> bool:
    """Whether a model is one of transformers, with a configuration."""
    return hasattr(model, "config") and hasattr(model, "save_pretrained")


def note(module: Any, gm: GraphModule, config: Any, heads: Heads) -> None:
    """Gives the module the record, the flags of states, and the graph's names of its tensors."""
    graphs = fx.tensors_of(gm)
    names: dict[int, str] = {}
    for name, tensor in graphs.items():
        names.setdefault(id(tensor), name)
    renamed = {
        name: names[id(tensor)]
        for name, tensor in fx.tensors_of(module).items()
        if graphs.get(name) is not tensor and id(tensor) in names
    }
    state = gm.meta.get(STATES, {}).get(STARTED)
    _mark(module, record_of(gm), renamed)
    live.enter(module, *live.sites(gm, Branch))
    if state is not None:
        _follow_flags(module, gm.get_buffer(STARTED), state.names, state.on)
    if not is_pretrained(module):
        return
    before = vars(module.config).get(CONFIG_KEY) or {"heads": {}}
    setattr(module.config, CONFIG_KEY, {"heads": before["heads"] if config is None else heads})
    setattr(module.config, CONFIG_KEY, described(module))
    folders.save_readably(module)


def remove_notes(module: Any) -> None:
    """Takes away what `note` gave the module."""
    end_state(module, STARTED)
    module.meta = {key: item for key, item in module.meta.items() if not str(key).startswith("fxsparse")}
    if not module.meta:
        del module.meta
    for hooks, hook in (
        (module._forward_pre_hooks, _before_call),
        (module._load_state_dict_post_hooks, _after_load),
    ):
        for key in [key for key, registered in hooks.items() if registered is hook]:
            del hooks[key]
    if is_pretrained(module):
        vars(module.config).pop(CONFIG_KEY, None)
        vars(module).pop("save_pretrained", None)


def _mark(module: Any, record: Record, names: Mapping[str, str]) -> None:
    if not isinstance(getattr(module, "meta", {}), dict):
        raise RewriteError(f"{type(module).__name__} uses the attribute `meta`, under which the record is kept")
    others = {key: item for key, item in vars(module).get("meta", {}).items() if not str(key).startswith("fxsparse")}
    module.meta = {**others, META_KEY: record, NAMES_KEY: dict(names)}


def _follow_flags(module: nn.Module, flags: Tensor, names: Iterable[str], on: Iterable[str]) -> None:
    """Registers the flags of branches, and follows them wherever they are written."""
    register_state(module, STARTED, names, on, start_branches)
    module.register_buffer(STARTED, flags)
    if _before_call not in module._forward_pre_hooks.values():  # a module that is made once more has them
        module.register_forward_pre_hook(_before_call)
        module.register_load_state_dict_post_hook(_after_load)


def _before_call(module: nn.Module, args: Any) -> None:
    """Buffers may have been written since the last call; in a compiled graph that nothing sees before it is traced."""
    if not torch.compiler.is_compiling():
        follow(module)


def _after_load(module: nn.Module, keys: Any) -> None:
    """Checkpoints of earlier versions hold no flags."""
    keys.missing_keys[:] = [key for key in keys.missing_keys if key.rpartition(".")[2] not in state_buffers(module)]
    follow(module)


# --- in a configuration -----------------------------------------------------------------------------------------------


def described(module: Any) -> dict[str, Any]:
    """What a configuration must say for `restored` to build the module: its sizes, its forms and its record."""
    meta = fx.meta_of(module)
    heads = getattr(module.config, CONFIG_KEY)["heads"]
    shapes = {name: torch.empty(shape, device="meta") for name, shape in dense_shapes(module).items()}
    shapes.pop(STARTED, None)
    config = copy.deepcopy(module.config)
    delattr(config, CONFIG_KEY)
    misfits = misfits_of(type(module), config, shapes)
    state = meta.get(STATES, {}).get(STARTED)
    return {
        "format": FORMAT,
        "sizes": {name: list(wanted) for name, (_, wanted) in misfits.items()},
        "heads": heads,
        "modules": specs_of(module),
        "flags": None if state is None else list(state.names),
        "names": meta[NAMES_KEY],
        "record": record_of(module).to_data(),
    }


def restored(module: nn.Module, description: Mapping[str, Any]) -> None:
    """Makes a module of the right sizes the one of `described`; in place, without values."""
    put_in(module, description["modules"])
    _mark(module, Record.from_data(description["record"]), description["names"])
    forms = [
        typed.read(Form, form, name) for spec in description["modules"].values() for name, form in spec["forms"].items()
    ]
    branches = {form.name: Branch(form.name, f"{form.name}_down", f"{form.name}_up") for form in forms if form.rank}
    live.enter(module, *branches.values())
    names = description["flags"]
    if names is not None:
        started = {form.name for form in forms if form.started}
        _follow_flags(module, torch.tensor([name in started for name in names]), names, started)
