"""The ``fxsparse::`` operators of a linear on a compressed N:M weight.

    y  = x (W^R)^T + b           dx = dy W^{R,C}           dW = dy^T x at kept positions           db = sum of dy

(SLoPe, arXiv 2405.16325, eq. 4-6). The forward pass is exact in W^R; only dx is pruned twice, and only where a column
mask is given. The gradient of a compressed weight is that of its values. There is no second derivative.

| operator | computes |
|---|---|
| ``nm_linear(x, values, indices, column_mask?, bias?, n, m)`` | y |
| ``nm_linear_grad_input(dy, values, indices, column_mask?, n, m)`` | dx |
| ``nm_linear_grad_values(dy, x, indices, n, m)`` | dW at kept positions |

Shapes: ``x [*, in]``, ``y`` and ``dy [*, out]``, ``bias [out]``; ``values``, ``indices`` and ``column_mask`` as in
`fxsparse.ops.nm`. A reference unpacks the weight, which a compiler does in one pass over values and weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fxsparse.ops import flops
from fxsparse.ops.define import Check, define
from fxsparse.ops.nm import (
    Pattern,
    double_prune_mask,
    gather_kept,
    kept_columns,
    nm_mask,
    pack,
    pack_column_mask,
    unpack,
)
from fxsparse.ops.operator import (
    COMPRESSED,
    CUSPARSELT,
    DENSE,
    OPERATOR,
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
    Traffic,
)
from fxsparse.ops.reference import bias_gradient, outer_product

_Gradients = tuple[Tensor | None, ...]


# --- references -------------------------------------------------------------------------------------------------------


def _nm_linear(
    x: Tensor, values: Tensor, indices: Tensor, column_mask: Tensor | None, bias: Tensor | None, n: int, m: int
) -> Tensor:
    """``x (W^R)^T + bias``."""
    return linear(x, unpack(values, indices, Pattern(n, m), x.shape[-1]), bias)


def _grad_input(dy: Tensor, values: Tensor, indices: Tensor, column_mask: Tensor | None, n: int, m: int) -> Tensor:
    """``dy W^{R,C}``, or ``dy W^R`` without a column mask."""
    if column_mask is not None:
        values = torch.where(kept_columns(column_mask, values.shape[1]), values, 0)
    return dy @ unpack(values, indices, Pattern(n, m), values.shape[1] // n * m)


def _grad_values(dy: Tensor, x: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    """``dy^T x`` at the kept positions, ``[out, in * n / m]``."""
    return gather_kept(outer_product(dy, x), indices, Pattern(n, m))


def _dense(weight: Tensor, /, x: Tensor, bias: Tensor | None, **rest: Any) -> Tensor:
    return linear(x, weight, bias)


# --- checks and shapes ------------------------------------------------------------------------------------------------


def _output(
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


def _grad_input_output(
    name: str, dy: Tensor, values: Tensor, indices: Tensor, column_mask: Tensor | None, n: int, m: int
) -> Output:
    check, pattern = Check(name, dy), Pattern(n, m)
    check.matrix("values", values)
    in_features = values.shape[1] // n * m
    check.compressed(dy.shape[-1], in_features, values, indices, column_mask, pattern)
    return dy, (*dy.shape[:-1], in_features)


def _grad_values_output(name: str, dy: Tensor, x: Tensor, indices: Tensor, n: int, m: int) -> Output:
    check, pattern = Check(name, dy), Pattern(n, m)
    check.tensor("x", x, (*dy.shape[:-1], x.shape[-1]))
    check.compressed(dy.shape[-1], x.shape[-1], None, indices, None, pattern)
    return dy, (dy.shape[-1], pattern.kept(x.shape[-1]))


# --- gradient ---------------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, indices, column_mask, *_, ctx.n, ctx.m = inputs
    needs = ctx.needs_input_grad
    ctx.save_for_backward(x if needs[1] else None, values if needs[0] else None, indices, column_mask)


def gradients(
    ctx: Any, dy: Tensor, x: Tensor, values: Tensor, indices: Tensor, column_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """dx and dW, where they are needed."""
    needs_x, needs_values, *_ = ctx.needs_input_grad
    dx = nm_linear_grad_input(dy, values, indices, column_mask, ctx.n, ctx.m) if needs_x else None
    return dx, nm_linear_grad_values(dy, x, indices, ctx.n, ctx.m) if needs_values else None


def _backward(ctx: Any, dy: Tensor) -> _Gradients:
    dx, dvalues = gradients(ctx, dy, *ctx.saved_tensors)
    dbias = bias_gradient(dy) if ctx.needs_input_grad[4] else None
    return dx, dvalues, None, None, dbias, None, None


# --- what a call costs, and random calls ------------------------------------------------------------------------------


def _sizes(y: Tensor, /, x: Tensor, **rest: Any) -> Sizes:
    return Sizes(x.shape[:-1], y.shape[-1], x.shape[-1])


def _grad_input_sizes(dx: Tensor, /, dy: Tensor, **rest: Any) -> Sizes:
    return Sizes(dy.shape[:-1], dy.shape[-1], dx.shape[-1])


def _grad_values_sizes(dvalues: Tensor, /, dy: Tensor, x: Tensor, **rest: Any) -> Sizes:
    return Sizes(dy.shape[:-1], dy.shape[-1], x.shape[-1])


def traffic(problem: Problem) -> Traffic:
    """The kernels read the weight compressed; a reference writes it dense, and the product reads that."""
    pattern = problem.nm
    stored = problem.weight * (pattern.density * problem.dtype.itemsize + pattern.density * pattern.index_bits / 8)
    moved = stored + problem.input_bytes + problem.output_bytes
    return Traffic(kernel=moved, copies=stored + problem.weight_bytes, decompresses=True)


def random_weight(problem: Problem, random: Random) -> tuple[Tensor, Tensor, Tensor]:
    """A weight that is N:M: dense, and its values and indices."""
    dense, mask = _random_pruned(problem, random)
    return dense, *pack(dense, mask, problem.nm)


def _random_pruned(problem: Problem, random: Random) -> tuple[Tensor, Tensor]:
    """A dense weight that is N:M, and its mask."""
    dense = random.normal(problem.out_features, problem.in_features)
    mask = nm_mask(dense.abs(), problem.nm)
    return dense * mask, mask


def _operands(problem: Problem, random: Random) -> Operands:
    pattern = problem.nm
    x = random.normal(problem.rows, problem.in_features)
    dense, values, indices = random_weight(problem, random)
    return Operands((x, values, indices, None, None, pattern.n, pattern.m), lambda: linear(x, dense))


def _grad_input_operands(problem: Problem, random: Random) -> Operands:
    pattern = problem.nm
    dy = random.normal(problem.rows, problem.out_features)
    dense, mask = _random_pruned(problem, random)
    values, indices = pack(dense, mask, pattern)
    column_mask = None
    if problem.out_features % pattern.m == 0:  # doubly pruned, as in training
        pruned = double_prune_mask(dense, mask, pattern)
        column_mask, dense = pack_column_mask(pruned, mask, pattern), dense * pruned
    return Operands((dy, values, indices, column_mask, pattern.n, pattern.m), lambda: dy @ dense)


def _grad_values_operands(problem: Problem, random: Random) -> Operands:
    pattern = problem.nm
    x, dy = random.normal(problem.rows, problem.in_features), random.normal(problem.rows, problem.out_features)
    _, _, indices = random_weight(problem, random)
    return Operands(
        (dy, x, indices, pattern.n, pattern.m), lambda: dy.t() @ x, lambda grad: gather_kept(grad, indices, pattern)
    )


# --- the operators ----------------------------------------------------------------------------------------------------

nm_linear_grad_input = define(
    Operator(
        "nm_linear_grad_input",
        "Tensor dy, Tensor values, Tensor indices, Tensor? column_mask, int n, int m",
        _grad_input,
        _grad_input_output,
        flops.linear_grad_input,
        implementations=(OPERATOR, SPARSE_TENSOR_CORES, SPARSE_WGMMA, REFERENCE),
        sizes=_grad_input_sizes,
        operands=_grad_input_operands,
        traffic=traffic,
        tiles=Tiles("nm_linear_grad_input", transposed=True),
    )
)

nm_linear_grad_values = define(
    Operator(
        "nm_linear_grad_values",
        "Tensor dy, Tensor x, Tensor indices, int n, int m",
        _grad_values,
        _grad_values_output,
        flops.linear_grad_weight,
        implementations=(OPERATOR, REFERENCE),
        sizes=_grad_values_sizes,
        operands=_grad_values_operands,
        traffic=traffic,
        tiles=Tiles("nm_linear_grad_values"),
    )
)

nm_linear = define(
    Operator(
        "nm_linear",
        "Tensor x, Tensor values, Tensor indices, Tensor? column_mask, Tensor? bias, int n, int m",
        _nm_linear,
        _output,
        flops.linear,  # dW is computed densely and gathered; the other two products skip what is pruned
        _save,
        _backward,
        gradients=("nm_linear_grad_input", "nm_linear_grad_values"),
        implementations=(COMPRESSED, SPARSE_TENSOR_CORES, SPARSE_WGMMA, CUSPARSELT, REFERENCE, DENSE),
        sizes=_sizes,
        operands=_operands,
        dense=_dense,
        traffic=traffic,
        tiles=Tiles("nm_linear", square=True),
    )
)
