"""Products of activations, as attention is made of: which axes of their operands and of their results are one.

    scores = matmul(q, k)        q [0, 1, i, c]   k [0, 1, c, j]                     scores [0, 1, i, j]
    mixed = sdpa(q, k, v, mask)  q [0, 1, i, c]   k [0, 1, j, c]   v [0, 1, j, d]    mixed [0, 1, i, d]

Axes of one label have the same positions. An axis of size 1 that is repeated has the label ``""``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.analysis.probing import shape_of
from fxsparse.analysis.ties import sizes
from fxsparse.graph import traits

aten = torch.ops.aten

SDPA = aten.scaled_dot_product_attention.default
Labels = tuple[str, ...]


@dataclass(frozen=True)
class ActivationProduct:
    """A product whose operands are all computed.

    Attributes:
        node: its call.
        factors: the operands that are multiplied, with the labels of their axes: two, or query, key and value.
        added: operands that are added to products of factors, a mask or a bias, with theirs.
        result: the labels of the result's axes.
    """

    node: Node
    factors: tuple[tuple[Node, Labels], ...]
    added: tuple[tuple[Node, Labels], ...]
    result: Labels

    def depth(self, factor: Node) -> int:
        """How many elements of a factor are summed over for an element of the first product that it is in."""
        labels = dict(self.factors)[factor]
        others = {label for other, each in self.factors if other is not factor for label in each}
        summed = [axis for axis, label in enumerate(labels) if label in others and label not in self.result]
        return math.prod(shape_of(factor)[axis] for axis in summed)


def activation_products(gm: GraphModule) -> dict[Node, ActivationProduct]:
    """The products of activations in a graph, in order of execution."""
    found = {node: activation_product(node) for node in gm.graph.nodes}
    return {node: product for node, product in found.items() if product is not None}


def activation_product(node: Node) -> ActivationProduct | None:
    """The labelled axes of a product of activations; None for any other node.

    A factor that is a parameter or a buffer, in whatever layout, makes a product a linear.
    """
    labelled = _LABELLED.get(node.target)
    product = labelled(node) if labelled is not None else None
    return product if product is not None and not any(_is_state(factor) for factor, _ in product.factors) else None


def _is_state(node: Node) -> bool:
    """Whether a node is a parameter or a buffer, in another layout or converted."""
    while traits.of(node.target).copies or traits.of(node.target).axes in {"reshape", "permute", "broadcast", "slices"}:
        node = node.all_input_nodes[0]
    return node.op == "get_attr"


def _multiplied(node: Node) -> ActivationProduct | None:
    """``matmul``, ``bmm`` and ``baddbmm``."""
    written = [argument for argument in fx.arguments(node).values() if isinstance(argument, Node)]
    left, right = written[-2:]
    if min(len(sizes(left)), len(sizes(right))) < 2:
        return None
    shape = sizes(node)
    result = (*map(str, range(len(shape) - 2)), "i", "j")
    factors = tuple(
        (factor, (*_aligned(factor, shape, result, inner=2), *ends))
        for factor, ends in ((left, ("i", "c")), (right, ("c", "j")))
    )
    added = tuple((bias, _aligned(bias, shape, result)) for bias in written[:-2])
    return ActivationProduct(node, factors, added, result)


def _attended(node: Node) -> ActivationProduct | None:
    query, key, value, mask = list(fx.arguments(node).values())[:4]
    shape = sizes(node)
    batch = tuple(map(str, range(len(shape) - 2)))
    result = (*batch, "i", "d")
    scores = (*shape[:-2], sizes(query)[-2], sizes(key)[-2])
    factors = tuple(
        (factor, (*_aligned(factor, shape, result, inner=2), *ends))
        for factor, ends in ((query, ("i", "c")), (key, ("j", "c")), (value, ("j", "d")))
    )
    added = ((mask, _aligned(mask, scores, (*batch, "i", "j"))),) if isinstance(mask, Node) else ()
    return ActivationProduct(node, factors, added, result)


def _summed(node: Node) -> ActivationProduct | None:
    written: Any = fx.arguments(node)
    inputs, _, result = written["equation"].replace(" ", "").partition("->")
    terms = inputs.split(",")
    if "." in inputs or not result or len(terms) < 2 or any(len(set(term)) < len(term) for term in (*terms, result)):
        return None
    factors = tuple((factor, tuple(term)) for factor, term in zip(written["tensors"], terms, strict=True))
    return ActivationProduct(node, factors, (), tuple(result))


_LABELLED: dict[Any, Callable[[Node], ActivationProduct | None]] = {
    aten.matmul.default: _multiplied,
    aten.bmm.default: _multiplied,
    aten.baddbmm.default: _multiplied,
    aten.einsum.default: _summed,
    SDPA: _attended,
}


def _aligned(operand: Node, shape: Sequence[Any], labels: Labels, *, inner: int = 0) -> Labels:
    """The labels of an operand's axes, but for ``inner`` last ones, counted from the right against a shape."""
    own = sizes(operand)
    places = range(len(shape) - len(own), len(shape) - inner)
    return tuple(labels[place] if _same(own[at], shape[place]) else "" for at, place in enumerate(places))


def _same(a: Any, b: Any) -> bool:
    one, other = (size if isinstance(size, int) else size.node.expr for size in (a, b))
    return bool(one == other)
