"""Helpers of the launches: matrices from tensors, names of dtypes, the device, and one program for each tile."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from fxsparse.codegen.loaded import kernel
from fxsparse.codegen.spec import DTYPES, NMSpec, Spec


def unsupported(dtype: torch.dtype, n: int | None = None, m: int | None = None) -> str | None:
    """Why there is no kernel for a dtype and pattern; None if there is one."""
    if dtype_name(dtype) not in DTYPES:
        return f"there are kernels for {', '.join(DTYPES)}, not for {dtype_name(dtype)}"
    if n is not None and (n, m) not in NMSpec.PATTERNS:
        return f"there are kernels for {', '.join(f'{a}:{b}' for a, b in NMSpec.PATTERNS)}, not for {n}:{m}"
    return None


def launch_tiles(spec: Spec, result: Sequence[int], *args: Tensor | float) -> None:
    """Launches one program for each tile of a result of that many rows and columns."""
    tile = spec.tile
    kernel(spec).launch((-(-result[0] // tile.rows) * -(-result[1] // tile.columns),), *args)


def rows_of(x: Tensor) -> Tensor:
    """``[..., features]`` as a matrix whose features are adjacent in memory."""
    matrix = x.reshape(-1, x.shape[-1])
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def if_present(tensor: Tensor | None) -> tuple[Tensor, ...]:
    """An optional tensor as zero or one arguments, contiguous."""
    return () if tensor is None else (tensor.contiguous(),)


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` of ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(x: Tensor) -> str:
    """The name of a tensor's dtype, as specs take it."""
    return dtype_name(x.dtype)


def precision_of(x: Tensor) -> str:
    """``"tf32"`` if torch's settings allow it for float32 products and the tensor is float32, else ``"ieee"``."""
    if x.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    return "tf32"


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Makes a tensor's device the current one: Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
