"""Norms of the inputs of linears over calibration batches, as Wanda weighs magnitudes with (arXiv 2306.11695, eq.
1)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.analysis.calibration import call, does_not_run
from fxsparse.errors import RewriteError
from fxsparse.graph import Linear


class _SquareSum(nn.Module):
    """Passes its input on and sums its squares per feature."""

    def __init__(self) -> None:
        super().__init__()
        self.total: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        squares = x.detach().float().square().flatten(0, -2).sum(0)
        self.total = squares if self.total is None else self.total + squares
        return x


def activation_norms(
    gm: GraphModule, linears: list[Linear], batches: Iterable[Any], *, pass_name: str = "nm-masks"
) -> dict[str, Tensor]:
    """The L2 norm of every input feature, over all tokens of all batches, in evaluation mode and without gradients.

    Args:
        gm: the traced graph module; it is not changed.
        linears: the linears to observe; those that share a weight are summed.
        batches: mappings of keyword arguments, tuples of arguments, or single tensors.

    Returns:
        by weight name, float32 ``[in]``.

    Raises:
        RewriteError: there are no batches, or one does not run through the model.
    """
    observed = fx.copy_sharing_state(gm)
    sums: dict[str, _SquareSum] = {}
    nodes = {node.name: node for node in observed.graph.nodes}
    for linear in linears:
        observer = sums.setdefault(linear.name, _SquareSum())
        node = nodes[linear.node.name]
        source = nodes[linear.input.name]
        target = f"observer_{len(sums)}_{node.name}"
        observed.add_submodule(target, observer)
        with observed.graph.inserting_before(node):
            node.replace_input_with(source, observed.graph.call_module(target, (source,)))
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
    return {name: observer.total.sqrt() for name, observer in sums.items() if observer.total is not None}
