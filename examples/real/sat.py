"""SAT with its ladder (LORS) on pretrained models and real text: at equal steps, and at equal time.

    python -m examples.real.sat                      # MiniLM is fine-tuned on Rotten Tomatoes, three seeds
    python -m examples.real.sat --model smollm2      # SmolLM2 is trained on, on IMDB reviews, one seed
    python -m examples.real.sat --quick

Omission rates 0.2, 0.33 and 0.5, each at a constant rate and with the ladder, and at 0.5 units that are drawn instead
of the top ones, beside dense training. What costs less time must be compared with dense training that stops earlier, so
that runs too, with 85, 70 and 55 % of the steps and the learning rate's whole decay. Times are of steps taken in turn;
a ladder's is the mean over its rungs.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxsparse
from fxsparse.passes import SelectNeurons
from fxsparse.passes.neurons.choice import Choice

from . import harness
from .classify import counted, fit, rate
from .harness import Cell, Results, markdown, spread
from .reviews import Task, accuracy, language_model, perplexity, read_task, token_windows

OMISSION = (0.2, 0.33, 0.5)
SHARES = (1.0, 0.85, 0.7, 0.55)
RUNGS = 2

Way = tuple[float, int, float, Choice]
"""Omission rate, rungs of the ladder, share of the steps, how units are chosen."""


def ways() -> dict[str, Way]:
    dense = {"dense" if share == 1 else f"dense, {share:.0%} of the steps": (0.0, 0, share, "top") for share in SHARES}
    constant = {f"SAT {omission:g}": (omission, 0, 1.0, "top") for omission in OMISSION}
    ladder = {f"SAT {omission:g} + LORS": (omission, RUNGS, 1.0, "top") for omission in OMISSION}
    drawn = {f"SAT {OMISSION[-1]:g}, drawn": (OMISSION[-1], 0, 1.0, "sampled")}
    return dense | constant | ladder | drawn


def rewritten(model: nn.Module, way: Way, rows: dict[str, Tensor], seed: int) -> GraphModule:
    omission, rungs, _, choice = way
    passes = [SelectNeurons(omission, rungs=rungs, choice=choice, seed=seed)] if omission else []
    return fxsparse.rewrite(model, passes, kwargs=rows)


class Classifier:
    """MiniLM learning the sentiment of reviews; what counts is the accuracy of the dense model, in percent."""

    measure, digits = "test accuracy %", 1

    def __init__(self, args: argparse.Namespace) -> None:
        sizes = {"train": 1024, "dev": 256, "test": 1024, "length": 32}
        self.epochs = 3
        if args.quick:
            sizes |= {"train": 256, "dev": 128, "test": 512}
            self.epochs = 2
        if args.tiny:
            sizes |= {"train": 64, "dev": 16, "test": 32}
        self.task: Task = read_task("rotten_tomatoes", **sizes)
        self.settings: Cell = {"data": self.task.name, **sizes, "epochs": self.epochs, "batch": 32, "rungs": RUNGS}
        self.rows = self.task.train.rows(slice(0, 32))

    def model(self, seed: int) -> nn.Module:
        return self.task.model(seed)

    def train(self, way: Way, seed: int) -> Cell:
        _, _, share, _ = way
        gm = rewritten(self.model(seed), way, self.rows, seed)
        values: list[float] = []

        def scheduled(optimizer: torch.optim.Optimizer, steps: int) -> fxsparse.Schedule:
            schedule = fxsparse.Schedule(gm, optimizer, total_steps=steps)
            schedules.append(schedule)
            return schedule

        schedules: list[fxsparse.Schedule] = []
        fit(
            gm, self.task, epochs=self.epochs * share, lr=5e-5, seed=seed, schedule=scheduled,
            before_step=lambda step: values.append(schedules[0].values().get("select-neurons.omission", 0.0)),
        )  # fmt: skip
        dense = self.model(seed)
        dense.load_state_dict(fxsparse.dense_state_dict(gm))
        return {
            "result": accuracy(gm, self.task.test),
            "in_its_class": accuracy(dense, self.task.test),
            "rates": values,
        }


class LanguageModel:
    """SmolLM2 trained on with reviews; what counts is the perplexity of the dense model."""

    measure, digits = "perplexity", 2

    def __init__(self, args: argparse.Namespace) -> None:
        self.name, self.source, coded, _ = language_model()
        self.steps, self.batch, length = (6, 2, 32) if args.tiny else (16, 4, 64) if args.quick else (80, 4, 64)
        text, self.windows, self.dev = token_windows(coded, count=self.steps * self.batch, length=length)
        ids = self.windows[: self.batch]
        self.rows = {"input_ids": ids, "labels": ids}
        self.settings: Cell = {
            "model": self.name,
            "text": text,
            "steps": self.steps,
            "batch": self.batch,
            "length": length,
        }

    def model(self, seed: int) -> nn.Module:
        return copy.deepcopy(self.source)

    def train(self, way: Way, seed: int) -> Cell:
        _, _, share, _ = way
        gm = rewritten(self.model(seed), way, self.rows, seed)
        optimizer = torch.optim.AdamW(gm.parameters(), lr=5e-5, weight_decay=0.01, fused=True)
        steps = round(self.steps * share)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
        schedule = fxsparse.Schedule(gm, optimizer, total_steps=steps)
        draw = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.windows), generator=draw)
        before, rates = perplexity(gm, self.dev), []
        gm.train()
        for step in range(steps):
            rates.append(schedule.values().get("select-neurons.omission", 0.0))
            ids = self.windows[order[step * self.batch : (step + 1) * self.batch]]
            gm(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(gm.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            decay.step()
        dense = self.model(seed)
        dense.load_state_dict(fxsparse.dense_state_dict(gm))
        return {
            "before": before,
            "result": perplexity(gm, self.dev),
            "in_its_class": perplexity(dense, self.dev),
            "rates": rates,
        }


def step_costs(work: Classifier | LanguageModel, rounds: int) -> Cell:
    """Time and FLOPs of a step at every rate that occurs, over the dense one's."""
    rates = sorted({0.0, *OMISSION, *(omission / 2 for omission in OMISSION)})
    calls, flops = {}, {}
    for omission in rates:
        gm = rewritten(work.model(0), (omission, 0, 1.0, "top"), work.rows, 0)
        optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-7, fused=True)
        schedule = fxsparse.Schedule(gm, optimizer, total_steps=1000)
        gm.train()

        def step(gm: Any = gm, optimizer: Any = optimizer, schedule: Any = schedule) -> None:
            gm(**work.rows).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

        flops[f"{omission:g}"] = counted(step)
        calls[f"{omission:g}"] = step
    seconds = harness.in_turn(calls, rounds)
    return {
        "rates": rates,
        "time": [harness.ratio(seconds[f"{omission:g}"], seconds["0"]) for omission in rates],
        "flops": [flops[f"{omission:g}"] / flops["0"] for omission in rates],
    }


def over_steps(rates: list[float], known: list[float], costs: list[float], dense_steps: int) -> float:
    """The cost of steps at these rates over that of all dense steps, between known rates by a line."""
    total = 0.0
    for omission in rates:
        right = next((place for place, value in enumerate(known) if value >= omission - 1e-9), len(known) - 1)
        left = max(0, right - 1)
        width = known[right] - known[left]
        share = (omission - known[left]) / width if width else 0.0
        total += costs[left] + share * (costs[right] - costs[left])
    return total / dense_steps


def summary(results: Results, seeds: list[int]) -> dict[str, Cell]:
    costs = results.cells["step costs"]
    dense_steps = len(results.cells[f"dense, seed {seeds[0]}"]["rates"])
    found = {}
    for name in ways():
        cells = [results.cells[f"{name}, seed {seed}"] for seed in seeds]
        found[name] = {
            "results": [cell["result"] for cell in cells],
            "same": max(abs(cell["result"] - cell["in_its_class"]) for cell in cells),
            "time": over_steps(cells[0]["rates"], costs["rates"], costs["time"], dense_steps),
            "flops": over_steps(cells[0]["rates"], costs["rates"], costs["flops"], dense_steps),
        }
    return found


def dense_at(found: dict[str, Cell], axis: str, value: float) -> float:
    """The mean result of dense training that costs as much, between the runs by a line."""
    points = sorted((cell[axis], statistics.fmean(cell["results"])) for name, cell in found.items() if "dense" in name)
    if value <= points[0][0]:
        return points[0][1]
    for (low, first), (high, second) in itertools.pairwise(points):
        if value <= high:
            return first + (second - first) * (value - low) / (high - low)
    return points[-1][1]


def tables(work: Classifier | LanguageModel, results: Results, seeds: list[int]) -> str:
    found, rows = summary(results, seeds), []
    for name, cell in found.items():
        sat = "SAT" in name
        rows.append(
            (
                name,
                spread(cell["results"], work.digits),
                f"{cell['flops']:.2f}",
                f"{cell['time']:.2f}",
                f"{dense_at(found, 'flops', cell['flops']):.{work.digits}f}" if sat else "",
                f"{dense_at(found, 'time', cell['time']):.{work.digits}f}" if sat else "",
                f"{cell['same']:.2g}",
            )
        )
    head = ("", work.measure, "FLOPs", "time", "dense at these FLOPs", "dense at this time", "off in its class")
    return markdown(head, rows)


def plot(work: Classifier | LanguageModel, results: Results, seeds: list[int]) -> None:
    found = summary(results, seeds)
    figure, panels = harness.figure(1, 2, (11, 4.5))
    for axes, axis in zip(panels, ("flops", "time"), strict=True):
        kinds: dict[str, Callable[[str], bool]] = {
            "dense": lambda name: "dense" in name,
            "SAT": lambda name: "SAT" in name and "LORS" not in name and "drawn" not in name,
            "SAT + LORS": lambda name: "LORS" in name,
            "SAT, drawn": lambda name: "drawn" in name,
        }
        for position, (kind, belongs) in enumerate(kinds.items()):
            cells = [(name, cell) for name, cell in found.items() if belongs(name)]
            for _, cell in cells:
                axes.scatter([cell[axis]] * len(seeds), cell["results"], s=10, alpha=0.5, color=f"C{position}")
            means = [statistics.fmean(cell["results"]) for _, cell in cells]
            axes.plot([cell[axis] for _, cell in cells], means, marker="o", color=f"C{position}", label=kind)
        axes.set(xlabel=f"{'FLOPs' if axis == 'flops' else 'time'} of the training / dense", ylabel=work.measure)
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.suptitle(f"{next(iter(work.settings.values()))}: small marks are seeds", fontsize=10)
    figure.savefig(results.path.with_suffix(".svg"))


def main() -> None:
    options = harness.parser(__doc__)
    options.add_argument("--model", default="minilm", choices=("minilm", "smollm2"))
    args = harness.parse(options)
    if args.model == "smollm2" and len(args.seeds) > 1:
        args.seeds = args.seeds[:1]
    work: Classifier | LanguageModel = Classifier(args) if args.model == "minilm" else LanguageModel(args)
    results = Results(f"sat-{args.model}", args, work.settings)
    for seed in args.seeds:
        for name, way in ways().items():
            results.cell(f"{name}, seed {seed}", lambda way=way, seed=seed: work.train(way, seed))  # type: ignore[misc]
    results.cell("step costs", lambda: step_costs(work, 2 if args.quick else 7))
    results.finish(tables(work, results, args.seeds))
    plot(work, results, args.seeds)


if __name__ == "__main__":
    main()
