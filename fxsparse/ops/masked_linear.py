"""The ``fxsparse::`` operators of a linear on a dense weight with a mask.

    y  = x (W * M)^T + b         dx = dy (W * M * C)         dW = (dy^T x) * M         db = sum of dy

They compute what those of `fxsparse.ops.nm_linear` do, on a weight whose mask may change. ``straight_through`` gives
pruned weights the gradient they would have if they took part (SR-STE, arXiv 2102.04010).

| operator | computes |
|---|---|
| ``masked_linear(x, weight, mask, column_mask?, bias?, straight_through=False)`` | y |
| ``masked_linear_grad_input(dy, weight, mask, column_mask?)`` | dx |
| ``masked_linear_grad_weight(dy, x, mask?)`` | dW, zero where pruned; of all weights without a mask |

Shapes: ``x [*, in]``, ``y`` and ``dy [*, out]``; ``weight``, ``mask`` and ``column_mask [out, in]``, the masks bool;
``bias [out]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fxsparse.ops import flops
from fxsparse.ops.define import Check, define
from fxsparse.ops.operator import Operator, Output
from fxsparse.ops.reference import bias_gradient, outer_product

_Gradients = tuple[Tensor | None, ...]


# --- references -------------------------------------------------------------------------------------------------------


def _masked_linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    column_mask: Tensor | None,
    bias: Tensor | None,
    straight_through: bool = False,
) -> Tensor:
    """``x (weight * mask)^T + bias``."""
    return linear(x, torch.where(mask, weight, 0), bias)


def _grad_input(dy: Tensor, weight: Tensor, mask: Tensor, column_mask: Tensor | None) -> Tensor:
    """``dy (weight * mask * column_mask)``."""
    if column_mask is not None:
        mask = mask & column_mask
    return dy @ torch.where(mask, weight, 0)


def _grad_weight(dy: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """``(dy^T x) * mask``; without a mask the gradient of the dense weight."""
    dense = outer_product(dy, x)
    return dense if mask is None else torch.where(mask, dense, 0).contiguous()


# --- checks and shapes ------------------------------------------------------------------------------------------------


def _output(
    name: str,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    column_mask: Tensor | None,
    bias: Tensor | None,
    straight_through: bool = False,
) -> Output:
    check = Check(name, x)
    check.matrix("weight", weight)
    rows = weight.shape[0]
    check.masked((rows, x.shape[-1]), weight, mask, column_mask)
    check.tensor("bias", bias, (rows,))
    return x, (*x.shape[:-1], rows)


def _grad_input_output(name: str, dy: Tensor, weight: Tensor, mask: Tensor, column_mask: Tensor | None) -> Output:
    check = Check(name, dy)
    check.matrix("weight", weight)
    check.masked((dy.shape[-1], weight.shape[1]), weight, mask, column_mask)
    return dy, (*dy.shape[:-1], weight.shape[1])


def _grad_weight_output(name: str, dy: Tensor, x: Tensor, mask: Tensor | None) -> Output:
    check, shape = Check(name, dy), (dy.shape[-1], x.shape[-1])
    check.tensor("x", x, (*dy.shape[:-1], x.shape[-1]))
    check.masked(shape, None, mask, None)
    return dy, shape


# --- gradient ---------------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, mask, column_mask, _, ctx.straight_through = inputs
    needs = ctx.needs_input_grad
    ctx.save_for_backward(x if needs[1] else None, weight if needs[0] else None, mask, column_mask)


def gradients(
    ctx: Any, dy: Tensor, x: Tensor, weight: Tensor, mask: Tensor, column_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """dx and dW, where they are needed."""
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    dx = masked_linear_grad_input(dy, weight, mask, column_mask) if needs_x else None
    return dx, masked_linear_grad_weight(dy, x, None if ctx.straight_through else mask) if needs_weight else None


def _backward(ctx: Any, dy: Tensor) -> _Gradients:
    dx, dweight = gradients(ctx, dy, *ctx.saved_tensors)
    return dx, dweight, None, None, bias_gradient(dy) if ctx.needs_input_grad[4] else None, None


# --- the operators ----------------------------------------------------------------------------------------------------

masked_linear_grad_input = define(
    Operator(
        "masked_linear_grad_input",
        "Tensor dy, Tensor weight, Tensor mask, Tensor? column_mask",
        _grad_input,
        _grad_input_output,
        flops.linear_grad_input,
    )
)

masked_linear_grad_weight = define(
    Operator(
        "masked_linear_grad_weight",
        "Tensor dy, Tensor x, Tensor? mask",
        _grad_weight,
        _grad_weight_output,
        flops.linear_grad_weight,
    )
)

masked_linear = define(
    Operator(
        "masked_linear",
        "Tensor x, Tensor weight, Tensor mask, Tensor? column_mask, Tensor? bias, bool straight_through=False",
        _masked_linear,
        _output,
        flops.linear,
        _save,
        _backward,
        gradients=("masked_linear_grad_input", "masked_linear_grad_weight"),
    )
)
