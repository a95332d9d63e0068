"""SR-STE on a schedule: masks that follow the magnitudes of dense weights, and a pull on the pruned ones.

    grad += decay * (1 - mask) * W       once per optimizer step, before the optimizer
    mask  = top n of m of |W|            after it, every few steps

Zhou et al., arXiv 2102.04010, eq. 9. The pull enters the gradient, so every optimizer treats it as part of the
gradient.

FST (Hu et al., arXiv 2404.01847) ends with dense training, a sixth of all steps: once the last sparse step is done,
masks keep everything and stay so, nothing is pulled any more, and pruned weights take part with the values they have
reached. The masks are the state, so a checkpoint of the model carries it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxsparse import graph as fx
from fxsparse.graph.sharded import cut_like, whole
from fxsparse.modules.sites import ModuleSite
from fxsparse.passes.base import Pass
from fxsparse.passes.event import Event
from fxsparse.passes.nm.rules import NMMask
from fxsparse.passes.nm.sparse_linear import SparseLinear, of_pass


class DynamicMasks(Event):
    """Moves the masks of the straight-through linears of a graph, or of its module form.

    Args:
        owner: the pass, whose linears move.
        gm: the rewritten graph module or module.
        decay: the pull on pruned weights.
        every: optimizer steps between two masks.
        transposable: n of m along both dimensions.
        dense_from: the number of sparse steps; all later ones are dense. None if all are sparse.
    """

    def __init__(
        self,
        owner: Pass,
        gm: nn.Module,
        *,
        decay: float,
        every: int,
        transposable: bool,
        dense_from: int | None = None,
    ):
        self.owner, self.gm, self.decay, self.every, self.transposable = owner, gm, decay, every, transposable
        self.dense_from = dense_from
        self.is_open = False
        self.overlap: Tensor | float | None = None  # share of the kept weights that the masks before kept too

    def _weights(self) -> list[SparseLinear | ModuleSite]:
        return [linear for linear in of_pass(self.owner, self.gm) if linear["straight_through"]]

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        if self.dense_from is not None and step > self.dense_from:
            return
        pulled: set[int] = set()
        for linear in self._weights():
            weight, mask = fx.attribute(self.gm, linear.name), fx.attribute(self.gm, f"{linear.name}_mask")
            if weight.grad is not None and self.decay and id(weight) not in pulled:
                pulled.add(id(weight))  # modules may share a weight
                pruned = ~(mask.mT if linear.held.transposed else mask)
                weight.grad.add_(weight * cut_like(pruned, weight), alpha=self.decay)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if self.dense_from is not None and step >= self.dense_from:
            self._open()
            return
        self.is_open = False  # after an earlier step was loaded
        if step % self.every:
            return
        again: list[Tensor] = []
        kept: list[Tensor] = []
        for linear in self._weights():
            rule = NMMask(linear.held.pattern, transposable=self.transposable, transposed=linear.held.transposed)
            mask, chosen = fx.attribute(self.gm, f"{linear.name}_mask"), rule(whole(fx.attribute(self.gm, linear.name)))
            again.append((mask & chosen).sum())
            kept.append(chosen.sum())
            mask.copy_(chosen)
        self.overlap = _total(again) / _total(kept) if kept else None

    def _open(self) -> None:
        """Lets every weight take part, in both passes."""
        for linear in () if self.is_open else self._weights():
            fx.attribute(self.gm, f"{linear.name}_mask").fill_(True)
            if linear["column_mask"] is not None:
                fx.attribute(self.gm, f"{linear.name}_column_mask").fill_(True)
        self.is_open = True

    def values(self) -> dict[str, float]:
        return {} if self.overlap is None else {"mask_overlap": float(self.overlap)}

    def state_dict(self) -> dict[str, Any]:
        return {"overlap": None if self.overlap is None else float(self.overlap)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.overlap = state["overlap"]


def _total(counts: list[Tensor]) -> Tensor:
    return torch.stack([count.to(counts[0].device) for count in counts]).sum()


def _in_graph(linear: SparseLinear | ModuleSite) -> str:
    """The name that a weight has, or had, in the graph."""
    return linear.form.name if isinstance(linear, ModuleSite) else linear.name
