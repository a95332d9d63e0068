"""Puts the kernels behind the ``fxsparse::`` operators on CUDA devices. Importing this module does it.

What has no kernel (float64, patterns such as 2:16) runs the reference.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxsparse import ops, reference
from fxsparse.codegen import launch


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


def _choose(
    dtype: torch.dtype, n: int, m: int, kernel: Callable[..., Tensor], plain: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    return kernel if launch.unsupported(dtype, n, m) is None else plain


ops.implement(ops.nm_linear, "cuda")(_nm_linear)
ops.implement(ops.nm_linear_grad_input, "cuda")(_nm_linear_grad_input)
ops.implement(ops.nm_linear_grad_values, "cuda")(_nm_linear_grad_values)
ops.implement(ops.nm_linear_low_rank, "cuda")(_nm_linear_low_rank)
