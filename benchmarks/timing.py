"""Timing on noisy machines: variants take turns, medians are compared, and every table names its machine."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

import fxsparse


@dataclass(frozen=True)
class Times:
    """Seconds of each turn of one variant."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratio(self, baseline: Times) -> tuple[float, float, float]:
        """Median, lower quartile and upper quartile of the ratios to a baseline, turn by turn."""
        ratios = [mine / its for mine, its in zip(self.seconds, baseline.seconds, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        return middle, low, high


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Times the variants in turn, so that a machine that speeds up or slows down affects all of them.

    Args:
        clock: seconds; ``time.thread_time`` leaves out the time that other processes take from a single thread.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warmup + rounds):
        for name, run in variants.items():
            begin = clock()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                seconds[name].append(clock() - begin)
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def device_microseconds(run: Callable[[], object]) -> float:
    """Microseconds on a CUDA device; the queue is busy before, so that launching takes no time."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # some 1 ms
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def environment() -> str:
    """Device and versions for the title of a table."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({torch.get_num_threads()} threads)"
    return f"{device}, torch {torch.__version__}, Python {platform.python_version()}, fxsparse {fxsparse.__version__}"
