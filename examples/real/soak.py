"""A long real fine-tuning whose schedules all move, interrupted twice: flat memory, few graphs, the same result.

    python -m examples.real.soak            # 3,000 steps of MiniLM on Rotten Tomatoes
    python -m examples.real.soak --quick    # 60 steps

Two pipelines, because gates are not trained beside a selection of tensors or branches:

* lazy low-rank branches, a new choice of neurons in every step with a ladder, tensors selected anew ten times;
* two texts in one pass, whose losses change by stages, and CoFi's gates, whose target rises.

Each is trained once without a break, and once in three parts: what an interruption leaves is the file of
``fxsparse.save`` and the states of optimizer, schedule and random numbers; the next part starts from a fresh model.
"""

from __future__ import annotations

import argparse
import gc
import resource
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.fx import GraphModule

import fxsparse

from . import harness
from .harness import Cell, Results, markdown
from .reviews import Task, accuracy, read_task

BATCH = 8
PIPELINES = {
    "neurons, tensors, branches": (
        "low-rank{rank=4,start=0.5,layers=[*query,*value]},"
        "select-neurons{omission=0.4,rungs=2,choice=sampled},select-tensors{rho=0.8,times=10}"
    ),
    "gates, two texts in one": "multiplex{n=2,stages=[[0.3,0,1],[1,0.9,0.1]]},gates{target=0.4}",
}


def resident() -> float:
    """Megabytes of memory that the process holds."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


@dataclass
class Training:
    """A rewritten model with all that trains it."""

    gm: GraphModule
    optimizer: torch.optim.Optimizer
    schedule: fxsparse.Schedule
    call: Any

    @classmethod
    def start(cls, gm: GraphModule, args: argparse.Namespace) -> Training:
        optimizer = torch.optim.AdamW(gm.parameters(), lr=2e-5, fused=True)
        schedule = fxsparse.Schedule(gm, optimizer, total_steps=args.steps)
        torch._dynamo.reset()
        call = torch.compile(gm, backend="fxsparse", options={"compiler": args.compiler})
        return cls(gm.train(), optimizer, schedule, call)

    def step(self, rows: dict[str, Tensor]) -> float:
        self.schedule.observe(rows)
        loss = self.call(**rows).loss
        (loss + (fxsparse.sparsity_loss(self.gm) if "sparsity" in dict(self.gm.named_children()) else 0)).backward()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss.item()

    def save(self, folder: Path) -> None:
        fxsparse.save(self.gm, folder / "model.safetensors")
        states = {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
        torch.save({**states, "random": torch.get_rng_state()}, folder / "states.pt")

    @classmethod
    def resume(cls, folder: Path, task: Task, args: argparse.Namespace) -> Training:
        gm = fxsparse.load(folder / "model.safetensors", task.model(0), kwargs=task.train.rows(slice(0, BATCH)))
        training = cls.start(gm, args)
        states = torch.load(folder / "states.pt", weights_only=False)  # written by save
        training.optimizer.load_state_dict(states["optimizer"])
        training.schedule.load_state_dict(states["schedule"])
        torch.set_rng_state(states["random"])
        return training


def rows_at(task: Task, step: int) -> dict[str, Tensor]:
    index = torch.randint(len(task.train), (BATCH,), generator=torch.Generator().manual_seed(step))
    return task.train.rows(index)


def soak(passes: str, task: Task, args: argparse.Namespace) -> Cell:
    """Trains without a break and in three parts, and compares."""
    whole = Training.start(fxsparse.rewrite(task.model(0), passes, kwargs=rows_at(task, 0)), args)
    torch.manual_seed(0)
    counters.clear()
    losses, memory, changes = [], [], 0
    trained: list[bool] = []
    for step in range(args.steps):
        now = [parameter.requires_grad for parameter in whole.gm.parameters()]
        changes, trained = changes + (now != trained), now
        losses.append(whole.step(rows_at(task, step)))
        if step % max(1, args.steps // 30) == 0 or step == args.steps - 1:
            memory.append((step, resident()))
    graphs = counters["stats"]["unique_graphs"]
    parts = in_parts(passes, task, args)
    mine, its = whole.gm.state_dict(), parts.gm.state_dict()
    difference = max(
        float((mine[name].double() - its[name].double()).abs().max()) for name in mine if mine[name].numel()
    )
    half = [megabytes for step, megabytes in memory if step >= args.steps // 2]
    return {
        "graphs": graphs,
        "selections": changes,
        "memory": memory,
        "growth_mb": half[-1] - half[0],
        "same_keys": mine.keys() == its.keys(),
        "difference": difference,
        "test": accuracy(whole.gm, task.test),
        "test_in_parts": accuracy(parts.gm, task.test),
        "losses": losses[:: max(1, len(losses) // 100)],
        "values": dict(whole.schedule.values()),
    }


def in_parts(passes: str, task: Task, args: argparse.Namespace) -> Training:
    """The same training, interrupted after a third and after two thirds of the steps."""
    training = Training.start(fxsparse.rewrite(task.model(0), passes, kwargs=rows_at(task, 0)), args)
    torch.manual_seed(0)
    stops = {args.steps // 3, 2 * args.steps // 3}
    with tempfile.TemporaryDirectory() as folder:
        for step in range(args.steps):
            if step in stops:
                training.save(Path(folder))
                del training
                training = Training.resume(Path(folder), task, args)
            training.step(rows_at(task, step))
    return training


def main() -> None:
    options = harness.parser(__doc__)
    options.add_argument("--compiler", default="aot_eager", choices=("inductor", "aot_eager", "eager"))
    args = harness.parse(options)
    args.steps = 12 if args.tiny else 60 if args.quick else 3000
    sizes = {"train": 64 if args.tiny else 1024, "dev": 8, "test": 32 if args.tiny else 512, "length": 32}
    task = read_task("rotten_tomatoes", **sizes)
    torch._dynamo.config.recompile_limit = 64
    results = Results("soak", args, {"data": task.name, **sizes, "steps": args.steps, "batch": BATCH})
    for name, passes in PIPELINES.items():
        results.cell(name, lambda passes=passes: soak(passes, task, args))  # type: ignore[misc]
    rows = [
        (
            name, f"{cell['growth_mb']:+.0f} MB", cell["graphs"], cell["selections"], f"{cell['difference']:.1e}",
            f"{cell['test']:.1f} / {cell['test_in_parts']:.1f}",
        )
        for name, cell in ((name, results.cells[name]) for name in PIPELINES)
    ]  # fmt: skip
    head = (
        "",
        "memory over the second half",
        "graphs",
        "sets of tensors",
        "off after two resumptions",
        "test accuracy %",
    )
    results.finish(markdown(head, rows))
    figure, axes = harness.figure()
    for name in PIPELINES:
        axes.plot(*zip(*results.cells[name]["memory"], strict=True), marker="o", markersize=3, label=name)
    axes.set(xlabel="step", ylabel="resident memory, MB", ylim=(0, None), title="memory of a long fine-tuning")
    axes.legend()
    figure.savefig(results.path.with_suffix(".svg"))


if __name__ == "__main__":
    main()
