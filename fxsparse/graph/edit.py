"""Editing a graph: inserting, replacing and removing nodes, with fake values and module paths kept right."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, Node

from fxsparse.graph.state import attribute
from fxsparse.graph.values import example_of, fake_mode

# Nobody reads what these return, yet they decide how the nodes after them run.
_MODE_SWITCHES = {
    torch._C._set_grad_enabled,
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
}


def insert_attribute(gm: GraphModule, name: str, *, before: Node) -> Node:
    """A ``get_attr`` node of a parameter or buffer, inserted before ``before``, with its fake value."""
    tensor = attribute(gm, name)
    with gm.graph.inserting_before(before):
        node = gm.graph.get_attr(name)
    node.meta["val"] = fake_mode(gm).from_tensor(tensor.detach(), static_shapes=True)
    _inherit(node, before)
    return node


def insert_call(
    gm: GraphModule, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *, like: Node
) -> Node:
    """A call of ``target`` inserted before ``like``, with its fake value and the module path of ``like``."""
    with gm.graph.inserting_before(like):
        node = gm.graph.call_function(target, args, kwargs or {})
    refresh(gm, node)
    _inherit(node, like)
    return node


def replace_with_call(gm: GraphModule, old: Node, target: Any, args: tuple[Any, ...]) -> Node:
    """Replaces ``old`` by a call of ``target`` whose result has the same shape and dtype."""
    with gm.graph.inserting_before(old):
        node = gm.graph.call_function(target, args)
    node.meta = dict(old.meta)
    replace(old, node)
    return node


def refresh(gm: GraphModule, node: Node) -> None:
    """Recomputes the fake value of a call from the fake values of its arguments."""
    # Composite operators see symbolic sizes only through the Python dispatcher, in torch 2.11.
    symbolic = enable_python_dispatcher() if _is_composite(node.target) else contextlib.nullcontext()
    with fake_mode(gm), symbolic, torch.no_grad():
        node.meta["val"] = node.target(*example_of(node.args), **example_of(node.kwargs))  # type: ignore[operator]


@functools.cache
def _is_composite(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return False
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), str(key).rpartition(".")[2])


def _inherit(node: Node, source: Node) -> None:
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack", "recompute", "ac_graph_id"):
        if key in source.meta:
            node.meta[key] = source.meta[key]


def replace(old: Node, new: Node) -> None:
    """Lets every user of ``old`` read ``new``, and removes ``old``."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def eliminate_dead_code(gm: GraphModule) -> None:
    """Removes nodes nothing reads, dropout included, and keeps writes to buffers and inputs, and switches of modes."""
    gm.graph.eliminate_dead_code(is_impure_node=_acts_beyond_its_result)


def _acts_beyond_its_result(node: Node) -> bool:
    if node.op in {"placeholder", "output"}:
        return True
    if node.op != "call_function":
        return False
    if node.target in _MODE_SWITCHES:
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return False
    # A write matters where what it mutates outlives the call: a buffer, a parameter or an input, also through views.
    written = [
        arg
        for arg, spec in zip(node.args, schema.arguments, strict=False)
        if spec.alias_info and spec.alias_info.is_write
    ]
    return any(_outlives_call(arg) for arg in written)


def _outlives_call(arg: Any) -> bool:
    while isinstance(arg, Node):
        if arg.op in {"get_attr", "placeholder"}:
            return True
        if arg.users and len(arg.users) > 1:
            return True
        arg = arg.args[0] if arg.args and _is_view(arg) else None
    return False


def _is_view(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(spec.alias_info for spec in schema.returns)
