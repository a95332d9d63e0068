"""Measuring the implementations of operators on the device at hand, and keeping the times (`timings`).

Candidates take turns on random operands, each first has to give the right result, and medians are kept.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

import torch

from fxsparse.lowering import candidates, timings
from fxsparse.lowering.candidates import Candidates, Run
from fxsparse.ops.operator import COMPRESSED, DENSE, OPERATOR, REFERENCE, Problem

ROUNDS = 15
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
    problem: Problem, device: str, *, until: float | None = None, compile_reference: bool = True
) -> Measurement:
    """Measures the implementations of one product and keeps the times.

    Args:
        problem: the product.
        device: device type.
        until: of ``time.monotonic``; three turns are taken in any case, with one tile of a kernel.
        compile_reference: also measure the reference, as Inductor compiles it.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        try:
            several = candidates.candidates_for(problem, device, compile_reference=compile_reference, until=until)
        except RuntimeError as failure:  # no memory for the operands
            return Measurement(problem, failed={"operands": _in_a_line(failure)})
        runs, failed = _validated(several, _TOLERANCE[problem.dtype])
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(ROUNDS):
            if turn >= 3 and until is not None and time.monotonic() > until:
                break
            for name, run in runs.items():
                times[name].append(timed(run, device))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    if OPERATOR in medians:
        medians[COMPRESSED] = medians[OPERATOR]  # the same kernel, whoever compressed the weight
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
    result = several.result(run()) if name == DENSE else run()
    scale = float(several.exact.abs().max()) or 1.0
    return float((result.to(several.exact.dtype) - several.exact).abs().max()) / scale


def _in_a_line(failure: Exception) -> str:
    return f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"


def timed(run: Run, device: str) -> float:
    """Milliseconds of one run."""
    if device != "cuda":
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _flush() -> None:
    """Empties the L2 cache, and keeps the device busy while the next launch is prepared."""
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    torch.empty(4 * max(size, 1 << 25), dtype=torch.uint8, device="cuda").zero_()
    torch.cuda._sleep(200_000)  # clock cycles, some 0.1 ms
