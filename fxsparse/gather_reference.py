"""The operators of ``fxsparse.gather_ops`` in plain torch: what every other implementation must equal."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from fxsparse.reference import outer


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
