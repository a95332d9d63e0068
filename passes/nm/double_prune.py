"""SLoPe's double-pruned backward (arXiv 2405.16325, eq. 4-6).

    forward   Y  = X (W^R)^T           exact in W^R
    BWD-1     dW = dY^T X              at kept positions
    BWD-2     dX = dY W^{R,C}          W^{R,C}: W^R pruned again, n:m along the output dimension

BWD-2 sums over the output dimension, so N:M hardware can multiply by W^{R,C}. It is never stored: one bit per kept
value says whether it survives. The extra zeros are 9.4 % at 2:4 and 5.84 % at 2:8
(``fxsparse.ops.nm.extra_zeros``).

Bi-Mask (Zhang et al., arXiv 2302.06058) prunes W^R the same way, in an order of the rows that was searched for, on top
of SR-STE's masks, which move in every step; dW is dense:

    nm-masks{storage=masked,dynamic=true},double-prune{every=1,permutations=100}

The order is the one of 100 random ones that lets most weights survive, searched for anew every 100 steps. In its code
the count that should reach 100 is not raised for convolutions, so their order is searched for in every step; for
linears it is as said here.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor, nn
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.graph.derived_buffers import BORROWED, Derived, derive
from fxsparse.graph.record import Change, hold, rewrote, skipped
from fxsparse.modules.sites import ModuleSite
from fxsparse.ops.nm import Pattern, PatternText
from fxsparse.options import Count, Index
from fxsparse.passes.base import Pass
from fxsparse.passes.event import Event
from fxsparse.passes.nm.convolutions import CONVOLUTION, masked_convolutions
from fxsparse.passes.nm.rules import ColumnMask
from fxsparse.passes.nm.sparse_linear import (
    SparseLinear,
    dense_and_mask,
    of_pass,
    replace_call,
    sparse_linears,
    store_column_mask,
)
from fxsparse.passes.pipeline import structure_only


@dataclass(frozen=True)
class DoublePruneBackward(Pass):
    """Prunes W^R once more along the output dimension for the gradient of the input.

    Attributes:
        pattern: of the second pruning; by default that of each weight.
        every: optimizer steps after which a Schedule chooses the surviving columns anew; 1 is every step, as in SLoPe's
            accuracy experiments, 100 the period of its accelerated code, 0 keeps the first choice.
        permutations: Bi-Mask: orders of the rows to try; needs masked weights, dynamic or not. A kernel for n:m then
            multiplies by the rows in that order. 0 leaves the rows as they are.
        permute_every: optimizer steps after which a Schedule searches for a new order.

    Raises:
        OptionError: an option is out of range.
    """

    name: ClassVar[str] = "double-prune"
    rest: ClassVar[str] = "left alone, it is not n:m"
    must_follow: ClassVar[tuple[str, ...]] = ("nm-masks",)
    pattern: PatternText | None = None
    every: Index = 100
    permutations: Annotated[int, Interval(ge=0, le=100_000)] = 0
    permute_every: Count = 100

    def rewrite(self, graph: GraphModule) -> Iterable[Change]:
        for held in masked_convolutions(graph):
            yield skipped(fx.module_path(held.name), f"{CONVOLUTION}, whose weight is not pruned again")
        done: set[str] = set()
        for linear in list(sparse_linears(graph)):
            reason = self._misfit(linear)
            if reason:
                yield skipped(linear.path, reason)
                continue
            if linear.name not in done:
                self._add_column_mask(graph, linear)
                hold(graph, [replace(linear.held, backward=str(self.pattern_of(linear)))])
                order = f" in the best of {self.permutations} orders" if self.permutations else ""
                yield rewrote(
                    linear.path, f"backward {self.pattern_of(linear)} along {linear.out_features} rows{order}"
                )
            done.add(linear.name)
            column_mask = fx.insert_attribute(graph, f"{linear.name}_column_mask", before=linear.node)
            replace_call(graph, linear.node, linear.node.target, column_mask=column_mask)

    def pattern_of(self, linear: SparseLinear | ModuleSite) -> Pattern:
        return Pattern.parse(self.pattern) if self.pattern else linear.pattern

    def _misfit(self, linear: SparseLinear) -> str | None:
        pattern = self.pattern_of(linear)
        if linear["column_mask"] is not None:
            return "is already double-pruned"
        if self.permutations and linear.compressed:
            return "backward stays exact, kernels of compressed weights group rows in their order; use storage=masked"
        if self.permutations and linear.held.experts:
            return "backward stays exact, orders of rows are of linears only; prune it without permutations"
        if linear["straight_through"] and not self.permutations:
            return (
                "its mask is dynamic and its gradient dense, so there is no W^R to prune once more; "
                "Bi-Mask does so with permutations=100"
            )
        if linear.out_features % pattern.m:
            return f"backward stays exact, {linear.out_features} rows are not a multiple of {pattern.m}"
        return None

    def rule(self, linear: SparseLinear | ModuleSite, step: int = 0) -> ColumnMask:
        """The rule for W^R ``[out, in]`` at an optimizer step."""
        seed = zlib.crc32(f"{linear.name} {step}".encode()) if self.permutations else 0
        return ColumnMask(str(self.pattern_of(linear)), permutations=self.permutations, seed=seed)

    def _add_column_mask(self, gm: GraphModule, linear: SparseLinear) -> None:
        dense, mask = dense_and_mask(gm, linear)
        column_mask = mask.clone() if structure_only(gm) else self.rule(linear)(dense, mask)
        fx.set_buffer(gm, f"{linear.name}_column_mask", store_column_mask(gm, linear, column_mask, mask))
        if gm.meta.get(BORROWED):
            rule = replace(self.rule(linear), transposed=linear.held.transposed)
            derive(gm, f"{linear.name}_column_mask", Derived(rule, (linear.name, f"{linear.name}_mask")))

    def schedule(self, graph: GraphModule, optimizer: torch.optim.Optimizer, total_steps: int) -> Iterable[Event]:
        if self.every:
            yield _Refresh(self, graph)


class _Refresh(Event):
    """Chooses the surviving columns anew every few optimizer steps, in place, and less often the order of the rows.

    Attributes:
        orders: of the rows, by weight; at first those that the rewrite found.
    """

    def __init__(self, owner: DoublePruneBackward, gm: nn.Module):
        self.owner, self.gm = owner, gm
        self.orders: dict[str, Tensor] = {}
        if owner.permutations:
            self._search(0)

    def _weights(self) -> Iterator[tuple[SparseLinear | ModuleSite, Tensor, Tensor]]:
        """The linears that the pass prunes twice, each with W^R and its mask."""
        for linear in of_pass(self.owner, self.gm):
            if linear["column_mask"] is not None:
                yield linear, *dense_and_mask(self.gm, linear)

    @torch.no_grad()
    def _search(self, step: int) -> None:
        for linear, dense, mask in self._weights():
            order = self.owner.rule(linear, step).order(dense, mask)
            if order is not None:
                self.orders[linear.name] = order

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        searches = bool(self.owner.permutations) and step % self.owner.permute_every == 0
        if searches:
            self._search(step)
        if step % self.owner.every and not searches:
            return
        for linear, dense, mask in self._weights():
            if linear["straight_through"] and bool(mask.all()):
                continue  # its training goes on dense
            order = self.orders.get(linear.name)
            column_mask = self.owner.rule(linear).in_order(
                dense, mask, None if order is None else order.to(mask.device)
            )
            stored = store_column_mask(self.gm, linear, column_mask, mask)
            fx.attribute(self.gm, f"{linear.name}_column_mask").copy_(stored)

    def state_dict(self) -> dict[str, Any]:
        return {"orders": {name: order.cpu() for name, order in self.orders.items()}} if self.orders else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.orders = dict(state["orders"])
