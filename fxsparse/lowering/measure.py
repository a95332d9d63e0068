"""Measuring the implementations of operators on the device at hand, and keeping the times (`timings`).

Candidates take turns on random operands, each first has to give the right result, and medians are kept.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fxsparse.lowering import candidates, timings
from fxsparse.lowering.candidates import Candidates, Run
from fxsparse.ops.operator import COMPRESSED, DENSE, OPERATOR, REFERENCE, Problem

ROUNDS = 15
SECONDS_ON_CPU = 2.0
"""After which five turns are enough on a CPU, where one may take as long."""
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4, torch.float64: 1e-10}


@dataclass(frozen=True)
class Measurement:
    """What was measured for one product.

    Attributes:
        problem: the product.
        milliseconds: of each implementation that gave the right result, the median.
        failed: the others, and why.
    """

    problem: Problem
    milliseconds: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def best(self) -> str | None:
        return min(self.milliseconds, key=lambda name: self.milliseconds[name]) if self.milliseconds else None

    def __str__(self) -> str:
        base = self.milliseconds.get(DENSE) or self.milliseconds.get(REFERENCE)
        shown = [
            f"{name} {time * 1e3:.0f} us" + (f" ({time / base:.2f})" if base else "")
            for name, time in sorted(self.milliseconds.items(), key=lambda item: item[1])
        ]
        nothing = f"nothing could be measured, {'; '.join(self.failed.values())}"
        return f"{timings.key(self.problem)}: {', '.join(shown) or nothing}"


def measure(
    problem: Problem,
    device: str,
    *,
    until: float | None = None,
    compile_reference: bool = True,
    exclude: Collection[str] = (),
) -> Measurement:
    """Measures the implementations of one product and keeps the times.

    Args:
        problem: the product.
        device: device type.
        until: of ``time.monotonic``; three turns are taken in any case, with one tile of a kernel.
        compile_reference: also measure the reference (:func:`candidates.candidates_for`).
        exclude: implementations to leave out.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        try:
            several = candidates.candidates_for(problem, device, compile_reference=compile_reference, until=until)
        except RuntimeError as failure:  # no memory for the operands
            return Measurement(problem, failed={"operands": _in_a_line(failure)})
        for name in exclude:
            several.makers.pop(name, None)
        runs, failed = _validated(several, _TOLERANCE[problem.dtype])
        times: dict[str, list[float]] = {name: [] for name in runs}
        begin = time.monotonic()
        for turn in range(ROUNDS):
            if turn >= 3 and until is not None and time.monotonic() > until:
                break
            if turn >= 5 and device == "cpu" and time.monotonic() > begin + SECONDS_ON_CPU:
                break
            for name, run in runs.items():
                times[name].append(timed(run, device))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    variants = [time for name, time in medians.items() if name.partition(":")[0] == OPERATOR]
    if variants:
        medians[COMPRESSED] = min(variants)  # the same kernel, whoever compressed the weight
    timings.remember(problem, device, medians)
    return Measurement(problem, medians, failed)


def _validated(several: Candidates, tolerance: float) -> tuple[dict[str, Run], dict[str, str]]:
    """Those that give the right result, and why the others do not."""
    runs: dict[str, Run] = {}
    failed: dict[str, str] = {}
    for implementation, make in several.makers.items():
        try:
            variants = make()
        except Exception as failure:  # a library that does not take the shape
            failed[implementation] = _in_a_line(failure)
            continue
        for name, run in variants.items():
            try:
                error = _error(several, name, run)
            except Exception as failure:  # a kernel that does not compile
                failed[name] = _in_a_line(failure)
                continue
            if error < tolerance:
                runs[name] = run
            else:
                failed[name] = f"its result is off by {error:.1e}"
    return runs, failed


def _error(several: Candidates, name: str, run: Run) -> float:
    """The largest error of a run, over the largest element of the right result."""
    result = several.result(run()) if name in several.dense else run()
    scale = float(several.exact.abs().max()) or 1.0
    return float((result.to(several.exact.dtype) - several.exact).abs().max()) / scale


def _in_a_line(failure: Exception) -> str:
    return f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"


def timed(run: Run, device: str) -> float:
    """Milliseconds of one run."""
    if device != "cuda":
        _fill_caches()
        # With one thread its own time is counted, which other processes disturb less.
        clock = time.thread_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
        begin = clock()
        run()
        return (clock() - begin) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _fill_caches() -> None:
    """Fills the caches of a CPU with something else: in a model, other weights pass before the same one comes again."""
    _filler().add_(1)


@functools.cache
def _filler() -> Tensor:
    return torch.zeros(min(2 * last_cache(), 256 << 20), dtype=torch.uint8)


def last_cache() -> int:
    """Bytes of the processor's last cache, 32 MiB where the system does not tell."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text.removesuffix("K")) << 10
    except (OSError, ValueError):
        return 32 << 20


def _flush() -> None:
    """Empties the L2 cache, and keeps the device busy while the next launch is prepared."""
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    torch.empty(4 * max(size, 1 << 25), dtype=torch.uint8, device="cuda").zero_()
    torch.cuda._sleep(2_000_000)  # clock cycles, some 1 ms: a launch through Python takes up to half of that
