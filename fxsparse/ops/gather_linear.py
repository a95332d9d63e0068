"""The ``fxsparse::`` operators of a linear on chosen rows and columns of a weight, as sparse fine-tuning uses them.

    y = x S^T + b[rows]      dx = dy S      dW[rows][:, columns] = dy^T x, zero elsewhere      db[rows] = sum of dy
    S = W[rows][:, columns]

(SAT, arXiv 2406.01392.) The gradients of the weight and of the bias have their full size, so the parameters are those
of the dense model. The choice is data: other indices of the same number need no new graph.

Shapes: ``x [*, k]``, ``weight [out, in]``, ``rows [s]`` and ``columns [k]`` int64 or None for all, ``bias [out]``;
``y [*, s]``. An index may appear once only where a gradient of the weight is taken. ``block`` promises that both
indices come in runs of so many consecutive ones, the first of each a multiple of it: a kernel then loads 16 bytes at a
time. A `Problem` has the sizes that take part, s and k, and as its extra ones the whole weight's and the block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fxsparse.ops.define import Check, define
from fxsparse.ops.flops import Operand, Product, outer
from fxsparse.ops.operator import (
    OPERATOR,
    REFERENCE,
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

LONGEST_RUN = 64
"""The largest ``block`` that a kernel makes use of: a step of its loop takes no more."""

_Gradients = tuple[Tensor | None, ...]


# --- references -------------------------------------------------------------------------------------------------------


def _gather_linear(
    x: Tensor, weight: Tensor, rows: Tensor | None, columns: Tensor | None, bias: Tensor | None, block: int = 1
) -> Tensor:
    """``x S^T + bias[rows]``."""
    if bias is not None and rows is not None:
        bias = bias.index_select(0, rows)
    return linear(x, _chosen(weight, rows, columns), bias)


def _grad_input(dy: Tensor, weight: Tensor, rows: Tensor | None, columns: Tensor | None, block: int = 1) -> Tensor:
    """``dy S``."""
    return dy @ _chosen(weight, rows, columns)


def _grad_weight(
    dy: Tensor,
    x: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    out_features: int,
    in_features: int,
    block: int = 1,
) -> Tensor:
    """``dy^T x`` at the chosen rows and columns of ``[out_features, in_features]``, zero elsewhere."""
    grad = outer_product(dy, x)
    if columns is not None:
        grad = grad.new_zeros(grad.shape[0], in_features).index_copy(1, columns, grad)
    return _spread(grad, rows, out_features)


def _chosen(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """``S = weight[rows][:, columns]``."""
    if rows is not None:
        weight = weight.index_select(0, rows)
    return weight if columns is None else weight.index_select(1, columns)


def _spread(part: Tensor, rows: Tensor | None, out_features: int) -> Tensor:
    """``part`` at the chosen rows of a tensor with ``out_features`` rows, zero elsewhere."""
    if rows is None:
        return part
    return part.new_zeros(out_features, *part.shape[1:]).index_copy(0, rows, part)


# --- checks and shapes ------------------------------------------------------------------------------------------------


def _count(check: Check, name: str, index: Tensor | None, size: int, block: int) -> int:
    """The number of rows or columns chosen among ``size``."""
    check.require(block > 0, f"block is {block}, expected at least 1")
    if index is None:
        return size
    check.require(index.dim() == 1, f"{name} is {list(index.shape)}, expected a vector")
    check.tensor(name, index, index.shape, torch.int64)
    check.require(index.shape[0] % block == 0, f"{index.shape[0]} {name} are chosen, no multiple of block={block}")
    return index.shape[0]


def _output(
    name: str,
    x: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    bias: Tensor | None,
    block: int = 1,
) -> Output:
    check = Check(name, x)
    check.matrix("weight", weight)
    check.tensor("weight", weight, weight.shape)
    taken = _count(check, "columns", columns, weight.shape[1], block)
    check.require(x.shape[-1] == taken, f"its input has {x.shape[-1]} features, but {taken} columns are chosen")
    check.tensor("bias", bias, (weight.shape[0],))
    return x, (*x.shape[:-1], _count(check, "rows", rows, weight.shape[0], block))


def _grad_input_output(
    name: str, dy: Tensor, weight: Tensor, rows: Tensor | None, columns: Tensor | None, block: int = 1
) -> Output:
    check = Check(name, dy)
    check.matrix("weight", weight)
    check.tensor("weight", weight, weight.shape)
    taken = _count(check, "rows", rows, weight.shape[0], block)
    check.require(dy.shape[-1] == taken, f"its input has {dy.shape[-1]} features, but {taken} rows are chosen")
    return dy, (*dy.shape[:-1], _count(check, "columns", columns, weight.shape[1], block))


def _grad_weight_output(
    name: str,
    dy: Tensor,
    x: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    out_features: int,
    in_features: int,
    block: int = 1,
) -> Output:
    check = Check(name, dy)
    check.tensor("dy", dy, (*dy.shape[:-1], _count(check, "rows", rows, out_features, block)))
    check.tensor("x", x, (*dy.shape[:-1], _count(check, "columns", columns, in_features, block)))
    return dy, (out_features, in_features)


# --- gradient ---------------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, rows, columns, _, block = inputs
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    ctx.shape, ctx.block = weight.shape, block
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, rows, columns)


def _backward(ctx: Any, dy: Tensor) -> _Gradients:
    x, weight, rows, columns = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dx = gather_linear_grad_input(dy, weight, rows, columns, ctx.block) if needs[0] else None
    dweight = gather_linear_grad_weight(dy, x, rows, columns, *ctx.shape, ctx.block) if needs[1] else None
    dbias = _spread(bias_gradient(dy), rows, ctx.shape[0]) if needs[4] else None
    return dx, dweight, None, None, dbias, None


# --- what a call costs, and random calls ------------------------------------------------------------------------------


def _flops(y: Operand, x: Operand, weight: Operand, *rest: Any, **named: Any) -> Sequence[Product]:
    flops = outer(y, x)
    return (Product(flops, {x: flops, weight: flops}),)


def _grad_input_flops(dx: Operand, dy: Operand, *rest: Any) -> Sequence[Product]:
    return (Product(outer(dy, dx)),)


def _grad_weight_flops(dweight: Operand, dy: Operand, x: Operand, *rest: Any) -> Sequence[Product]:
    return (Product(outer(dy, x)),)


def _sizes(y: Tensor, /, x: Tensor, weight: Tensor, block: int = 1, **rest: Any) -> Sizes:
    return Sizes(x.shape[:-1], y.shape[-1], x.shape[-1], (*weight.shape, block))


def _grad_input_sizes(dx: Tensor, /, dy: Tensor, weight: Tensor, block: int = 1, **rest: Any) -> Sizes:
    return Sizes(dy.shape[:-1], dy.shape[-1], dx.shape[-1], (*weight.shape, block))


def _grad_weight_sizes(dweight: Tensor, /, dy: Tensor, x: Tensor, block: int = 1, **rest: Any) -> Sizes:
    return Sizes(dy.shape[:-1], dy.shape[-1], x.shape[-1], (*dweight.shape, block))


def _random(problem: Problem, random: Random) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """x, dy, weight, rows and columns."""
    out, in_features = problem.out_features, problem.in_features
    *whole, block = problem.extra
    tensors = random.normal(problem.rows, in_features), random.normal(problem.rows, out), random.normal(*whole)
    return *tensors, random.choice(out, whole[0], block), random.choice(in_features, whole[1], block)


def _operands(problem: Problem, random: Random) -> Operands:
    x, _, weight, rows, columns = _random(problem, random)
    return Operands((x, weight, rows, columns, None, problem.extra[2]))


def _grad_input_operands(problem: Problem, random: Random) -> Operands:
    _, dy, weight, rows, columns = _random(problem, random)
    return Operands((dy, weight, rows, columns, problem.extra[2]))


def _grad_weight_operands(problem: Problem, random: Random) -> Operands:
    x, dy, _, rows, columns = _random(problem, random)
    return Operands((dy, x, rows, columns, *problem.extra))


def _traffic(problem: Problem) -> Traffic:
    """The reference copies the part of the weight, and the product reads the copy."""
    is_whole = problem.extra[:2] == (problem.out_features, problem.in_features)
    return Traffic(
        kernel=problem.weight_bytes + problem.input_bytes + problem.output_bytes,
        copies=0 if is_whole else 2 * problem.weight_bytes,
    )


# --- the operators ----------------------------------------------------------------------------------------------------

gather_linear_grad_input = define(
    Operator(
        "gather_linear_grad_input",
        "Tensor dy, Tensor weight, Tensor? rows, Tensor? columns, int block=1",
        _grad_input,
        _grad_input_output,
        _grad_input_flops,
        sizes=_grad_input_sizes,
        operands=_grad_input_operands,
        traffic=_traffic,
        tiles=Tiles("gather_linear", transposed=True),
    )
)

gather_linear_grad_weight = define(
    Operator(
        "gather_linear_grad_weight",
        "Tensor dy, Tensor x, Tensor? rows, Tensor? columns, SymInt out_features, SymInt in_features, int block=1",
        _grad_weight,
        _grad_weight_output,
        _grad_weight_flops,
        sizes=_grad_weight_sizes,
        operands=_grad_weight_operands,
        traffic=_traffic,
        tiles=Tiles("gather_linear_grad_weight"),
    )
)

gather_linear = define(
    Operator(
        "gather_linear",
        "Tensor x, Tensor weight, Tensor? rows, Tensor? columns, Tensor? bias, int block=1",
        _gather_linear,
        _output,
        _flops,
        _save,
        _backward,
        gradients=("gather_linear_grad_input", "gather_linear_grad_weight"),
        implementations=(OPERATOR, REFERENCE),
        sizes=_sizes,
        operands=_operands,
        traffic=_traffic,
        tiles=Tiles("gather_linear"),
    )
)
