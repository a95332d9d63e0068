"""What meets the heads of an attention and is made of parameters alone: a position bias, a scale of each head, a sink.

    table [buckets, heads] -> embedding -> permute -> + scores

Where nothing else reads it, the parameters lose the heads themselves; an index would leave them whole.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.analysis.ties import sizes, ties
from fxsparse.graph import traits
from fxsparse.graph.resize import Lost

_MOST = 1 << 26
"""Elements of a parameter that is followed through a reshape."""


def narrowed_state(gm: GraphModule, operand: Node, axis: int, keep: Tensor, reader: Node) -> dict[Node, list[Lost]]:
    """Leaves some positions of an operand by leaving them of the parameters it is made of.

    Args:
        gm: the graph; parameters are replaced, never written to.
        operand: a node that ``reader`` alone reads.
        axis: of the operand.
        keep: bool, of the positions of ``axis``.

    Returns:
        what the nodes that make the operand lose; nothing, and the graph as it was, where its positions are no
        parameters' or something else reads them.
    """
    kept: dict[Node, tuple[int, Tensor]] = {}
    if not _follow(gm, operand, axis % len(sizes(operand)), keep, reader, kept):
        return {}
    for node, (at, stays) in kept.items():
        if node.op == "get_attr":
            name, old = str(node.target), gm.get_parameter(str(node.target))
            left = old.detach().index_select(at, stays.nonzero().flatten().to(old.device))
            new = fx.set_parameter(gm, name, left, requires_grad=old.requires_grad)
            node.meta = {**node.meta, "val": fx.fake_mode(gm).from_tensor(new.detach(), static_shapes=True)}
    return {node: [{at: (~stays).long()}] for node, (at, stays) in kept.items()}


def _follow(
    gm: GraphModule, node: Node, axis: int, keep: Tensor, reader: Node, kept: dict[Node, tuple[int, Tensor]]
) -> bool:
    """Whether all positions of an axis are parameters' that only ``reader`` reads; fills in what stays of each node."""
    size = sizes(node)[axis]
    if list(node.users) != [reader] or node in kept or not isinstance(size, int) or size != len(keep):
        return False  # a symbolic size is not compared, which would fix it
    kept[node] = (axis, keep)
    if node.op == "get_attr":
        held = fx.attribute(gm, str(node.target))
        is_own = isinstance(held, nn.Parameter) and fx.reads(gm)[id(held)] == [node]
        return is_own and len(fx.parameter_names(gm)[id(held)]) == 1
    if node.op != "call_function":
        return False
    if traits.of(node.target).axes == "reshape" and not traits.of(node.target).shaped_like:
        source: Node = node.args[0]  # type: ignore[assignment]
        before = _before_reshape(sizes(source), sizes(node), axis, keep)
        if before is not None:
            return _follow(gm, source, *before, node, kept)
    group = next((group for group in ties(node) if (node, axis) in group), [])
    makers = [(other, at) for other, at in group if other is not node]
    return bool(makers) and all(_follow(gm, other, at, keep, node, kept) for other, at in makers)


def _before_reshape(old: Any, new: Any, axis: int, keep: Tensor) -> tuple[int, Tensor] | None:
    """The axis of what is reshaped that has these positions, and what stays of it; None if no one axis has them, or
    sizes are not fixed."""
    if not all(isinstance(size, int) for size in (*old, *new)) or math.prod(new) > _MOST:
        return None
    stays = keep.view([-1 if at == axis else 1 for at in range(len(new))]).expand(list(new)).reshape(list(old))
    for at in range(len(old)):
        along = stays.movedim(at, 0).unsqueeze(-1).flatten(1)
        if torch.equal(along.any(1), along.all(1)):
            return at, along.any(1)
    return None
