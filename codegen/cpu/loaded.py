"""The C++ kernels of this process: made, built and loaded once a spec, or the reason why not."""

from __future__ import annotations

import ctypes
import functools
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from fxsparse.codegen.cpu import build
from fxsparse.codegen.cpu.host import host
from fxsparse.codegen.cpu.spec import CPUSpec

_lock = threading.Lock()
_kernels: dict[int, Kernel] = {}


@dataclass(frozen=True)
class Kernel:
    """A kernel that is loaded.

    Attributes:
        spec: what it was made from.
        file: its source, for a person to read.
        id: what the operators of ``host`` know it by.
        shrink: columns of the product for one of the result.
    """

    spec: CPUSpec
    file: Path
    id: int
    shrink: int

    @property
    def launches(self) -> int:
        """Times it was launched by this process."""
        count: int = host().fxsparse_launches(self.id)
        return count


def kernel(spec: CPUSpec) -> Kernel | str:
    """The kernel of a spec, or why there is none: no compiler, or it failed, or the cache cannot be used.

    The first call renders, builds (seconds, with a line on standard error) and loads it; a failure is remembered.
    """
    with _lock:
        return _kernel(spec)


@functools.cache
def _kernel(spec: CPUSpec) -> Kernel | str:
    try:
        file, target = build.library(spec.name, spec.render(), spec.instruction_set.flags)
        run = build.load(target).fxsparse_kernel
        made = Kernel(spec, file, spec.id, getattr(spec, "shrink", 1))
        dtype = _scalar_types()[getattr(torch, spec.dtype)]
        host().fxsparse_load(made.id, ctypes.cast(run, ctypes.c_void_p), spec.n, spec.m, made.shrink, dtype)
    except build.BuildError as error:
        return str(error)
    return _kernels.setdefault(made.id, made)


def by_id(number: int) -> Kernel:
    """A loaded kernel.

    Raises:
        KeyError: it is not loaded.
    """
    return _kernels[number]


def kernels() -> list[Kernel]:
    """Every C++ kernel that this process has loaded, the most launched first."""
    return sorted(_kernels.values(), key=lambda one: (-one.launches, one.file.name))


def _scalar_types() -> dict[torch.dtype, int]:
    """Numbers of dtypes in torch's stable interface."""
    return {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}
