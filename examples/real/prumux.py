"""PruMUX on a pretrained model and real text: several inputs in one pass through a pruned encoder.

    python -m examples.real.prumux            # MiniLM on Rotten Tomatoes, N in 1, 2, 5 and s in 0, 0.6, 0.8
    python -m examples.real.prumux --quick    # N in 1, 2 and s in 0, 0.6, few steps

MiniLM is fine-tuned first. For every N a copy is multiplexed and trained on for the same number of steps (N = 1 too);
for every s a copy of that is pruned by CoFi's gates, with it as the teacher, cut and tuned. A model that had one text
at a time has much to learn anew, so there are more texts than elsewhere, and a larger learning rate for N above 1.
Throughputs are measured in turn, compiled. Auto-PruMUX is fitted to the corners of the grid and predicts the cells that
it has not seen.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

import fxsparse
from fxsparse.autoprumux import AutoPruMUX
from fxsparse.passes import DistillLayers, GateStructures, Multiplex

from . import harness
from .classify import fit
from .harness import Cell, Results, markdown, spread
from .reviews import Task, accuracy, read_task

GROUPS = 16
"""Groups of N texts in a training step."""


def key(members: int, sparsity: float, seed: int) -> str:
    return f"N={members}, s={sparsity:g}, seed {seed}"


def steps_of(gm: GraphModule, task: Task, members: int, steps: int, lr: float, seed: int, **options: Any) -> None:
    """Trains for a number of steps of ``GROUPS`` groups."""
    epochs = steps / max(1, len(task.train) // (GROUPS * members))
    fit(
        gm, task, epochs=epochs, lr=lr, seed=seed, batch=GROUPS, members=members,
        schedule=lambda optimizer, total: fxsparse.Schedule(gm, optimizer, total_steps=total), **options,
    )  # fmt: skip


def multiplexed(first: GraphModule, task: Task, members: int, seed: int, args: argparse.Namespace) -> GraphModule:
    stages = ((0.25, 0.0, 1.0), (1.0, 0.9, 0.1))
    mux = Multiplex(members, demux="mlp", stages=stages, ignore=(0, 101, 102), seed=seed)
    gm = fxsparse.rewrite(first, [mux] if members > 1 else [], copy=True)
    steps_of(gm, task, members, args.mux_steps, 1e-4 if members == 1 else 3e-4, seed)
    return gm


def pruned(teacher: GraphModule, task: Task, members: int, sparsity: float, seed: int, args: Any) -> GraphModule:
    passes = [GateStructures(target=sparsity, warmup=0.4, constraint="projection"), DistillLayers(teacher)]
    gm = fxsparse.rewrite(teacher, passes, copy=True)
    loss = {"extra_loss": lambda: fxsparse.sparsity_loss(gm), "stop_early": False}
    steps_of(gm, task, members, args.prune_steps, 1e-4, seed, **loss)
    small = fxsparse.rewrite(gm, "end-distill,materialize")
    steps_of(small, task, members, args.tune_steps, 5e-5, seed)
    return small


class Grid:
    """Trains the cells of one seed. A model is written to a file, and read again when a run resumes."""

    def __init__(self, task: Task, results: Results, seed: int, args: argparse.Namespace) -> None:
        self.task, self.results, self.seed, self.args = task, results, seed, args
        self.folder = results.path.with_suffix("") / f"seed{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows = task.train.rows(slice(0, 2 * max(args.members)))

    def plain(self) -> GraphModule:
        return fxsparse.trace(self.task.model(self.seed), kwargs=self.rows)

    def model(self, members: int, sparsity: float, make: Callable[[], GraphModule]) -> GraphModule:
        """The model of a cell, trained now and written to a file unless it was, and read from that file."""
        path = self.folder / f"N{members}-s{sparsity:g}.safetensors"

        def measure() -> Cell:
            gm = make()
            fxsparse.save(gm, path)
            numbers: Cell = {
                "test": accuracy(gm, self.task.test),
                "read_back": accuracy(self.read(path), self.task.test),
            }
            return numbers | {"parameters": sum(parameter.numel() for parameter in gm.parameters())}

        self.results.cell(key(members, sparsity, self.seed), measure)
        return self.read(path)

    def read(self, path: Path) -> GraphModule:
        return fxsparse.load(path, self.task.model(self.seed), kwargs=self.rows)

    def run(self) -> dict[tuple[int, float], GraphModule]:
        models: dict[tuple[int, float], GraphModule] = {}
        for members in self.args.members:
            for sparsity in self.args.sparsities:
                if sparsity == 0:
                    make = functools.partial(self.multiplexed, members)
                else:
                    make = functools.partial(
                        pruned, models[members, 0.0], self.task, members, sparsity, self.seed, self.args
                    )
                models[members, sparsity] = self.model(members, sparsity, make)
        return models

    def multiplexed(self, members: int) -> GraphModule:
        return multiplexed(self.tuned, self.task, members, self.seed, self.args)

    @functools.cached_property
    def tuned(self) -> GraphModule:
        gm = self.plain()
        steps_of(gm, self.task, 1, self.args.first_steps, 5e-5, self.seed)
        return gm


def throughputs(models: dict[tuple[int, float], GraphModule], task: Task, args: argparse.Namespace) -> Cell:
    """Texts per second of each model at a batch of 32 groups, compiled, in turn."""
    calls = {}
    for (members, sparsity), gm in models.items():
        rows = {name: value for name, value in task.test.rows(slice(0, 32 * members)).items() if name != "labels"}
        call = torch.compile(copy.deepcopy(gm).eval(), backend="fxsparse", options={"compiler": args.compiler})
        calls[f"N={members}, s={sparsity:g}"] = torch.no_grad()(lambda call=call, rows=rows: call(**rows))
    seconds = harness.in_turn(calls, args.rounds)
    plain = next(iter(seconds))
    return {
        name: {
            "texts / s": 32 * int(name[2 : name.index(",")]) / statistics.median(taken),
            "over plain": int(name[2 : name.index(",")]) * harness.ratio(seconds[plain], taken),
        }
        for name, taken in seconds.items()
    }


def predictions(results: Results, args: argparse.Namespace) -> str:
    """Auto-PruMUX, fitted to the corners of the grid, for every other cell."""
    seeds, speed = args.seeds, results.cells["throughput"]
    points = {
        (members, sparsity): (
            statistics.fmean(results.cells[key(members, sparsity, seed)]["test"] for seed in seeds),
            speed[f"N={members}, s={sparsity:g}"]["over plain"],
        )
        for members in args.members
        for sparsity in args.sparsities
    }
    ends = {args.members[0], args.members[-1]}, {args.sparsities[0], args.sparsities[-1]}
    corners = {point: value for point, value in points.items() if point[0] in ends[0] and point[1] in ends[1]}
    auto, rows = AutoPruMUX.fit(corners), []
    for point in points.keys() - corners.keys():
        level, quick = auto.accuracy(*point).value, auto.throughput(*point).value
        found = points[point]
        rows.append(
            (
                f"N={point[0]}, s={point[1]:g}", f"{found[0]:.1f}", f"{level:.1f}", f"{level - found[0]:+.1f}",
                f"{found[1]:.2f}", f"{quick:.2f}", f"{100 * (quick / found[1] - 1):+.0f} %",
            )
        )  # fmt: skip
    head = ("not seen by Auto-PruMUX", "accuracy %", "predicted", "error", "throughput", "predicted", "error")
    return markdown(head, sorted(rows))


def tables(results: Results, args: argparse.Namespace) -> str:
    rows = []
    for members in args.members:
        for sparsity in args.sparsities:
            cells = [results.cells[key(members, sparsity, seed)] for seed in args.seeds]
            speed = results.cells["throughput"][f"N={members}, s={sparsity:g}"]
            rows.append(
                (
                    f"N={members}, s={sparsity:g}",
                    spread([cell["test"] for cell in cells]),
                    spread([cell["read_back"] for cell in cells]),
                    f"{speed['over plain']:.2f}",
                    f"{statistics.fmean(cell['parameters'] for cell in cells) / 1e6:.1f}",
                )
            )
    grid = markdown(("", "test accuracy %", "read back %", "throughput / plain", "parameters, M"), rows)
    return grid + "\n\n" + predictions(results, args)


def plot(results: Results, args: argparse.Namespace) -> None:
    figure, axes = harness.figure()
    for position, members in enumerate(args.members):
        speeds, means = [], []
        for sparsity in args.sparsities:
            values = [results.cells[key(members, sparsity, seed)]["test"] for seed in args.seeds]
            speeds.append(results.cells["throughput"][f"N={members}, s={sparsity:g}"]["over plain"])
            means.append(statistics.fmean(values))
            axes.scatter([speeds[-1]] * len(values), values, s=10, alpha=0.5, color=f"C{position}")
            axes.annotate(
                f"s={sparsity:g}", (speeds[-1], means[-1]), textcoords="offset points", xytext=(4, 5), fontsize=8
            )
        axes.plot(speeds, means, marker="o", color=f"C{position}", label=f"N = {members}")
    axes.set(xlabel="throughput over the plain model's", ylabel="test accuracy, %", xscale="log")
    axes.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.set_title("MiniLM multiplexed and pruned on Rotten Tomatoes", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(results.path.with_suffix(".svg"))


def main() -> None:
    options = harness.parser(__doc__)
    options.add_argument("--compiler", default="inductor", choices=("inductor", "eager"))
    args = harness.parse(options)
    sizes = {"train": 6400, "dev": 512, "test": 1024, "length": 32}
    args.members, args.sparsities, args.rounds = [1, 2, 5], [0.0, 0.6, 0.8], 9
    args.first_steps, args.mux_steps, args.prune_steps, args.tune_steps = 192, 1000, 192, 96
    if args.quick:
        sizes |= {"train": 256, "dev": 128, "test": 512}
        args.members, args.sparsities, args.rounds = [1, 2], [0.0, 0.6], 3
        args.first_steps, args.mux_steps, args.prune_steps, args.tune_steps = 32, 32, 32, 8
    if args.tiny:
        sizes |= {"train": 80, "dev": 20, "test": 40}
        args.first_steps, args.mux_steps, args.prune_steps, args.tune_steps = 2, 2, 2, 1
    task = read_task("rotten_tomatoes", **sizes)
    steps = {"first": args.first_steps, "mux": args.mux_steps, "prune": args.prune_steps, "tune": args.tune_steps}
    results = Results("prumux", args, {"data": task.name, **sizes, "steps": steps, "groups": GROUPS})
    models = {}
    for seed in args.seeds:
        of_seed = Grid(task, results, seed, args).run()
        models = models or of_seed
    results.cell("throughput", lambda: throughputs(models, task, args))
    results.finish(tables(results, args))
    plot(results, args)


if __name__ == "__main__":
    main()
