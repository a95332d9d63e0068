"""From a rewritten model to one of plain ATen, which exporters and compilers of others can read: `to_aten`.

Every operator of fxsparse is replaced by its reference, and what the reference computes from parameters alone, which is
the dense weight, becomes a parameter:

    nm_linear(x, values, indices, None, bias, 2, 4)    linear(x, weight, bias)
    masked_linear(x, weight, mask, None, bias)         linear(x, weight, bias), the weight zero where it was masked
    nm_linear_low_rank(x, values, ..., down, up, ...)  linear(x, weight, bias) + linear(linear(x, down) / r, up)

The zeros stay where they were, for runtimes that know what to do with them.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxsparse import graph as fx
from fxsparse.conversion.depth import CONFIG_KEY
from fxsparse.errors import RewriteError
from fxsparse.graph import live
from fxsparse.graph.graph_state import STATES, end_state, state_buffers
from fxsparse.graph.record import META_KEY, HeldWeight, record_of
from fxsparse.graph.training_form import FORM_KEY, TRAINING_ONLY
from fxsparse.modules.held import Held
from fxsparse.modules.sites import module_sites
from fxsparse.modules.spec import place, take_out
from fxsparse.ops.operator import Operator, operator_of
from fxsparse.passes.distill.distill import end_distillation
from fxsparse.passes.nm.branch import Branch
from fxsparse.tracing.casting import ORIGIN
from fxsparse.tracing.trace import TracedModule

_DENSE = "_dense"
"""Ends the name of a dense weight until its own name is free."""


@torch.no_grad()
def to_aten(model: nn.Module) -> nn.Module:
    """A copy of a rewritten model, in evaluation mode, that computes the same by ATen operators on dense weights.

    What is exported of it (``torch.export``, AOTInductor, ONNX) needs nothing of fxsparse where it runs. Weights that
    were held in another form are dense again, under their original names, and take the memory of dense weights; all
    other parameters and buffers are shared with ``model``.

    Args:
        model: a traced or rewritten graph module, the module that `fxsparse.to_module` made of one, or a module that
            holds such ones; also compiled or wrapped in ``DistributedDataParallel``. It is left as it is.

    Returns:
        a graph module for a graph module; for a module one of the same class.

    Raises:
        RewriteError: ``model`` holds nothing that was rewritten, or is sharded.
    """
    model = fx.unwrapped(model)
    if isinstance(model, GraphModule):
        return _graph(fx.graph_module_of(model, "fxsparse.to_aten", whole=True))
    parts = [part for part in model.modules() if isinstance(part, (TracedModule, Held))]
    if not parts:
        fx.graph_module_of(model, "fxsparse.to_aten")  # which says what it takes
    if any(hasattr(tensor, "device_mesh") for tensor in fx.tensors_of(model).values()):
        raise RewriteError("fxsparse.to_aten reads whole weights; load the full state dict into a model on one device")
    memo: dict[int, Any] = {id(tensor): tensor for tensor in fx.tensors_of(model).values()}
    twin = _dense_modules(copy.deepcopy(model, memo))
    for module in list(twin.modules()):
        for name, child in module._modules.items():
            if isinstance(child, TracedModule):
                module._modules[name] = _graph(child)
    return twin.eval()


# --- modules ----------------------------------------------------------------------------------------------------------


def _dense_modules(model: nn.Module) -> nn.Module:
    """Makes plain modules of those that hold weights in another form, in place; branches that have started stay."""
    for module in [module for module in model.modules() if fx.module_form_of(module) is module]:
        for buffer in state_buffers(module):
            end_state(module, buffer)
        vars(module)["meta"] = {key: item for key, item in fx.meta_of(module).items() if not key.startswith(META_KEY)}
        vars(vars(module).get("config", module)).pop(CONFIG_KEY, None)
    dense: dict[int, nn.Parameter] = {}
    products = []
    for site in module_sites(model):
        stored, form = fx.attribute(model, site.parameter_name), site.form
        site.module.forms = {
            **site.module.forms,
            site.leaf: replace(form, started=False),
        }  # the weight without a branch
        if id(stored) not in dense:
            weight = site.module.dense(site.leaf).detach().contiguous()
            dense[id(stored)] = nn.Parameter(weight, requires_grad=False)
        products.append((site.module, site.leaf, form, dense[id(stored)], site["down"], site["up"]))
    take_out(model)
    for module, leaf, form, weight, down, up in products:
        module._parameters[leaf] = weight
        if form.started:
            plain = replace(form, storage="dense", n=0, m=0, straight_through=False)
            model = place(model, module, leaf, plain, {leaf: weight, f"{leaf}_down": down, f"{leaf}_up": up})
    return model


# --- graphs -----------------------------------------------------------------------------------------------------------


def _graph(gm: GraphModule) -> GraphModule:
    twin = fx.copy_sharing_state(gm)
    end_distillation(twin)
    held = {weight.name: weight for weight in record_of(gm).weights}
    before = fx.state_read(twin)
    made: dict[Any, str] = {}
    for call in list(twin.graph.nodes):
        operator = operator_of(call.target) if call.op == "call_function" else None
        if operator is not None:
            _inline(twin, call, operator, held, made)
    for buffer in state_buffers(twin):
        end_state(twin, buffer)
    for key in (META_KEY, ORIGIN, STATES, FORM_KEY, TRAINING_ONLY, live.KEY):
        twin.meta.pop(key, None)
    fx.eliminate_dead_code(twin)
    waiting = {part for branch in live.sites(gm, Branch) for part in (branch.down, branch.up)}  # not started
    fx.delete_state(twin, (before | waiting) - fx.state_read(twin))
    for weight in reversed(held.values()):
        _name_as_original(twin, weight)
    twin.graph.lint()
    twin.recompile()
    return twin.eval()


def _inline(
    gm: GraphModule, call: Node, operator: Operator, held: Mapping[str, HeldWeight], made: dict[Any, str]
) -> None:
    """Replaces a call by the operator's reference, and what that computes from state alone by state.

    Args:
        gm: the graph module.
        call: the call.
        operator: what it calls.
        held: the weights that are held in another form, by name.
        made: the names of such state, by what it was computed from.
    """
    named, last = fx.arguments(call), call.prev
    result = fx.insert_function(gm, operator.reference, *named.values(), before=call)
    inserted = list(itertools.takewhile(lambda node: node is not call, _after(last)))
    fx.replace(call, result)
    stored = next((arg for arg in (named.get("values"), named.get("mask")) if _is_state(gm, arg)), None)
    weight = held.get(str(stored.target).rpartition("_")[0]) if stored is not None else None
    base = f"{call.name}_constant" if weight is None else f"{weight.name}{_DENSE}"
    state = [
        str(arg.target) if _is_state(gm, arg) else None if isinstance(arg, Node) else arg for arg in named.values()
    ]
    for number, (node, tensor) in enumerate(_constants(gm, inserted)):
        transposed = weight is not None and weight.transposed and not number
        key = (operator.name, *state, number)
        if key not in made:
            made[key] = f"{base}{number or ''}"
            register = fx.set_parameter if tensor.is_floating_point() else fx.set_buffer
            register(gm, made[key], tensor.mT.contiguous() if transposed else tensor)
        read = fx.insert_attribute(gm, made[key], before=node)
        if transposed:
            read = fx.insert_call(gm, torch.ops.aten.transpose.int, (read, -2, -1), like=node)
        node.replace_all_uses_with(read)


def _name_as_original(gm: GraphModule, weight: HeldWeight) -> None:
    """Gives a dense weight the original's names, unless something else in the graph is read under one of them."""
    made, tensors = f"{weight.name}{_DENSE}", fx.tensors_of(gm)
    if made not in tensors or not tensors.keys().isdisjoint(weight.names):
        return
    fx.delete(gm, made)
    first, parameter = weight.names[0], nn.Parameter(tensors[made])
    for name in weight.names:
        path, _, leaf = name.rpartition(".")
        gm.get_submodule(path).register_parameter(leaf, parameter)
        fx.put_first(gm.get_submodule(path), leaf)
    for node in gm.graph.find_nodes(op="get_attr"):
        node.target = first if node.target == made else node.target


def _constants(gm: GraphModule, nodes: list[Node]) -> list[tuple[Node, Tensor]]:
    """Those of ``nodes`` that depend on parameters and buffers alone and are read by others, and their values."""
    values: dict[Node, Any] = {}
    for node in nodes:
        if all(source in values or _is_state(gm, source) for source in node.all_input_nodes):
            args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda source: _value(gm, source, values))
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return [
        (node, value)
        for node, value in values.items()
        if isinstance(value, Tensor) and node.all_input_nodes and any(user not in values for user in node.users)
    ]


def _value(gm: GraphModule, node: Node, values: Mapping[Node, Any]) -> Any:
    return values[node] if node in values else fx.attribute(gm, str(node.target))


def _after(node: Node) -> Iterator[Node]:
    while True:
        node = node.next
        yield node


def _is_state(gm: GraphModule, arg: Any) -> bool:
    return isinstance(arg, Node) and arg.op == "get_attr" and isinstance(fx.attribute(gm, str(arg.target)), Tensor)
