"""The C++ kernels of this process: made, built and loaded once a spec, or the reason why not."""

from __future__ import annotations

import ctypes
import functools
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxsparse.codegen.cpu import build
from fxsparse.codegen.cpu.host import host
from fxsparse.codegen.cpu.spec import CPUSpec, Tile

_lock = threading.Lock()
_kernels: dict[int, Kernel] = {}
_failures: dict[CPUSpec, str] = {}


@dataclass(frozen=True)
class Kernel:
    """A kernel that is loaded.

    Attributes:
        spec: what it was made from.
        tile: how it cuts its work.
        file: its source, for a person to read.
        id: what the operators of ``host`` know it by.
        counter: where they count its launches.
    """

    spec: CPUSpec
    tile: Tile
    file: Path
    id: int
    counter: ctypes.c_int64

    @property
    def shrink(self) -> int:
        """Columns of the product for one of the result."""
        return self.spec.shrink

    @property
    def launches(self) -> int:
        """Times it was launched by this process."""
        return self.counter.value


def kernel(spec: CPUSpec, tile: Tile) -> Kernel | str:
    """The kernel of a spec and a tile, or why there is none: no compiler, or it failed, or the cache cannot be used.

    The first call renders, builds (seconds, with a line on standard error) and loads it; a failure is remembered.
    """
    with _lock:
        return _kernel(spec, tile)


@functools.cache
def _kernel(spec: CPUSpec, tile: Tile) -> Kernel | str:
    built = _built(spec)
    if isinstance(built, str):
        return built
    (file, run), number = built, spec.id(tile)
    sizes = spec.n, spec.m, spec.shrink, _scalar_types()[getattr(torch, spec.dtype)], tile.few, tile.vectors, tile.rows
    address = host().fxsparse_load(number, ctypes.cast(run, ctypes.c_void_p), *sizes)
    made = Kernel(spec, tile, file, number, ctypes.c_int64.from_address(address))
    return _kernels.setdefault(number, made)


@functools.cache
def _built(spec: CPUSpec) -> tuple[Path, Any] | str:
    try:
        file, target = build.library(spec.name, spec.render(), spec.instruction_set.flags)
        host()
        return file, build.load(target).fxsparse_kernel
    except build.BuildError as error:
        _failures[spec] = str(error)
        return _failures[spec]


def failure(spec: CPUSpec) -> str | None:
    """Why a spec could not be built, None if that was not tried or it was; builds nothing."""
    with _lock:
        return _failures.get(spec)


def by_id(number: int) -> Kernel:
    """A loaded kernel.

    Raises:
        KeyError: it is not loaded.
    """
    return _kernels[number]


def kernels() -> list[Kernel]:
    """Every C++ kernel that this process has loaded, the most launched first."""
    return sorted(_kernels.values(), key=lambda one: (-one.launches, one.file.name))


def launches() -> dict[Path, int]:
    """Launches so far, by source file."""
    counts: dict[Path, int] = {}
    for one in list(_kernels.values()):
        counts[one.file] = counts.get(one.file, 0) + one.launches
    return counts


def forget() -> None:
    """Forgets what was built and what failed; what is loaded stays loaded."""
    with _lock:
        _kernel.cache_clear()
        _built.cache_clear()
        _failures.clear()


def _scalar_types() -> dict[torch.dtype, int]:
    """Numbers of dtypes in torch's stable interface."""
    return {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}
