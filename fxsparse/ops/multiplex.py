"""The ``fxsparse::`` operators of data multiplexing (DataMUX, arXiv 2202.09318).

    mux            mixed[g] = 1/N  sum over i < N of  keys[i] * x[g N + i]
    demux_linear   y[g N + i] = W [key_i ; h[g]] + b,    W = [W_key | W_h]

Rows of a group are consecutive. The concatenation is never made: ``W_h h[g]`` does not depend on i, so it is computed
once a group and not N times.

Shapes: ``x [groups * N, ..., dim]``, ``keys [N, dim]`` or, of ``demux_linear``, ``[groups, N, key_dim]``,
``h [groups, ..., in]``, ``weight [out, key_dim + in]``, ``bias [out]``; all of one floating-point dtype. The extra
sizes of a `Problem` are the members of a group, of ``demux_linear`` the width of a key, and the positions of one row of
a batch, the product of the dimensions in ``...``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fxsparse.ops.define import Check, define
from fxsparse.ops.flops import Operand, Product
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
from fxsparse.ops.reference import outer_product

_Gradients = tuple[Tensor | None, ...]


def _members_of(x: Tensor, n: int) -> Tensor:
    """``[groups * n, ...]`` as ``[groups, n, ...]``."""
    return x.unflatten(0, (-1, n))


def _beside_positions(keys: Tensor, x: Tensor) -> Tensor:
    """Keys ``[(groups,) N, dim]`` with dimensions of size 1 for those between the first and the last of ``x``."""
    return keys[(..., *(None,) * (x.dim() - 2), slice(None))]


def _positions(tensor: Tensor) -> int:
    """Positions of one row of a batch ``[batch, ..., features]``."""
    return math.prod(tensor.shape[1:-1])


def _row_multiple(problem: Problem) -> int:
    """Rows are the positions of whole rows of a batch."""
    return problem.extra[-1]


# --- mux --------------------------------------------------------------------------------------------------------------


def _mux(x: Tensor, keys: Tensor, n: int) -> Tensor:
    """``1/n sum of keys[i] * x[g n + i]``, ``[groups, ..., dim]``."""
    return (_members_of(x, n) * _beside_positions(keys, x)).sum(1) / n


def _mux_output(name: str, x: Tensor, keys: Tensor, n: int) -> Output:
    check = Check(name, x)
    check.require(x.dim() >= 2, f"its input is {list(x.shape)}, expected [groups * n, ..., dim]")
    check.require(n >= 1, f"n={n}, but a group has at least one member")
    check.require(x.shape[0] % n == 0, f"{x.shape[0]} rows are not whole groups of {n}")
    check.tensor("keys", keys, (n, x.shape[-1]))
    return x, (x.shape[0] // n, *x.shape[1:])


def _mux_flops(mixed: Operand, x: Operand, keys: Operand, n: int) -> Sequence[Product]:
    return (Product(0, {x: 0, keys: 0}),)  # elementwise


def _mux_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, keys, ctx.n = inputs
    needs = ctx.needs_input_grad
    ctx.save_for_backward(x if needs[1] else None, keys if needs[0] else None)


def _mux_backward(ctx: Any, dy: Tensor) -> _Gradients:
    x, keys = ctx.saved_tensors
    dx = dkeys = None
    shared = dy.unsqueeze(1) / ctx.n
    if ctx.needs_input_grad[0]:
        dx = (shared * _beside_positions(keys, dy)).flatten(0, 1)
    if ctx.needs_input_grad[1]:
        products = _members_of(x, ctx.n) * shared
        dkeys = products.movedim(1, 0).reshape(ctx.n, -1, x.shape[-1]).sum(1)
    return dx, dkeys, None


def _mux_sizes(mixed: Tensor, /, n: int, **rest: Any) -> Sizes:
    return Sizes(mixed.shape[:-1], mixed.shape[-1], mixed.shape[-1], (n, _positions(mixed)))


def _mux_operands(problem: Problem, random: Random) -> Operands:
    members, positions = problem.extra
    groups = max(1, problem.rows // positions)
    x = random.normal(groups * members, positions, problem.in_features)
    return Operands((x, random.normal(members, problem.in_features), members))


mux = define(
    Operator(
        "mux",
        "Tensor x, Tensor keys, int n",
        _mux,
        _mux_output,
        _mux_flops,
        _mux_save,
        _mux_backward,
        implementations=(OPERATOR, REFERENCE),
        sizes=_mux_sizes,
        operands=_mux_operands,  # no traffic: every implementation is one pass over the input
        row_multiple=_row_multiple,
    )
)


# --- demux_linear -----------------------------------------------------------------------------------------------------


def _demux_linear(h: Tensor, keys: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``weight [key_i ; h[g]] + bias``, ``[groups * N, ..., out]``."""
    key_dim = keys.shape[-1]
    projected = linear(keys, weight[:, :key_dim], bias)
    product = linear(h, weight[:, key_dim:])
    return (product.unsqueeze(1) + _beside_positions(projected, product)).flatten(0, 1)


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


def _demux_flops(y: Operand, h: Operand, keys: Operand, weight: Operand, *rest: Any) -> Sequence[Product]:
    rows = weight.shape[0]
    of_input, of_keys = 2 * h.numel * rows, 2 * keys.numel * rows
    return (Product(of_input + of_keys, {h: of_input, keys: of_keys, weight: of_input + of_keys}),)


def _demux_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, keys, weight, _ = inputs
    needs = ctx.needs_input_grad
    ctx.members, ctx.key_dim, ctx.shared = keys.shape[-2], keys.shape[-1], keys.dim() == 2
    needs_sides = (h if needs[2] else None, keys if needs[2] else None)
    ctx.save_for_backward(*needs_sides, weight if needs[0] or needs[1] else None)


def _demux_backward(ctx: Any, dy: Tensor) -> _Gradients:
    h, keys, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    members = _members_of(dy, ctx.members)
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
        dweight = torch.cat([outer_product(dprojected, keys), outer_product(dproduct, h)], 1)
    if needs[3]:
        dbias = dprojected.reshape(-1, dy.shape[-1]).sum(0)
    return dh, dkeys, dweight, dbias


def _demux_sizes(y: Tensor, /, h: Tensor, keys: Tensor, **rest: Any) -> Sizes:
    return Sizes(h.shape[:-1], y.shape[-1], h.shape[-1], (*keys.shape[-2:], _positions(h)))


def _demux_operands(problem: Problem, random: Random) -> Operands:
    members, key_dim, positions = problem.extra
    h = random.normal(max(1, problem.rows // positions), positions, problem.in_features)
    weight = random.normal(problem.out_features, key_dim + problem.in_features)
    return Operands((h, random.normal(members, key_dim), weight, None))


def _demux_traffic(problem: Problem) -> Traffic:
    """The reference adds the keys' part afterwards, to every member of a group."""
    of_all = problem.output_bytes * problem.extra[0]
    return Traffic(problem.weight_bytes + problem.input_bytes + of_all, copies=problem.output_bytes + of_all)


demux_linear = define(
    Operator(
        "demux_linear",
        "Tensor h, Tensor keys, Tensor weight, Tensor? bias",
        _demux_linear,
        _demux_output,
        _demux_flops,
        _demux_save,
        _demux_backward,
        implementations=(OPERATOR, REFERENCE),
        sizes=_demux_sizes,
        operands=_demux_operands,
        traffic=_demux_traffic,
        tiles=Tiles("demux_linear"),
        row_multiple=_row_multiple,
    )
)
