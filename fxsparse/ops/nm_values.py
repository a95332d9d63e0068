"""The ``fxsparse::`` operators between a dense weight and its kept values, at positions that are known.

    nm_values(weight, indices, n, m)           weight [out, in] -> values [out, in * n / m]
    nm_spread(values, indices, in_features, n, m)    values -> dense [out, in_features], zero elsewhere

Each is the other's gradient. A linear on a masked weight runs through them as one on a compressed weight
(`fxsparse.lowering.masked`); indices as in `fxsparse.ops.nm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fxsparse.ops.define import Check, define
from fxsparse.ops.flops import Product
from fxsparse.ops.nm import Pattern, gather_kept, unpack
from fxsparse.ops.operator import Operator, Output


def _values(weight: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    return gather_kept(weight, indices, Pattern(n, m)).contiguous()


def _spread(values: Tensor, indices: Tensor, in_features: int, n: int, m: int) -> Tensor:
    return unpack(values, indices, Pattern(n, m), in_features).contiguous()


def _values_output(name: str, weight: Tensor, indices: Tensor, n: int, m: int) -> Output:
    check, pattern = Check(name, weight), Pattern(n, m)
    check.matrix("weight", weight)
    rows, columns = weight.shape
    check.compressed(rows, columns, None, indices, None, pattern)
    return weight, (rows, pattern.kept(columns))


def _spread_output(name: str, values: Tensor, indices: Tensor, in_features: int, n: int, m: int) -> Output:
    check, pattern = Check(name, values), Pattern(n, m)
    check.matrix("values", values)
    check.compressed(values.shape[0], in_features, values, indices, None, pattern)
    return values, (values.shape[0], in_features)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, indices, ctx.n, ctx.m = inputs
    ctx.in_features = weight.shape[1]
    ctx.save_for_backward(indices)


def _backward(ctx: Any, dvalues: Tensor) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    return nm_spread(dvalues.contiguous(), indices, ctx.in_features, ctx.n, ctx.m), None, None, None


def _no_products(*args: Any, **named: Any) -> Sequence[Product]:
    return ()


nm_spread = define(
    Operator(
        "nm_spread",
        "Tensor values, Tensor indices, int in_features, int n, int m",
        _spread,
        _spread_output,
        _no_products,
    )
)

nm_values = define(
    Operator(
        "nm_values",
        "Tensor weight, Tensor indices, int n, int m",
        _values,
        _values_output,
        _no_products,
        _save,
        _backward,
        gradients=("nm_spread",),
    )
)
