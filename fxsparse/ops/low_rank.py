"""The ``fxsparse::`` operators of a sparse linear with a low-rank branch beside it, in one call.

    y = x (W^R)^T + scale (x down^T) up^T + b

    dx     = dy W^{R,C} + scale (dy up) down          ddown = scale (dy up)^T x
    dW, db   as without the branch                    dup   = scale dy^T (x down^T)

(SLoPe, arXiv 2405.16325, section on lazy low-rank adapters.) The scale is 1 / r unless given, that of SLoPe's code.

    nm_linear_low_rank(x, values, indices, column_mask?, down, up, bias?, n, m, scale=None)
    masked_linear_low_rank(x, weight, mask, column_mask?, down, up, bias?, straight_through=False, scale=None)

Shapes: those of the product, ``down [r, in]`` and ``up [out, r]``. The extra size of a `Problem` is the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from fxsparse.ops import flops, masked_linear, nm_linear
from fxsparse.ops.define import Check, define
from fxsparse.ops.flops import Operand, rows_times
from fxsparse.ops.operator import (
    COMPRESSED,
    DENSE,
    REFERENCE,
    SPARSE_TENSOR_CORES,
    SPARSE_WGMMA,
    Operands,
    Operator,
    Output,
    Problem,
    Random,
    Sizes,
    Tiles,
)
from fxsparse.ops.reference import bias_gradient, outer_product

_Gradients = tuple[Tensor | None, ...]


# --- the branch -------------------------------------------------------------------------------------------------------


def _scale(down: Tensor, scale: float | None) -> float:
    return 1 / down.shape[0] if scale is None else scale


def _hidden(x: Tensor, down: Tensor, scale: float | None) -> Tensor:
    """``scale x down^T [*, r]``; scaled here and not after ``up``, where fp16 could have overflowed."""
    return linear(x, down) * _scale(down, scale)


def _branch(x: Tensor, down: Tensor, up: Tensor, scale: float | None) -> Tensor:
    return linear(_hidden(x, down, scale), up)


def _check_branch(name: str, x: Tensor, down: Tensor, up: Tensor, out_features: int) -> None:
    check = Check(name, x)
    check.matrix("down", down)
    rank = down.shape[0]
    check.require(rank > 0, f"down is {list(down.shape)}, but a rank is at least 1")
    check.tensor("down", down, (rank, x.shape[-1]))
    check.tensor("up", up, (out_features, rank))


def _add_branch(
    ctx: Any, dy: Tensor, dx: Tensor | None, x: Tensor, down: Tensor, up: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Adds a branch's share to dx, and gives the gradients of ``down`` and ``up``."""
    needs_down, needs_up = ctx.needs_input_grad[4:6]
    ddown = dup = None
    if dx is not None or needs_down:
        dhidden = dy @ up * _scale(down, ctx.scale)
        if dx is not None:
            dx = dx + dhidden @ down
        if needs_down:
            ddown = outer_product(dhidden, x)
    if needs_up:  # the hidden states cost less to compute again than to return from an operator with one result
        dup = outer_product(dy, _hidden(x, down, ctx.scale))
    return dx, ddown, dup


def _flops(
    y: Operand,
    x: Operand,
    weight: Operand,
    mask: Operand,
    column_mask: Operand | None,
    down: Operand,
    up: Operand,
    *rest: Any,
    **named: Any,
) -> Sequence[flops.Product]:
    (product,) = flops.linear(y, x, weight)
    into, back = rows_times(x, down), rows_times(x, up)
    hidden = flops.Product(into, {x: into, down: into}, "hidden")
    # The hidden states are computed again for the gradient of ``up``.
    return hidden, flops.Product(product.flops + back, {**product.gradients, hidden: back, up: back + into})


# --- beside a compressed weight ---------------------------------------------------------------------------------------


def _nm(
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
    product = nm_linear.nm_linear.reference(x, values, indices, column_mask, bias, n, m)
    return product + _branch(x, down, up, scale)


def _nm_output(
    name: str,
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
) -> Output:
    result = nm_linear.nm_linear.output(name, x, values, indices, column_mask, bias, n, m)
    _check_branch(name, x, down, up, values.shape[0])
    return result


def _nm_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, indices, column_mask, down, up, _, ctx.n, ctx.m, ctx.scale = inputs
    needs = ctx.needs_input_grad
    needs_x = needs[1] or needs[4] or needs[5]
    ctx.save_for_backward(x if needs_x else None, values if needs[0] else None, indices, column_mask, down, up)


def _nm_backward(ctx: Any, dy: Tensor) -> _Gradients:
    *product, down, up = ctx.saved_tensors
    dx, dvalues = nm_linear.gradients(ctx, dy, *product)
    dx, ddown, dup = _add_branch(ctx, dy, dx, product[0], down, up)
    dbias = bias_gradient(dy) if ctx.needs_input_grad[6] else None
    return dx, dvalues, None, None, ddown, dup, dbias, None, None, None


def _nm_sizes(y: Tensor, /, x: Tensor, down: Tensor, **rest: Any) -> Sizes:
    return Sizes(x.shape[:-1], y.shape[-1], x.shape[-1], (down.shape[0],))


def _nm_dense(
    weight: Tensor, /, x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, scale: float | None, **rest: Any
) -> Tensor:
    return linear(x, weight, bias) + _branch(x, down, up, scale)


def _nm_operands(problem: Problem, random: Random) -> Operands:
    (rank,) = problem.extra
    pattern, x = problem.nm, random.normal(problem.rows, problem.in_features)
    dense, values, indices = nm_linear.random_weight(problem, random)
    down, up = random.normal(rank, problem.in_features), random.normal(problem.out_features, rank)
    args = (x, values, indices, None, down, up, None, pattern.n, pattern.m, 1.0)
    return Operands(args, lambda: linear(x, dense) + linear(linear(x, down), up))


nm_linear_low_rank = define(
    Operator(
        "nm_linear_low_rank",
        "Tensor x, Tensor values, Tensor indices, Tensor? column_mask, Tensor down, Tensor up, Tensor? bias, "
        "int n, int m, float? scale=None",
        _nm,
        _nm_output,
        _flops,
        _nm_save,
        _nm_backward,
        gradients=nm_linear.nm_linear.gradients,
        implementations=(COMPRESSED, SPARSE_TENSOR_CORES, SPARSE_WGMMA, REFERENCE, DENSE),
        sizes=_nm_sizes,
        operands=_nm_operands,
        dense=_nm_dense,
        traffic=nm_linear.traffic,
        tiles=Tiles("nm_linear_low_rank", square=True),
    )
)


# --- beside a dense weight with a mask --------------------------------------------------------------------------------


def _masked(
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
    product = masked_linear.masked_linear.reference(x, weight, mask, column_mask, bias)
    return product + _branch(x, down, up, scale)


def _masked_output(
    name: str,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    column_mask: Tensor | None,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    straight_through: bool = False,
    scale: float | None = None,
) -> Output:
    result = masked_linear.masked_linear.output(name, x, weight, mask, column_mask, bias)
    _check_branch(name, x, down, up, weight.shape[0])
    return result


def _masked_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, mask, column_mask, down, up, _, ctx.straight_through, ctx.scale = inputs
    needs = ctx.needs_input_grad
    needs_x = needs[1] or needs[4] or needs[5]
    ctx.save_for_backward(x if needs_x else None, weight if needs[0] else None, mask, column_mask, down, up)


def _masked_backward(ctx: Any, dy: Tensor) -> _Gradients:
    *product, down, up = ctx.saved_tensors
    dx, dweight = masked_linear.gradients(ctx, dy, *product)
    dx, ddown, dup = _add_branch(ctx, dy, dx, product[0], down, up)
    dbias = bias_gradient(dy) if ctx.needs_input_grad[6] else None
    return dx, dweight, None, None, ddown, dup, dbias, None, None


masked_linear_low_rank = define(
    Operator(
        "masked_linear_low_rank",
        "Tensor x, Tensor weight, Tensor mask, Tensor? column_mask, Tensor down, Tensor up, Tensor? bias, "
        "bool straight_through=False, float? scale=None",
        _masked,
        _masked_output,
        _flops,
        _masked_save,
        _masked_backward,
        gradients=masked_linear.masked_linear.gradients,
    )
)
