"""The linears and whole layers of published models, sparse against dense, on a GPU.

    python -m benchmarks.gpu --first-run  # the first ten minutes on a GPU: `first_run`
    python -m benchmarks.gpu [--output gpu.md] [--minutes 10] [--only linear layer] [--models llama-3-8b]

Linears: every weight shape of OPT-2.7B/13B/66B, Llama-3-8B and Mistral-7B at 1 to 16,384 tokens, 2:4; the forward
product, both gradients and the fused low-rank form, as `fxsparse` dispatches them, beside cuBLAS under Inductor's
max-autotune and torch's own semi-structured path. Layers: one transformer layer of each model, training step and
inference; neuron selection, dropped layers and multiplexing on the same layers. Cases are written as they are measured;
a run that stops resumes after the last one.

What fxsparse runs is chosen by measuring, before the rivals meet. Rivals take turns, operands are random, medians with
the 10 % and 90 % quantiles are given, and for each rival the peak of the memory it allocated itself, and of a layer the
bytes of its weights and optimizer. Without a GPU nothing is measured; ``--device cpu --small`` runs the program on toy
shapes, for its own sake.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

from benchmarks import first_run
from benchmarks.gpu_cases import MODELS, TOY, Case, Run, cases
from benchmarks.timing import device_microseconds, environment
from fxsparse.backend.compiled import compiled_graphs

HEADER = "| what | model | shape | us (10 % - 90 %) | dense / this | peak MiB | weights, optimizer MiB | runs |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu.md"))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=["linear", "layer"], choices=("linear", "layer"))
    parser.add_argument("--models", nargs="*", default=None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--first-run", action="store_true", help="is everything right here, and worth it?")
    args = parser.parse_args(arguments)
    known = TOY if args.small else MODELS
    if unknown := set(args.models or ()) - set(known):
        parser.error(f"unknown models {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if args.rounds < 2:
        parser.error("quantiles need at least 2 rounds")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu measures on a GPU and this machine has none: nothing was measured.", file=sys.stderr)
        return 1
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    title = f"{environment()}, bfloat16, {args.rounds} rounds in turn{', toy shapes' if args.small else ''}"
    if not args.first_run:
        return fill(args.output, title, cases(args), args)
    worker = first_run.Worker(args)
    try:
        return fill(args.output, f"first run, {title}", first_run.units(args), args, first_run.HEADER, worker.rows)
    finally:
        worker.end()


class Named(Protocol):
    """What a line begins with: what, model and shape."""

    @property
    def name(self) -> tuple[str, str, str]: ...


def fill(
    path: Path,
    title: str,
    planned: Iterable[Named],
    args: argparse.Namespace,
    header: str = HEADER,
    lines_of: Callable[[Any, argparse.Namespace], list[str]] | None = None,
) -> int:
    """Appends the cases that a table does not have yet, each whole, until the time is over."""
    lines_of = lines_of or rows
    done = path.read_text().splitlines() if path.is_file() else []
    if done and done[0] != title:
        print(f"{path} is of something else ({done[0]}): give another --output", file=sys.stderr)
        return 1
    known = {tuple(cell.strip() for cell in line.split("|")[1:4]) for line in done}
    until = time.monotonic() + 60 * args.minutes
    with path.open("a") as file:
        if not done:
            file.write(f"{title}\n\n{header}\n{'|---' * (header.count('|') - 1)}|\n")
            file.flush()
        for case in planned:
            if case.name in known:
                continue
            if time.monotonic() > until:
                print(f"stopped after {args.minutes:g} minutes; the same command goes on", file=sys.stderr)
                return 0
            lines = "\n".join(lines_of(case, args))
            file.write(lines + "\n")
            file.flush()
            print(lines, flush=True)
    print(f"written to {path}")
    return 0


# --- measuring --------------------------------------------------------------------------------------------------------


def rows(case: Case, args: argparse.Namespace) -> list[str]:
    """A row for each rival of a case; the first rival's bears the case's name."""
    torch._dynamo.reset()  # one function is compiled for many shapes, more often than Dynamo allows
    makers = case.rivals()
    labels = {name: case.what if number == 0 else f"{case.what}, {name}" for number, name in enumerate(makers)}
    runs: dict[str, Run] = {}
    peaks: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, make in makers.items():
        try:
            runs[name], peaks[name] = warm(make, args.device)
        except Exception as error:  # a library that does not take the shape, memory that is not enough
            runs.pop(name, None)
            failed[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".replace("|", "/")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _, name in itertools.product(range(args.rounds), runs):
        times[name].append(timed(runs[name], args.device))
    base = times.get(next(iter(makers)))
    found = []
    for name, label in labels.items():
        cells = [failed.get(name, ""), "", "", "", ""]
        if name in times:
            deciles = statistics.quantiles(times[name], n=10, method="inclusive")
            spread = f"{statistics.median(times[name]):.1f} ({deciles[0]:.1f} - {deciles[-1]:.1f})"
            ratio = statistics.median(its / mine for mine, its in zip(times[name], base, strict=True)) if base else None
            state = getattr(runs[name], "state", None)
            cells = [
                spread,
                "" if ratio is None else f"{ratio:.2f}",
                f"{peaks[name] / 2**20:.1f}" if args.device == "cuda" else "",
                "" if state is None else f"{state() / 2**20:.1f}",
                chosen(runs[name]),
            ]
        found.append(f"| {' | '.join([label, case.model, case.shape, *cells])} |")
    return found


def warm(make: Callable[[], Run], device: str) -> tuple[Run, float]:
    """Makes a rival and runs it three times, which compiles; returns the peak of the bytes it allocated itself."""
    if device != "cuda":
        run = make()
        for _ in range(3):
            run()
        return run, 0.0
    before = torch.cuda.memory_allocated()
    run = make()
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return run, float(torch.cuda.max_memory_allocated() - before)


def timed(run: Run, device: str) -> float:
    """Microseconds."""
    if device != "cuda":
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e6
    return device_microseconds(run)


def chosen(run: Run) -> str:
    """What the backend says it runs."""
    compiled = getattr(run, "compiled", None)
    graphs = [] if compiled is None else compiled_graphs(compiled)
    return ", ".join(sorted({f"{choice.op} {choice.implementation}" for graph in graphs for choice in graph.choices}))


if __name__ == "__main__":
    sys.exit(main())
