"""Which axes of an operator's result and operands are one: what goes from one of them goes from all.

    y = linear(x, w, b)     x.2 ~ w.1     y.2 ~ w.0 ~ b.0     x.0 ~ y.0     x.1 ~ y.1
    y = view(x, [s, 4, 8])  x.0 ~ y.0                        (of x [s, 32])

An axis that an operator reduces, or sums products over, ends there. An axis in no group is one that the operator mixes
or takes apart, or that nothing is known of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from fxsparse import graph as fx
from fxsparse.graph import traits
from fxsparse.graph.experts import grouped_operands
from fxsparse.ops.multiplex import demux_linear, mux

Axis = tuple[Node, int]
"""A dimension of what a node computes; for several results, of each."""


def ties(node: Node) -> list[list[Axis]]:
    """The groups of axes, of a call and of its operands, that are one; a group of one is an axis that ends there."""
    tie = _OURS.get(node.target) or _BY_AXES.get(traits.of(node.target).axes) or _of_experts
    return [list(group) for group in tie(node)]


def sizes(node: Any) -> Sequence[Any]:
    """The sizes of what a node computes; of the first, where it is several."""
    value = fx.value(node)
    while isinstance(value, (tuple, list)):
        value = value[0]
    return value.shape


def _expression(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.expr


# --- the same axes, others, or in another order -----------------------------------------------------------------------


def _aligned(node: Node, operands: Iterable[Node] | None = None) -> list[list[Axis]]:
    """Pointwise operators: axes are counted from the right, and those of size 1 are broadcast."""
    out = sizes(node)
    groups = []
    for axis, size in enumerate(out):
        group = [(node, axis)]
        for operand in traits.operands(node) if operands is None else operands:
            if isinstance(operand.meta.get("val"), Tensor):
                place = axis - len(out) + len(sizes(operand))
                if place >= 0 and _expression(sizes(operand)[place]) == _expression(size):
                    group.append((operand, place))
        groups.append(group)
    return groups


def _reshaped(node: Node) -> list[list[Axis]]:
    source: Any = node.args[0]
    old, new = sizes(source), sizes(node)
    after_old = {_product(old[axis + 1 :]): axis for axis in reversed(range(len(old))) if old[axis] != 1}
    groups: list[list[Axis]] = []
    if traits.of(node.target).shaped_like:
        like: Any = fx.arguments(node)[traits.of(node.target).shaped_like]
        groups += [[(like, axis), (node, axis)] for axis in range(len(new))]
    for axis, size in enumerate(new):
        at = after_old.get(_product(new[axis + 1 :])) if size != 1 else None
        if at is not None and (_expression(old[at]) == _expression(size) or _is_multiple(old[at], size)):
            groups.append([(source, at), (node, axis)])
    return groups


def _product(of: Sequence[Any]) -> Any:
    return sympy.prod([_expression(size) for size in of])


def _is_multiple(a: Any, b: Any) -> bool:
    """Whether one of two sizes holds the other several times: dimensions before it were merged in, or taken out."""
    return isinstance(a, int) and isinstance(b, int) and (a % b == 0 or b % a == 0)


def _permuted(node: Node) -> list[list[Axis]]:
    source: Any = node.args[0]
    order = traits.permutation(node) or ()
    return [[(source, at), (node, axis)] for axis, at in enumerate(order)]


def _item(node: Node) -> list[list[Axis]]:
    source: Any = node.args[0]
    return [[(source, axis), (node, axis)] for axis in range(len(sizes(node)))]


# --- one or some axes change, the others stay -------------------------------------------------------------------------


def _along(node: Node) -> list[list[Axis]]:
    """Operators that change one dimension and keep the others."""
    source: Any = node.args[0]
    changed = traits.dims(node)
    return [[(source, axis), (node, axis)] for axis in range(len(sizes(source))) if axis not in changed]


def _sliced(node: Node) -> list[list[Axis]]:
    """As :func:`_along`; a slice of all positions, as ``x[:, :, None]`` takes, changes nothing."""
    source: Any = node.args[0]
    old, new = sizes(source), sizes(node)
    whole = [axis for axis in traits.dims(node) if _expression(old[axis]) == _expression(new[axis])]
    return [*_along(node), *([(source, axis), (node, axis)] for axis in whole)]


def _selected(node: Node) -> list[list[Axis]]:
    source: Any = node.args[0]
    left = [axis for axis in range(len(sizes(source))) if axis not in traits.dims(node)]
    return [[(source, at), (node, axis)] for axis, at in enumerate(left)]


def _joined(node: Node) -> list[list[Axis]]:
    parts: Any = node.args[0]
    (dim,) = traits.dims(node)
    one_size = len({_expression(sizes(part)[dim]) for part in parts}) == 1
    return [
        [(node, axis), *((part, axis) for part in parts)] for axis in range(len(sizes(node))) if axis != dim or one_size
    ]


def _indexed(node: Node) -> list[list[Axis]]:
    """``x[i, j]``: what follows the dimensions that are indexed stays where it is, counted from the right."""
    source: Any = node.args[0]
    indices: Any = node.args[1]
    old, new = len(sizes(source)), len(sizes(node))
    return [[(source, axis), (node, axis - old + new)] for axis in range(len(indices), old)]


def _gathered(node: Node) -> list[list[Axis]]:
    """``gather``: along one axis the result has the positions of the index, along the others those of both."""
    arguments = fx.arguments(node)
    source, index, rank = arguments["self"], arguments["index"], len(sizes(node))
    dim = arguments["dim"] % rank
    groups: list[list[Axis]] = []
    for axis in range(rank):
        is_tied = axis != dim and _expression(sizes(source)[axis]) == _expression(sizes(index)[axis])
        groups.append([(node, axis), (index, axis), *([(source, axis)] if is_tied else [])])
    return groups


def _reduced(node: Node) -> list[list[Axis]]:
    """The axes that are summed over end there, alone in their group."""
    source: Any = node.args[0]
    over = traits.dims(node)
    count = len(sizes(source))
    left = [axis for axis in range(count) if axis not in over]
    keeps = len(sizes(node)) == count
    groups: list[list[Axis]] = [[(source, axis)] for axis in sorted(over)]
    return groups + [[(source, at), (node, at if keeps else axis)] for axis, at in enumerate(left)]


def _norm(node: Node) -> list[list[Axis]]:
    """Over one axis, a norm ties it to its weight and its bias; over several, it takes none of them apart."""
    source, shape, weight, bias = list(fx.arguments(node).values())[:4]
    groups = _aligned(node, [source])
    if len(shape) != 1:
        return groups[: -len(shape)]
    groups[-1] += [(arg, 0) for arg in (weight, bias) if isinstance(arg, Node)]
    return groups


def _stacked(node: Node) -> list[list[Axis]]:
    parts: Any = node.args[0]
    rank = len(sizes(node))
    dim = fx.arguments(node)["dim"] % rank
    left = [axis for axis in range(rank) if axis != dim]
    return [[(node, axis), *((part, at) for part in parts)] for at, axis in enumerate(left)]


def _repeated(node: Node) -> list[list[Axis]]:
    """Without a dimension, elements of all of them are repeated."""
    source: Any = node.args[0]
    dim, rank = fx.arguments(node)["dim"], len(sizes(node))
    return [] if dim is None else [[(source, at), (node, at)] for at in range(rank) if at != dim % rank]


def _padded(node: Node) -> list[list[Axis]]:
    """Padding is written for the last axes, the last one first."""
    source: Any = node.args[0]
    rank, pads = len(sizes(node)), fx.arguments(node)["pad"]
    padded = {rank - 1 - at // 2 for at, count in enumerate(pads) if count != 0}
    return [[(source, axis), (node, axis)] for axis in range(rank) if axis not in padded]


def _pooled(node: Node) -> list[list[Axis]]:
    """Pooling of an axis, the last one."""
    source: Any = node.args[0]
    return [[(source, axis), (node, axis)] for axis in range(len(sizes(node)) - 1)]


# --- products ---------------------------------------------------------------------------------------------------------


def _multiplied(node: Node) -> list[list[Axis]]:
    product = traits.of(node.target).product
    assert product is not None
    arguments = fx.arguments(node)
    x, weight = arguments[product.input], arguments[product.weight]
    bias = arguments[product.bias] if product.bias is not None else None
    if len(sizes(weight)) != 2 or len(sizes(x)) < 2:
        return []
    last, rows = len(sizes(x)) - 1, int(product.transposed)
    out = [(node, last), (weight, rows), *([(bias, len(sizes(bias)) - 1)] if isinstance(bias, Node) else [])]
    return [[(x, last), (weight, 1 - rows)], out, *([(x, axis), (node, axis)] for axis in range(last))]


def _summed(node: Node) -> list[list[Axis]]:
    """``einsum``: the axes of one index are one."""
    equation, operands = fx.arguments(node)["equation"].replace(" ", ""), fx.arguments(node)["tensors"]
    inputs, arrow, result = equation.partition("->")
    terms = [*inputs.split(","), result]
    if "." in equation or not arrow or any(len(set(term)) < len(term) for term in terms):
        return []
    of_index: dict[str, list[Axis]] = {}
    for term, operand in zip(terms, (*operands, node), strict=True):
        for axis, index in enumerate(term):
            of_index.setdefault(index, []).append((operand, axis))
    return list(of_index.values())


def _of_experts(node: Node) -> list[list[Axis]]:
    """A product of rows with the matrices of their experts; of any other operator nothing is known."""
    operands = grouped_operands(node) if node.op == "call_function" else None
    if operands is None or [len(sizes(operand)) for operand in operands[:2]] != [2, 3]:
        return []
    x, weight, _ = operands
    return [[(x, 1), (weight, 1)], [(node, 1), (weight, 2)], [(x, 0), (node, 0)]]


def _convolved(node: Node) -> list[list[Axis]]:
    arguments = fx.arguments(node)
    x, weight, bias = arguments["input"], arguments["weight"], arguments["bias"]
    if arguments["groups"] != 1:
        return [[(x, 0), (node, 0)]]
    rows = int(arguments.get("transposed", False))
    out = [(node, 1), (weight, rows), *([(bias, 0)] if isinstance(bias, Node) else [])]
    return [[(x, 1), (weight, 1 - rows)], out, [(x, 0), (node, 0)]]


def _embedded(node: Node) -> list[list[Axis]]:
    weight, ids = node.args[:2]
    last = len(sizes(node)) - 1
    return [[(node, last), (weight, 1)], *([(ids, axis), (node, axis)] for axis in range(last))]  # type: ignore[list-item]


def _mux(node: Node) -> list[list[Axis]]:
    arguments = fx.arguments(node)
    x, keys = arguments["x"], arguments["keys"]
    last = len(sizes(x)) - 1
    return [[(x, last), (keys, 1), (node, last)], *([(x, axis), (node, axis)] for axis in range(1, last))]


def _demux(node: Node) -> list[list[Axis]]:
    h, keys, weight, bias = fx.arguments(node).values()
    last, last_key = len(sizes(h)) - 1, len(sizes(keys)) - 1
    out: list[Any] = [(node, last), (weight, 0), *([(bias, 0)] if isinstance(bias, Node) else [])]
    groups: list[Any] = [out, *([(h, axis), (node, axis)] for axis in range(1, last))]
    if sizes(keys)[last_key] == sizes(h)[last]:
        groups.append([(h, last), (keys, last_key), (weight, 1)])
    return groups


_Tie = Callable[[Node], Iterable[Sequence[Axis]]]

_OURS: dict[Any, _Tie] = {
    mux.overload: _mux,
    demux_linear.overload: _demux,
    torch.ops.aten.gather.default: _gathered,
    torch.ops.aten.stack.default: _stacked,
    torch.ops.aten.repeat_interleave.self_int: _repeated,
    torch.ops.aten.pad.default: _padded,
    torch.ops.aten.constant_pad_nd.default: _padded,
    torch.ops.aten.adaptive_avg_pool1d.default: _pooled,
    torch.ops.aten.einsum.default: _summed,
}

_BY_AXES: dict[traits.Axes | None, _Tie] = {
    "pointwise": _aligned,
    "broadcast": _aligned,
    "reshape": _reshaped,
    "permute": _permuted,
    "item": _item,
    "slices": _sliced,
    "along": _along,
    "select": _selected,
    "join": _joined,
    "index": _indexed,
    "reduce": _reduced,
    "norm": _norm,
    "product": _multiplied,
    "convolution": _convolved,
    "embedding": _embedded,
}
