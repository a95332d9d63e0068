"""Launches that the PTX emulator carries out: kernels run as compiled, on CPU tensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from fxsparse.codegen.aot import compile_for
from fxsparse.codegen.loaded import Kernel
from tests.support.ptx_emulator import Memory, Program


@contextmanager
def emulation(capability: int, order: int = 1) -> Iterator[None]:
    """Inside, every launch runs the PTX for a compute capability; ``order`` is that of a block's warps."""

    def launch(kernel: Kernel, grid: tuple[int, ...], *args: Any) -> None:
        run(kernel, capability, grid, args, order)

    with mock.patch.object(Kernel, "launch", launch):
        yield


def run(kernel: Kernel, capability: int, grid: tuple[int, ...], args: tuple[Any, ...], order: int = 1) -> None:
    """Runs all blocks and copies memory back into the tensors. Memory around them holds NaN."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    raw = {_storage(tensor).data_ptr(): _storage(tensor) for tensor in tensors}
    memory = Memory(sum(storage.numel() + 512 for storage in raw.values()) + 4096)
    memory.bytes[:] = 0xFF
    base = {pointer: memory.put(storage.numpy()) for pointer, storage in raw.items()}
    params = [_param(arg, base) for arg in args]
    sizes = [arg for arg in args if isinstance(arg, int)]
    aligned = all(size % 16 == 0 for size in sizes) and all(
        tensor.storage_offset() * tensor.element_size() % 16 == 0 for tensor in tensors
    )
    program = Program(compile_for(kernel.spec, capability, aligned=aligned).asm["ptx"])
    for block in itertools.product(*(range(count) for count in (*grid, 1, 1)[:3])):
        program.run(memory, params, block, kernel.spec.tile.warps, order)
    for pointer, storage in raw.items():
        storage.copy_(torch.from_numpy(memory.get(base[pointer], np.uint8, (storage.numel(),))))


def _storage(tensor: Tensor) -> Tensor:
    """All bytes that a tensor is a view of."""
    return torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())


def _param(arg: Any, base: dict[int, int]) -> int:
    if isinstance(arg, Tensor):
        return base[_storage(arg).data_ptr()] + arg.storage_offset() * arg.element_size()
    return int(np.float32(arg).view(np.uint32)) if isinstance(arg, float) else arg
