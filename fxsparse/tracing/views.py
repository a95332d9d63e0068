"""Views: which nodes of a graph share memory, and how a view's new values are written back into its source.

    piece = base[:, 2:]             piece.mul_(3)
    ------------------------------------------------------------------------------
    slice     (base, 1, 2, end)     base' = slice_scatter(base, piece', 1, 2, end)
    select    (base, dim, index)    base' = select_scatter(base, piece', dim, index)
    transpose (base, 0, 1)          base' = transpose(piece', 0, 1)
    view      (base, sizes)         base' = reshape(piece', sizes of base)

Nodes share memory where the fake values that capture gave them share a storage. Operator schemas do not say it:
``reshape``, ``contiguous`` and ``to`` may return a view or a copy, and dropout returns its very input in evaluation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

from fxsparse import graph as fx
from fxsparse.graph import traits
from fxsparse.tracing.modes import arguments

aten = torch.ops.aten

Call = Callable[..., Node]
"""Inserts a call of an operator: ``call(target, *args)`` gives its node."""

WriteBack = Callable[[Call, Node, Node], Node]
"""``write_back(call, base, value)``: the node of ``base`` where the view of it holds ``value``."""

_OPPOSITE = {aten.view_as_real.default: aten.view_as_complex.default}
_OPPOSITE |= {back: there for there, back in _OPPOSITE.items()}


class Aliases:
    """Who shares memory with whom in a graph.

    Attributes:
        root: of every node that is a tensor in known memory, the node that the memory came with.
        parent: of every view, the node it is a view of; of one piece of several (``chunk``), the node of all pieces.
        opaque: roots whose views cannot be followed: a region or a Python function hands them on.
    """

    def __init__(self, gm: GraphModule) -> None:
        self.root: dict[Node, Node] = {}
        self.parent: dict[Node, Node] = {}
        self.opaque: set[Node] = set()
        self._owners: dict[int, Node] = {}
        for node in gm.graph.nodes:
            self._add(node)
            if isinstance(node.target, HigherOrderOperator) and _writes_into_inputs(gm, node):
                self.opaque |= {self.root[source] for source in node.all_input_nodes if source in self.root}

    def _add(self, node: Node) -> None:
        storages = set(_storages(node))
        roots = {self._owners[storage] for storage in storages if storage in self._owners}
        if not roots:
            if storages and isinstance(fx.value(node), Tensor):
                self._owners[storages.pop()] = self.root[node] = node
            return
        self.root[node] = next(iter(roots))
        sources = [source for source in node.all_input_nodes if self.root.get(source) in roots]
        if len(storages) == 1 and sources and (isinstance(node.target, OpOverload) or _is_piece(node)):
            self.parent[node] = sources[0]
        else:
            self.opaque |= roots

    def chain(self, node: Node) -> Iterator[tuple[Node, Node]]:
        """From a view down to its root: each view and the tensor it was made from."""
        while node in self.parent:
            source = self.parent[node]
            base = self.parent[source] if _is_piece(node) else source
            yield node, base
            node = base


def _storages(node: Node) -> Iterator[int]:
    for leaf in pytree.tree_leaves(node.meta.get("val")):
        while isinstance(leaf, Tensor) and is_functorch_wrapped_tensor(leaf):  # inside of a vmap
            leaf = get_unwrapped(leaf)
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
            yield leaf.untyped_storage()._cdata


def _is_piece(node: Node) -> bool:
    return node.target is operator.getitem


def writes(node: Node) -> list[Any]:
    """The arguments that ``node`` writes into."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    specs = zip(schema.arguments, arguments(node), strict=True)
    return [argument for spec, argument in specs if spec.alias_info and spec.alias_info.is_write]


def _writes_into_inputs(gm: GraphModule, call: Node) -> bool:
    """Whether a region (code under ``no_grad`` or ``autocast``) writes into a tensor that was handed to it."""
    regions = [fx.attribute(gm, str(source.target)) for source in call.all_input_nodes if source.op == "get_attr"]
    for region in regions:
        if isinstance(region, GraphModule):
            aliases = Aliases(region)
            written = [target for node in region.graph.nodes for target in pytree.tree_leaves(writes(node))]
            roots = {aliases.root.get(target) for target in written}
            if any(root is None or root.op == "placeholder" for root in roots) or aliases.opaque & roots:
                return True
    return False


# --- writing back -----------------------------------------------------------------------------------------------------


def write_back(gm: GraphModule, view: Node, base: Node) -> WriteBack | None:
    """How values of ``view`` get into ``base``, the tensor it was made from; None where there is no such operator."""
    if _is_piece(view):
        return _of_piece(view)
    name = view.target._schema.name.rpartition("::")[2]  # type: ignore[union-attr]
    known = traits.of(view.target)
    if known.detaches:
        # Where base has a gradient, a write behind its back changes the value and not the gradient's formula.
        return None if may_require_grad(gm, base) else lambda call, base, value: call(aten.detach.default, value)
    if is_same_place(view, base):
        return lambda call, base, value: value
    if known.axes in {"reshape", "broadcast"}:
        # An element that was expanded has several places to go.
        return _reshape if _surely_equal(fx.value(view).numel(), fx.value(base).numel()) else None
    if view.target in _OPPOSITE:
        return lambda call, base, value: call(_OPPOSITE[view.target], value)  # type: ignore[index]
    return _of_layout(view) or _of_part(view, base, name)


def _of_layout(view: Node) -> WriteBack | None:
    order = traits.permutation(view)
    if order is None:
        return None
    back = [order.index(axis) for axis in range(len(order))]
    if view.target is not aten.permute.default and tuple(back) == order:
        return lambda call, base, value: call(view.target, value, *arguments(view)[1:])
    return lambda call, base, value: call(aten.permute.default, value, back)


def _of_part(view: Node, base: Node, name: str) -> WriteBack | None:
    rest = arguments(view)[1:]
    scatters = {
        "slice": aten.slice_scatter.default,
        "select": aten.select_scatter.default,
        "diagonal": aten.diagonal_scatter.default,
    }
    if name in scatters:
        return lambda call, base, value: call(scatters[name], base, value, *rest)
    if name == "narrow" and isinstance(rest[1], int) and rest[1] >= 0:
        dim, start, length = rest
        return lambda call, base, value: call(
            aten.slice_scatter.default, base, value, dim, start, _plus(call, start, length)
        )
    if name == "as_strided" and fx.value(base).is_contiguous() and fx.value(base).storage_offset() == 0:
        return lambda call, base, value: call(aten.as_strided_scatter.default, base, value, *rest)
    return None


def _of_piece(piece: Node) -> WriteBack | None:
    """Of one of the results of ``split``, ``chunk`` or ``unbind``."""
    pieces: Any = piece.args[0]
    index: Any = piece.args[1]
    name = pieces.target._schema.name.rpartition("::")[2].removeprefix("unsafe_")
    given = arguments(pieces)
    how, dim = given[1], given[-1]
    if name == "unbind":
        return lambda call, base, value: call(aten.select_scatter.default, base, value, dim, index)
    if name == "chunk":
        return lambda call, base, value: _scatter_at(call, base, value, dim, index, _chunk_length(call, base, how, dim))
    if name in {"split", "split_with_sizes"}:
        return lambda call, base, value: _scatter_at(call, base, value, dim, index, how)
    return None


def _scatter_at(call: Call, base: Node, value: Node, dim: int, index: int, lengths: Any) -> Node:
    """Into the piece number ``index`` of pieces of one length, or of lengths of their own."""
    if isinstance(lengths, (list, tuple)):
        start: Any = 0
        for length in lengths[:index]:
            start = _plus(call, start, length)
        end = _plus(call, start, lengths[index])
    else:
        start, end = _times(call, lengths, index), _times(call, lengths, index + 1)
    return call(aten.slice_scatter.default, base, value, dim, start, end)


def _chunk_length(call: Call, base: Node, chunks: int, dim: int) -> Any:
    size = _size(call, base, dim)
    if isinstance(size, int):
        return -(-size // chunks)
    return call(operator.floordiv, call(operator.add, size, chunks - 1), chunks)


def _reshape(call: Call, base: Node, value: Node) -> Node:
    return call(aten.reshape.default, value, sizes(call, base))


def sizes(call: Call, node: Node) -> list[Any]:
    """The sizes of ``node``: numbers, and nodes where they vary."""
    return [_size(call, node, dim) for dim in range(fx.value(node).dim())]


def _size(call: Call, node: Node, dim: int) -> Any:
    size = fx.value(node).shape[dim]
    return size if isinstance(size, int) else call(aten.sym_size.int, node, dim)


def _plus(call: Call, one: Any, other: Any) -> Any:
    return one + other if isinstance(one, int) and isinstance(other, int) else call(operator.add, one, other)


def _times(call: Call, one: Any, other: int) -> Any:
    return one * other if isinstance(one, int) else call(operator.mul, one, other)


# --- questions about values -------------------------------------------------------------------------------------------


def is_same_place(node: Node, other: Node) -> bool:
    """Whether two nodes that share memory are the same elements in the same order."""
    one, two = fx.value(node), fx.value(other)
    same_start = _surely_equal(one.storage_offset(), two.storage_offset())
    return one.dtype == two.dtype and same_start and has_sizes(one, two) and has_layout(one, two)


def has_sizes(tensor: Tensor, like: Tensor) -> bool:
    """Whether ``tensor`` surely has the sizes of ``like``."""
    return tensor.dim() == like.dim() and all(map(_surely_equal, tensor.shape, like.shape))


def has_layout(tensor: Tensor, like: Tensor) -> bool:
    """Whether ``tensor`` surely has the strides of ``like``, which has the same sizes; of a size of 1 none counts."""
    return all(
        _surely_equal(size, 1) or _surely_equal(stride, other)
        for size, stride, other in zip(tensor.shape, tensor.stride(), like.stride(), strict=True)
    )


def _surely_equal(one: Any, other: Any) -> bool:
    return statically_known_true(one == other)


def may_require_grad(gm: GraphModule, node: Node) -> bool:
    """Whether a gradient could flow through ``node``: a parameter or an input of floating type is behind it."""
    seen: set[Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        fake = current.meta.get("val")
        if isinstance(fake, torch.SymInt) or (isinstance(fake, Tensor) and not _is_differentiable(fake)):
            continue
        pending.extend(current.all_input_nodes)
        if current.op == "placeholder" and isinstance(fake, Tensor):
            return True
        if current.op == "get_attr" and isinstance(fx.attribute(gm, str(current.target)), nn.Parameter):
            return True
    return False


def _is_differentiable(fake: Tensor) -> bool:
    return fake.dtype.is_floating_point or fake.dtype.is_complex
