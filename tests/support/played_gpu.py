"""A GPU that a CPU plays: Triton's launches of N:M linears are carried out in plain torch, from addresses alone."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fxsparse.codegen.metadata import WGMMA_SP, metadata_shape, unpack_wgmma_metadata
from fxsparse.ops.nm import Pattern, unpack


class Compiled:
    """What Triton compiles of a plain ``y = x W^T (+ bias)``, W 2:4 in bfloat16, on values and indices or, on Hopper's
    sparse tensor cores, through descriptors."""

    def __init__(self, names: list[str]):
        self.names, self.asm = names, {"ptx": ""}

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        assert len(grid) == 3
        return lambda *args: self.run(**dict(zip(self.names, args, strict=True)))

    def run(self, **named: Any) -> None:
        rows, columns, depth = named["M"], named["N"], named["K"]

        def matrix(name: str, height: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            stride = named.get(f"{name}_stride", width)
            place = getattr(named[name], "base", named[name])
            place = place if isinstance(place, int) else place.data_ptr()
            count = (height - 1) * stride + width
            memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(place)
            return torch.frombuffer(memory, dtype=dtype).as_strided((height, width), (stride, 1))

        if "metadata" in named:
            shape = metadata_shape(WGMMA_SP, columns, depth)
            words = matrix("metadata", 1, math.prod(shape), torch.int32).view(shape)
            indices = unpack_wgmma_metadata(words, columns, depth)
        else:
            indices = matrix("indices", columns, depth // 8, torch.uint8)
        if "arrived" in named:  # a part's sums, and zeros
            assert not matrix("arrived", 1, 2, torch.int32).any()
            matrix("sums", rows, columns, torch.float32).fill_(1)
        weight = unpack(matrix("values", columns, depth // 2), indices, Pattern(2, 4), depth)
        bias = matrix("bias", 1, columns)[0] if "bias" in named else None
        matrix("y", rows, columns).copy_(linear(matrix("x", rows, depth), weight, bias))


class Played:
    """Stands for ``JITFunction.run``, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, function: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> Compiled:
        self.calls += 1
        compiled = Compiled(function.arg_names)
        if not warmup:
            compiled[(*grid, 1, 1)[:3]](*args)
        return compiled
