"""Which axes of a graph become shorter, and by how much, when something is taken out of it.

What is taken out are rows of linears, heads of an attention, channels of an MLP, or dimensions of a residual stream.
Rows and heads are probed: with NaN in their place, an axis on which some positions change and others do not is one that
loses those. Views, splits, norms of single heads and rotary positions need no case of their own. A residual stream
knows its axes.
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


def losses(removed: Removed, targets: Sequence[Node], axis: int = -1) -> Losses:
    """What the nodes between some sources and some targets lose when positions of the sources go.

    Args:
        removed: of each source, along ``axis``; nothing of a source that has none.
        targets: the last nodes to look at.
        axis: of the sources.

    Returns:
        for the sources and all nodes on a way to a target, 1 at every position that goes.
    """
    changes = _changes(removed, targets, axis)
    return {node: [_partly(changed) for changed in results] for node, results in changes.items()}


def losses_of_unit(removed: Removed, targets: Sequence[Node], count: int) -> Losses:
    """:func:`losses` where ``count`` units go that are like one, whose rows ``removed`` has.

    Returns:
        ``count`` at every position of the one unit, and 0 elsewhere.

    Raises:
        Mixed: what a unit changes is not some positions of a single axis, so that units could not go one by one.
    """
    changes = _changes(removed, targets, -1)
    found = {node: [_partly(changed) for changed in results] for node, results in changes.items()}
    for node, results in changes.items():
        for changed, lost in zip(results, found[node], strict=True):
            if bool(changed.any()) and not any(_is_all(changed, axis, positions) for axis, positions in lost.items()):
                raise Mixed(node)
    return {
        node: [{axis: count * positions for axis, positions in lost.items()} for lost in results]
        for node, results in found.items()
    }


def _is_all(changed: Tensor, axis: int, positions: Tensor) -> bool:
    """Whether what changed is exactly some positions of an axis."""
    return bool(changed.eq(positions.bool().view([-1 if at == axis else 1 for at in range(changed.dim())])).all())


def losses_of_stream(stream: Stream, keep: Tensor) -> Losses:
    """What the nodes of a residual stream lose when only ``keep``, bool ``[stream.size]``, of its dimensions stay."""
    return {node: [{axis: lost_of(keep, sizes(node)[axis]) for axis in axes}] for node, axes in stream.nodes.items()}


def lost_of(keep: Tensor, size: int) -> Tensor:
    """What goes from an axis that holds the units of ``keep`` once or several times, one after the other."""
    return (~keep).long().repeat(size // len(keep))


def _changes(removed: Removed, targets: Sequence[Node], axis: int) -> dict[Node, list[Tensor]]:
    """For each result of each node, which of its elements change; bool."""
    removed = {source: index for source, index in removed.items() if len(index)}
    others = {
        source: [at for at in range(len(sizes(source)) - 1) if at != axis % len(sizes(source))] for source in removed
    }
    section = Section(others, targets, _POSITIONS)
    if not section.nodes:
        return {}
    stand_ins: dict[Node, Any] = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        # Above zero, so that what is clipped there shows as well.
        drawn = {source: section.draw(source, torch.rand) + 0.5 for source in removed}
        holes = {source: drawn[source].index_fill(axis, index, torch.nan) for source, index in removed.items()}
        whole, broken = (section.run(values, stand_ins) for values in (drawn, holes))
    return {
        node: [_changed(a, b) for a, b in zip(_results(whole[node]), _results(broken[node]), strict=True)]
        for node in (*removed, *section.nodes)
    }


def _results(value: Any) -> list[Tensor]:
    if isinstance(value, (tuple, list)):
        return [item for item in value if isinstance(item, Tensor)]
    return [value] if isinstance(value, Tensor) else []


def _changed(a: Tensor, b: Tensor) -> Tensor:
    return a.ne(b) & ~(a.isnan() & b.isnan()) if a.is_floating_point() else a.ne(b)


def _partly(changed: Tensor) -> Lost:
    """The axes of which some positions change and others do not."""
    marks = {axis: changed.movedim(axis, 0).unsqueeze(-1).flatten(1).any(1) for axis in range(changed.dim())}
    return {axis: at.long() for axis, at in marks.items() if bool(at.any()) and not bool(at.all())}
