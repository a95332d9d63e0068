"""Norms of the inputs of linears over calibration batches, as Wanda weighs magnitudes with (arXiv 2306.11695, eq.
1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.analysis.calibration import call, does_not_run
from fxsparse.errors import RewriteError
from fxsparse.graph import ExpertLinear, Linear


class _SquareSum(nn.Module):
    """Sums the squares of an input per feature; of experts, per feature of the rows that each reads.

    Args:
        experts: how many; 0 for a linear.
        form: of their product.
    """

    def __init__(self, experts: int = 0, form: str = "") -> None:
        super().__init__()
        self.experts, self.form = experts, form
        self.total: Tensor | None = None

    def forward(self, x: Tensor, routing: Tensor | None = None) -> None:
        squares = x.detach().float().square()
        squares = self._by_expert(squares, routing) if self.experts else squares.flatten(0, -2).sum(0)
        self.total = squares if self.total is None else self.total + squares

    def _by_expert(self, squares: Tensor, routing: Tensor | None) -> Tensor:
        if routing is None:
            return squares.sum(1)
        if self.form == "grouped":  # rows behind the last offset belong to nobody
            places = torch.arange(len(squares), device=squares.device, dtype=routing.dtype)
            routing = torch.searchsorted(routing, places, right=True)
        sums = squares.new_zeros(self.experts + 1, squares.shape[-1])
        return sums.index_add_(0, routing.clamp(max=self.experts).long(), squares)[:-1]

    @property
    def norms(self) -> Tensor | None:
        """Float32 ``[in]``, or ``[experts, 1, in]``: 1 of an expert that no row was routed to."""
        if self.total is None or not self.experts:
            return None if self.total is None else self.total.sqrt()
        idle = ~self.total.any(1, keepdim=True)
        return self.total.sqrt().masked_fill(idle, 1).unsqueeze(1)


def activation_norms(
    gm: GraphModule,
    linears: Sequence[Linear | ExpertLinear],
    batches: Iterable[Any],
    *,
    pass_name: str = "nm-masks",
) -> dict[str, Tensor]:
    """The L2 norm of every input feature, over all tokens of all batches, in evaluation mode and without gradients.

    Args:
        gm: the traced graph module; it is not changed.
        linears: the linears, and products of experts, to observe; those that share a weight are summed.
        batches: mappings of keyword arguments, tuples of arguments, or single tensors.

    Returns:
        by weight name, float32 ``[in]``; of experts ``[experts, 1, in]``, over the rows that each reads, and 1 for an
        expert that reads none.

    Raises:
        RewriteError: there are no batches, or one does not run through the model.
    """
    observed = fx.copy_sharing_state(gm)
    sums: dict[str, _SquareSum] = {}
    nodes = {node.name: node for node in observed.graph.nodes}
    for linear in linears:
        of_experts = (linear.experts, linear.form) if isinstance(linear, ExpertLinear) else ()
        routing = linear.routing if isinstance(linear, ExpertLinear) else None
        observer = sums.setdefault(linear.name, _SquareSum(*of_experts))
        node = nodes[linear.node.name]
        target = f"observer_{len(sums)}_{node.name}"
        observed.add_submodule(target, observer)
        with observed.graph.inserting_before(node):
            read = tuple(nodes[source.name] for source in (linear.input, routing) if source is not None)
            observed.graph.call_module(target, read)
    observed.recompile()
    observed.eval()
    count = 0
    with torch.no_grad():
        for batch in batches:
            try:
                call(observed, batch)
            except Exception as error:
                raise does_not_run(count, error, pass_name) from error
            count += 1
    if not count:
        raise RewriteError("the calibration holds no batch", pass_name=pass_name)
    return {name: norms for name, observer in sums.items() if (norms := observer.norms) is not None}
