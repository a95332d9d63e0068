"""Puts the kernels behind the ``fxsparse::`` operators on CUDA devices. Importing this module does it, where Triton is.

What has no kernel (float64, patterns such as 2:16) runs the reference.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from fxsparse.codegen import fused_ops, launch  # noqa: F401  fused_ops registers operators
from fxsparse.ops import gather_linear, multiplex, nm_linear, reference
from fxsparse.ops.define import declare_kernel, implement


def _nm_linear(
    x: Tensor, values: Tensor, indices: Tensor, column_mask: Tensor | None, bias: Tensor | None, n: int, m: int
) -> Tensor:
    run: Callable[..., Tensor] = _choose(x.dtype, n, m, launch.nm_linear, reference.nm_linear)
    return run(x, values, indices, column_mask, bias, n, m)


def _nm_linear_grad_input(
    dy: Tensor, values: Tensor, indices: Tensor, column_mask: Tensor | None, n: int, m: int
) -> Tensor:
    run = _choose(dy.dtype, n, m, launch.nm_linear_grad_input, reference.nm_linear_grad_input)
    return run(dy, values, indices, column_mask, n, m)


def _nm_linear_grad_values(dy: Tensor, x: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    run = _choose(dy.dtype, n, m, launch.nm_linear_grad_values, reference.nm_linear_grad_values)
    return run(dy, x, indices, n, m)


def _nm_linear_low_rank(
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
    run = _choose(x.dtype, n, m, launch.nm_linear_low_rank, reference.nm_linear_low_rank)
    return run(x, values, indices, column_mask, down, up, bias, n, m, scale)


def _mux(x: Tensor, keys: Tensor, n: int) -> Tensor:
    run = _choose(x.dtype, None, None, launch.mux, reference.mux)
    return run(x, keys, n)


def _demux_linear(h: Tensor, keys: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    run = _choose(h.dtype, None, None, launch.demux_linear, reference.demux_linear)
    return run(h, keys, weight, bias)


def _gather_linear(
    x: Tensor, weight: Tensor, rows: Tensor | None, columns: Tensor | None, bias: Tensor | None
) -> Tensor:
    run = _choose(x.dtype, None, None, launch.gather_linear, reference.gather_linear)
    return run(x, weight, rows, columns, bias)


def _gather_linear_grad_input(dy: Tensor, weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    run = _choose(dy.dtype, None, None, launch.gather_linear_grad_input, reference.gather_linear_grad_input)
    return run(dy, weight, rows, columns)


def _gather_linear_grad_weight(
    dy: Tensor, x: Tensor, rows: Tensor | None, columns: Tensor | None, out_features: int, in_features: int
) -> Tensor:
    if launch.unsupported(dy.dtype) is not None:
        return reference.gather_linear_grad_weight(dy, x, rows, columns, out_features, in_features)
    return launch.gather_linear_grad_weight(dy, x, rows, columns, (out_features, in_features))


def _choose(
    dtype: torch.dtype, n: int | None, m: int | None, kernel: Callable[..., Tensor], plain: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    return kernel if launch.unsupported(dtype, n, m) is None else plain


KERNELS: dict[CustomOpDef, Callable[..., Tensor]] = {
    nm_linear.nm_linear: _nm_linear,
    nm_linear.nm_linear_grad_input: _nm_linear_grad_input,
    nm_linear.nm_linear_grad_values: _nm_linear_grad_values,
    nm_linear.nm_linear_low_rank: _nm_linear_low_rank,
    multiplex.mux: _mux,
    multiplex.demux_linear: _demux_linear,
    gather_linear.gather_linear: _gather_linear,
    gather_linear.gather_linear_grad_input: _gather_linear_grad_input,
    gather_linear.gather_linear_grad_weight: _gather_linear_grad_weight,
}
"""What an operator runs on a GPU."""

if importlib.util.find_spec("triton") is not None:
    for _op, _kernel in KERNELS.items():
        implement(_op, "cuda")(_kernel)
    declare_kernel("nm_linear_epilogue", "cuda")
    declare_kernel("sparse_tensor_core_linear", "cuda")
