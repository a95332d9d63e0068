"""The kernels that this process has loaded, and how often each was launched."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxsparse.codegen import source
from fxsparse.codegen.cpu import loaded as cpu
from fxsparse.codegen.spec import Spec


@dataclass
class Kernel:
    """A generated kernel.

    Attributes:
        spec: that it was generated from.
        file: its source, for a person to read.
        function: the Triton function in that file.
        launches: times it was launched by this process. A CUDA graph replays without launching anew, so its kernels
            count once a capture.
        checked: whether the spec has seen what the compiler made of it, which it does before the first launch.
    """

    spec: Spec
    file: Path
    function: Any
    launches: int = 0
    checked: bool = False

    def launch(self, grid: tuple[int, ...], *args: Any) -> None:
        """Runs it on the current device and stream, without waiting for it."""
        self.count()
        options: dict[str, int] = {"num_warps": self.spec.tile.warps}
        if not self.spec.gluon:
            options["num_stages"] = self.spec.tile.stages
        if self.spec.relies_on_ptx and not self.checked:
            self.spec.check(self.function.warmup(*args, grid=grid, **options).asm["ptx"])
            self.checked = True
        compiled = self.function[grid](*args, **options)
        for seen in _seen.get():
            seen.append(Launched(self, grid, args, compiled))

    def count(self) -> None:
        """Notes a launch."""
        self.launches += 1
        for counts, _ in _recordings:
            counts[self.file] = counts.get(self.file, 0) + 1


@dataclass(frozen=True)
class Launched:
    """A launch, and what Triton compiled for its arguments."""

    kernel: Kernel
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    compiled: Any


_seen: ContextVar[tuple[list[Launched], ...]] = ContextVar("_seen", default=())


@contextmanager
def launched() -> Iterator[list[Launched]]:
    """Launches inside the block, of this thread."""
    seen: list[Launched] = []
    token = _seen.set((*_seen.get(), seen))
    try:
        yield seen
    finally:
        _seen.reset(token)


_kernels: dict[Path, Kernel] = {}
_recordings: list[tuple[dict[Path, int], dict[Path, int]]] = []
_lock = threading.Lock()


@functools.cache
def kernel(spec: Spec) -> Kernel:
    """The kernel of a spec: rendered, stored and loaded the first time it is asked for."""
    with _lock:
        file = source.write(spec.name, spec.render())
        if file not in _kernels:
            _kernels[file] = Kernel(spec, file, getattr(source.load(file), spec.name))
        return _kernels[file]


def kernels() -> list[Kernel | cpu.Kernel]:
    """Every kernel this process has loaded, Triton's and C++, the most launched first."""
    every: list[Kernel | cpu.Kernel] = [*_kernels.values(), *cpu.kernels()]
    return sorted(every, key=lambda kernel: (-kernel.launches, kernel.file.name))


@contextmanager
def recording(counts: dict[Path, int] | None = None) -> Iterator[dict[Path, int]]:
    """Launches inside the block, by source file; added to ``counts`` where given."""
    counts = {} if counts is None else counts
    start(counts)
    try:
        yield counts
    finally:
        stop(counts)


def start(counts: dict[Path, int]) -> None:
    """Adds every launch to ``counts`` from here on; at most once, however often it is started."""
    if not any(other is counts for other, _ in _recordings):
        _recordings.append((counts, cpu.launches()))


def stop(counts: dict[Path, int]) -> None:
    # C++ kernels count their own launches.
    for before in [before for other, before in _recordings if other is counts]:
        for file, count in cpu.launches().items():
            if count > before.get(file, 0):
                counts[file] = counts.get(file, 0) + count - before.get(file, 0)
    _recordings[:] = [pair for pair in _recordings if pair[0] is not counts]
