"""SLoPe's double-pruned backward (arXiv 2405.16325, eq. 4-6).

    forward   Y  = X (W^R)^T           exact in W^R
    BWD-1     dW = dY^T X              at kept positions
    BWD-2     dX = dY W^{R,C}          W^{R,C}: W^R pruned again, n:m along the output dimension

BWD-2 sums over the output dimension, so N:M hardware can multiply by W^{R,C}. It is never stored: one bit per kept
value says whether it survives. The extra zeros are 9.4 % at 2:4 and 5.84 % at 2:8
(``fxsparse.ops.nm.extra_zeros``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.errors import OptionError
from fxsparse.graph.derived_buffers import BORROWED, Derived, derive
from fxsparse.graph.record import Change, rewrote, skipped
from fxsparse.ops.nm import Pattern
from fxsparse.passes.base import Pass
from fxsparse.passes.event import Event
from fxsparse.passes.nm.rules import ColumnMask
from fxsparse.passes.nm.sparse_linear import (
    SparseLinear,
    dense_and_mask,
    replace_call,
    sparse_linears,
    store_column_mask,
)


@dataclass(frozen=True)
class DoublePruneBackward(Pass):
    """Prunes W^R once more along the output dimension for the gradient of the input.

    Attributes:
        pattern: of the second pruning; by default that of each weight.
        every: optimizer steps after which a Schedule chooses the surviving columns anew; 1 is every step, as in SLoPe's
            accuracy experiments, 100 the period of its accelerated code, 0 keeps the first choice.

    Raises:
        OptionError: an option is out of range.
    """

    name: ClassVar[str] = "double-prune"
    must_follow: ClassVar[tuple[str, ...]] = ("nm-masks",)
    pattern: str | None = None
    every: int = 100

    def __post_init__(self) -> None:
        if self.pattern is not None:
            object.__setattr__(self, "pattern", str(Pattern.parse(str(self.pattern))))
        if self.every < 0:
            raise OptionError(f"every={self.every} must be 0 (static) or a number of steps", pass_name=self.name)

    def rewrite(self, graph: GraphModule) -> Iterable[Change]:
        done: set[str] = set()
        for linear in list(sparse_linears(graph)):
            reason = self._misfit(linear)
            if reason:
                yield skipped(linear.path, reason)
                continue
            if linear.name not in done:
                self._add_column_mask(graph, linear)
                yield rewrote(linear.path, f"backward {self.pattern_of(linear)} along {linear.out_features} rows")
            done.add(linear.name)
            column_mask = fx.insert_attribute(graph, f"{linear.name}_column_mask", before=linear.node)
            replace_call(graph, linear.node, linear.node.target, column_mask=column_mask)

    def pattern_of(self, linear: SparseLinear) -> Pattern:
        return Pattern.parse(self.pattern) if self.pattern else linear.pattern

    def _misfit(self, linear: SparseLinear) -> str | None:
        pattern = self.pattern_of(linear)
        if linear["column_mask"] is not None:
            return "is already double-pruned"
        if linear["straight_through"]:
            return "its mask is dynamic and its gradient dense, so there is no W^R to prune once more"
        if linear.out_features % pattern.m:
            return f"backward stays exact, {linear.out_features} rows are not a multiple of {pattern.m}"
        return None

    def _add_column_mask(self, gm: GraphModule, linear: SparseLinear) -> None:
        fx.set_buffer(gm, f"{linear.name}_column_mask", self._column_mask(gm, linear))
        if gm.meta.get(BORROWED):
            rule = ColumnMask(str(self.pattern_of(linear)), linear.held.transposed)
            derive(gm, f"{linear.name}_column_mask", Derived(rule, (linear.name, f"{linear.name}_mask")))

    def _column_mask(self, gm: GraphModule, linear: SparseLinear) -> torch.Tensor:
        dense, mask = dense_and_mask(gm, linear)
        column_mask = ColumnMask(str(self.pattern_of(linear)))(dense, mask)
        return store_column_mask(gm, linear, column_mask, mask)

    def schedule(self, graph: GraphModule, optimizer: torch.optim.Optimizer, total_steps: int) -> Iterable[Event]:
        if self.every:
            yield _Refresh(self, graph)


class _Refresh(Event):
    """Chooses the surviving columns anew every few optimizer steps, in place."""

    def __init__(self, owner: DoublePruneBackward, gm: GraphModule):
        self.owner, self.gm = owner, gm

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if step % self.owner.every:
            return
        for linear in _once_per_weight(self.gm):
            if linear["column_mask"] is not None:
                fx.attribute(self.gm, f"{linear.name}_column_mask").copy_(self.owner._column_mask(self.gm, linear))


def _once_per_weight(gm: GraphModule) -> Iterable[SparseLinear]:
    return {linear.name: linear for linear in sparse_linears(gm)}.values()
