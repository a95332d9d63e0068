"""SparseGPT: n:m masks by the optimal brain surgeon, and weights that make up for what is pruned (arXiv 2301.00774).

    H     = X^T X + damping        of a linear's inputs; damping is 1 % of the mean of the diagonal, on the diagonal
    U     upper, U^T U = H^-1      row i of U is what pruning weight i asks of those behind it
    group of m columns             of each row the n with the largest (w_i / U_ii)^2 stay
    pruned w_i                     W[:, i:] -= (w_i / U_ii) U[i, i:]

Columns go from left to right, 128 at a time: inside such a block every pruned column updates the block at once, and the
columns behind it are updated when the block is done. A group's scores are of weights that everything before it updated.

Paper and code leave open, or differ in, and this does:

- **What is calibrated through.** The authors' code collects the inputs of all linears of a transformer layer before it
  prunes any of them, and runs the next layer behind the pruned one. Here each linear is observed behind all that were
  pruned before it, in its own layer too, which needs no notion of a layer and no more runs.
- **Inputs that are always zero.** Their weights become zero, as in the code. The code sets their diagonal to 1 before
  it averages, so its damping depends on how inputs are scaled; here they count as zero in the average.
- **A linear that no calibration token reaches** (an expert) has nothing to be measured by: its largest magnitudes stay,
  unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.analysis.calibration import Site, sequentially
from fxsparse.errors import RewriteError
from fxsparse.graph import Linear
from fxsparse.ops.nm import Pattern, nm_mask, transposable_mask

DAMPING = 0.01
"""Share of the mean of the diagonal that is added to it."""

_BLOCK = 128  # columns updated together


@dataclass(frozen=True, eq=False)
class Pruned:
    """A weight that SparseGPT pruned.

    Attributes:
        weight: ``[out, in]``, zero where pruned, of the dtype of the original.
        mask: bool ``[out, in]``.
        error: squared change of the linear's outputs over the calibration, relative to their squared size; None if no
            input was ever other than zero.
    """

    weight: Tensor
    mask: Tensor
    error: float | None

    def __str__(self) -> str:
        return "no calibration input reached it" if self.error is None else f"output error {self.error:.2g}"


def sparsegpt(
    gm: GraphModule, chosen: list[tuple[list[Linear], Pattern]], batches: Iterable[Any], transposable: bool = False
) -> dict[str, Pruned]:
    """Prunes the weights of linears in order of execution, each behind those pruned before it.

    Args:
        gm: the traced graph module; it is not changed.
        chosen: the linears that share a weight, and its pattern.
        batches: the calibration, as `fxsparse.analysis.calibration.call` takes them.
        transposable: n of m along the output dimension too, in every block of m columns.

    Returns:
        by weight name.

    Raises:
        RewriteError: there are no batches, one does not run through the model, or an input is not finite.
    """
    patterns = {site[0].name: pattern for site, pattern in chosen}
    pruned: dict[str, Pruned] = {}

    def update(site: Site, gram: Tensor) -> Tensor:
        linear = site[0]
        if not gram.isfinite().all():
            raise RewriteError(
                "its inputs are not finite over the calibration batches", pass_name="nm-masks", site=linear.path
            )
        weight = fx.attribute(gm, linear.name).detach()
        dense = weight.t() if linear.transposed else weight
        result = prune(dense, gram.to(dense.device), patterns[linear.name], transposable)
        pruned[linear.name] = result
        return result.weight.t() if linear.transposed else result.weight

    sequentially(gm, [site for site, _ in chosen], batches, update)
    return pruned


def prune(weight: Tensor, gram: Tensor, pattern: Pattern, transposable: bool = False) -> Pruned:
    """Prunes one weight, in float64.

    Args:
        weight: ``[out, in]``.
        gram: X^T X over all inputs, float64 ``[in, in]``, on the weight's device.
        pattern: n:m along ``in``, which is a multiple of m.
        transposable: n of m along ``out`` too.
    """
    search = transposable_mask if transposable else nm_mask
    original = weight.double()
    silent = gram.diagonal() == 0
    reached = not bool(silent.all())
    work = original.masked_fill(silent, 0) if reached else original.clone()
    factor = _factor(gram)
    mask = torch.zeros_like(work, dtype=torch.bool)
    columns = work.shape[1]
    step = pattern.m * max(1, _BLOCK // pattern.m)
    for start in range(0, columns, step):
        end = min(start + step, columns)
        block, upper = work[:, start:end], factor[start:end, start:end]
        errors = torch.zeros_like(block)
        for column in range(end - start):
            if column % pattern.m == 0:
                group = slice(column, column + pattern.m)
                scores = (block[:, group] / upper.diagonal()[group]).square()
                mask[:, start + column : start + column + pattern.m] = search(scores, pattern)
            gone = ~mask[:, start + column]
            errors[:, column] = torch.where(gone, block[:, column] / upper[column, column], 0)
            block[:, column:] -= errors[:, column, None] * upper[column, column:]
            block[:, column].masked_fill_(gone, 0)
        work[:, end:] -= errors @ factor[start:end, end:]
    result = work.to(weight.dtype)
    return Pruned(result, mask, _relative_error(original, result.double(), gram) if reached else None)


def _factor(gram: Tensor) -> Tensor:
    """U, upper and with a positive diagonal: U^T U is the inverse of the damped matrix, or of 1 without inputs."""
    mean = gram.diagonal().mean()
    damped = gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (DAMPING * mean if mean > 0 else 1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def _relative_error(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    """|(W - W') X|^2 / |W X|^2; 0 where both are 0."""
    change = weight - pruned
    size = float((weight @ gram * weight).sum())
    return float((change @ gram * change).sum()) / size if size else 0.0
