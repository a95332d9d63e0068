"""The first ten minutes on a GPU: are the kernels right on it, and are they worth what was predicted?

    python -m benchmarks.gpu --first-run [--output gpu.md] [--minutes 10]

In this order, each written as it is known: the tests marked ``gpu`` of the kernels, in eight processes; then products
of OPT-13B and Llama-3-8B, the most telling first, every implementation of each checked against the right result and
timed in turn with dense (cold in L2, the host hidden), beside what `static_model` predicts; then a training step and
an inference of one layer, and ``generate()`` of four with a static cache and CUDA graphs. A run that stops resumes
after the last line.

Everything runs in a process of its own, which is ended when it does not answer: a kernel that waits for what never
comes costs its time limit and a line that says so, and Hopper's kernel, the only one that waits, is left out from then
on. ``--device cpu --small`` rehearses it on toy shapes.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import multiprocessing
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import static
from benchmarks.generation import generators, sparse_llama
from benchmarks.gpu_cases import MODELS, TOY, Case, layer_cases, layer_tokens
from benchmarks.static_model import MACHINES
from benchmarks.timing import interleaved
from fxsparse.lowering import measure
from fxsparse.ops.nm import Pattern
from fxsparse.ops.operator import COMPRESSED, DENSE, OPERATOR, SPARSE_WGMMA, Problem

HEADER = "| what | model | shape | implementation | us | dense / this | predicted | note |"
TESTS, PRODUCT, LAYER, GENERATE = "tests", "product", "layer", "generate"
LIMITS = {TESTS: 240.0, PRODUCT: 90.0, LAYER: 180.0, GENERATE: 240.0}
"""Seconds after which what does not answer is ended."""

LAYERS, TOKENS = 4, 64
"""Of the model that generates, and what it generates."""

BACKENDS = {DENSE: "inductor", "2:4": "fxsparse"}

_KERNELS = {"nm_linear": COMPRESSED, "sparse_tensor_core_linear": "sparse_tensor_cores"}


@dataclass(frozen=True)
class Unit:
    """One thing to do; what, model and shape name it in the table."""

    kind: str
    what: str
    model: str
    shape: str
    problem: Problem | None = None

    @property
    def name(self) -> tuple[str, str, str]:
        return self.what, self.model, self.shape


def units(args: argparse.Namespace) -> Iterator[Unit]:
    """Everything, the most telling first."""
    yield Unit(TESTS, "tests of kernels", "all", "test_gpu.py")
    for op, rows, name, (columns, depth) in products(args):
        problem = Problem(op, Pattern(2, 4), torch.bfloat16, rows, columns, depth)
        yield Unit(PRODUCT, op, name, f"{rows}x{depth} -> {columns}", problem)
    model = "toy-llama" if args.small else "llama-3-8b"
    for what in ("training step of a layer", "inference of a layer"):
        yield Unit(LAYER, what, model, f"{layer_tokens(args)} tokens")
    yield Unit(GENERATE, "generate()", model, f"{LAYERS} layers, {TOKENS} tokens")


def products(args: argparse.Namespace) -> Iterator[tuple[str, int, str, tuple[int, int]]]:
    linears = {"toy": (96, 64)} if args.small else static.LINEARS
    telling = ("OPT-13B q,k,v,o", "Llama-3-8B gate,up", "Llama-3-8B k,v")
    names = sorted(linears, key=lambda name: telling.index(name) if name in telling else len(telling))
    first, rest = names[: len(telling)], names[len(telling) :]
    few, many = ((4,), 64) if args.small else ((16, 1, 64), 4096)
    for group in (first, rest):
        for rows, name in itertools.product((few[0], many, *few[1:]), group):
            yield "nm_linear", rows, name, linears[name]
        for op, name in itertools.product(("nm_linear_grad_input", "nm_linear_grad_values"), group[:2]):
            yield op, many, name, linears[name]


# --- one unit ---------------------------------------------------------------------------------------------------------


def rows(unit: Unit, args: argparse.Namespace) -> list[str]:
    """The lines of the table that a unit gives; an error is one."""
    try:
        if unit.kind == TESTS:
            return tests(unit, args)
        return {PRODUCT: product, LAYER: layer, GENERATE: generation}[unit.kind](unit, args)
    except Exception as error:
        traceback.print_exc()
        return [line(unit, "", note=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")]


def line(unit: Unit, implementation: str, us: str = "", ratio: str = "", predicted: str = "", note: str = "") -> str:
    cells = [*unit.name, implementation, us, ratio, predicted, note.replace("|", "/").replace("\n", " ")]
    return f"| {' | '.join(cells)} |"


def tests(unit: Unit, args: argparse.Namespace) -> list[str]:
    """Runs the tests of the kernels that need a GPU."""
    if importlib.util.find_spec("pytest") is None:
        return [line(unit, "", note="pytest is not installed")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/codegen/test_gpu.py"]
    command += ["-n", "8"] if importlib.util.find_spec("xdist") and args.device == "cuda" else []
    root = Path(__file__).parents[1]
    limit = LIMITS[TESTS] - 20
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=limit, check=False)
    failed = re.findall(r"^(?:FAILED|ERROR) \S*?(test_\w+\S*)", done.stdout, re.M)
    summary = [text for text in done.stdout.splitlines() if re.search(r"\d+ (passed|failed|skipped|error)", text)]
    return [
        line(unit, "pytest", note=summary[-1].strip("= ") if summary else f"exit {done.returncode}"),
        *(line(unit, "pytest", note=f"failed: {name}") for name in failed[:10]),
    ]


def product(unit: Unit, args: argparse.Namespace) -> list[str]:
    """Checks and times every implementation of a product."""
    assert unit.problem is not None
    excluded = getattr(args, "exclude", ())
    found = measure.measure(unit.problem, args.device, compile_reference=False, exclude=excluded)
    times: dict[str, float] = {}  # the best variant of each implementation; an operator's kernel is compressed too
    for name, time in found.milliseconds.items():
        name = name.partition(":")[0]
        if name != OPERATOR:
            times[name] = min(time, times.get(name, time))
    base, predicted = times.get(DENSE), prediction(unit.problem)
    lines = [
        line(
            unit,
            name,
            f"{time * 1e3:.1f}",
            "" if base is None else f"{base / time:.2f}",
            f"{predicted[name]:.2f}" if name in predicted else "",
        )
        for name, time in sorted(times.items(), key=lambda item: item[1])
    ]
    return [*lines, *(line(unit, name, note=why) for name, why in found.failed.items())]


def prediction(problem: Problem) -> dict[str, float]:
    """The ratios to dense that the model predicts, by implementation, for a device that it knows."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    machine = next((machine.name for machine in MACHINES if machine.name in name), None)
    if machine is None or problem.op != "nm_linear":
        return {}
    size = problem.rows, problem.out_features, problem.in_features
    found = {kernel: one.ratio for kernel, one in static.predictions(machine, *size)}
    return {_KERNELS.get(kernel, kernel.removesuffix("_linear")): ratio for kernel, ratio in found.items()}


def layer(unit: Unit, args: argparse.Namespace) -> list[str]:
    """Times a layer, dense and 2:4."""
    from benchmarks import gpu

    sizes = (TOY if args.small else MODELS)[unit.model]
    rivals = {name: make for name, make in layer_cases(sizes, args)[unit.what].items() if name in (DENSE, "2:4")}
    lines = []
    for text in gpu.rows(Case(unit.what, unit.model, unit.shape, lambda: rivals), args):
        what, _, _, us, ratio, _, state, runs = (cell.strip() for cell in text.split("|")[1:-1])
        name = what.removeprefix(unit.what).strip(", ") or DENSE
        note = f"weights, optimizer {state} MiB; {runs}" if ratio else us
        lines.append(line(unit, name, us if ratio else "", ratio, note=note))
    return lines


def generation(unit: Unit, args: argparse.Namespace, backends: Mapping[str, str] = BACKENDS) -> list[str]:
    """Times a token of ``generate()``, host and all: dense under Inductor, and 2:4 as the backend runs it."""
    sizes = (TOY if args.small else MODELS)[unit.model]
    model = sparse_llama(
        torch.bfloat16, args.device, hidden_size=sizes.hidden, intermediate_size=sizes.intermediate,
        num_attention_heads=sizes.heads, num_key_value_heads=sizes.key_heads, num_hidden_layers=LAYERS, vocab_size=4096,
    )  # fmt: skip
    mode = "reduce-overhead" if args.device == "cuda" else None
    runs = generators(model, backends, TOKENS, static=True, mode=mode)
    times = interleaved(runs, rounds=args.rounds, warmup=2)
    first = next(iter(times))
    return [
        line(unit, name, f"{one.median / TOKENS * 1e6:.0f}", f"{times[first].ratio(one)[0]:.2f}", note="a token")
        for name, one in times.items()
    ]


# --- the process that does them ---------------------------------------------------------------------------------------


class Worker:
    """A process that does units one after the other, and is replaced when it hangs or dies.

    Args:
        args: of the command.
        target: what the process runs.
        method: how it is started; CUDA does not outlive a fork.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        target: Callable[[Connection, argparse.Namespace], None] | None = None,
        method: str = "spawn",
    ):
        self.args, self.target, self.method = args, target or serve, method
        self.process: Any = None
        self.connection: Any = None

    def rows(self, unit: Unit, args: argparse.Namespace) -> list[str]:
        """The lines of a unit; one that says so where none came in time."""
        if self.process is None:
            self._start()
        self.connection.send(unit)
        try:
            if self.connection.poll(LIMITS[unit.kind]):
                found: list[str] = self.connection.recv()
                return found
            note = f"no answer in {LIMITS[unit.kind]:g} s, ended"
            if unit.kind == PRODUCT:
                self.args = argparse.Namespace(**{**vars(self.args), "exclude": (SPARSE_WGMMA,)})
                note += f"; {SPARSE_WGMMA} is left out from here on"
        except (EOFError, ConnectionError):
            note = "its process died"
        self.end()
        return [line(unit, "", note=note)]

    def _start(self) -> None:
        context: Any = multiprocessing.get_context(self.method)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=self.target, args=(theirs, self.args), daemon=False)
        self.process.start()
        theirs.close()

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
        self.process = self.connection = None


def serve(connection: Connection, args: argparse.Namespace) -> None:
    """Answers units until there are no more."""
    torch.manual_seed(0)
    while True:
        try:
            unit = connection.recv()
        except EOFError:
            return
        connection.send(rows(unit, args))
