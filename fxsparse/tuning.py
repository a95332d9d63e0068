"""Measuring the implementations of N:M products on the device at hand, and keeping the times (`fxsparse.measured`).

Rivals take turns on random operands, each first has to give the right result, and medians are kept.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from fxsparse import lower, measured, nm, reference
from fxsparse.codegen import launch
from fxsparse.codegen import tune as tiles
from fxsparse.codegen.metadata import pack_metadata
from fxsparse.compiled import compiled_graphs
from fxsparse.cost_model import Work
from fxsparse.custom_op import has_kernel
from fxsparse.errors import OptionError
from fxsparse.frozen import pattern_of
from fxsparse.lower import COMPRESSED, CUSPARSELT, DENSE, OPERATOR, REFERENCE, SPARSE_TENSOR_CORES, Site

ROWS = (1, 16, 64, 512, 4096)
"""Rows of the input that are measured where nothing else is said: decoding up to training."""

ROUNDS = 15
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4, torch.float64: 1e-10}
_TRAINED = ("nm_linear_grad_input", "nm_linear_grad_values")

Run = Callable[[], Tensor]


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
        return f"{measured.key(self.work)}: {', '.join(shown) or 'nothing could be measured'}"


def tune(
    model: nn.Module | Callable[..., Any],
    *,
    rows: Sequence[int] | None = None,
    seconds: float = 60.0,
    again: bool = False,
    progress: bool = True,
) -> list[Measurement]:
    """Measures, ahead of time, the implementations of every N:M product of a model, and keeps what is found.

    Compiled code chooses by it from then on, in this process and in later ones; what was compiled before stays.

    Args:
        model: a rewritten graph module, a model with N:M weights, or what ``torch.compile(..., backend="fxsparse")``
            returned for one.
        rows: of the inputs, batch times sequence; by default those a compiled model has met, else `ROWS`.
        seconds: at most spent; products that no time was left for are not in the result, call it again for them.
        again: also measure what was measured before.
        progress: print a line for each product to standard error.

    Raises:
        OptionError: the model has no N:M product, or an option is out of range.
    """
    if seconds <= 0 or any(count < 1 for count in rows or ()):
        raise OptionError(f"seconds={seconds} and every number of rows must be positive")
    device, works = works_of(model, rows)
    if not works:
        raise OptionError("the model has no N:M product to tune: rewrite it with nm-masks, or give it N:M weights")
    pending = [work for work in works if again or not measured.times(work, device)]
    until, found = time.monotonic() + seconds, []
    for count, work in enumerate(pending, 1):
        if time.monotonic() > until:
            if progress:
                print(f"tuning stopped after {seconds:g} s, {len(pending) - count + 1} left", file=sys.stderr)
            break
        found.append(measure(work, device, until=until))
        if progress:
            print(f"[{count}/{len(pending)}] {found[-1]}", file=sys.stderr, flush=True)
    return found


def works_of(model: Any, rows: Sequence[int] | None) -> tuple[str, list[Work]]:
    """The device and the products of a model, each once."""
    met = [choice.work for graph in compiled_graphs(model) for choice in graph.choices if choice.work is not None]
    if met and rows is None:
        works: Iterable[Work] = met
    else:
        works = [replace(work, rows=count) for work in [*met, *_works_in(model)] for count in rows or ROWS]
    module = getattr(model, "_orig_mod", model)
    tensors = [*module.parameters(), *module.buffers()] if isinstance(module, nn.Module) else []
    return (tensors[0].device.type if tensors else "cpu"), list(dict.fromkeys(works))


def _works_in(model: Any) -> Iterator[Work]:
    model = getattr(model, "_orig_mod", model)
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, GraphModule):
            for op, node in lower.operators(module):
                site = lower.site_of(op, node)
                work = None if site is None else site.work
                if work is not None:
                    yield work
                    trained = any(parameter.requires_grad for parameter in module.parameters())
                    yield from (replace(work, op=name) for name in _TRAINED if trained)
        elif isinstance(weight := getattr(module, "weight", None), nn.Parameter) and weight.dim() == 2:
            pattern = None if isinstance(module, nn.Embedding) else pattern_of(weight)
            if pattern is not None:
                yield Work("nm_linear", pattern, weight.dtype, 1, *weight.shape)


def measure(work: Work, device: str, *, until: float | None = None, compile_reference: bool = True) -> Measurement:
    """Measures the implementations of one product and keeps the times.

    Args:
        work: the product.
        device: device type.
        until: of ``time.monotonic``; three turns are taken in any case.
        compile_reference: also measure the reference, as Inductor compiles it.
    """
    torch.manual_seed(0)
    found = Measurement(work)
    runs, exact = rivals(work, device, compile_reference=compile_reference)
    scale = float(exact.abs().max()) or 1.0
    for name, run in list(runs.items()):
        try:
            error = float((run().double() - exact).abs().max()) / scale
        except Exception as failure:  # a library that does not take the shape, a kernel that does not compile
            found.failed[name] = f"{type(failure).__name__}: {str(failure).partition(chr(10))[0]}"
            del runs[name]
            continue
        if not error < _TOLERANCE[work.dtype]:
            found.failed[name] = f"its result is off by {error:.1e}"
            del runs[name]
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
    """Empties the L2 cache, which also keeps the device busy while the next launch is prepared."""
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    torch.empty(4 * max(size, 1 << 25), dtype=torch.uint8, device="cuda").zero_()


def rivals(work: Work, device: str, *, compile_reference: bool) -> tuple[dict[str, Run], Tensor]:
    """The implementations of a product on random operands, and the exact result."""
    pattern, n, m = work.pattern, work.pattern.n, work.pattern.m

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(work.dtype)

    dense = randn(work.out_features, work.in_features)
    mask = nm.nm_mask(dense.abs(), pattern)
    dense = dense * mask
    values, indices = nm.pack(dense, mask, pattern)
    x, dy = randn(work.rows, work.in_features), randn(work.rows, work.out_features)
    down, up = randn(8, work.in_features), randn(work.out_features, 8)
    operands: dict[str, tuple[Any, ...]] = {
        "nm_linear": (x, values, indices, None, None, n, m),
        "nm_linear_grad_input": (dy, values, indices, None, n, m),
        "nm_linear_grad_values": (dy, x, indices, n, m),
        "nm_linear_low_rank": (x, values, indices, None, down, up, None, n, m, 1.0),
    }
    args = operands[work.op]
    plain: Callable[..., Tensor] = getattr(reference, work.op)
    exact = plain(*(arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args))
    runs: dict[str, Run] = {}
    if work.op == "nm_linear":
        runs[DENSE] = lambda: F.linear(x, dense)
    elif work.op == "nm_linear_low_rank":
        runs[DENSE] = lambda: F.linear(x, dense) + F.linear(F.linear(x, down), up)
    elif work.op == "nm_linear_grad_input":
        runs[DENSE] = lambda: dy @ dense  # to compare with; a trained weight is not expanded
    if compile_reference:
        compiled = as_inductor_compiles(plain)
        runs[REFERENCE] = lambda: compiled(*args)
    if has_kernel(work.op, device):
        _tune_tiles(work, x, args)
        operator = getattr(torch.ops.fxsparse, work.op).default
        runs[OPERATOR] = lambda: operator(*args)
    site = Site("nm_linear", device, work.dtype, (work.out_features, work.in_features), pattern, work.rows, True)
    site = replace(site, inference=True)
    if work.op == "nm_linear" and lower.no_sparse_tensor_cores(site) is None:
        metadata = pack_metadata(indices)
        cores = torch.ops.fxsparse.sparse_tensor_core_linear.default
        runs[SPARSE_TENSOR_CORES] = lambda: cores(x, values, metadata, None, "", [])
    if work.op == "nm_linear" and lower.no_cusparselt(site) is None:
        packed = torch._cslt_compress(dense)
        library = torch.ops.fxsparse.cusparselt_linear.default
        runs[CUSPARSELT] = lambda: library(x, packed, None, work.out_features)
    return runs, exact


def as_inductor_compiles(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A reference as it runs inside a compiled graph."""
    return torch.compile(function, dynamic=False)


def _tune_tiles(work: Work, x: Tensor, args: tuple[Any, ...]) -> None:
    """Finds the kernel's best tile first, so that rivals meet at their best."""
    if not x.is_cuda or work.op not in ("nm_linear", "nm_linear_low_rank"):
        return
    pattern, shape = work.pattern, (work.rows, work.out_features, work.in_features)
    dtype = str(work.dtype).removeprefix("torch.")
    run: Callable[..., Tensor] = getattr(launch, work.op)
    plans = tiles.candidates(work.op, work.rows, dtype, tall=work.out_features > work.in_features)
    tiles.measure(tiles.key(work.op, *shape, dtype, pattern.n, pattern.m), lambda plan: run(*args, plan=plan), plans)
