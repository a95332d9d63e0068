"""Measuring the implementations of operators on the device at hand, and keeping the times (`fxsparse.measured`).

Rivals take turns on random operands, each first has to give the right result, and medians are kept.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fxsparse import lower, measured, sites
from fxsparse.compiled import compiled_graphs
from fxsparse.cost_model import Work
from fxsparse.errors import OptionError
from fxsparse.frozen import pattern_of
from fxsparse.lower import COMPRESSED, DENSE, OPERATOR, REFERENCE
from fxsparse.rivals import Rivals, Run, rivals

ROWS = (1, 16, 64, 512, 4096)
"""Rows of the input that are measured where nothing else is said: decoding up to training."""

ROUNDS = 15
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4, torch.float64: 1e-10}


@dataclass(frozen=True)
class Measurement:
    """What was found for one product.

    Attributes:
        work: the product.
        milliseconds: of each implementation that gave the right result, the median.
        failed: the others, and why.
    """

    work: Work
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
        return f"{measured.key(self.work)}: {', '.join(shown) or nothing}"


def tune(
    model: nn.Module | Callable[..., Any],
    *,
    rows: Sequence[int] | None = None,
    seconds: float = 60.0,
    again: bool = False,
    progress: bool = True,
) -> list[Measurement]:
    """Measures, ahead of time, the implementations of every operator of a model and of its gradients.

    What is found is kept: compiled code chooses by it from then on, in this process and in later ones; what was
    compiled before stays.

    Args:
        model: a rewritten graph module, a model with N:M weights, or what ``torch.compile(..., backend="fxsparse")``
            returned for one.
        rows: of the inputs, batch times sequence; by default those a compiled model has met, else `ROWS`.
        seconds: at most spent; products that no time was left for are not in the result, call it again for them.
        again: also measure what was measured before.
        progress: print a line for each product to standard error, above a bar where rich is installed.

    Raises:
        OptionError: the model holds no such operator, or an option is out of range.
    """
    if seconds <= 0 or any(count < 1 for count in rows or ()):
        raise OptionError(f"seconds={seconds} and every number of rows must be positive")
    device, works = works_of(model, rows)
    if not works:
        raise OptionError("the model has nothing to tune: rewrite it, with nm-masks say, or give it N:M weights")
    pending = [work for work in works if again or REFERENCE not in measured.times(work, device)]
    until, found = time.monotonic() + seconds, []
    with _bar(len(pending)) if progress else contextlib.nullcontext(lambda line: None) as say:
        for count, work in enumerate(pending, 1):
            if time.monotonic() > until:
                say(f"tuning stopped after {seconds:g} s, {len(pending) - count + 1} left")
                break
            found.append(measure(work, device, until=until))
            say(f"[{count}/{len(pending)}] {found[-1]}")
    return found


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[str], None]]:
    """What prints a line for a product to standard error, above a progress bar where rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield functools.partial(print, file=sys.stderr, flush=True)
        return
    columns = TextColumn("tuning"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True, soft_wrap=True), transient=True) as bar:
        task = bar.add_task("tuning", total=total)

        def say(line: str) -> None:
            bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
            bar.advance(task)

        yield say


def works_of(model: Any, rows: Sequence[int] | None) -> tuple[str, list[Work]]:
    """The device and the products of a model, each once."""
    met = [choice.work for graph in compiled_graphs(model) for choice in graph.choices if choice.work is not None]
    if met and rows is None:
        works: Iterable[Work] = met
    else:
        works = [_with_rows(work, count) for work in [*met, *_works_in(model)] for count in rows or ROWS]
    module = getattr(model, "_orig_mod", model)
    tensors = [*module.parameters(), *module.buffers()] if isinstance(module, nn.Module) else []
    return (tensors[0].device.type if tensors else "cpu"), list(dict.fromkeys(works))


def _works_in(model: Any) -> Iterator[Work]:
    model = getattr(model, "_orig_mod", model)
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, GraphModule):
            for op, node in sites.operators(module):
                site = sites.site_of(op, node)
                if site is not None:
                    trained = any(parameter.requires_grad for parameter in module.parameters())
                    works = [each.work for each in (site, *(lower.gradients(site) if trained else ()))]
                    yield from (work for work in works if work is not None)
        elif isinstance(weight := getattr(module, "weight", None), nn.Parameter) and weight.dim() == 2:
            pattern = None if isinstance(module, nn.Embedding) else pattern_of(weight)
            if pattern is not None:
                yield Work("nm_linear", pattern, weight.dtype, 1, *weight.shape)


def _with_rows(work: Work, count: int) -> Work:
    """A product on another number of rows; of operators that take whole groups, at least so many."""
    length = work.further[-1] if work.op in ("mux", "demux_linear") else 1
    return replace(work, rows=-(-count // length) * length)


def measure(work: Work, device: str, *, until: float | None = None, compile_reference: bool = True) -> Measurement:
    """Measures the implementations of one product and keeps the times.

    Args:
        work: the product.
        device: device type.
        until: of ``time.monotonic``; three turns are taken in any case, with one tile of a kernel.
        compile_reference: also measure the reference, as Inductor compiles it.
    """
    found = Measurement(work)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        try:
            several = rivals(work, device, compile_reference=compile_reference, until=until)
        except RuntimeError as failure:  # no memory for the operands
            found.failed["operands"] = _in_a_line(failure)
            return found
        runs = _right_ones(several, found)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(ROUNDS):
            if turn >= 3 and until is not None and time.monotonic() > until:
                break
            for name, run in runs.items():
                times[name].append(timed(run, device))
    found.milliseconds.update({name: statistics.median(taken) for name, taken in times.items()})
    if OPERATOR in found.milliseconds:
        found.milliseconds[COMPRESSED] = found.milliseconds[OPERATOR]  # the same kernel, whoever compressed the weight
    measured.remember(work, device, found.milliseconds)
    return found


def _right_ones(rivals: Rivals, found: Measurement) -> dict[str, Run]:
    """Those that give the right result; what became of the others goes to ``found``."""
    runs: dict[str, Run] = {}
    scale = float(rivals.exact.abs().max()) or 1.0
    for implementation, make in rivals.makers.items():
        try:
            variants = make()
        except Exception as failure:  # a library that does not take the shape
            found.failed[implementation] = _in_a_line(failure)
            continue
        for name, run in variants.items():
            try:
                result = rivals.result(run()) if name == DENSE else run()
                error = float((result.to(rivals.exact.dtype) - rivals.exact).abs().max()) / scale
            except Exception as failure:  # a kernel that does not compile
                found.failed[name] = _in_a_line(failure)
                continue
            if error < _TOLERANCE[found.work.dtype]:
                runs[name] = run
            else:
                found.failed[name] = f"its result is off by {error:.1e}"
    return runs


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
