"""What a sublayer adds to its stream: the term of a sum that comes from its last linear.

linear -> dropout -> (+ stream)                      the linear's result, up to a factor
linear -> norm -> scale -> (+ stream)                the norm's: a factor before it would change nothing, or a bias
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxsparse.analysis.probing import CannotRun, between, shape_of
from fxsparse.analysis.products import activation_product
from fxsparse.analysis.sections import Section
from fxsparse.analysis.ties import sizes
from fxsparse.graph import Linear, traits
from fxsparse.graph.experts import grouped_operands

aten = torch.ops.aten

_POSITIONS = 4
"""Examples and tokens at which it is tried, where they are apart."""


@dataclass(frozen=True)
class Added:
    """A term of a sum.

    Attributes:
        node: the first node on the way from the linear on which a factor is a factor of the term.
        total: the sum.
        stream: its other term.
    """

    node: Node
    total: Node
    stream: Node


class NotAdded(Exception):
    """Why a linear's result is no term of a sum."""


def added(linear: Linear) -> Added:
    """What a linear's result adds to a stream.

    Raises:
        NotAdded: nothing, or something else reads it.
    """
    reached, pending = {linear.node}, [linear.node]
    for node in pending:  # in order of execution, until a sum takes all of them in
        for user in sorted(node.users):
            if user not in reached and _reads(user, node):
                reached.add(user)
                pending.append(user)
    for total in sorted(reached):
        term, stream = _terms(total, reached)
        if term is not None and stream is not None:
            if any(map(_multiplies, between({linear.node}, [term]))) or not _has(term, linear.out_features):
                break  # it only has a part in what is added, as a router has in what experts compute
            return Added(_acts(linear.node, term, total), total, stream)
    raise NotAdded("its result goes into no sum with its stream")


def acts_on(linear: Linear) -> Node:
    """Where a factor is one of what a sublayer with this last linear adds: its result, or that of a norm behind it."""
    try:
        return added(linear).node
    except NotAdded:
        return linear.node


def why_not_added(linear: Linear) -> str | None:
    """Why a linear's result is no term of a sum; None if it is one."""
    try:
        added(linear)
    except NotAdded as reason:
        return str(reason)
    return None


def _acts(start: Node, term: Node, total: Node) -> Node:
    """The first node from ``start`` to ``term`` that nothing but the way to the term reads, and that the term is
    proportional to."""
    for node in (start, *between({start}, [term])):
        if not isinstance(node.meta["val"], Tensor):
            continue  # several results, of which the term may be one
        inside = {node, *between({node}, [term])}
        readers = {user for each in inside for user in each.users if _reads(user, each)}
        if term in inside and not readers - inside - {total} and (node is term or _is_proportional(node, term)):
            return node
    raise NotAdded("its result is read more than once, so it cannot be taken out")


def _is_proportional(node: Node, term: Node) -> bool:
    section = Section({node: range(len(sizes(node)) - 1)}, [term], _POSITIONS)
    stand_ins: dict[Node, Any] = {}
    x = torch.randn(section.shape(node), generator=torch.Generator().manual_seed(0))
    try:
        # The first run draws the stand-ins.
        _, whole, half = (_run(section, node, x * factor, stand_ins)[term] for factor in (1.0, 1.0, 0.5))
    except CannotRun:
        return False
    if not bool(whole.isfinite().all() and half.isfinite().all()):
        return False
    return bool(torch.allclose(half, whole * 0.5, rtol=1e-3, atol=1e-5 * float(whole.abs().max())))


def _run(section: Section, node: Node, x: Tensor, stand_ins: dict[Node, Any]) -> dict[Node, Any]:
    """Draws the same of dropouts in every run."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return section.run({node: x}, stand_ins)


def _has(node: Node, size: int) -> bool:
    """Whether an axis has a size; a symbolic one is not compared, which would fix it."""
    return any(isinstance(own, int) and own == size for own in sizes(node))


def _multiplies(node: Node) -> bool:
    """Whether a call is a product, with a weight or of two activations."""
    is_product = traits.of(node.target).axes in {"product", "convolution"} or activation_product(node) is not None
    return node.op == "call_function" and (is_product or grouped_operands(node) is not None)


def _reads(user: Node, node: Node) -> bool:
    """Whether ``user`` reads what ``node`` computes, and not only its sizes or its dtype."""
    has_tensor = isinstance(user.meta.get("val"), (Tensor, tuple, list))
    return user.op == "output" or (has_tensor and node in traits.values_read(user))


def _terms(node: Node, reached: set[Node]) -> tuple[Node | None, Node | None]:
    """Of a sum, the term that was reached and the one, of the sum's shape, that was not; None for any other node."""
    if node.target not in (aten.add.Tensor, aten.add_.Tensor):
        return None, None
    terms = [term for term in node.args[:2] if isinstance(term, Node)]
    term = next((term for term in terms if term in reached), None)
    stream = next((other for other in terms if other not in reached and shape_of(other) == shape_of(node)), None)
    return term, stream
