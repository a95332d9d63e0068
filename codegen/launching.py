"""What every launch needs: matrices out of tensors, names of dtypes, the device, one program a tile."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from fxsparse.codegen.loaded import kernel
from fxsparse.codegen.spec import Spec


def launch_tiles(spec: Spec, result: Sequence[int], *args: Tensor | float) -> None:
    """One program for each tile of a result."""
    tile = spec.tile
    kernel(spec).launch((-(-result[0] // tile.rows) * -(-result[1] // tile.columns),), *args)


def blocks(rows: int, columns: int, square: bool) -> Iterator[slice]:
    step = columns if square and rows > columns > 0 else rows
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def rows_of(x: Tensor) -> Tensor:
    """``[..., features]`` as a matrix whose features are adjacent in memory."""
    matrix = x.reshape(-1, x.shape[-1])
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def count(index: Tensor | None, size: int) -> int:
    return size if index is None else index.shape[0]


def given(tensor: Tensor | None) -> tuple[Tensor, ...]:
    return () if tensor is None else (tensor.contiguous(),)


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(x: Tensor) -> str:
    return dtype_name(x.dtype)


def precision_of(x: Tensor) -> str:
    """What the user allows float32 products: torch's own setting."""
    if x.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    return "tf32"


def power_of_two(rank: int) -> int:
    return max(16, 1 << (rank - 1).bit_length())


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
