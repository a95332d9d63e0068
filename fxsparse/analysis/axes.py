"""Which axes of a graph become shorter, and by how much, when something is taken out of it.

What is taken out are rows of linears, heads of an attention, channels of an MLP, or dimensions of a residual stream.
Rows and heads are probed: with NaN in their place, an axis on which some positions change is one that loses those, but
for positions that change as well with NaN in the place of all that stays. Views, splits, norms of single heads and
rotary positions need no case of their own. A residual stream knows its axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxsparse.analysis.residual_streams import Stream
from fxsparse.analysis.sections import Section
from fxsparse.analysis.ties import sizes
from fxsparse.graph.resize import Losses, Lost

_POSITIONS = 4  # examples or tokens at which axes are probed, where they are apart

Removed = Mapping[Node, Tensor]
"""Positions, int64, that go along an axis of nodes."""


class Mixed(Exception):
    """An operator mixes units."""

    def __init__(self, node: Node):
        super().__init__(f"{node.name} mixes units")


def losses(removed: Removed, targets: Sequence[Node], axis: int | Mapping[Node, int] = -1) -> Losses:
    """What the nodes between some sources and some targets lose when positions of the sources go.

    Args:
        removed: of each source, along ``axis``; nothing of a source that has none.
        targets: the last nodes to look at.
        axis: of all sources, or of each.

    Returns:
        for the sources and all nodes on a way to a target, 1 at every position that goes.
    """
    return {node: [_lost(*marks) for marks in results] for node, results in _changes(removed, targets, axis).items()}


def losses_of_unit(removed: Removed, targets: Sequence[Node], count: int) -> Losses:
    """:func:`losses` where ``count`` units go that are like one, whose rows ``removed`` has.

    Returns:
        ``count`` at every position of the one unit, and 0 elsewhere.

    Raises:
        Mixed: what a unit changes is not some positions of a single axis, so that units could not go one by one.
    """
    found: dict[Node, list[Lost]] = {}
    for node, results in _changes(removed, targets, -1).items():
        found[node] = [_lost(*marks) for marks in results]
        for (changed, _), lost in zip(results, found[node], strict=True):
            if bool(changed.any()) and len(lost) != 1:
                raise Mixed(node)
    return {
        node: [{axis: count * positions for axis, positions in lost.items()} for lost in results]
        for node, results in found.items()
    }


def losses_of_stream(stream: Stream, keep: Tensor) -> Losses:
    """What the nodes of a residual stream lose when only ``keep``, bool ``[stream.size]``, of its dimensions stay."""
    return {node: [{axis: lost_of(keep, sizes(node)[axis]) for axis in axes}] for node, axes in stream.nodes.items()}


def lost_of(keep: Tensor, size: int) -> Tensor:
    """What goes from an axis that holds the units of ``keep`` once or several times, one after the other."""
    return (~keep).long().repeat(size // len(keep))


def _changes(
    removed: Removed, targets: Sequence[Node], axis: int | Mapping[Node, int]
) -> dict[Node, list[tuple[Tensor, Tensor]]]:
    """For each result of each node, which of its elements change with what goes, and with what stays; bool."""
    if not any(map(len, removed.values())):
        return {}
    along = {source: (axis if isinstance(axis, int) else axis[source]) % len(sizes(source)) for source in removed}
    others = {source: [at for at in range(len(sizes(source)) - 1) if at != along[source]] for source in removed}
    section = Section(others, targets, _POSITIONS)
    if not section.nodes:
        return {}
    stand_ins: dict[Node, Any] = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        # Above zero, so that what is clipped there shows as well.
        drawn = {source: section.draw(source, torch.rand) + 0.5 for source in removed}
        gone, left = dict(drawn), dict(drawn)
        for source, index in removed.items():
            goes = torch.zeros(drawn[source].shape[along[source]], dtype=torch.bool).index_fill(0, index, True)
            for broken, positions in ((gone, goes), (left, ~goes)):
                places = positions.nonzero().flatten()
                broken[source] = drawn[source].index_fill(along[source], places, torch.nan)
        whole, goes_there, stays_there = (section.run(values, stand_ins) for values in (drawn, gone, left))
    return {
        node: [
            (_changed(a, b), _changed(a, c))
            for a, b, c in zip(*(_results(run[node]) for run in (whole, goes_there, stays_there)), strict=True)
        ]
        for node in (*removed, *section.nodes)
    }


def _results(value: Any) -> list[Tensor]:
    if isinstance(value, (tuple, list)):
        return [item for item in value if isinstance(item, Tensor)]
    return [value] if isinstance(value, Tensor) else []


def _changed(a: Tensor, b: Tensor) -> Tensor:
    return a.ne(b) & ~(a.isnan() & b.isnan()) if a.is_floating_point() else a.ne(b)


def _lost(changed: Tensor, stays: Tensor) -> Lost:
    """The axes of which some positions change, with what goes alone, and others do not."""
    lost = {}
    for axis in range(changed.dim()):
        goes = _along(changed, axis) & ~_along(stays, axis)
        if bool(goes.any()) and not bool(goes.all()):
            lost[axis] = goes.long()
    return lost


def _along(marks: Tensor, axis: int) -> Tensor:
    return marks.movedim(axis, 0).unsqueeze(-1).flatten(1).any(1)
