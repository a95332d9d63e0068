"""The ``fxsparse::`` operators of a linear on chosen rows and columns of a weight, as sparse fine-tuning uses them.

    y = x S^T + b[rows]      dx = dy S      dW[rows][:, columns] = dy^T x, zero elsewhere      db[rows] = sum of dy
    S = W[rows][:, columns]

(SAT, arXiv 2406.01392.) The gradients of the weight and of the bias have their full size, so the parameters are those
of the dense model. The choice is data: other indices of the same number need no new graph.

Shapes: ``x [*, k]``, ``weight [out, in]``, ``rows [s]`` and ``columns [k]`` int64 or None for all, ``bias [out]``;
``y [*, s]``. An index may appear once only where a gradient of the weight is taken. Kernels are in
``fxsparse.codegen.kernels``; ``fxsparse.ops.reference`` runs on every other device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxsparse.cost.formulas import Operand, Product, Size, formula
from fxsparse.ops import reference
from fxsparse.ops.define import Check, Output, define

_Gradients = tuple[Tensor | None, ...]
_Shape = Sequence[int]


def _index(check: Check, name: str, index: Tensor | None, size: int) -> int:
    """The number of rows or columns chosen among ``size``."""
    if index is None:
        return size
    check.require(index.dim() == 1, f"{name} is {list(index.shape)}, expected a vector")
    check.tensor(name, index, index.shape, torch.int64)
    return index.shape[0]


def _output(
    name: str, x: Tensor, weight: Tensor, rows: Tensor | None, columns: Tensor | None, bias: Tensor | None
) -> Output:
    check = Check(name, x)
    check.matrix("weight", weight)
    check.tensor("weight", weight, weight.shape)
    taken = _index(check, "columns", columns, weight.shape[1])
    check.require(x.shape[-1] == taken, f"its input has {x.shape[-1]} features, but {taken} columns are chosen")
    check.tensor("bias", bias, (weight.shape[0],))
    return x, (*x.shape[:-1], _index(check, "rows", rows, weight.shape[0]))


def _grad_input_output(name: str, dy: Tensor, weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Output:
    check = Check(name, dy)
    check.matrix("weight", weight)
    check.tensor("weight", weight, weight.shape)
    taken = _index(check, "rows", rows, weight.shape[0])
    check.require(dy.shape[-1] == taken, f"its input has {dy.shape[-1]} features, but {taken} rows are chosen")
    return dy, (*dy.shape[:-1], _index(check, "columns", columns, weight.shape[1]))


def _grad_weight_output(
    name: str, dy: Tensor, x: Tensor, rows: Tensor | None, columns: Tensor | None, out_features: int, in_features: int
) -> Output:
    check = Check(name, dy)
    check.tensor("dy", dy, (*dy.shape[:-1], _index(check, "rows", rows, out_features)))
    check.tensor("x", x, (*dy.shape[:-1], _index(check, "columns", columns, in_features)))
    return dy, (out_features, in_features)


def _flops(x: _Shape, weight: _Shape, rows: _Shape | None, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(x) * (weight if rows is None else rows)[0]


def _grad_input_flops(
    dy: _Shape, weight: _Shape, rows: _Shape | None, columns: _Shape | None, *args: Any, **kwargs: Any
) -> int:
    return 2 * math.prod(dy) * (weight[1] if columns is None else columns[0])


def _grad_weight_flops(dy: _Shape, x: _Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(dy) * x[-1]


@formula("fxsparse::gather_linear")
def _formula(out: Operand, x: Operand, weight: Operand, *rest: Any, **named: Any) -> Sequence[Product]:
    flops: Size = 2 * out.numel * x.shape[-1]
    return (Product(flops, {x: flops, weight: flops}),)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, rows, columns, _ = inputs
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    ctx.shape = weight.shape
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, rows, columns)


def _backward(ctx: Any, dy: Tensor) -> _Gradients:
    x, weight, rows, columns = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dx = gather_linear_grad_input(dy, weight, rows, columns) if needs[0] else None
    dweight = gather_linear_grad_weight(dy, x, rows, columns, *ctx.shape) if needs[1] else None
    dbias = None
    if needs[4]:
        dbias = reference.spread(dy.reshape(-1, dy.shape[-1]).sum(0), rows, ctx.shape[0])
    return dx, dweight, None, None, dbias


gather_linear_grad_input = define(
    "Tensor dy, Tensor weight, Tensor? rows, Tensor? columns",
    reference.gather_linear_grad_input,
    _grad_input_output,
    _grad_input_flops,
)

gather_linear_grad_weight = define(
    "Tensor dy, Tensor x, Tensor? rows, Tensor? columns, SymInt out_features, SymInt in_features",
    reference.gather_linear_grad_weight,
    _grad_weight_output,
    _grad_weight_flops,
)

gather_linear = define(
    "Tensor x, Tensor weight, Tensor? rows, Tensor? columns, Tensor? bias",
    reference.gather_linear,
    _output,
    _flops,
    _save,
    _backward,
)
