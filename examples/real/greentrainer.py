"""GreenTrainer on a pretrained model and real text, beside the cheap ways of fine-tuning that a user would pick.

    python -m examples.real.greentrainer                  # MiniLM on Rotten Tomatoes, three seeds
    python -m examples.real.greentrainer --data imdb      # whole reviews, 128 tokens of each
    python -m examples.real.greentrainer --quick          # one seed, fewer texts and epochs

MiniLM with a new head learns the sentiment of reviews. The ways to train it:

* every tensor;
* what ``select-tensors`` chooses at the start of every epoch, within rho of a full step's FLOPs;
* the last two layers, pooler and head, in plain torch;
* the biases and the head (BitFit), in plain torch;
* LoRA of PEFT on queries and values, with the head;
* two layers drawn anew eight times an epoch, with embeddings and head (as LISA does), in plain torch.

The fewer tensors a way trains, the larger is its learning rate, set by hand. All have the same texts in the same order,
and early stopping on texts of their own. FLOPs are those of the operators that ran, counted by torch, choosing
included. Times are of steps taken in turn.
Of every rewritten model the checkpoint is read back by transformers and classifies the test texts again.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

import fxsparse
from fxsparse.passes import SelectTensors

from . import harness
from .classify import Trained, counted, fit
from .harness import Cell, Results, markdown, spread
from .reviews import Task, accuracy, read_task

RHO = {0.36: 1e-3, 0.5: 2e-4, 0.7: 1e-4}
"""Learning rates. The forward pass is a third of a full step's FLOPs, so no rho below it trains anything."""


@dataclass
class Way:
    """A model made ready to be trained in one way.

    Attributes:
        model: what is trained.
        lr: the peak learning rate.
        source: the Hugging Face model a rewritten one was made of.
        before_step: told the number of every step.
    """

    model: nn.Module
    lr: float
    source: Any = None
    before_step: Callable[[int], None] = lambda step: None

    @property
    def trained(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> fxsparse.Schedule:
        return fxsparse.Schedule(self.model, optimizer, total_steps=steps)


def ways(task: Task, epochs: int) -> dict[str, Callable[[int], Way]]:
    """A function of the seed for each way."""
    made: dict[str, Callable[[int], Way]] = {"full": lambda seed: Way(task.model(seed), 5e-5)}
    for rho in RHO:
        made[f"GreenTrainer {rho:g}"] = lambda seed, rho=rho: selected(task, rho, epochs, seed)  # type: ignore[misc]
    made["last two layers"] = lambda seed: partly(task, seed, 2e-4, last_two)
    made["BitFit"] = lambda seed: partly(task, seed, 1e-3, lambda name, layers: "bias" in name)
    made["LoRA, rank 8"] = lambda seed: lora(task, seed)
    made["random layers"] = lambda seed: random_layers(task, seed, max(1, len(task.train) // 32 // 8))
    return made


def selected(task: Task, rho: float, epochs: int, seed: int) -> Way:
    model = task.model(seed)
    gm = fxsparse.rewrite(model, [SelectTensors(rho=rho, times=epochs)], kwargs=task.train.rows(slice(0, 32)))
    return Way(gm, RHO[rho], source=model)


def last_two(name: str, layers: int) -> bool:
    return any(f"layer.{layer}." in name for layer in (layers - 2, layers - 1)) or "pooler" in name


def partly(task: Task, seed: int, lr: float, chosen: Callable[[str, int], bool]) -> Way:
    """Only some tensors and the head, as one would write it."""
    model = task.model(seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("classifier" in name or chosen(name, model.config.num_hidden_layers))
    return Way(model, lr)


def lora(task: Task, seed: int) -> Way:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS"
    )
    return Way(get_peft_model(task.model(seed), config), 1e-3)


def random_layers(task: Task, seed: int, every: int) -> Way:
    model = task.model(seed)
    draw, layers = random.Random(seed), range(model.config.num_hidden_layers)

    def choose(step: int) -> None:
        if step % every == 0:
            drawn = draw.sample(layers, 2)
            for layer in layers:
                model.bert.encoder.layer[layer].requires_grad_(layer in drawn)

    choose(0)
    return Way(model, 1e-4, before_step=choose)


def train(way: Way, task: Task, epochs: int, seed: int) -> Cell:
    """Trains one way and measures what came out."""
    schedule = way.schedule if way.source is not None else None
    trained: Trained = fit(
        way.model, task, epochs=epochs, lr=way.lr, seed=seed, schedule=schedule, before_step=way.before_step
    )
    cell = {
        "test": accuracy(way.model, task.test),
        "dev": trained.dev,
        "best": trained.best,
        "flops": trained.flops,
        "choices": trained.choices,
        "trained": way.trained,
    }
    if way.source is not None:
        cell["read_back"] = read_back(way, task)
    return cell


def read_back(way: Way, task: Task) -> float:
    """Test accuracy of the checkpoint as plain transformers reads it."""
    with tempfile.TemporaryDirectory() as folder:
        fxsparse.save_pretrained(way.model, way.source, folder)
        return accuracy(transformers.AutoModelForSequenceClassification.from_pretrained(folder), task.test)


def step_times(made: dict[str, Callable[[int], Way]], task: Task, rounds: int) -> Cell:
    """Step time and FLOPs of every way over full training's; the ways take their steps in turn."""
    calls, flops = {}, {}
    rows = task.train.rows(slice(0, 32))
    for name, make in made.items():
        way = make(0)
        optimizer = torch.optim.AdamW(way.model.parameters(), lr=1e-6, fused=True)
        way.model.train()
        if way.source is not None:
            way.schedule(optimizer, 10).observe(rows)

        def step(model: nn.Module = way.model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            model(**rows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        flops[name] = counted(step)
        calls[name] = step
    seconds = harness.in_turn(calls, rounds)
    return {
        "seconds": seconds,
        "time": {name: harness.ratio(taken, seconds["full"]) for name, taken in seconds.items()},
        "flops": {name: count / flops["full"] for name, count in flops.items()},
    }


def tables(results: Results, made: dict[str, Any], seeds: list[int]) -> str:
    cells = {name: [results.cells[f"{name}, seed {seed}"] for seed in seeds] for name in made}
    full = statistics.fmean(cell["flops"] for cell in cells["full"])
    times = results.cells["step times"]
    rows = []
    for name, of_seeds in cells.items():
        paired = [mine["test"] - its["test"] for mine, its in zip(of_seeds, cells["full"], strict=True)]
        rows.append(
            (
                name,
                spread([cell["test"] for cell in of_seeds]),
                spread(paired),
                f"{statistics.fmean(cell['flops'] for cell in of_seeds) / full:.2f}",
                f"{times['flops'][name]:.2f}",
                f"{times['time'][name]:.2f}",
                f"{statistics.fmean(cell['trained'] for cell in of_seeds) / 1e6:.2f}",
                spread([cell["read_back"] for cell in of_seeds]) if "read_back" in of_seeds[0] else "",
            )
        )
    head = (
        "",
        "test accuracy %",
        "minus full",
        "FLOPs / full",
        "of a step",
        "time of a step",
        "trained, M",
        "read back %",
    )
    return markdown(head, rows)


def plot(results: Results, made: dict[str, Any], seeds: list[int]) -> None:
    figure, axes = harness.figure()
    full = statistics.fmean(results.cells[f"full, seed {seed}"]["flops"] for seed in seeds)
    for position, name in enumerate(made):
        of_seeds = [results.cells[f"{name}, seed {seed}"] for seed in seeds]
        flops = [cell["flops"] / full for cell in of_seeds]
        ours = "GreenTrainer" in name
        look = {"color": f"C{position}", "marker": "s" if ours else "o"}
        axes.scatter(flops, [cell["test"] for cell in of_seeds], s=14, alpha=0.5, **look)
        mean = statistics.fmean(flops), statistics.fmean(cell["test"] for cell in of_seeds)
        axes.scatter(*mean, s=70, label=name, **look)
    axes.set(xlabel="FLOPs of the training / full fine-tuning's", ylabel="test accuracy, %", xlim=(0.3, 1.1))
    axes.set_title(f"MiniLM on {results.settings['data']}: small marks are seeds, large ones their means", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(results.path.with_suffix(".svg"))


def main() -> None:
    options = harness.parser(__doc__)
    options.add_argument("--data", default="rotten_tomatoes", choices=("rotten_tomatoes", "imdb"))
    args = harness.parse(options)
    sizes = {"train": 1024, "dev": 256, "test": 1024, "length": 32 if args.data == "rotten_tomatoes" else 128}
    epochs = 3
    if args.quick:
        sizes |= {"train": 256, "dev": 128, "test": 512}
        epochs = 2
    if args.tiny:
        sizes |= {"train": 64, "dev": 16, "test": 32}
    task = read_task(args.data, **sizes)
    results = Results(f"greentrainer-{args.data}", args, {"data": task.name, **sizes, "epochs": epochs, "batch": 32})
    made = ways(task, epochs)
    for seed in args.seeds:
        for name, make in made.items():
            results.cell(f"{name}, seed {seed}", lambda make=make, seed=seed: train(make(seed), task, epochs, seed))  # type: ignore[misc]
    results.cell("step times", lambda: step_times(made, task, 2 if args.tiny else 3 if args.quick else 7))
    results.finish(tables(results, made, args.seeds))
    plot(results, made, args.seeds)


if __name__ == "__main__":
    main()
