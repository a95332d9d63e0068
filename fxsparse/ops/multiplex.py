"""The ``fxsparse::`` operators of data multiplexing (DataMUX, arXiv 2202.09318).

    mux            mixed[g] = 1/N  sum over i < N of  keys[i] * x[g N + i]
    demux_linear   y[g N + i] = W [key_i ; h[g]] + b,    W = [W_key | W_h]

Rows of a group are consecutive. The concatenation is never made: ``W_h h[g]`` does not depend on i, so it is computed
once a group and not N times. Kernels for both are in ``fxsparse.codegen.kernels``.

Shapes: ``x [groups * N, ..., dim]``, ``keys [N, dim]`` or, of ``demux_linear``, ``[groups, N, key_dim]``,
``h [groups, ..., in]``, ``weight [out, key_dim + in]``, ``bias [out]``; all of one floating-point dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxsparse.cost.formulas import Operand, Product, formula
from fxsparse.ops import reference
from fxsparse.ops.define import Check, Output, define
from fxsparse.ops.reference import beside_positions, members_of

_Gradients = tuple[Tensor | None, ...]


def _mux_output(name: str, x: Tensor, keys: Tensor, n: int) -> Output:
    check = Check(name, x)
    check.require(x.dim() >= 2, f"its input is {list(x.shape)}, expected [groups * n, ..., dim]")
    check.require(n >= 1, f"n={n}, but a group has at least one member")
    check.require(x.shape[0] % n == 0, f"{x.shape[0]} rows are not whole groups of {n}")
    check.tensor("keys", keys, (n, x.shape[-1]))
    return x, (x.shape[0] // n, *x.shape[1:])


def _demux_output(name: str, h: Tensor, keys: Tensor, weight: Tensor, bias: Tensor | None) -> Output:
    check = Check(name, h)
    check.require(h.dim() >= 2, f"its input is {list(h.shape)}, expected [groups, ..., in]")
    check.require(keys.dim() in (2, 3), f"keys is {list(keys.shape)}, expected [N, key_dim] or [groups, N, key_dim]")
    members, key_dim = keys.shape[-2:]
    check.tensor("keys", keys, (members, key_dim) if keys.dim() == 2 else (h.shape[0], members, key_dim))
    check.matrix("weight", weight)
    check.tensor("weight", weight, (weight.shape[0], key_dim + h.shape[-1]))
    check.tensor("bias", bias, (weight.shape[0],))
    return h, (h.shape[0] * members, *h.shape[1:-1], weight.shape[0])


def _mux_flops(x: Sequence[int], keys: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 0  # elementwise


def _demux_flops(h: Sequence[int], keys: Sequence[int], weight: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * (math.prod(h) + math.prod(keys)) * weight[0]


@formula("fxsparse::mux")
def _mux_formula(out: Operand, x: Operand, keys: Operand, n: int) -> Sequence[Product]:
    return (Product(0, {x: 0, keys: 0}),)


@formula("fxsparse::demux_linear")
def _demux_formula(out: Operand, h: Operand, keys: Operand, weight: Operand, *rest: Any) -> Sequence[Product]:
    rows = weight.shape[0]
    of_input, of_keys = 2 * h.numel * rows, 2 * keys.numel * rows
    return (Product(of_input + of_keys, {h: of_input, keys: of_keys, weight: of_input + of_keys}),)


def _mux_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, keys, ctx.n = inputs
    needs = ctx.needs_input_grad
    ctx.save_for_backward(x if needs[1] else None, keys if needs[0] else None)


def _mux_backward(ctx: Any, dy: Tensor) -> _Gradients:
    x, keys = ctx.saved_tensors
    dx = dkeys = None
    shared = dy.unsqueeze(1) / ctx.n
    if ctx.needs_input_grad[0]:
        dx = (shared * beside_positions(keys, dy)).flatten(0, 1)
    if ctx.needs_input_grad[1]:
        products = members_of(x, ctx.n) * shared
        dkeys = products.movedim(1, 0).reshape(ctx.n, -1, x.shape[-1]).sum(1)
    return dx, dkeys, None


def _demux_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, keys, weight, _ = inputs
    needs = ctx.needs_input_grad
    ctx.members, ctx.key_dim, ctx.shared = keys.shape[-2], keys.shape[-1], keys.dim() == 2
    needs_sides = (h if needs[2] else None, keys if needs[2] else None)
    ctx.save_for_backward(*needs_sides, weight if needs[0] or needs[1] else None)


def _demux_backward(ctx: Any, dy: Tensor) -> _Gradients:
    h, keys, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    members = members_of(dy, ctx.members)
    dproduct = members.sum(1)
    dprojected = members.flatten(2, -2).sum(2) if members.dim() > 3 else members
    if ctx.shared:
        dprojected = dprojected.sum(0)
    dh = dkeys = dweight = dbias = None
    if needs[0]:
        dh = dproduct @ weight[:, ctx.key_dim :]
    if needs[1]:
        dkeys = dprojected @ weight[:, : ctx.key_dim]
    if needs[2]:
        dweight = torch.cat([reference.outer(dprojected, keys), reference.outer(dproduct, h)], 1)
    if needs[3]:
        dbias = dprojected.reshape(-1, dy.shape[-1]).sum(0)
    return dh, dkeys, dweight, dbias


mux = define("Tensor x, Tensor keys, int n", reference.mux, _mux_output, _mux_flops, _mux_save, _mux_backward)

demux_linear = define(
    "Tensor h, Tensor keys, Tensor weight, Tensor? bias",
    reference.demux_linear,
    _demux_output,
    _demux_flops,
    _demux_save,
    _demux_backward,
)
