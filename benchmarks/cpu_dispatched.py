"""What the backend dispatches on a CPU against dense, over shapes and numbers of tokens: nothing may be below 0.98.

    python -m benchmarks.cpu_dispatched [--output dispatched.md] [--minutes 30] [--kinds inference training]

Each row is a linear with a 2:4 weight under ``torch.compile(backend="fxsparse")``, measured on its first use as for
any user, against the same linear dense under Inductor, in turn: with a frozen weight, and a training step (forward and
both gradients) of compressed values pruned twice. `runs` is what was chosen; where it is dense the ratio is noise.
Weights of few tokens rotate through copies that no cache holds. A run that stops goes on after its last row, and
``--summary`` lists the rows below 0.98.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import fxsparse
from benchmarks.cpu import DTYPES, MODELS, ROTATED, clock
from benchmarks.timing import environment, interleaved
from fxsparse.backend.compiled import compiled_graphs
from fxsparse.codegen.cpu import instruction_sets
from fxsparse.ops.nm import Pattern, nm_mask
from fxsparse.passes import DoublePruneBackward, InsertNMMasks

TOKENS = {"inference": (1, 4, 16, 64, 256, 1024), "training": (64, 256, 1024)}
ALLOWED = 0.98
HEADER = "| kind | weight | dtype | tokens | threads | runs | dense / as dispatched |"
PASSES = (InsertNMMasks("2:4", keep_first=False, keep_head=False), DoublePruneBackward())


@dataclass(frozen=True)
class Case:
    """A linear at a number of tokens."""

    kind: str
    shape: tuple[int, int]
    dtype: torch.dtype
    tokens: int
    threads: int

    @property
    def name(self) -> tuple[str, ...]:
        dtype = str(self.dtype).removeprefix("torch.")
        return (self.kind, f"{self.shape[0]}x{self.shape[1]}", dtype, str(self.tokens), str(self.threads))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("dispatched.md"))
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--kinds", nargs="*", default=list(TOKENS), choices=tuple(TOKENS))
    parser.add_argument("--models", nargs="*", default=["gpt2", "llama-3.2-1b"], choices=tuple(MODELS))
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    parser.add_argument("--tokens", nargs="*", type=int, default=None, help="1 to 1024")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--summary", action="store_true", help="only sum up what a table has")
    args = parser.parse_args(arguments)
    if args.summary:
        print("\n".join(summary(args.output.read_text().splitlines())))
        return 0
    until = time.monotonic() + 60 * args.minutes
    torch.set_num_threads(args.threads)
    title = f"{environment()}, {instruction_sets.processor()}, {instruction_sets.chosen()}"
    done = args.output.read_text().splitlines() if args.output.is_file() else []
    if done and done[0] != title:
        print(f"{args.output} is of something else ({done[0]}): give another --output", file=sys.stderr)
        return 1
    known = {tuple(cell.strip() for cell in line.split("|")[1:6]) for line in done}
    dtypes = [dtype for dtype in DTYPES if str(dtype).removeprefix("torch.") in args.dtypes]
    with args.output.open("a") as file:
        if not done:
            file.write(f"{title}\n\n{HEADER}\n{'|---' * (HEADER.count('|') - 1)}|\n")
        for case in cases(args.kinds, args.models, dtypes, args.threads):
            if case.name in known or (args.tokens and case.tokens not in args.tokens):
                continue
            if time.monotonic() > until:
                print("stopped because the time is over; the same command goes on", file=sys.stderr)
                break
            line = row(case, args.rounds)
            file.write(line + "\n")
            file.flush()
            print(line, flush=True)
    return 0


def cases(kinds: list[str], models: list[str], dtypes: list[torch.dtype], threads: int) -> Iterator[Case]:
    shapes = [shape for model in models for shape in MODELS[model]]
    for kind in kinds:
        for shape, dtype, tokens in itertools.product(shapes, dtypes, TOKENS[kind]):
            yield Case(kind, shape, dtype, tokens, threads)


def summary(lines: list[str]) -> list[str]:
    """How many rows ran what, and those below :data:`ALLOWED`."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    rows = [row for row in rows if len(row) == HEADER.count("|") - 1 and row[0] in TOKENS]
    below = [row for row in rows if float(row[-1].split()[0]) < ALLOWED]
    counts = {ran: sum(row[5] == ran for row in rows) for ran in sorted({row[5] for row in rows})}
    shown = ", ".join(f"{count} run {ran}" for ran, count in counts.items())
    return [f"{len(rows)} cases: {shown}; {len(below)} below {ALLOWED}", *(" | ".join(row) for row in below)]


def row(case: Case, rounds: int) -> str:
    """A case, measured."""
    torch.compiler.reset()
    torch.manual_seed(0)
    dense, ours, runs = (inference if case.kind == "inference" else training)(case)
    times = interleaved({"dense": dense, "ours": ours}, rounds=rounds, warmup=2, clock=clock(case.threads))
    middle, low, high = times["dense"].ratio(times["ours"])
    return f"| {' | '.join([*case.name, runs(), f'{middle:.2f} ({low:.2f} - {high:.2f})'])} |"


Run = Callable[[], object]


def inference(case: Case) -> tuple[Run, Run, Callable[[], str]]:
    """The linear with frozen weights, several of them; dense, as dispatched, and what that is."""
    linears = [_linear(case)]
    copies = max(1, ROTATED // linears[0].weight.nbytes) if case.tokens <= 64 else 1
    linears += [_linear(case, linears[0].weight) for _ in range(copies - 1)]
    x = torch.randn(case.tokens, case.shape[1], dtype=case.dtype)

    def over_all(backend: str) -> tuple[Run, Callable[..., Tensor]]:
        fast = torch.compile(_call, backend=backend, dynamic=False)

        def turn() -> None:
            for linear in linears:
                fast(linear, x)

        return turn, fast

    (dense, _), (ours, fast) = over_all("inductor"), over_all("fxsparse")
    return dense, ours, lambda: _chosen(fast)


def _call(linear: nn.Linear, x: Tensor) -> Tensor:
    result: Tensor = linear(x)
    return result


@torch.no_grad()
def _linear(case: Case, weight: Tensor | None = None) -> nn.Linear:
    rows, columns = case.shape
    linear = nn.Linear(columns, rows, bias=False, dtype=case.dtype)
    linear.weight.mul_(nm_mask(linear.weight.abs(), Pattern(2, 4))) if weight is None else linear.weight.copy_(weight)
    return linear.requires_grad_(False)


def training(case: Case) -> tuple[Run, Run, Callable[[], str]]:
    """A step of the linear: forward and both gradients."""
    rows, columns = case.shape
    linear = nn.Linear(columns, rows, bias=False, dtype=case.dtype)
    x = torch.randn(case.tokens, columns, dtype=case.dtype, requires_grad=True)
    dy = torch.randn(case.tokens, rows, dtype=case.dtype)
    sparse = fxsparse.rewrite(linear, PASSES, (x.detach(),))
    fast = torch.compile(sparse, backend="fxsparse", dynamic=False)
    slow = torch.compile(linear, backend="inductor", dynamic=False)

    def step(model: nn.Module) -> Run:
        def run() -> None:
            model(x).backward(dy)
            model.zero_grad()
            x.grad = None

        return run

    return step(slow), step(fast), lambda: _chosen(fast)


def _chosen(compiled: object) -> str:
    choices = [choice for graph in compiled_graphs(compiled) for choice in graph.choices]
    return ", ".join(choice.implementation for choice in choices)


if __name__ == "__main__":
    sys.exit(main())
