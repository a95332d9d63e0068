"""The operators of ``fxsparse.ops`` in plain torch: what every other implementation must equal.

They have no control flow on data and write nothing in place, so a compiler may inline them and fuse what is inside; the
int64 positions that unpacking scatters by are then never in memory.

Shapes: ``x [*, in]``, ``dy [*, out]``; an N:M weight as in ``fxsparse.nm``; ``weight``, ``mask``, dense ``column_mask``
``[out, in]``; ``bias [out]``; ``down [r, in]``, ``up [out, r]``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from fxsparse.nm import Pattern, gather_kept, kept_columns, unpack


def nm_linear(
    x: Tensor, values: Tensor, indices: Tensor, column_mask: Tensor | None, bias: Tensor | None, n: int, m: int
) -> Tensor:
    """``x (W^R)^T + bias``."""
    return linear(x, unpack(values, indices, Pattern(n, m), x.shape[-1]), bias)


def nm_linear_grad_input(
    dy: Tensor, values: Tensor, indices: Tensor, column_mask: Tensor | None, n: int, m: int
) -> Tensor:
    """``dy W^{R,C}``, or ``dy W^R`` without a column mask."""
    if column_mask is not None:
        values = torch.where(kept_columns(column_mask, values.shape[1]), values, 0)
    return dy @ unpack(values, indices, Pattern(n, m), values.shape[1] // n * m)


def nm_linear_grad_values(dy: Tensor, x: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    """``dy^T x`` at the kept positions, ``[out, in * n / m]``."""
    return gather_kept(outer(dy, x), indices, Pattern(n, m))


def nm_linear_low_rank(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    column_mask: Tensor | None,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    scale: float | None = None,
) -> Tensor:
    """``x (W^R)^T + scale (x down^T) up^T + bias``; the scale is 1 / r unless given."""
    return nm_linear(x, values, indices, column_mask, bias, n, m) + _branch(x, down, up, scale)


def masked_linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    column_mask: Tensor | None,
    bias: Tensor | None,
    straight_through: bool = False,
) -> Tensor:
    """``x (weight * mask)^T + bias``."""
    return linear(x, torch.where(mask, weight, 0), bias)


def masked_linear_grad_input(dy: Tensor, weight: Tensor, mask: Tensor, column_mask: Tensor | None) -> Tensor:
    """``dy (weight * mask * column_mask)``."""
    if column_mask is not None:
        mask = mask & column_mask
    return dy @ torch.where(mask, weight, 0)


def masked_linear_grad_weight(dy: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """``(dy^T x) * mask``; without a mask the gradient of the dense weight."""
    dense = outer(dy, x)
    return dense if mask is None else torch.where(mask, dense, 0).contiguous()


def masked_linear_low_rank(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    column_mask: Tensor | None,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    straight_through: bool = False,
    scale: float | None = None,
) -> Tensor:
    """``x (weight * mask)^T + scale (x down^T) up^T + bias``; the scale is 1 / r unless given."""
    return masked_linear(x, weight, mask, column_mask, bias) + _branch(x, down, up, scale)


def low_rank_scale(down: Tensor, scale: float | None) -> float:
    """What a branch is multiplied by."""
    return 1 / down.shape[0] if scale is None else scale


def low_rank_hidden(x: Tensor, down: Tensor, scale: float | None) -> Tensor:
    """``scale x down^T [*, r]``; scaled here and not after ``up``, where fp16 could have overflowed."""
    return linear(x, down) * low_rank_scale(down, scale)


def outer(dy: Tensor, x: Tensor) -> Tensor:
    """``dy^T x`` summed over all leading dimensions, ``[out, in]``."""
    return dy.reshape(-1, dy.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


def _branch(x: Tensor, down: Tensor, up: Tensor, scale: float | None) -> Tensor:
    return linear(low_rank_hidden(x, down, scale), up)
