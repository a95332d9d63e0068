"""The ``fxsparse::`` operators of products of routed rows with the masked dense weights of their experts.

    y_s = x_s (W_e * M_e)^T      dx_s = dy_s (W_e * M_e * C_e)      dW_e = (sum of dy_s^T x_s) * M_e

They compute what those of `fxsparse.ops.nm_expert_linear` do, on a weight whose mask may change. ``straight_through``
gives pruned weights the gradient they would have if they took part (SR-STE, arXiv 2102.04010).

| operator | computes |
|---|---|
| ``masked_expert_linear(x, weight, mask, column_mask?, offsets, straight_through=False)`` | y |
| ``masked_expert_linear_grad_input(dy, weight, mask, column_mask?, offsets)`` | dx |
| ``masked_expert_linear_grad_weight(dy, x, mask?, offsets)`` | dW, zero where pruned; of all weights without a mask |

Shapes: ``x [rows, in]``, ``y`` and ``dy [rows, out]``; ``weight``, ``mask`` and ``column_mask [experts, out, in]``, the
masks bool. What runs, and what the references are for, is as in `fxsparse.ops.nm_expert_linear`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fxsparse.ops.define import Check, define, implement
from fxsparse.ops.operator import Operator, Output
from fxsparse.ops.routed import (
    apart,
    check_experts,
    check_rows,
    grad_input_flops,
    grad_weight_flops,
    linear_flops,
    spans,
    times,
)

# --- references -------------------------------------------------------------------------------------------------------


def _linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    column_mask: Tensor | None,
    offsets: Tensor,
    straight_through: bool = False,
) -> Tensor:
    return times(torch.where(mask, weight, 0), x, offsets)


def _grad_input(dy: Tensor, weight: Tensor, mask: Tensor, column_mask: Tensor | None, offsets: Tensor) -> Tensor:
    mask = mask if column_mask is None else mask & column_mask
    return (apart(dy, offsets) @ torch.where(mask, weight, 0)).sum(0)


def _grad_weight(dy: Tensor, x: Tensor, mask: Tensor | None, offsets: Tensor) -> Tensor:
    dense = apart(dy, offsets).mT @ x
    return dense if mask is None else torch.where(mask, dense, 0).contiguous()


# --- what runs --------------------------------------------------------------------------------------------------------


def _run(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    column_mask: Tensor | None,
    offsets: Tensor,
    straight_through: bool = False,
) -> Tensor:
    y = x.new_zeros(x.shape[0], weight.shape[1])
    for expert, rows in spans(offsets):
        y[rows] = linear(x[rows], torch.where(mask[expert], weight[expert], 0))
    return y


def _run_grad_input(dy: Tensor, weight: Tensor, mask: Tensor, column_mask: Tensor | None, offsets: Tensor) -> Tensor:
    dx = dy.new_zeros(dy.shape[0], weight.shape[-1])
    for expert, rows in spans(offsets):
        kept = mask[expert] if column_mask is None else mask[expert] & column_mask[expert]
        dx[rows] = dy[rows] @ torch.where(kept, weight[expert], 0)
    return dx


def _run_grad_weight(dy: Tensor, x: Tensor, mask: Tensor | None, offsets: Tensor) -> Tensor:
    dweight = dy.new_zeros(len(offsets), dy.shape[-1], x.shape[-1])
    for expert, rows in spans(offsets):
        dense = dy[rows].t() @ x[rows]
        dweight[expert] = dense if mask is None else torch.where(mask[expert], dense, 0)
    return dweight


# --- checks and shapes ------------------------------------------------------------------------------------------------


def _output(
    name: str,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    column_mask: Tensor | None,
    offsets: Tensor,
    straight_through: bool = False,
) -> Output:
    check = Check(name, x)
    check_experts(check, "weight", weight)
    experts, out, _ = weight.shape
    check_rows(check, x, offsets, experts)
    check.masked((experts, out, x.shape[-1]), weight, mask, column_mask)
    return x, (x.shape[0], out)


def _grad_input_output(
    name: str, dy: Tensor, weight: Tensor, mask: Tensor, column_mask: Tensor | None, offsets: Tensor
) -> Output:
    check = Check(name, dy)
    check_experts(check, "weight", weight)
    experts, _, in_features = weight.shape
    check_rows(check, dy, offsets, experts)
    check.masked((experts, dy.shape[-1], in_features), weight, mask, column_mask)
    return dy, (dy.shape[0], in_features)


def _grad_weight_output(name: str, dy: Tensor, x: Tensor, mask: Tensor | None, offsets: Tensor) -> Output:
    check = Check(name, dy)
    check.require(offsets.dim() == 1, f"offsets are {list(offsets.shape)}, expected one for each expert")
    experts = offsets.shape[0]
    check_rows(check, dy, offsets, experts)
    check.tensor("x", x, (dy.shape[0], x.shape[-1]))
    shape = (experts, dy.shape[-1], x.shape[-1])
    check.masked(shape, None, mask, None)
    return dy, shape


# --- gradient ---------------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, mask, column_mask, offsets, ctx.straight_through = inputs
    needs = ctx.needs_input_grad
    ctx.save_for_backward(x if needs[1] else None, weight if needs[0] else None, mask, column_mask, offsets)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, mask, column_mask, offsets = ctx.saved_tensors
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    dx = masked_expert_linear_grad_input(dy, weight, mask, column_mask, offsets) if needs_x else None
    kept = None if ctx.straight_through else mask
    dweight = masked_expert_linear_grad_weight(dy, x, kept, offsets) if needs_weight else None
    return dx, dweight, None, None, None, None


# --- the operators ----------------------------------------------------------------------------------------------------

masked_expert_linear_grad_input = define(
    Operator(
        "masked_expert_linear_grad_input",
        "Tensor dy, Tensor weight, Tensor mask, Tensor? column_mask, Tensor offsets",
        _grad_input,
        _grad_input_output,
        grad_input_flops,
    )
)

masked_expert_linear_grad_weight = define(
    Operator(
        "masked_expert_linear_grad_weight",
        "Tensor dy, Tensor x, Tensor? mask, Tensor offsets",
        _grad_weight,
        _grad_weight_output,
        grad_weight_flops,
    )
)

masked_expert_linear = define(
    Operator(
        "masked_expert_linear",
        "Tensor x, Tensor weight, Tensor mask, Tensor? column_mask, Tensor offsets, bool straight_through=False",
        _linear,
        _output,
        linear_flops,
        _save,
        _backward,
        gradients=("masked_expert_linear_grad_input", "masked_expert_linear_grad_weight"),
    )
)

for _device in ("cpu", "cuda"):
    implement(masked_expert_linear, _device)(_run)
    implement(masked_expert_linear_grad_input, _device)(_run_grad_input)
    implement(masked_expert_linear_grad_weight, _device)(_run_grad_weight)
