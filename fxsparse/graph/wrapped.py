"""Finds the rewritten graph module inside the wrappers that training loops put around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fxsparse.errors import FxsparseError, OptionError
from fxsparse.graph.added_state import added_state_of
from fxsparse.graph.graph_state import STATES, follow
from fxsparse.graph.record import META_KEY
from fxsparse.graph.sharded import is_fully_sharded, reshard


def unwrapped(model: Any) -> Any:
    """What ``torch.compile``, ``DistributedDataParallel`` and ``DataParallel`` wrap; anything else as it is.

    A model that was rewritten in a one-line call stands for its rewritten graph.
    """
    model = unwrapped_module(model)
    state = added_state_of(model)
    return model if state is None or state.graph is None else state.graph


def unwrapped_module(model: Any) -> Any:
    """As `unwrapped`, but a model that was rewritten in a one-line call stands for itself."""
    while True:
        if isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        else:
            return model


def within_data_parallel(model: Any) -> Any:
    """What ``DistributedDataParallel`` and ``DataParallel`` wrap, compiled or not; anything else as it is."""
    while isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        model = model.module
    return model


def module_form_of(model: Any) -> nn.Module | None:
    """The module that `fxsparse.to_module` made, in whatever wraps it (PEFT, a module of the caller's); or None."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        meta = vars(module).get("meta")
        if not isinstance(module, GraphModule) and isinstance(meta, dict) and META_KEY in meta:
            return module
    return None


def rewritten_of(
    model: Any, function: str, *, whole: bool = False, error: type[FxsparseError] = OptionError
) -> nn.Module:
    """The graph module in ``model``, or the module that `fxsparse.to_module` made of one; as `graph_module_of`."""
    module = module_form_of(model)
    if module is None:
        return graph_module_of(model, function, whole=whole, error=error)
    if whole:
        _refuse_sharded(module, function, error)
    follow(module)
    return module


def graph_module_of(
    model: Any, function: str, *, whole: bool = False, error: type[FxsparseError] = OptionError
) -> GraphModule:
    """The graph module in ``model``, in the state of training that its flags say.

    Args:
        model: a traced or rewritten graph module, or a wrapper of one that `unwrapped` knows.
        function: the public function that was called, for the message.
        whole: whether it reads the values of parameters, which must then not be sharded.
        error: raised if ``model`` holds no graph module, or a sharded one.
    """
    inner = unwrapped(model)
    state = added_state_of(inner)
    if state is not None and state.whole is not None:
        inner = state.whole(inner)
    name = type(inner).__name__
    if name == "FullyShardedDataParallel":
        raise error(f"{function} cannot read what {name} has flattened; gather its full state dict, or use fully_shard")
    if module_form_of(inner) is not None:
        raise error(
            f"{function} takes a graph, and this {name} was made of one by fxsparse.to_module: pass that graph, or "
            "fxsparse.trace(module, kwargs=batch)"
        )
    if not isinstance(inner, GraphModule):
        parts = inner.named_modules() if isinstance(inner, nn.Module) else ()
        path = next((path for path, part in parts if isinstance(part, GraphModule) and META_KEY in part.meta), None)
        if path is not None:
            raise error(f"{function} takes the rewritten model itself: pass the {path} of this {name}")
        if state is not None:
            raise error(
                f"{function} takes a whole model, and this {name} was only called with a cache of keys and values: "
                "call it once without (use_cache=False)"
            )
        raise error(
            f"{function} takes a model that fxsparse.trace or fxsparse.rewrite returned, and this {name} is not one: "
            "call gm = fxsparse.rewrite(model, passes, kwargs=batch) first, and train and pass on gm"
        )
    reshard(inner)
    _refuse_flattened(inner, function, error)
    if whole:
        _refuse_sharded(inner, function, error)
    if STATES in inner.meta:
        follow(inner)
    return inner


def _refuse_flattened(gm: GraphModule, function: str, error: type[FxsparseError]) -> None:
    """Refuses what ``FullyShardedDataParallel`` and ``fully_shard`` make of a graph module that cannot work."""
    if any(hasattr(parameter, "_fsdp_flattened") or "_flat_param" in name for name, parameter in gm.named_parameters()):
        raise error(
            f"{function}: FullyShardedDataParallel has flattened the parameters, and rows and columns can no longer be "
            "told apart; call torch.distributed.fsdp.fully_shard(gm) instead"
        )
    layers = [name for name, module in gm.named_modules() if name and is_fully_sharded(module)]
    if layers:
        raise error(
            f"{function}: {layers[0]} was sharded on its own, but a graph does not call its submodules, and they would "
            "never be gathered; call fully_shard(gm) on the whole graph module alone"
        )


def _refuse_sharded(model: nn.Module, function: str, error: type[FxsparseError]) -> None:
    sharded = [name for name, tensor in model.state_dict(keep_vars=True).items() if hasattr(tensor, "device_mesh")]
    if sharded:
        raise error(
            f"{function}: {sharded[0]} is sharded (a DTensor), and so are {len(sharded) - 1} more; load its full state "
            "dict (torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True) into a "
            "model that is not sharded, and pass that"
        )
