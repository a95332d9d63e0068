"""The operators of ``fxsparse.ops.nm_linear`` in plain torch: what every other implementation must equal.

They have no control flow on data and write nothing in place, so a compiler may inline them and fuse what is inside; the
int64 positions that unpacking scatters by are then never in memory.

Shapes: ``x [*, in]``, ``dy [*, out]``; an N:M weight as in ``nm``; ``weight``, ``mask``, dense ``column_mask``
``[out, in]``; ``bias [out]``; ``down [r, in]``, ``up [out, r]``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from fxsparse.ops.nm import Pattern, gather_kept, kept_columns, unpack


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


def gather_linear(
    x: Tensor, weight: Tensor, rows: Tensor | None, columns: Tensor | None, bias: Tensor | None
) -> Tensor:
    """``x S^T + bias[rows]``."""
    if bias is not None and rows is not None:
        bias = bias.index_select(0, rows)
    return linear(x, chosen(weight, rows, columns), bias)


def gather_linear_grad_input(dy: Tensor, weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """``dy S``."""
    return dy @ chosen(weight, rows, columns)


def gather_linear_grad_weight(
    dy: Tensor, x: Tensor, rows: Tensor | None, columns: Tensor | None, out_features: int, in_features: int
) -> Tensor:
    """``dy^T x`` at the chosen rows and columns of ``[out_features, in_features]``, zero elsewhere."""
    grad = outer(dy, x)
    if columns is not None:
        grad = grad.new_zeros(grad.shape[0], in_features).index_copy(1, columns, grad)
    return spread(grad, rows, out_features)


def spread(part: Tensor, rows: Tensor | None, out_features: int) -> Tensor:
    """``part`` at the chosen rows of a tensor with ``out_features`` rows, zero elsewhere."""
    if rows is None:
        return part
    return part.new_zeros(out_features, *part.shape[1:]).index_copy(0, rows, part)


def chosen(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """``S = weight[rows][:, columns]``."""
    if rows is not None:
        weight = weight.index_select(0, rows)
    return weight if columns is None else weight.index_select(1, columns)


def mux(x: Tensor, keys: Tensor, n: int) -> Tensor:
    """``1/n sum of keys[i] * x[g n + i]``, ``[groups, ..., dim]``."""
    return (members_of(x, n) * beside_positions(keys, x)).sum(1) / n


def demux_linear(h: Tensor, keys: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``weight [key_i ; h[g]] + bias``, ``[groups * N, ..., out]``."""
    key_dim = keys.shape[-1]
    projected = linear(keys, weight[:, :key_dim], bias)
    product = linear(h, weight[:, key_dim:])
    return (product.unsqueeze(1) + beside_positions(projected, product)).flatten(0, 1)


def members_of(x: Tensor, n: int) -> Tensor:
    """``[groups * n, ...]`` as ``[groups, n, ...]``."""
    return x.unflatten(0, (-1, n))


def beside_positions(keys: Tensor, x: Tensor) -> Tensor:
    """Keys ``[(groups,) N, dim]`` with dimensions of size 1 for those between the first and the last of ``x``."""
    return keys[(..., *(None,) * (x.dim() - 2), slice(None))]
