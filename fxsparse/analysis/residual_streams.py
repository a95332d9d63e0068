"""Residual streams: the axis of hidden dimensions that embeddings, sublayers, norms and heads of a model share.

Found by flooding from the streams between blocks: an axis of a node belongs to the stream if an operator ties it to one
that does. Pointwise operators, norms, dropout and views that keep the axis carry it on; a linear cuts it: its weight's
columns read the stream, or its weight's rows and its bias write it. Equal sizes alone never decide. An operator whose
axes are not known ends the search with an error.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.analysis.blocks import stacks
from fxsparse.graph import Linear
from fxsparse.graph.record import Change, skipped
from fxsparse.ops import multiplex  # noqa: F401  (defines mux and demux_linear)

aten = torch.ops.aten

Axis = tuple[Node, int]
"""A dimension of what a node computes; for several results, of each. It may hold the stream several times, one after
the other."""

MEANS = {aten.mean.dim}
_SUMS = {aten.sum.dim_IntList, aten.linalg_vector_norm.default}
RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unflatten.int}
RESHAPES |= {aten.flatten.using_ints, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims}
PERMUTES = {aten.permute.default, aten.transpose.int, aten.t.default, aten.numpy_T.default, aten.movedim.int}
ALONG = {aten.slice.Tensor: 1, aten.index_select.default: 1, aten.narrow.default: 1, aten.cumsum.default: 1}
ALONG |= {aten.split.Tensor: 2, aten.split_with_sizes.default: 2, aten.chunk.default: 2, aten.roll.default: 2}
ALIGNED = {"expand", "expand_as", "to", "_to_copy", "type_as", "contiguous", "clone", "detach", "alias", "dropout"}
ALIGNED |= {"feature_dropout", "native_dropout", "lift_fresh_copy", "masked_fill", "masked_fill_", "where"}
ALIGNED |= {"zeros_like", "ones_like", "full_like", "empty_like"}


@dataclass(frozen=True, eq=False)
class Stream:
    """A residual stream.

    Attributes:
        path: the module path of its first stack of blocks.
        size: hidden dimensions.
        axes: what belongs to it, of calls, of parameters and buffers where they are read, of inputs.
    """

    path: str
    size: int
    axes: frozenset[Axis]

    @cached_property
    def nodes(self) -> dict[Node, tuple[int, ...]]:
        """Every node of the stream with its axes, in order of execution."""
        found: dict[Node, list[int]] = {}
        for node, axis in sorted(self.axes):
            found.setdefault(node, []).append(axis)
        return {node: tuple(axes) for node, axes in found.items()}

    @property
    def means(self) -> list[Node]:
        """The means over hidden dimensions, as norms that are written out take them."""
        users = dict.fromkeys(user for node in self.nodes for user in node.users if user.target in MEANS)
        return [user for user in users if any((user.args[0], axis) in self.axes for axis in reduced(user))]

    def reads(self, linear: Linear) -> bool:
        """Whether the columns of a linear's weight are hidden dimensions."""
        return (linear.weight, 0 if linear.transposed else 1) in self.axes

    def writes(self, linear: Linear) -> bool:
        """Whether the rows of a linear's weight are hidden dimensions."""
        return (linear.weight, 1 if linear.transposed else 0) in self.axes


class Unknown(Exception):
    """Why a stream could not be followed."""


def streams(gm: GraphModule) -> tuple[list[Stream], list[Change]]:
    """The residual streams of a training-IR graph, and those that could not be followed, with the reason.

    Streams of one width are one: what is taken out of it is taken out everywhere.
    """
    ties = _Ties(gm)
    found: dict[int, Stream] = {}
    changes = []
    for stack in stacks(gm):
        seed = stack.blocks[0].stream_in
        try:
            last = len(sizes(seed)) - 1
            size = _static(sizes(seed)[last])
            if size is None:
                raise Unknown(f"the last dimension of {seed.name} is not a fixed number")
            known = found.get(size)
            axes = ties.flood((seed, last), size, known.axes if known else frozenset())
            found[size] = Stream(known.path if known else stack.path, size, axes)
        except Unknown as reason:
            changes.append(skipped(stack.path, f"hidden dimensions: {reason}"))
    return list(found.values()), changes


class _Ties:
    """Which axes of a graph are one, operator by operator."""

    def __init__(self, gm: GraphModule):
        self.gm = gm
        self.of_node: dict[Node, list[list[Axis]]] = {}
        self.same_tensor = {node: nodes for nodes in _tensors(gm).values() for node in nodes}

    def flood(self, seed: Axis, size: int, known: frozenset[Axis]) -> frozenset[Axis]:
        """All axes that are one with ``seed``, of that size or a multiple of it."""
        seen, pending = {*known, seed}, [seed]
        while pending:
            at = pending.pop()
            for other in self._tied(at):
                if other not in seen:
                    if sizes(other[0])[other[1]] % size:
                        raise Unknown(f"{other[0].name} takes them apart")
                    seen.add(other)
                    pending.append(other)
        return frozenset(seen)

    def _tied(self, at: Axis) -> Iterator[Axis]:
        node, axis = at
        if node.op == "get_attr":
            yield from ((other, axis) for other in self.same_tensor[node])
        else:
            yield from self._within(node, at)
        for user in node.users:
            if user.op != "output" and _has_tensor(user):
                yield from self._within(user, at)

    def _within(self, node: Node, at: Axis) -> Iterator[Axis]:
        """What ``node`` ties ``at`` to; an error where its axes are not known."""
        if node.op == "placeholder":
            return
        if node not in self.of_node:
            self.of_node[node] = [list(group) for group in _ties_of(node)]
        groups = [group for group in self.of_node[node] if at in group]
        if not groups:
            raise Unknown(f"{node.name} ({node.target}) does not keep them apart")
        for group in groups:
            yield from group


def _tensors(gm: GraphModule) -> dict[int, list[Node]]:
    """By identity of the tensor, the nodes that read it."""
    found: dict[int, list[Node]] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        value = fx.attribute(gm, str(node.target))
        if isinstance(value, Tensor):
            found.setdefault(id(value), []).append(node)
    return found


def _has_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (Tensor, tuple, list))


# --- operators --------------------------------------------------------------------------------------------------------


def _ties_of(node: Node) -> Iterable[Sequence[Axis]]:
    """The groups of axes, of a call and of its operands, that are one; a group of one is an axis that ends there."""
    target, args = node.target, node.args
    if target is operator.getitem:
        source = args[0]
        return [[(source, axis), (node, axis)] for axis in range(len(sizes(node)))]  # type: ignore[list-item]
    if not isinstance(target, torch._ops.OpOverload):
        return []
    if target in _OPERATORS:
        return _OPERATORS[target](node)
    if target in RESHAPES:
        return _reshaped(node)
    if target in PERMUTES:
        return _permuted(node)
    if target in ALONG:
        return _along(node, ALONG[target])
    if target in MEANS | _SUMS:
        return _reduced(node)
    if torch.Tag.pointwise in target.tags or target._opname in ALIGNED:
        return _aligned(node)
    return []


def _aligned(node: Node, operands: Iterable[Node] | None = None) -> list[list[Axis]]:
    """Pointwise operators: axes are counted from the right, and those of size 1 are broadcast."""
    out = sizes(node)
    groups = []
    for axis, size in enumerate(out):
        group = [(node, axis)]
        for operand in node.all_input_nodes if operands is None else operands:
            if isinstance(operand.meta.get("val"), Tensor):
                place = axis - len(out) + len(sizes(operand))
                if place >= 0 and _expr(sizes(operand)[place]) == _expr(size):
                    group.append((operand, place))
        groups.append(group)
    return groups


def _reshaped(node: Node) -> list[list[Axis]]:
    source: Any = node.args[0]
    old, new = sizes(source), sizes(node)
    after_old = {_product(old[axis + 1 :]): axis for axis in reversed(range(len(old))) if old[axis] != 1}
    groups: list[list[Axis]] = []
    for axis, size in enumerate(new):
        at = after_old.get(_product(new[axis + 1 :])) if size != 1 else None
        if at is not None and (_expr(old[at]) == _expr(size) or _is_multiple(old[at], size)):
            groups.append([(source, at), (node, axis)])
    return groups


def _is_multiple(a: Any, b: Any) -> bool:
    """Whether one of two sizes holds the other several times: dimensions before it were merged in, or taken out."""
    return isinstance(a, int) and isinstance(b, int) and (a % b == 0 or b % a == 0)


def _permuted(node: Node) -> list[list[Axis]]:
    source: Any = node.args[0]
    dims: Any = node.args[1:]
    order = list(range(len(sizes(node))))
    if node.target is aten.permute.default:
        order = [dim % len(order) for dim in dims[0]]
    elif node.target is aten.transpose.int:
        a, b = (dim % len(order) for dim in dims)
        order[a], order[b] = b, a
    elif node.target is aten.movedim.int:
        a, b = (dim % len(order) for dim in dims)
        order.insert(b, order.pop(a))
    else:
        order.reverse()
    return [[(source, at), (node, axis)] for axis, at in enumerate(order)]


def _along(node: Node, place: int) -> list[list[Axis]]:
    """Operators that change one dimension and keep the others."""
    source: Any = node.args[0]
    dim: Any = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
    count = len(sizes(source))
    changed = {at % count for at in (dim if isinstance(dim, (list, tuple)) else [dim])}
    return [[(source, axis), (node, axis)] for axis in range(count) if axis not in changed]


def _selected(node: Node) -> list[list[Axis]]:
    source: Any = node.args[0]
    count = len(sizes(source))
    dim = int(node.args[1]) % count  # type: ignore[arg-type]
    left = [axis for axis in range(count) if axis != dim]
    return [[(source, at), (node, axis)] for axis, at in enumerate(left)]


def _joined(node: Node) -> list[list[Axis]]:
    parts: Any = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    count = len(sizes(node))
    one_size = len({_expr(sizes(part)[dim]) for part in parts}) == 1  # type: ignore[index]
    return [
        [(node, axis), *((part, axis) for part in parts)]
        for axis in range(count)
        if axis != dim % count or one_size  # type: ignore[operator]
    ]


def _indexed(node: Node) -> list[list[Axis]]:
    """``x[i, j]``: what follows the dimensions that are indexed stays where it is, counted from the right."""
    source: Any = node.args[0]
    indices: Any = node.args[1]
    old, new = len(sizes(source)), len(sizes(node))
    return [[(source, axis), (node, axis - old + new)] for axis in range(len(indices), old)]


def _reduced(node: Node) -> list[list[Axis]]:
    """The axes that are summed over end there, alone in their group."""
    source: Any = node.args[0]
    over = reduced(node)
    count = len(sizes(source))
    left = [axis for axis in range(count) if axis not in over]
    keeps = len(sizes(node)) == count
    groups: list[list[Axis]] = [[(source, axis)] for axis in over]
    return groups + [[(source, at), (node, at if keeps else axis)] for axis, at in enumerate(left)]


def reduced(node: Node) -> set[int]:
    """The dimensions that a mean, a sum or a norm of vectors runs over."""
    count = len(sizes(node.args[0]))
    place = 2 if node.target is aten.linalg_vector_norm.default else 1
    dims: Any = node.args[place] if len(node.args) > place else node.kwargs.get("dim")
    over = dims if isinstance(dims, (list, tuple)) else [] if dims is None else [dims]
    return {dim % count for dim in over} or set(range(count))


def _linear(node: Node) -> list[list[Axis]]:
    x, weight, bias = (*node.args, None)[:3]
    last = len(sizes(x)) - 1
    out: list[Any] = [(node, last), (weight, 0), *([(bias, 0)] if isinstance(bias, Node) else [])]
    return [[(x, last), (weight, 1)], out, *([(x, axis), (node, axis)] for axis in range(last))]


def _addmm(node: Node) -> list[list[Axis]]:
    bias, x, weight = node.args[:3]
    out: list[Any] = [(node, 1), (weight, 1), (bias, len(sizes(bias)) - 1)]
    return [[(x, 1), (weight, 0)], out, [(x, 0), (node, 0)]]


def _matmul(node: Node) -> list[list[Axis]]:
    a, b = node.args[:2]
    if len(sizes(b)) != 2 or len(sizes(a)) < 2:
        return []
    last = len(sizes(a)) - 1
    return [[(a, last), (b, 0)], [(node, last), (b, 1)], *([(a, axis), (node, axis)] for axis in range(last))]  # type: ignore[list-item]


def _norm(node: Node) -> list[list[Axis]]:
    source, shape = node.args[:2]
    groups = _aligned(node, [source])  # type: ignore[list-item]
    if len(shape) != 1:  # type: ignore[arg-type]
        return groups[: -len(shape)]  # type: ignore[arg-type]
    groups[-1] += [(arg, 0) for arg in node.args[2:4] if isinstance(arg, Node)]
    return groups


def _mux(node: Node) -> list[list[Axis]]:
    x, keys = node.args[:2]
    last = len(sizes(x)) - 1
    return [[(x, last), (keys, 1), (node, last)], *([(x, axis), (node, axis)] for axis in range(1, last))]  # type: ignore[list-item]


def _demux(node: Node) -> list[list[Axis]]:
    h, keys, weight, bias = node.args[:4]
    last, last_key = len(sizes(h)) - 1, len(sizes(keys)) - 1
    out: list[Any] = [(node, last), (weight, 0), *([(bias, 0)] if isinstance(bias, Node) else [])]
    groups: list[Any] = [out, *([(h, axis), (node, axis)] for axis in range(1, last))]
    if sizes(keys)[last_key] == sizes(h)[last]:
        groups.append([(h, last), (keys, last_key), (weight, 1)])
    return groups


def _embedding(node: Node) -> list[list[Axis]]:
    weight, ids = node.args[:2]
    last = len(sizes(node)) - 1
    return [[(node, last), (weight, 1)], *([(ids, axis), (node, axis)] for axis in range(last))]  # type: ignore[list-item]


def _convolution(node: Node) -> list[list[Axis]]:
    x, weight = node.args[:2]
    bias = node.args[2] if len(node.args) > 2 else None
    groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    if groups != 1:
        return [[(x, 0), (node, 0)]]  # type: ignore[list-item]
    out: list[Any] = [(node, 1), (weight, 0), *([(bias, 0)] if isinstance(bias, Node) else [])]
    return [[(x, 1), (weight, 1)], out, [(x, 0), (node, 0)]]


_OPERATORS: dict[Any, Any] = {
    aten.linear.default: _linear,
    aten.addmm.default: _addmm,
    aten.mm.default: _matmul,
    aten.matmul.default: _matmul,
    aten.layer_norm.default: _norm,
    aten.rms_norm.default: _norm,
    aten.embedding.default: _embedding,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    torch.ops.fxsparse.mux.default: _mux,
    torch.ops.fxsparse.demux_linear.default: _demux,
    aten.select.int: _selected,
    aten.cat.default: _joined,
    aten.index.Tensor: _indexed,
}


# --- sizes ------------------------------------------------------------------------------------------------------------


def sizes(node: Any) -> Sequence[Any]:
    """The sizes of what a node computes; of the first, where it is several."""
    value = fx.value(node)
    while isinstance(value, (tuple, list)):
        value = value[0]
    return value.shape


def _static(size: Any) -> int | None:
    return size if isinstance(size, int) else None


def _expr(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.expr


def _product(of: Sequence[Any]) -> Any:
    return sympy.prod([_expr(size) for size in of])
