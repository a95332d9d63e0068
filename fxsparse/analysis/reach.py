"""Which rows of linears reach which units of a section, and which columns its units reach.

Found by running a section on random values. Where its positions are apart, each of them asks for one set of units, so
that a single pass answers for all sets; elsewhere every set takes a pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxsparse.analysis.sections import Section


def reached(section: Section, target: Node, axis: int, units: Tensor) -> list[Tensor]:
    """For every source, a linear, which of its rows reach some sets of units of a target.

    Where positions are apart, a position asks for one of the sets, and one backward pass answers for all.

    Args:
        section: has ``target`` among its targets.
        axis: of the target, that of units.
        units: bool ``[sets, units]``.

    Returns:
        bool ``[sets, rows]``, from gradients at random values: what a rectifier happens to close is missed.
    """
    drawn = {source: section.draw(source, torch.randn).requires_grad_() for source in section.sources}
    # In-place operators may write into a copy, not into what gradients are taken of.
    values = {source: value.clone() for source, value in drawn.items()}
    result = section.run(values, {})[target]
    weights = torch.rand_like(result) + 0.5
    hits = [torch.zeros(len(units), value.shape[-1], dtype=torch.bool) for value in drawn.values()]
    if not result.requires_grad:  # integers chosen by values
        return hits
    for place, asked in enumerate(_asked(section, target, axis, units, result)):
        gradients = torch.autograd.grad(
            (result * weights.mul(asked)).sum(), list(drawn.values()), retain_graph=True, allow_unused=True
        )
        for seen, (source, gradient) in zip(hits, zip(drawn, gradients, strict=True), strict=True):
            if gradient is not None:
                _note(seen, section.positions.get(source), gradient.ne(0), place)
    return hits


def changed(section: Section, source: Node, target: Node, axis: int, count: int) -> Tensor:
    """Which columns of a target change when a unit of the source does, bool ``[count, columns]``.

    Args:
        axis: of the source, that of its ``count`` units.
    """
    units, stand_ins = torch.eye(count, dtype=torch.bool), dict[Node, Any]()
    with torch.no_grad():
        first = section.draw(source, torch.randn)
        other = torch.randn_like(first)
        base = section.run({source: first}, stand_ins)[target]
        seen = torch.zeros(count, base.shape[-1], dtype=torch.bool)
        for place, asked in enumerate(_asked(section, source, axis, units, first)):
            mixed = section.run({source: torch.where(asked, other, first)}, stand_ins)[target]
            _note(seen, section.positions.get(target), mixed.ne(base), place)
    return seen


def _asked(section: Section, node: Node, axis: int, units: Tensor, like: Tensor) -> list[Tensor]:
    """Masks that broadcast with a node's value: one in which every position has a set of units, or one for each set."""
    axes = section.positions.get(node)
    axis %= like.dim()
    if axes is None or axis in axes:
        return [row.view([-1 if at == axis else 1 for at in range(like.dim())]) for row in units]
    lengths = [like.shape[at] for at in axes]
    masks = units[torch.arange(math.prod(lengths)) % len(units)].view(*lengths, -1)
    shape = [1] * (like.dim() - len(lengths) - 1)
    order = [*axes, axis, *(at for at in range(like.dim()) if at != axis and at not in axes)]
    return [masks.view(*lengths, units.shape[1], *shape).permute([order.index(at) for at in range(like.dim())])]


def _note(seen: Tensor, axes: tuple[int, ...] | None, marks: Tensor, place: int) -> None:
    """Adds what is marked, ``[..., columns]``, to ``seen``, ``[sets, columns]``: by position, or to one set."""
    if axes is None or marks.dim() - 1 in axes:
        seen[place] |= marks.flatten(0, -2).any(0)
        return
    by_position = marks.movedim(axes, tuple(range(len(axes)))).flatten(0, len(axes) - 1)
    by_position = by_position.reshape(len(by_position), -1, marks.shape[-1]).any(1)
    for begin in range(0, len(by_position), len(seen)):
        part = by_position[begin : begin + len(seen)]
        seen[: len(part)] |= part


class Runs:
    """A section run on random values: which rows of its sources reach columns of a target, and the other way round.

    Nothing is assumed of positions: a question takes a pass. What a rectifier happens to close is missed.

    Args:
        section: has ``target`` among its targets.
        target: its last axis is that of columns.
    """

    def __init__(self, section: Section, target: Node):
        self.section, self.target = section, target
        self._stand_ins: dict[Node, Any] = {}
        self._values = {source: self._draw(source).requires_grad_() for source in section.sources}
        self._result = self._run({source: value.clone() for source, value in self._values.items()})
        self._weights = torch.rand_like(self._result) + 0.5

    def _draw(self, source: Node) -> Tensor:
        # Near zero, so that a softmax closes nothing.
        return self.section.draw(source, torch.randn) * 0.5

    def _run(self, values: dict[Node, Tensor]) -> Tensor:
        result: Tensor = self.section.run(values, self._stand_ins)[self.target]
        return result

    def rows(self, columns: Tensor) -> dict[Node, Tensor]:
        """By source, the rows, bool, that any of some columns, bool, depends on."""
        wanted = (self._result * self._weights)[..., columns].sum()
        values = list(self._values.values())
        gradients: Any = [None] * len(values)  # what is chosen by values
        if wanted.requires_grad:
            gradients = torch.autograd.grad(wanted, values, retain_graph=True, allow_unused=True)
        return {
            source: torch.zeros(value.shape[-1], dtype=torch.bool) if gradient is None else _any(gradient.ne(0))
            for (source, value), gradient in zip(self._values.items(), gradients, strict=True)
        }

    def columns(self, rows: dict[Node, Tensor]) -> Tensor:
        """The columns, bool, that depend on some rows, bool, of sources."""
        with torch.no_grad():
            values = {
                source: torch.where(rows[source], self._draw(source), value) if source in rows else value.clone()
                for source, value in self._values.items()
            }
            result = self._run(values)
            return _any(result.ne(self._result) & ~(result.isnan() & self._result.isnan()))


def _any(marks: Tensor) -> Tensor:
    return marks.flatten(0, -2).any(0)
