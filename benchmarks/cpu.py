"""N:M on a CPU against dense: the linears of GPT-2 small, Llama-3.2-1B and Llama-3-8B, and whole models.

    python -m benchmarks.cpu [--output cpu.md] [--minutes 60] [--only forward ...] [--models gpt2 ...]
    python -m benchmarks.cpu --quick          two minutes, the most telling cases

Each row is a product at a shape: how many times faster the C++ kernel is than torch's own dense product (MKL, oneDNN),
and than oneDNN with the weight packed before, which torch offers for forward products; the median of the ratios turn by
turn, with the quartiles. Beside it the limit, the ratio of the times that bytes and FLOPs need at the rates measured at
the start. Rivals take turns on random data; weights of few tokens rotate through copies that no cache holds. With one
thread CPU time is counted, so that other processes disturb less. Cases are written as they are measured; a run that
stops resumes after the last one; ``--summary`` sums the table up. ``step`` and ``generate`` are whole models
(`benchmarks.cpu_models`), ``host`` what calling an operator costs under Inductor, ``gather`` the share of a product
over selected rows that copying them takes; they are lines below the table.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import cpu_models
from benchmarks.timing import Times, environment, interleaved
from fxsparse.codegen.cpu import instruction_sets, launch
from fxsparse.lowering.measure import last_cache
from fxsparse.ops import nm
from fxsparse.ops.nm import Pattern

MODELS = {
    "gpt2": ((768, 768), (2304, 768), (3072, 768), (768, 3072)),
    "llama-3.2-1b": ((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)),
    "llama-3-8b": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
}
"""``(out, in)`` of the weights."""

FEW, MANY = (1, 2, 4, 8, 16, 32, 64), (256, 1024, 4096)
PATTERNS = (Pattern(2, 4), Pattern(2, 8))
DTYPES = (torch.float32, torch.bfloat16)
KINDS = {"forward": "nm_linear", "grad input": "nm_linear_grad_input", "grad values": "nm_linear_grad_values"}
MODELS_TOO = ("host", "step", "generate", "gather")
ROTATED = max(128 << 20, min(2 * last_cache(), 512 << 20))
"""Bytes of dense weights that one turn passes over where tokens are few: more than a cache holds."""

HEADER = "| product | weight | pattern | dtype | tokens | threads | dense / ours | packed dense / ours | limit |"

Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A product at a shape."""

    product: str
    model: str
    shape: tuple[int, int]
    pattern: Pattern
    dtype: torch.dtype
    tokens: int
    threads: int

    @property
    def name(self) -> tuple[str, ...]:
        rows, columns = self.shape
        dtype = str(self.dtype).removeprefix("torch.")
        weight = f"{self.model} {rows}x{columns}"
        return (self.product, weight, str(self.pattern), dtype, str(self.tokens), str(self.threads))


@dataclass(frozen=True)
class Rates:
    """Of this machine, measured: bytes read a second, and FLOPs a second of the best dense product for each dtype."""

    bytes: float
    flops: dict[torch.dtype, float]

    def seconds(self, moved: float, flops: float, dtype: torch.dtype) -> float:
        return max(moved / self.bytes, flops / self.flops[dtype])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=None, help="cpu.md, or cpu-quick.md of a quick run")
    parser.add_argument("--minutes", type=float, default=None, help="60, of a quick run 2")
    parser.add_argument("--rounds", type=int, default=None, help="9, of a quick run 5")
    parser.add_argument("--only", nargs="*", default=[*KINDS, *MODELS_TOO], choices=(*KINDS, *MODELS_TOO))
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=tuple(MODELS))
    parser.add_argument("--threads", nargs="*", type=int, default=None, help="one and all")
    parser.add_argument("--tokens", nargs="*", type=int, default=[*FEW, *MANY], choices=(*FEW, *MANY))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--summary", action="store_true", help="only sum up what a table has")
    args = parser.parse_args(arguments)
    path = args.output or Path("cpu-quick.md" if args.quick else "cpu.md")
    minutes = args.minutes or (2 if args.quick else 60)
    rounds = args.rounds or (5 if args.quick else 9)
    if args.summary:
        print("\n".join(summary(path.read_text().splitlines())))
        return 0
    begin = time.monotonic()
    torch.manual_seed(0)
    if (reason := launch.unavailable("nm_linear", torch.float32, 2, 4)) is not None:
        print(f"nothing was measured: {reason}", file=sys.stderr)
        return 1
    every = torch.get_num_threads()
    title = f"{environment()}, {instruction_sets.processor()}, {instruction_sets.chosen()}"
    plan = [case for case in cases(quick=args.quick, every=every) if case.product in args.only]
    plan = [case for case in plan if case.model in args.models and case.tokens in args.tokens]
    plan = [case for case in plan if args.threads is None or case.threads in args.threads]
    try:
        failed = fill(path, title, plan, rounds, begin + 60 * minutes)
        wanted = [name for name in MODELS_TOO if name in args.only and not args.quick]
        for threads in args.threads or sorted({1, every}) if wanted and not failed else ():
            torch.set_num_threads(threads)
            add_models(path, wanted, threads, rounds)
        return failed
    finally:
        torch.set_num_threads(every)


def cases(*, quick: bool, every: int) -> Iterator[Case]:
    """Everything that is measured, or the most telling part of it.

    Args:
        every: all threads.
    """
    if quick:
        two_four, small, large = PATTERNS[0], ("llama-3.2-1b", (2048, 2048)), ("llama-3-8b", (4096, 4096))
        for tokens, dtype in itertools.product((1, 4, 8), DTYPES):
            yield Case("forward", *large, two_four, dtype, tokens, 1)
        for pattern, product in itertools.product(PATTERNS, KINDS):
            yield Case(product, *small, pattern, torch.float32, 1024, 1)
        for tokens, dtype in itertools.product((1, 8), DTYPES):
            yield Case("forward", *large, two_four, dtype, tokens, every)
        for product in KINDS:
            yield Case(product, *small, two_four, torch.float32, 1024, every)
        return
    weights = [(model, shape) for model, shapes in MODELS.items() for shape in shapes]
    threads = (1,) if every == 1 else (1, every)
    for (model, shape), count, dtype, pattern in itertools.product(weights, threads, DTYPES, PATTERNS):
        for tokens in FEW:
            yield Case("forward", model, shape, pattern, dtype, tokens, count)
        for tokens, product in itertools.product(MANY, KINDS):
            yield Case(product, model, shape, pattern, dtype, tokens, count)


def fill(path: Path, title: str, plan: list[Case], rounds: int, until: float) -> int:
    """Appends the cases that a table does not have yet, until the time is over."""
    done = path.read_text().splitlines() if path.is_file() else []
    if done and done[0] != title:
        print(f"{path} is of something else ({done[0]}): give another --output", file=sys.stderr)
        return 1
    known = {tuple(cell.strip() for cell in line.split("|")[1:7]) for line in done}
    rates: dict[int, Rates] = {}
    with path.open("a") as file:
        if not done:
            file.write(f"{title}\n\n{HEADER}\n{'|---' * (HEADER.count('|') - 1)}|\n")
        for case in plan:
            if case.name in known:
                continue
            if time.monotonic() > until:
                print("stopped because the time is over; the same command goes on", file=sys.stderr)
                return 0
            torch.set_num_threads(case.threads)
            if case.threads not in rates:
                rates[case.threads] = measured_rates(case.threads)
            line = row(case, rounds, rates[case.threads])
            file.write(line + "\n")
            file.flush()
            print(line, flush=True)
    print(f"written to {path}")
    return 0


def add_models(path: Path, wanted: list[str], threads: int, rounds: int) -> None:
    """Appends what whole models show, each part unless a report has it."""
    tick = clock(threads)
    parts: dict[str, list[Callable[[], Iterator[str]]]] = {
        "host": [cpu_models.host_costs],
        "step": [lambda: cpu_models.training_steps(rounds, tick)],
        "generate": [lambda dtype=dtype: cpu_models.generation(dtype, rounds, tick) for dtype in DTYPES],  # type: ignore[misc]
        "gather": [lambda: cpu_models.gathered_rows(rounds, tick)],
    }
    for name in wanted:
        head = f"{name}, {threads} threads:"
        if head in path.read_text():
            continue
        lines = [line for part in parts[name] for line in part()]
        with path.open("a") as file:
            file.write("\n" + "\n".join([head, *(f"    {line}" for line in lines)]) + "\n")
        print("\n".join([head, *lines]), flush=True)


def summary(lines: list[str]) -> list[str]:
    """Over all weights, for each product, pattern, dtype, number of tokens and of threads: the middle ratio, the worst
    and the best, and the middle limit."""
    ratios: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines):
        if len(cells) == HEADER.count("|") - 1 and cells[0] in KINDS:
            product, _, pattern, dtype, tokens, threads, *results = cells
            ratios.setdefault((product, pattern, dtype, tokens, threads), []).append(tuple(results))
    rows = [HEADER.replace(" weight |", ""), "|---" * (HEADER.count("|") - 2) + "|"]
    for key, results in ratios.items():
        columns = [[float(cell.split()[0]) for cell in column if cell] for column in zip(*results, strict=True)]
        shown = [f"{statistics.median(c):.2f} ({min(c):.2f} - {max(c):.2f})" if c else "" for c in columns[:2]]
        rows.append(f"| {' | '.join([*key, *shown, f'{statistics.median(columns[2]):.2f}'])} |")
    return rows


def row(case: Case, rounds: int, rates: Rates) -> str:
    """A case, measured."""
    times = interleaved(rivals(case), rounds=rounds, warmup=2, clock=clock(case.threads))
    ratios = [spread(times, name) for name in ("dense", "packed")]
    return f"| {' | '.join([*case.name, *ratios, f'{limit(case, rates):.2f}'])} |"


def spread(times: dict[str, Times], name: str) -> str:
    if name not in times:
        return ""
    middle, low, high = times[name].ratio(times["ours"])
    return f"{middle:.2f} ({low:.2f} - {high:.2f})"


def clock(threads: int) -> Callable[[], float]:
    return time.thread_time if threads == 1 else time.perf_counter


# --- the rivals -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """A weight in all forms that are compared."""

    dense: Tensor
    values: Tensor
    indices: Tensor
    column_mask: Tensor


def make_weight(case: Case) -> Weight:
    """A random weight, pruned along rows and columns."""
    dense = torch.randn(case.shape)
    mask = nm.nm_mask(dense.abs(), case.pattern)
    column_mask = nm.pack_column_mask(nm.double_prune_mask(dense, mask, case.pattern), mask, case.pattern)
    dense = (dense * mask).to(case.dtype)
    return Weight(dense, *nm.pack(dense, mask, case.pattern), column_mask)


def rivals(case: Case) -> dict[str, Run]:
    """Ours and the dense ones, each over all copies of the weight."""
    rows, columns = case.shape
    n, m = case.pattern.n, case.pattern.m
    first = make_weight(case)
    copies = max(1, ROTATED // first.dense.nbytes) if case.tokens <= FEW[-1] else 1
    weights = [first, *(Weight(*(tensor.clone() for tensor in vars(first).values())) for _ in range(copies - 1))]
    x, dy = torch.randn(case.tokens, columns).to(case.dtype), torch.randn(case.tokens, rows).to(case.dtype)

    def over_all(run: Callable[[Weight], object]) -> Run:
        def turn() -> None:
            for weight in weights:
                run(weight)

        return turn

    if case.product == "grad input":
        return {
            "dense": over_all(lambda w: dy @ w.dense),
            "ours": over_all(lambda w: launch.nm_linear_grad_input(dy, w.values, w.indices, w.column_mask, n, m)),
        }
    if case.product == "grad values":
        return {
            "dense": over_all(lambda w: dy.t() @ x),
            "ours": over_all(lambda w: launch.nm_linear_grad_values(dy, x, w.indices, n, m)),
        }
    found = {
        "dense": over_all(lambda w: F.linear(x, w.dense)),
        "ours": over_all(lambda w: launch.nm_linear(x, w.values, w.indices, None, None, n, m)),
    }
    packed = [packed_linear(weight.dense, case.tokens) for weight in weights]
    if packed[0] is not None:

        def turn() -> None:
            for run in packed:
                assert run is not None
                run(x)

        found["packed"] = turn
    return found


def packed_linear(weight: Tensor, tokens: int) -> Callable[[Tensor], Tensor] | None:
    """oneDNN's product with a weight packed before, as frozen graphs of Inductor call it; None if it has none."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, tokens)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except RuntimeError:
        return None


# --- the limit --------------------------------------------------------------------------------------------------------


def limit(case: Case, rates: Rates) -> float:
    """How many times faster bytes and FLOPs allow the product to be than a dense one at the measured rates."""
    rows, columns = case.shape
    size, density = case.dtype.itemsize, case.pattern.density
    activations = case.tokens * (rows + columns) * size
    dense = rows * columns * size
    kept = dense * density
    packed = rows * case.pattern.index_bytes(columns)
    flops = 2.0 * case.tokens * rows * columns
    best = rates.seconds(activations + kept + packed, flops * density, case.dtype)
    return rates.seconds(activations + dense, flops, case.dtype) / best


def measured_rates(threads: int) -> Rates:
    """Bytes read by a product with a vector, and FLOPs of a product of 1024 x 1024, the best of some."""
    matrix, vector = torch.randn(8192, 4096), torch.randn(4096)
    moved = matrix.nbytes / best_time(lambda: torch.mv(matrix, vector), threads)
    flops = {}
    for dtype in DTYPES:
        a, b = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
        runs: list[Run] = [lambda a=a, b=b: F.linear(a, b)]  # type: ignore[misc]
        packed = packed_linear(b, 1024)
        if packed is not None:
            runs.append(lambda a=a, run=packed: run(a))  # type: ignore[misc]
        flops[dtype] = 2 * 1024**3 / min(best_time(run, threads) for run in runs)
    return Rates(moved, flops)


def best_time(run: Run, threads: int) -> float:
    return min(interleaved({"only": run}, rounds=7, warmup=2, clock=clock(threads))["only"].seconds)


if __name__ == "__main__":
    sys.exit(main())
