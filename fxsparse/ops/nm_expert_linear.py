"""The ``fxsparse::`` operators of products of routed rows with the compressed N:M weights of their experts.

    y_s = x_s (W_e^R)^T          dx_s = dy_s W_e^{R,C}          dW_e = sum of dy_s^T x_s at kept positions

over the rows s of expert e (`fxsparse.ops.routed` has the offsets). Each expert's matrix is pruned on its own. As in
`fxsparse.ops.nm_linear` only dx is pruned twice, and only where a column mask is given. An expert without rows has a
gradient of zeros.

| operator | computes |
|---|---|
| ``nm_expert_linear(x, values, indices, column_mask?, offsets, n, m)`` | y |
| ``nm_expert_linear_grad_input(dy, values, indices, column_mask?, offsets, n, m)`` | dx |
| ``nm_expert_linear_grad_values(dy, x, indices, offsets, n, m)`` | dW at kept positions |

Shapes: ``x [rows, in]``, ``y`` and ``dy [rows, out]``; ``values``, ``indices`` and ``column_mask`` as in
`fxsparse.ops.nm`, ``[experts, out, ...]``. What runs is a loop over the experts that got rows, which expands one matrix
at a time. The references have no loop over data, so that a compiler can trace them, and multiply all rows by all
experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fxsparse.ops.define import Check, define, implement
from fxsparse.ops.nm import Pattern, gather_kept, kept_columns, unpack
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
    x: Tensor, values: Tensor, indices: Tensor, column_mask: Tensor | None, offsets: Tensor, n: int, m: int
) -> Tensor:
    weight = unpack(values, indices, Pattern(n, m), x.shape[-1])
    return times(weight, x, offsets)


def _grad_input(
    dy: Tensor, values: Tensor, indices: Tensor, column_mask: Tensor | None, offsets: Tensor, n: int, m: int
) -> Tensor:
    return (apart(dy, offsets) @ _twice_pruned(values, indices, column_mask, Pattern(n, m))).sum(0)


def _grad_values(dy: Tensor, x: Tensor, indices: Tensor, offsets: Tensor, n: int, m: int) -> Tensor:
    return gather_kept(apart(dy, offsets).mT @ x, indices, Pattern(n, m))


def _twice_pruned(values: Tensor, indices: Tensor, column_mask: Tensor | None, pattern: Pattern) -> Tensor:
    """W^{R,C}, or W^R without a column mask, of one expert or of all."""
    if column_mask is not None:
        values = torch.where(kept_columns(column_mask, values.shape[-1]), values, 0)
    return unpack(values, indices, pattern, values.shape[-1] // pattern.n * pattern.m)


# --- what runs --------------------------------------------------------------------------------------------------------


def _run(
    x: Tensor, values: Tensor, indices: Tensor, column_mask: Tensor | None, offsets: Tensor, n: int, m: int
) -> Tensor:
    y = x.new_zeros(x.shape[0], values.shape[1])
    for expert, rows in spans(offsets):
        y[rows] = linear(x[rows], unpack(values[expert], indices[expert], Pattern(n, m), x.shape[-1]))
    return y


def _run_grad_input(
    dy: Tensor, values: Tensor, indices: Tensor, column_mask: Tensor | None, offsets: Tensor, n: int, m: int
) -> Tensor:
    dx = dy.new_zeros(dy.shape[0], values.shape[-1] // n * m)
    for expert, rows in spans(offsets):
        columns = None if column_mask is None else column_mask[expert]
        dx[rows] = dy[rows] @ _twice_pruned(values[expert], indices[expert], columns, Pattern(n, m))
    return dx


def _run_grad_values(dy: Tensor, x: Tensor, indices: Tensor, offsets: Tensor, n: int, m: int) -> Tensor:
    pattern = Pattern(n, m)
    dvalues = dy.new_zeros(*indices.shape[:-1], pattern.kept(x.shape[-1]))
    for expert, rows in spans(offsets):
        dvalues[expert] = gather_kept(dy[rows].t() @ x[rows], indices[expert], pattern)
    return dvalues


# --- checks and shapes ------------------------------------------------------------------------------------------------


def _compressed(
    check: Check,
    shape: tuple[int, int, int],
    values: Tensor | None,
    indices: Tensor,
    column_mask: Tensor | None,
    pattern: Pattern,
) -> None:
    """The parts of compressed weights of a shape ``[experts, out, in]``."""
    experts, out, in_features = shape
    check.require(
        in_features % pattern.m == 0, f"{in_features} columns are not a multiple of {pattern.m}, as {pattern} needs"
    )
    kept = pattern.kept(in_features)
    check.tensor("values", values, (experts, out, kept))
    check.tensor("indices", indices, (experts, out, pattern.index_bytes(in_features)), torch.uint8)
    check.tensor("column_mask", column_mask, (experts, out, -(-kept // 8)), torch.uint8)


def _output(
    name: str,
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    column_mask: Tensor | None,
    offsets: Tensor,
    n: int,
    m: int,
) -> Output:
    check = Check(name, x)
    check_experts(check, "values", values)
    experts, out, _ = values.shape
    check_rows(check, x, offsets, experts)
    _compressed(check, (experts, out, x.shape[-1]), values, indices, column_mask, Pattern(n, m))
    return x, (x.shape[0], out)


def _grad_input_output(
    name: str,
    dy: Tensor,
    values: Tensor,
    indices: Tensor,
    column_mask: Tensor | None,
    offsets: Tensor,
    n: int,
    m: int,
) -> Output:
    check, pattern = Check(name, dy), Pattern(n, m)
    check_experts(check, "values", values)
    experts, _, kept = values.shape
    check_rows(check, dy, offsets, experts)
    in_features = kept // pattern.n * pattern.m
    _compressed(check, (experts, dy.shape[-1], in_features), values, indices, column_mask, pattern)
    return dy, (dy.shape[0], in_features)


def _grad_values_output(name: str, dy: Tensor, x: Tensor, indices: Tensor, offsets: Tensor, n: int, m: int) -> Output:
    check, pattern = Check(name, dy), Pattern(n, m)
    check_experts(check, "indices", indices)
    experts, out, _ = indices.shape
    check_rows(check, dy, offsets, experts)
    check.tensor("x", x, (dy.shape[0], x.shape[-1]))
    _compressed(check, (experts, dy.shape[-1], x.shape[-1]), None, indices, None, pattern)
    return dy, (experts, out, pattern.kept(x.shape[-1]))


# --- gradient ---------------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, indices, column_mask, offsets, ctx.n, ctx.m = inputs
    needs = ctx.needs_input_grad
    ctx.save_for_backward(x if needs[1] else None, values if needs[0] else None, indices, column_mask, offsets)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, values, indices, column_mask, offsets = ctx.saved_tensors
    needs_x, needs_values, *_ = ctx.needs_input_grad
    dx = nm_expert_linear_grad_input(dy, values, indices, column_mask, offsets, ctx.n, ctx.m) if needs_x else None
    dvalues = nm_expert_linear_grad_values(dy, x, indices, offsets, ctx.n, ctx.m) if needs_values else None
    return dx, dvalues, None, None, None, None, None


# --- the operators ----------------------------------------------------------------------------------------------------

nm_expert_linear_grad_input = define(
    Operator(
        "nm_expert_linear_grad_input",
        "Tensor dy, Tensor values, Tensor indices, Tensor? column_mask, Tensor offsets, int n, int m",
        _grad_input,
        _grad_input_output,
        grad_input_flops,
    )
)

nm_expert_linear_grad_values = define(
    Operator(
        "nm_expert_linear_grad_values",
        "Tensor dy, Tensor x, Tensor indices, Tensor offsets, int n, int m",
        _grad_values,
        _grad_values_output,
        grad_weight_flops,
    )
)

nm_expert_linear = define(
    Operator(
        "nm_expert_linear",
        "Tensor x, Tensor values, Tensor indices, Tensor? column_mask, Tensor offsets, int n, int m",
        _linear,
        _output,
        linear_flops,
        _save,
        _backward,
        gradients=("nm_expert_linear_grad_input", "nm_expert_linear_grad_values"),
    )
)

for _device in ("cpu", "cuda"):
    implement(nm_expert_linear, _device)(_run)
    implement(nm_expert_linear_grad_input, _device)(_run_grad_input)
    implement(nm_expert_linear_grad_values, _device)(_run_grad_values)
