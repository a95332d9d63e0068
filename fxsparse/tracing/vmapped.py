"""Masks that a model makes of a function of four numbers, by ``vmap``, become masks made of four broadcast tensors.

    q' = _add_batch_dim(q [t], 0, level 3)              q' = q.view(1, 1, t, 1)
    y' = q' >= k'                               ->      y' = q' >= k'
    y  = _remove_batch_dim(y', level 3, t, 0)           y  = y'.expand(-1, -1, t, -1)

Capture leaves vmap's own calls in a graph, which nothing can run outside of it. A level of nesting is a dimension here;
between the calls stand numbers for each, so that pointwise operators and lookups broadcast them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._functorch import predispatch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxsparse import graph as fx
from fxsparse.graph import traits

aten = torch.ops.aten

_ENTER, _LEAVE = predispatch._add_batch_dim, predispatch._remove_batch_dim
_MADE = {aten.new_ones.default, aten.new_zeros.default, aten.new_full.default, aten.full.default}


def without_vmap(gm: GraphModule) -> None:
    """Takes vmap's calls out of a graph; leaves it as it is where something else than numbers is mapped over.

    Args:
        gm: a graph with the fake values that capture gave it; edited in place. Eliminate dead code after.
    """
    for nodes in _regions(gm):
        if all(map(_broadcasts, nodes)):
            _replace(gm, nodes, sorted({_level(node) for node in nodes if node.target in (_ENTER, _LEAVE)}))


def _level(node: Node) -> int:
    level: Any = node.args[2 if node.target is _ENTER else 1]
    return int(level)


def _regions(gm: GraphModule) -> Iterable[list[Node]]:
    """The nodes from vmap's first calls to its last, for each nest of them, in order of execution."""
    region: list[Node] = []
    inside: set[Node] = set()
    for node in gm.graph.nodes:
        enters = node.target is _ENTER
        if enters and region and region[-1].target is _LEAVE and _is_outermost(region[-1]):
            yield region
            region, inside = [], set()
        if enters or any(source in inside for source in node.all_input_nodes):
            region.append(node)
            if not (node.target is _LEAVE and _is_outermost(node)):
                inside.add(node)
    if region:
        yield region


def _is_outermost(node: Node) -> bool:
    """Whether a call leaves the last level: what reads it is no vmap's."""
    return not any(user.target is _LEAVE for user in node.users)


def _broadcasts(node: Node) -> bool:
    """Whether a call on numbers computes, with dimensions for the levels, what vmap does."""
    if node.target is _ENTER:
        x: Any = node.args[0]
        return bool(fx.value(x).dim() == 1 and node.args[1] == 0)
    if node.target is _LEAVE:
        source: Any = node.args[0]
        inside_out = source.target is not _LEAVE or _level(source) > _level(node)
        return inside_out and bool(node.args[3] == 0 and fx.value(node).dim() == 1 + fx.value(source).dim())
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim():
        return False
    lookup = _lookup(node)
    if lookup is not None:
        return len(lookup[1]) == fx.value(lookup[0]).dim()
    return node.target in _MADE or traits.of(node.target).axes == "pointwise"


def _lookup(node: Node) -> tuple[Node, list[Node]] | None:
    """The table and the indices of ``table[i, j]``, which transformers and flex attention let be an operator's."""
    if node.target is aten.index.Tensor:
        return node.args  # type: ignore[return-value]
    if str(node.target) == "flat_apply" and any(str(argument).endswith(".ModIndex") for argument in node.args):
        table, *indices = (source for source in node.all_input_nodes if isinstance(source.meta.get("val"), Tensor))
        return table, indices
    return None


def _replace(gm: GraphModule, nodes: list[Node], levels: list[int]) -> None:
    new: dict[Node, Node] = {}
    for node in nodes:
        if node.target is _ENTER:
            shape = [-1 if level == _level(node) else 1 for level in levels]
            new[node] = fx.insert_call(gm, aten.view.default, (node.args[0], shape), like=node)
        elif node.target is _LEAVE:
            source = new[node.args[0]]  # type: ignore[index]
            sizes = [node.args[2] if level == _level(node) else -1 for level in levels]
            if fx.value(source).dim() == 0:
                source = fx.insert_call(gm, aten.view.default, (source, [1] * len(levels)), like=node)
            new[node] = fx.insert_call(gm, aten.expand.default, (source, sizes), like=node)
        elif (lookup := _lookup(node)) is not None:
            table, indices = map_arg(lookup, lambda source: new.get(source, source))
            new[node] = fx.insert_call(gm, aten.index.Tensor, (table, indices), like=node)
        else:
            args, kwargs = map_arg((node.args, node.kwargs), lambda source: new.get(source, source))
            new[node] = fx.insert_call(gm, node.target, args, kwargs, like=node)
    for node in reversed(nodes):
        node.replace_all_uses_with(new[node])
        gm.graph.erase_node(node)
