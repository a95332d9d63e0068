"""Four methods in one pipeline on MiniLM, against each alone, at a measured speed-up.

    python -m examples.real.together            # one seed; more with --seeds 0 1 2
    python -m examples.real.together --quick

The pipeline drops half of the layers (LayerCHOP), lets two texts share a pass (DataMUX), closes structures with CoFi's
gates under the fine-tuned model as the teacher, and makes what is left 2:4 (SLoPe). Every way starts from the same
fine-tuned MiniLM, takes the same number of steps on the same texts, and is written and read back. The table says which
has the best accuracy among those that were measured to be at least four and eight times as fast.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

import fxsparse
from fxsparse.passes import (
    DistillLayers,
    DoublePruneBackward,
    DropLayers,
    GateStructures,
    InsertNMMasks,
    Multiplex,
    Pass,
)

from . import harness
from .classify import fit
from .harness import Cell, Results, markdown, spread
from .reviews import Task, accuracy, read_task

GROUPS = 16


@dataclass(frozen=True)
class Way:
    """Stages of passes, each trained for its share of the steps.

    Attributes:
        methods: those it combines, by name.
        members: texts that share a pass.
        stages: makes the passes of each stage from the fine-tuned model, and its share of the steps.
    """

    methods: tuple[str, ...]
    members: int
    stages: Callable[[GraphModule], list[tuple[list[Pass | str], float]]]


def ways(seed: int) -> dict[str, Way]:
    def mux(members: int) -> Pass:
        stages = ((0.25, 0.0, 1.0), (1.0, 0.9, 0.1))
        return Multiplex(members, demux="mlp", stages=stages, ignore=(0, 101, 102), seed=seed)

    def cofi(target: float) -> Callable[[GraphModule], list[tuple[list[Pass | str], float]]]:
        return lambda first: [
            ([GateStructures(target=target, warmup=0.4), DistillLayers(first)], 0.7),
            (["end-distill,materialize"], 0.3),
        ]

    def chop(fraction: float) -> Way:
        return Way(("LayerCHOP",), 1, lambda first: [([DropLayers("max-gap", fraction=fraction)], 1.0)])

    def together(members: int, target: float) -> Way:
        masks: list[Pass | str] = [InsertNMMasks("2:4"), DoublePruneBackward()]
        return Way(
            ("LayerCHOP", "DataMUX", "CoFi", "SLoPe"),
            members,
            lambda first: [
                ([DropLayers("max-gap"), mux(members)], 0.5),
                ([GateStructures(target=target, warmup=0.4)], 0.3),
                (["materialize", *masks], 0.2),
            ],
        )

    return {
        "LayerCHOP, 2 of 6 layers": chop(4 / 6),
        "CoFi 80%": Way(("CoFi",), 1, cofi(0.8)),
        "CoFi 90%": Way(("CoFi",), 1, cofi(0.9)),
        "DataMUX, N = 5": Way(("DataMUX",), 5, lambda first: [([mux(5)], 1.0)]),
        "DataMUX, N = 10": Way(("DataMUX",), 10, lambda first: [([mux(10)], 1.0)]),
        "SLoPe 2:4": Way(("SLoPe",), 1, lambda first: [([InsertNMMasks("2:4"), DoublePruneBackward()], 1.0)]),
        "all four, N = 2, s = 0.4": together(2, 0.4),
        "all four, N = 2, s = 0.7": together(2, 0.7),
    }


def steps_of(gm: GraphModule, task: Task, members: int, steps: int, lr: float, seed: int, **options: Any) -> None:
    epochs = steps / max(1, len(task.train) // (GROUPS * members))
    fit(
        gm, task, epochs=epochs, lr=lr, seed=seed, batch=GROUPS, members=members,
        schedule=lambda optimizer, total: fxsparse.Schedule(gm, optimizer, total_steps=total), **options,
    )  # fmt: skip


def train(way: Way, first: GraphModule, task: Task, args: argparse.Namespace, seed: int, path: Path) -> Cell:
    """Runs the stages of a way; only the last goes back to its best epoch."""
    gm = fxsparse.rewrite(first, [], copy=True)
    stages = way.stages(first)
    for place, (passes, share) in enumerate(stages):
        gm = fxsparse.rewrite(gm, passes)
        options: dict[str, Any] = {"stop_early": place == len(stages) - 1}
        if any(isinstance(item, GateStructures) for item in passes):
            options["extra_loss"] = lambda gm=gm: fxsparse.sparsity_loss(gm)
        steps_of(gm, task, way.members, max(1, round(share * args.steps)), 1e-4, seed, **options)
    fired = {entry.text: len(entry.rewritten) for entry in fxsparse.record_of(gm).entries}
    fxsparse.save(gm, path)
    read = fxsparse.load(path, task.model(seed), kwargs=example(task))
    return {"test": accuracy(gm, task.test), "read_back": accuracy(read, task.test), "fired": fired}


def example(task: Task) -> dict[str, torch.Tensor]:
    return task.train.rows(slice(0, 20))


def fine_tuned(task: Task, args: argparse.Namespace, seed: int, path: Path) -> Cell:
    gm = fxsparse.trace(task.model(seed), kwargs=example(task))
    steps_of(gm, task, 1, args.first_steps, 5e-5, seed)
    fxsparse.save(gm, path)
    return {"test": accuracy(gm, task.test)}


def speeds(paths: dict[str, tuple[Path, int]], task: Task, args: argparse.Namespace, seed: int) -> Cell:
    """Texts per second over the fine-tuned model's at 32 groups, compiled, in turn."""
    calls, texts = {}, {}
    for name, (path, members) in paths.items():
        gm = fxsparse.load(path, task.model(seed), kwargs=example(task)).eval().requires_grad_(False)
        rows = {key: value for key, value in task.test.rows(slice(0, 32 * members)).items() if key != "labels"}
        call = torch.compile(copy.deepcopy(gm), backend="fxsparse", options={"compiler": args.compiler})
        calls[name] = torch.no_grad()(lambda call=call, rows=rows: call(**rows))
        texts[name] = len(rows["input_ids"])
    seconds = harness.in_turn(calls, args.rounds)
    plain = next(iter(seconds))
    return {name: texts[name] / texts[plain] * harness.ratio(seconds[plain], taken) for name, taken in seconds.items()}


def tables(results: Results, made: dict[str, Way], seeds: list[int]) -> str:
    speed, rows = results.cells["speed"], []
    means = {}
    for name in ("fine-tuned", *made):
        cells = [results.cells[f"{name}, seed {seed}"] for seed in seeds]
        means[name] = statistics.fmean(cell["test"] for cell in cells)
        read = spread([cell["read_back"] for cell in cells]) if "read_back" in cells[0] else ""
        rows.append((name, spread([cell["test"] for cell in cells]), read, f"{speed[name]:.2f}"))
    text = markdown(("", "test accuracy %", "read back %", "texts / s over fine-tuned"), rows)
    lines = []
    for least in (4, 8):
        alone = {name: means[name] for name, way in made.items() if speed[name] >= least and len(way.methods) == 1}
        four = {name: means[name] for name, way in made.items() if speed[name] >= least and len(way.methods) > 1}
        lines.append((f"at least {least} times as fast", best(alone), best(four)))
    return text + "\n\n" + markdown(("", "best of one method", "best of four together"), lines)


def best(means: dict[str, float]) -> str:
    if not means:
        return "none"
    name = max(means, key=lambda name: means[name])
    return f"{means[name]:.1f} ({name})"


def plot(results: Results, made: dict[str, Way], seeds: list[int]) -> None:
    figure, axes = harness.figure()
    for position, name in enumerate(("fine-tuned", *made)):
        values = [results.cells[f"{name}, seed {seed}"]["test"] for seed in seeds]
        marker = "s" if name.startswith("all four") else "o"
        axes.scatter(
            results.cells["speed"][name],
            statistics.fmean(values),
            s=60,
            marker=marker,
            color=f"C{position}",
            label=name,
        )
        axes.scatter([results.cells["speed"][name]] * len(values), values, s=10, alpha=0.5, color=f"C{position}")
    axes.set(xlabel="texts per second over the fine-tuned model's", ylabel="test accuracy, %", xscale="log")
    axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.set_title("four methods in one pipeline (squares) and each alone", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(results.path.with_suffix(".svg"))


def main() -> None:
    options = harness.parser(__doc__)
    options.add_argument("--compiler", default="inductor", choices=("inductor", "eager"))
    args = harness.parse(options)
    sizes = {"train": 1024, "dev": 256, "test": 1024, "length": 32}
    args.first_steps, args.steps, args.rounds = 192, 480, 9
    if args.quick:
        sizes |= {"train": 256, "dev": 128, "test": 512}
        args.first_steps, args.steps, args.rounds = 24, 40, 3
    if args.tiny:
        sizes |= {"train": 160, "dev": 20, "test": 320}
        args.first_steps, args.steps, args.rounds = 2, 10, 1
    task = read_task("rotten_tomatoes", **sizes)
    results = Results("together", args, {"data": task.name, **sizes, "steps": args.steps, "groups": GROUPS})
    for seed in args.seeds:
        one_seed(results, task, args, seed)
    made = ways(0)
    paths = {"fine-tuned": (path_of(results, args.seeds[0], "fine-tuned"), 1)}
    paths |= {name: (path_of(results, args.seeds[0], name), way.members) for name, way in made.items()}
    results.cell("speed", lambda: speeds(paths, task, args, args.seeds[0]))
    results.finish(tables(results, made, args.seeds))
    plot(results, made, args.seeds)


def path_of(results: Results, seed: int, name: str) -> Path:
    """The file that holds a model of a seed."""
    folder = results.path.with_suffix("") / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / ("".join(letter if letter.isalnum() else "-" for letter in name) + ".safetensors")


def one_seed(results: Results, task: Task, args: argparse.Namespace, seed: int) -> None:
    start = path_of(results, seed, "fine-tuned")
    results.cell(f"fine-tuned, seed {seed}", lambda: fine_tuned(task, args, seed, start))
    first = fxsparse.load(start, task.model(seed), kwargs=example(task))
    for name, way in ways(seed).items():
        path = path_of(results, seed, name)
        results.cell(f"{name}, seed {seed}", lambda way=way, path=path: train(way, first, task, args, seed, path))  # type: ignore[misc]


if __name__ == "__main__":
    main()
