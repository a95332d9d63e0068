"""Products whose depth is computed in parts: the memory through which the parts are added.

Each part leaves its sums in memory and counts itself; the one that finds all others counted adds all sums in the order
of the parts, so that results do not depend on which one it is, and sets the count back.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_counters: dict[tuple[torch.device, int], Tensor] = {}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; of another device those of an H100."""
    return 132 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


def workspace(results: int, parts: int, elements: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for the sums of all parts of some results, and the numbers of parts that have arrived, all 0.

    Args:
        results: that are counted on their own.
        parts: of each.
        elements: of each, float32.
        device: of the launch.
    """
    sums = torch.empty(results * parts * elements, dtype=torch.float32, device=device)
    both = sums, _zeros(results, device)
    for seen in _seen.get():
        seen.append((both, (results, parts, elements, device)))
    return both


_seen: ContextVar[tuple[list[Any], ...]] = ContextVar("_seen", default=())


@contextmanager
def workspaces() -> Iterator[list[tuple[tuple[Tensor, Tensor], tuple[Any, ...]]]]:
    """Memory that is asked for inside the block by this thread, with the arguments it was asked for with."""
    seen: list[Any] = []
    token = _seen.set((*_seen.get(), seen))
    try:
        yield seen
    finally:
        _seen.reset(token)


def _zeros(count: int, device: torch.device) -> Tensor:
    """Zeros, which a launch leaves as zeros: those of a stream are used again, as its launches follow each other. What
    a CUDA graph captures gets its own, because graphs may be replayed at once."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    kept = _counters.get(key)
    if kept is None or kept.numel() < count:
        kept = _counters[key] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return kept
