"""Editing a graph: inserting, replacing and removing nodes, with fake values and module paths kept right.

A replacement is written as the few lines of torch it means::

    def capped(scores, limit, training):
        return scores + training * (limit * (scores / limit).tanh() - scores)

    fx.transform(gm, scores, capped, "attention.limit", "training")

`insert_function` traces the function over the fake values of its inputs and copies its operators into the graph;
`transform` lets the readers of a node read the result; `insert_call` inserts a single operator.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fxsparse.graph import traits
from fxsparse.graph.function import function_graph
from fxsparse.graph.function_key import Flag
from fxsparse.graph.sharded import is_sharded
from fxsparse.graph.state import SharedByCopies, attribute, set_buffer
from fxsparse.graph.traits import switches_mode
from fxsparse.graph.values import example_of, fake_mode, quiet, stack_path

TRACED = "fxsparse_traced"
"""In ``gm.meta``: graphs of functions that were inserted, so that equal ones are traced once."""


def insert_attribute(gm: GraphModule, name: str, *, before: Node) -> Node:
    """A ``get_attr`` node of a parameter or buffer, inserted before ``before``, with its fake value."""
    tensor = attribute(gm, name)
    with gm.graph.inserting_before(before):
        node = gm.graph.get_attr(name)
    node.meta = {"val": _fake(fake_mode(gm), tensor.detach()), **_inherited(before)}
    return node


def insert_buffer(gm: GraphModule, name: str, tensor: torch.Tensor, *, before: Node) -> Node:
    """A ``get_attr`` node of ``tensor`` as a persistent buffer on the model's device, called ``name`` or, where the
    graph reads a tensor by that name, ``name_1``, ``name_2``, ..."""
    used = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(1)))
    free = next(name for name in names if name not in used)
    device = next((parameter.device for parameter in gm.parameters()), torch.device("cpu"))
    set_buffer(gm, free, tensor.to(device))
    return insert_attribute(gm, free, before=before)


def _fake(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    """The fake value of a parameter or buffer; that of a sharded one is whole, as the graph reads it when it runs."""
    if not is_sharded(tensor):
        return mode.from_tensor(tensor, static_shapes=True)
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def insert_call(
    gm: GraphModule, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *, like: Node
) -> Node:
    """A call of ``target`` inserted before ``like``, with its fake value and the module path of ``like``."""
    with gm.graph.inserting_before(like):
        node = gm.graph.call_function(target, args, kwargs or {})
    refresh(gm, node)
    node.meta.update(_inherited(like))
    return node


def replace_with_call(gm: GraphModule, old: Node, target: Any, args: tuple[Any, ...]) -> Node:
    """Replaces ``old`` by a call of ``target`` whose result has the same shape and dtype."""
    with gm.graph.inserting_before(old):
        node = gm.graph.call_function(target, args)
    node.meta = dict(old.meta)
    replace(old, node)
    return node


def insert_function(
    gm: GraphModule, fn: Callable[..., Any], *inputs: Any, before: Node, like: Node | None = None
) -> Any:
    """Inserts the operators of ``fn(*inputs)``.

    The graph stays valid at other sizes: ``x.shape`` is symbolic inside ``fn``. A condition on a size is decided once,
    by the traced example. Dropout and random draws draw when the graph runs.

    Args:
        gm: the graph module.
        fn: a function of tensors and sizes, of plain torch; it may return nested tuples, lists and dictionaries.
        inputs: nodes; names of parameters and buffers, which become ``get_attr`` nodes; names of training flags
            (``training``, ``encoder.training``), which are bools to ``fn``; and constants. They may be nested.
        before: the node to insert before.
        like: the node whose module path the new nodes take; by default ``before``.

    Returns:
        the result of ``fn`` with a node in the place of every tensor and size.

    Raises:
        RewriteError: ``fn`` reads the values of a tensor, fixes a symbolic size, uses a tensor that is not among its
            inputs, or runs other operators in training than in evaluation.
    """
    source = before if like is None else like
    return _insert(gm, fn, inputs, before, _inherited(source), stack_path(source))


def insert_module(gm: GraphModule, path: str, module: nn.Module, *inputs: Any, before: Node) -> Any:
    """Inserts the operators of ``module(*inputs)``, as `insert_function` does those of a function.

    Args:
        gm: the graph module, which has adopted the module's parameters and buffers under ``path`` (see `adopt`).
        path: module path of the new nodes; ``<path>.training`` says whether the module's dropout is on.
        module, inputs, before: as for `insert_function`.
    """
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]

    def call(training: bool, state: Sequence[torch.Tensor], *args: Any) -> Any:
        with _in_mode(module, training):
            return functional_call(module, dict(zip(names, state, strict=True)), args)

    meta = {**_inherited(before), "nn_module_stack": {path: (path, type(module).__name__)}}
    return _insert(gm, call, (f"{path}.training", [f"{path}.{name}" for name in names], *inputs), before, meta, path)


def transform(gm: GraphModule, node: Node, fn: Callable[..., Any], *inputs: Any, before: Node | None = None) -> Node:
    """Lets everything that reads ``node`` read ``fn(node, *inputs)`` instead.

    Args:
        gm, fn, inputs: as for `insert_function`; ``fn`` returns one tensor.
        node: the node, whose module path the new nodes take.
        before: the node to insert before; by default the one after ``node``.

    Returns:
        the node of the result.
    """
    readers = list(node.users)
    result: Node = insert_function(gm, fn, node, *inputs, before=node.next if before is None else before, like=node)
    for reader in readers:
        reader.replace_input_with(node, result)
    return result


def _insert(
    gm: GraphModule, fn: Callable[..., Any], inputs: Sequence[Any], before: Node, meta: Mapping[str, Any], site: str
) -> Any:
    reads: dict[str, Node] = {}

    def operand(leaf: Any) -> Any:
        if not isinstance(leaf, str):
            return leaf
        if isinstance(attribute(gm, leaf), bool):
            return Flag(leaf)
        if leaf not in reads:
            reads[leaf] = insert_attribute(gm, leaf, before=before)
        return reads[leaf]

    operands = pytree.tree_map(operand, tuple(inputs))
    results: list[Any] = []
    try:
        known = gm.meta.setdefault(TRACED, SharedByCopies())
        graph, structure = function_graph(fake_mode(gm), fn, operands, site=site, known=known)
        graph.eliminate_dead_code(is_impure_node=_acts_beyond_its_result)
        nodes = [leaf for leaf in pytree.tree_leaves(operands) if isinstance(leaf, Node)]
        twins = dict(zip(graph.find_nodes(op="placeholder"), nodes, strict=True))
        with gm.graph.inserting_before(before):
            results = list(gm.graph.graph_copy(graph, twins))  # type: ignore[arg-type]
        for node in set(twins.values()) - set(nodes) | set(reads.values()):
            node.meta = {"val": node.meta["val"], **meta}
    finally:
        for read in reads.values():
            if not read.users and read not in results:
                gm.graph.erase_node(read)
    return pytree.tree_unflatten(results, structure)


@contextlib.contextmanager
def _in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    module.train(training)
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def refresh(gm: GraphModule, node: Node) -> None:
    """Recomputes the fake value of a call from the fake values of its arguments."""
    # Composite operators see symbolic sizes only through the Python dispatcher, in torch 2.11.
    symbolic = enable_python_dispatcher() if _is_composite(node.target) else contextlib.nullcontext()
    with quiet(), fake_mode(gm), symbolic, torch.no_grad():
        node.meta["val"] = node.target(*example_of(node.args), **example_of(node.kwargs))  # type: ignore[operator]


@functools.cache
def _is_composite(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target is torch.ops.aten.baddbmm.default:  # its meta function expands
        return True
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), str(key).rpartition(".")[2])


def _inherited(source: Node) -> dict[str, Any]:
    """The meta that a new node takes over: where it belongs and how its region is recomputed."""
    keys = ("nn_module_stack", "stack_trace", "source_fn_stack", "recompute", "ac_graph_id")
    return {key: source.meta[key] for key in keys if key in source.meta}


def replace(old: Node, new: Node) -> None:
    """Lets every user of ``old`` read ``new``, and removes ``old``."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def eliminate_dead_code(gm: GraphModule) -> None:
    """Removes nodes nothing reads, dropout included, and keeps writes to buffers and inputs, switches of modes, and
    assertions on inputs."""
    gm.graph.eliminate_dead_code(is_impure_node=_acts_beyond_its_result)


def _acts_beyond_its_result(node: Node) -> bool:
    if node.op in {"placeholder", "output"}:
        return True
    if node.op != "call_function":
        return False
    if switches_mode(node) or (traits.of(node.target).asserts and not _follows_from_weights(node)):
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return False
    # A write matters if the tensor it mutates outlives the call: a buffer, a parameter or an input, also through views.
    written = [
        arg
        for arg, spec in zip(node.args, schema.arguments, strict=False)
        if spec.alias_info and spec.alias_info.is_write
    ]
    return any(_outlives_call(arg) for arg in written)


def _follows_from_weights(node: Node) -> bool:
    """Whether an assertion is on what layers compute; it goes with them."""
    gm, pending, seen = node.graph.owning_module, [node], {node}
    while pending:
        current = pending.pop()
        if current.op == "get_attr" and gm is not None and isinstance(attribute(gm, str(current.target)), nn.Parameter):
            return True
        further = [read for read in current.all_input_nodes if read not in seen]
        seen.update(further)
        pending += further
    return False


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
