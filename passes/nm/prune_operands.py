"""Pruning inputs or output gradients in the place of weights: SLoPe's ablation (arXiv 2405.16325, appendix).

SLoPe asks which matrix of a training step bears n:m pruning best: weights (``nm-masks,double-prune``), inputs, or
gradients of outputs. Here are the other two, chosen anew in every step, with dense weights and their optimizer; the
formulas are in `fxsparse.ops.pruned_operands`.

It is a pass of its own and no option of ``double-prune``, because there is no W^R to prune twice.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.errors import RewriteError
from fxsparse.graph import Linear
from fxsparse.graph.record import Change, rewrote, skipped
from fxsparse.ops.nm import Pattern, PatternText
from fxsparse.ops.pruned_operands import Matrix
from fxsparse.options import Globs
from fxsparse.passes.base import Pass
from fxsparse.passes.nm.branch import Additions


@dataclass(frozen=True)
class PruneOperands(Pass):
    """Prunes the inputs of linears, or the gradients of their outputs, n:m in every step.

    Attributes:
        matrix: ``inputs``, in the forward pass and in both products of the backward, or ``gradients``, in the backward;
            weights are pruned by ``nm-masks,double-prune``.
        pattern: ``n:m``, along the dimension that each product sums over.
        exclude: globs over module paths of linears to leave alone.
        keep_first: leave the first linears after the input alone.
        keep_head: leave the heads alone.

    Raises:
        OptionError: an option is out of range.
        RewriteError: a glob matches no linear.
    """

    name: ClassVar[str] = "prune-operands"
    rest: ClassVar[str] = "left alone, operands of linears are pruned"
    cannot_follow: ClassVar[tuple[str, ...]] = ("select-tensors",)
    no_module: ClassVar[str] = "it prunes what linears are given in every step, and no module does; keep the graph form"
    matrix: Matrix = "inputs"
    pattern: PatternText = "2:4"
    exclude: Globs = ()
    keep_first: bool = True
    keep_head: bool = True

    def rewrite(self, graph: GraphModule) -> Iterable[Change]:
        linears = list(fx.linears(graph))
        for glob in self.exclude:
            if not any(fnmatch.fnmatchcase(linear.path, glob) for linear in linears):
                shown = ", ".join(linear.path for linear in linears[:4])
                raise RewriteError(
                    f"the glob {glob!r} matches no linear; there are: {shown or 'none'}", pass_name=self.name
                )
        first = fx.first_linears(graph) if self.keep_first else set()
        heads = fx.head_linears(graph) if self.keep_head else set()
        additions = Additions(graph)
        for linear in linears:
            reason = additions.reason(linear.name) or self._misfit(linear)
            if linear.node in heads:
                reason = reason or "it is a head (keep_head=False prunes there)"
            if linear.node in first:
                reason = reason or "it is the first linear after the input (keep_first=False prunes there)"
            if reason:
                yield skipped(linear.path, f"left alone, {reason}")
            else:
                self._replace(graph, linear)
                yield rewrote(linear.path, f"{self.matrix} {self.pattern}")

    def _misfit(self, linear: Linear) -> str | None:
        for glob in self.exclude:
            if fnmatch.fnmatchcase(linear.path, glob):
                return f"excluded by {glob!r}"
        dtype = fx.value(linear.weight).dtype
        if not dtype.is_floating_point:
            return f"its weight is {dtype}, not a real floating-point type"
        size, m = linear.in_features if self.matrix == "inputs" else linear.out_features, Pattern.parse(self.pattern).m
        return f"{size} features, not a multiple of {m}" if size % m else None

    def _replace(self, gm: GraphModule, linear: Linear) -> None:
        pattern = Pattern.parse(self.pattern)

        def pruned(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            rows = weight.t() if linear.transposed else weight
            return torch.ops.fxsparse.pruned_operand_linear(x, rows, bias, pattern.n, pattern.m, self.matrix)

        result = fx.insert_function(gm, pruned, linear.input, linear.weight, linear.bias, before=linear.node)
        fx.replace(linear.node, result)
