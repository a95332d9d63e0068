"""Launches that the PTX emulator carries out: kernels run as compiled, on CPU tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from fxsparse.codegen.aot import compile_for
from fxsparse.codegen.loaded import Kernel
from tests.support.ptx_block import Descriptor
from tests.support.ptx_emulator import Memory, Program

FRESH = {"y", "sums"}
"""Arguments that a kernel may not read before it has written them."""


@dataclass(frozen=True)
class Emulation:
    """How launches are emulated.

    Attributes:
        capability: of the device.
        order: of a block's warps, 1 or -1, or drawn anew for every launch by a function of their number.
        blocks: of the blocks, from their number; None for the usual one.
        mutate: changes the PTX.
    """

    capability: int
    order: int | Callable[[int], Sequence[int]] = 1
    blocks: Callable[[int], Sequence[int]] | None = None
    mutate: Callable[[str], str] | None = None


@contextmanager
def emulation(capability: int, order: Any = 1, **how: Any) -> Iterator[None]:
    """Inside, every launch runs the PTX for a compute capability; arguments as of :class:`Emulation`."""
    emulated = Emulation(capability, order, **how)

    def launch(kernel: Kernel, grid: tuple[int, ...], *args: Any) -> None:
        run(kernel, emulated, grid, args)

    with mock.patch.object(Kernel, "launch", launch):
        yield


def run(kernel: Kernel, how: Emulation, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
    """Runs all blocks and copies memory back into the tensors. Memory around them holds NaN."""
    names = {
        _storage(arg).data_ptr(): argument.name
        for argument, arg in zip(kernel.spec.arguments, args, strict=True)
        if isinstance(arg, Tensor)
    }
    bases = [arg if isinstance(arg, Tensor) else getattr(arg, "base", None) for arg in args]
    tensors = [tensor for tensor in bases if isinstance(tensor, Tensor)]
    raw = {_storage(tensor).data_ptr(): _storage(tensor) for tensor in tensors}
    memory = Memory(sum(storage.numel() + 512 for storage in raw.values()) + 4096)
    memory.bytes[:] = 0xFF
    base = {
        pointer: memory.put(storage.numpy(), written=names.get(pointer) not in FRESH)
        for pointer, storage in raw.items()
    }
    params = [_param(arg, base) for arg in args]
    sizes = [arg for arg in args if isinstance(arg, int)]
    aligned = all(size % 16 == 0 for size in sizes) and all(
        tensor.storage_offset() * tensor.element_size() % 16 == 0 for tensor in tensors
    )
    ptx = compile_for(kernel.spec, how.capability, aligned=aligned).asm["ptx"]
    program = Program(ptx if how.mutate is None else how.mutate(ptx))
    order = how.order if isinstance(how.order, int) else how.order(program.warps)
    blocks = None if how.blocks is None else how.blocks(math.prod(grid))
    program.launch(memory, params, grid, program.warps, order, blocks)
    for pointer, storage in raw.items():
        storage.copy_(torch.from_numpy(memory.get(base[pointer], np.uint8, (storage.numel(),))))


def _storage(tensor: Tensor) -> Tensor:
    """All bytes that a tensor is a view of."""
    return torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())


def _param(arg: Any, base: dict[int, int]) -> Any:
    if isinstance(arg, Tensor):
        return base[_storage(arg).data_ptr()] + arg.storage_offset() * arg.element_size()
    if hasattr(arg, "block_shape"):
        shape, swizzle = tuple(arg.shape), arg.layout.swizzle_byte_width
        box, itemsize = tuple(arg.block_shape), arg.base.element_size()
        return Descriptor(_param(arg.base, base), shape, tuple(arg.strides), box, itemsize, swizzle)
    return int(np.float32(arg).view(np.uint32)) if isinstance(arg, float) else arg
