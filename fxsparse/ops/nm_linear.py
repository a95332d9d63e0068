"""The ``fxsparse::`` operators and their gradients.

    y  = x (W^R)^T + b           dx = dy W^{R,C}           dW = dy^T x at kept positions           db = sum of dy

(SLoPe, arXiv 2405.16325, eq. 4-6). The forward pass is exact in W^R; only dx is pruned twice, and only where a column
mask is given. The gradient of a compressed weight is that of its values. There is no second derivative.

| operator | computes |
|---|---|
| ``nm_linear(x, values, indices, column_mask?, bias?, n, m)`` | y, of a compressed weight |
| ``nm_linear_grad_input(dy, values, indices, column_mask?, n, m)`` | dx |
| ``nm_linear_grad_values(dy, x, indices, n, m)`` | dW at kept positions |
| ``nm_linear_low_rank(..., column_mask?, down, up, bias?, n, m, scale=None)`` | y + scale (x down^T) up^T |
| ``masked_linear(x, weight, mask, column_mask?, bias?, straight_through=False)`` | y, of a dense weight |
| ``masked_linear_grad_input(dy, weight, mask, column_mask?)`` | dx |
| ``masked_linear_grad_weight(dy, x, mask?)`` | dW, zero where pruned; of all weights without a mask |
| ``masked_linear_low_rank(..., column_mask?, down, up, bias?, straight_through=False, scale=None)`` | both |

``straight_through`` gives pruned weights the gradient they would have if they took part (SR-STE, arXiv 2102.04010);
the scale is 1 / r unless given, that of SLoPe's code. Shapes and dtypes are those of ``fxsparse.ops.nm`` and
``fxsparse.ops.reference``, which says what each computes and runs on every device that ``implement`` gave no kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fxsparse.ops import reference
from fxsparse.ops.define import DECOMPOSITIONS, Check, Output, define, implement
from fxsparse.ops.nm import Pattern

__all__ = [
    "DECOMPOSITIONS",
    "implement",
    "masked_linear",
    "masked_linear_grad_input",
    "masked_linear_grad_weight",
    "masked_linear_low_rank",
    "nm_linear",
    "nm_linear_grad_input",
    "nm_linear_grad_values",
    "nm_linear_low_rank",
]

_Gradients = tuple[Tensor | None, ...]
_Shape = Sequence[int]


# --- FLOPs: 2 for every token and weight that takes part --------------------------------------------------------------


def _forward_flops(x: _Shape, weight: _Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(x[:-1]) * math.prod(weight)


def _weight_flops(dy: _Shape, x: _Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(dy) * x[-1]


def _low_rank_flops(
    x: _Shape,
    weight: _Shape,
    mask: _Shape,
    column_mask: _Shape | None,
    down: _Shape,
    up: _Shape,
    *args: Any,
    **kwargs: Any,
) -> int:
    return sum(_forward_flops(x, factor) for factor in (weight, down, up))


# --- gradients that both kinds of weight share ------------------------------------------------------------------------


def _bias_gradient(dy: Tensor) -> Tensor:
    return dy.reshape(-1, dy.shape[-1]).sum(0)


def _add_branch(
    ctx: Any, dy: Tensor, dx: Tensor | None, x: Tensor, down: Tensor, up: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Adds a branch's share to dx, and gives the gradients of ``down`` and ``up``."""
    needs_down, needs_up = ctx.needs_input_grad[4:6]
    ddown = dup = None
    if dx is not None or needs_down:
        dhidden = dy @ up * reference.low_rank_scale(down, ctx.scale)
        if dx is not None:
            dx = dx + dhidden @ down
        if needs_down:
            ddown = reference.outer(dhidden, x)
    if needs_up:  # the hidden states cost less to compute again than to return from an operator with one result
        dup = reference.outer(dy, reference.low_rank_hidden(x, down, ctx.scale))
    return dx, ddown, dup


# --- compressed weights -----------------------------------------------------------------------------------------------


def _nm_output(
    name: str,
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    column_mask: Tensor | None,
    bias: Tensor | None,
    n: int,
    m: int,
) -> Output:
    check = Check(name, x)
    check.matrix("values", values)
    rows = values.shape[0]
    check.compressed(rows, x.shape[-1], values, indices, column_mask, Pattern(n, m))
    check.tensor("bias", bias, (rows,))
    return x, (*x.shape[:-1], rows)


def _nm_low_rank_output(
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
    result = _nm_output(name, x, values, indices, column_mask, bias, n, m)
    Check(name, x).branch(values.shape[0], x.shape[-1], down, up)
    return result


def _nm_grad_input_output(
    name: str, dy: Tensor, values: Tensor, indices: Tensor, column_mask: Tensor | None, n: int, m: int
) -> Output:
    check, pattern = Check(name, dy), Pattern(n, m)
    check.matrix("values", values)
    in_features = values.shape[1] // n * m
    check.compressed(dy.shape[-1], in_features, values, indices, column_mask, pattern)
    return dy, (*dy.shape[:-1], in_features)


def _nm_grad_values_output(name: str, dy: Tensor, x: Tensor, indices: Tensor, n: int, m: int) -> Output:
    check, pattern = Check(name, dy), Pattern(n, m)
    check.tensor("x", x, (*dy.shape[:-1], x.shape[-1]))
    check.compressed(dy.shape[-1], x.shape[-1], None, indices, None, pattern)
    return dy, (dy.shape[-1], pattern.kept(x.shape[-1]))


def _nm_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, indices, column_mask, *_, ctx.n, ctx.m = inputs
    needs = ctx.needs_input_grad
    ctx.save_for_backward(x if needs[1] else None, values if needs[0] else None, indices, column_mask)


def _nm_gradients(
    ctx: Any, dy: Tensor, x: Tensor, values: Tensor, indices: Tensor, column_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """dx and dW."""
    needs_x, needs_values, *_ = ctx.needs_input_grad
    dx = nm_linear_grad_input(dy, values, indices, column_mask, ctx.n, ctx.m) if needs_x else None
    return dx, nm_linear_grad_values(dy, x, indices, ctx.n, ctx.m) if needs_values else None


def _nm_backward(ctx: Any, dy: Tensor) -> _Gradients:
    dx, dvalues = _nm_gradients(ctx, dy, *ctx.saved_tensors)
    dbias = _bias_gradient(dy) if ctx.needs_input_grad[4] else None
    return dx, dvalues, None, None, dbias, None, None


def _nm_low_rank_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, indices, column_mask, down, up, _, ctx.n, ctx.m, ctx.scale = inputs
    needs = ctx.needs_input_grad
    needs_x = needs[1] or needs[4] or needs[5]
    ctx.save_for_backward(x if needs_x else None, values if needs[0] else None, indices, column_mask, down, up)


def _nm_low_rank_backward(ctx: Any, dy: Tensor) -> _Gradients:
    *product, down, up = ctx.saved_tensors
    dx, dvalues = _nm_gradients(ctx, dy, *product)
    dx, ddown, dup = _add_branch(ctx, dy, dx, product[0], down, up)
    dbias = _bias_gradient(dy) if ctx.needs_input_grad[6] else None
    return dx, dvalues, None, None, ddown, dup, dbias, None, None, None


nm_linear_grad_input = define(
    "Tensor dy, Tensor values, Tensor indices, Tensor? column_mask, int n, int m",
    reference.nm_linear_grad_input,
    _nm_grad_input_output,
    _forward_flops,
)

nm_linear_grad_values = define(
    "Tensor dy, Tensor x, Tensor indices, int n, int m",
    reference.nm_linear_grad_values,
    _nm_grad_values_output,
    _weight_flops,
)

nm_linear = define(
    "Tensor x, Tensor values, Tensor indices, Tensor? column_mask, Tensor? bias, int n, int m",
    reference.nm_linear,
    _nm_output,
    _forward_flops,
    _nm_save,
    _nm_backward,
)

nm_linear_low_rank = define(
    "Tensor x, Tensor values, Tensor indices, Tensor? column_mask, Tensor down, Tensor up, Tensor? bias, int n, int m, "
    "float? scale=None",
    reference.nm_linear_low_rank,
    _nm_low_rank_output,
    _low_rank_flops,
    _nm_low_rank_save,
    _nm_low_rank_backward,
)


# --- dense weights with a mask ----------------------------------------------------------------------------------------


def _masked_output(
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


def _masked_low_rank_output(
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
    result = _masked_output(name, x, weight, mask, column_mask, bias)
    Check(name, x).branch(weight.shape[0], x.shape[-1], down, up)
    return result


def _masked_grad_input_output(
    name: str, dy: Tensor, weight: Tensor, mask: Tensor, column_mask: Tensor | None
) -> Output:
    check = Check(name, dy)
    check.matrix("weight", weight)
    check.masked((dy.shape[-1], weight.shape[1]), weight, mask, column_mask)
    return dy, (*dy.shape[:-1], weight.shape[1])


def _masked_grad_weight_output(name: str, dy: Tensor, x: Tensor, mask: Tensor | None) -> Output:
    check, shape = Check(name, dy), (dy.shape[-1], x.shape[-1])
    check.tensor("x", x, (*dy.shape[:-1], x.shape[-1]))
    check.masked(shape, None, mask, None)
    return dy, shape


def _masked_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, mask, column_mask, _, ctx.straight_through = inputs
    needs = ctx.needs_input_grad
    ctx.save_for_backward(x if needs[1] else None, weight if needs[0] else None, mask, column_mask)


def _masked_gradients(
    ctx: Any, dy: Tensor, x: Tensor, weight: Tensor, mask: Tensor, column_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """dx and dW."""
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    dx = masked_linear_grad_input(dy, weight, mask, column_mask) if needs_x else None
    return dx, masked_linear_grad_weight(dy, x, None if ctx.straight_through else mask) if needs_weight else None


def _masked_backward(ctx: Any, dy: Tensor) -> _Gradients:
    dx, dweight = _masked_gradients(ctx, dy, *ctx.saved_tensors)
    return dx, dweight, None, None, _bias_gradient(dy) if ctx.needs_input_grad[4] else None, None


def _masked_low_rank_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, mask, column_mask, down, up, _, ctx.straight_through, ctx.scale = inputs
    needs = ctx.needs_input_grad
    needs_x = needs[1] or needs[4] or needs[5]
    ctx.save_for_backward(x if needs_x else None, weight if needs[0] else None, mask, column_mask, down, up)


def _masked_low_rank_backward(ctx: Any, dy: Tensor) -> _Gradients:
    *product, down, up = ctx.saved_tensors
    dx, dweight = _masked_gradients(ctx, dy, *product)
    dx, ddown, dup = _add_branch(ctx, dy, dx, product[0], down, up)
    dbias = _bias_gradient(dy) if ctx.needs_input_grad[6] else None
    return dx, dweight, None, None, ddown, dup, dbias, None, None


masked_linear_grad_input = define(
    "Tensor dy, Tensor weight, Tensor mask, Tensor? column_mask",
    reference.masked_linear_grad_input,
    _masked_grad_input_output,
    _forward_flops,
)

masked_linear_grad_weight = define(
    "Tensor dy, Tensor x, Tensor? mask",
    reference.masked_linear_grad_weight,
    _masked_grad_weight_output,
    _weight_flops,
)

masked_linear = define(
    "Tensor x, Tensor weight, Tensor mask, Tensor? column_mask, Tensor? bias, bool straight_through=False",
    reference.masked_linear,
    _masked_output,
    _forward_flops,
    _masked_save,
    _masked_backward,
)

masked_linear_low_rank = define(
    "Tensor x, Tensor weight, Tensor mask, Tensor? column_mask, Tensor down, Tensor up, Tensor? bias, "
    "bool straight_through=False, float? scale=None",
    reference.masked_linear_low_rank,
    _masked_low_rank_output,
    _low_rank_flops,
    _masked_low_rank_save,
    _masked_low_rank_backward,
)
