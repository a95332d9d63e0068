"""One line for every method: the same training loop, with each recipe by its name.

    python examples/one_line.py                                # all recipes; several minutes, most of them compiling
    python examples/one_line.py sat greentrainer --steps 100   # two of them
    python examples/one_line.py --compiler eager --steps 20    # a quick look, without Inductor

A small BERT first learns which package of the standard library a snippet of code comes from. Then each recipe trains a
copy of it on, compiled by ``torch.compile(model, backend="fxsparse", options={"recipe": name})``. What differs from
one recipe to the next is that name. They take their steps in turn, so that step times can be compared on a busy
machine. The table at the end tells what each gave, beside the dense model trained on for as long.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from pretraining import progress_bar
from rich.console import Console
from rich.table import Table
from snippets import Snippets, read_snippets
from torch import Tensor
from torch._dynamo.utils import counters

import fxsparse
from fxsparse.graph import unwrapped
from fxsparse.graph.training_form import training_graph

RECIPES = ("slope", "slope-low-rank", "greentrainer", "sat", "layerchop", "dimchop", "prumux")


@dataclass
class Run:
    """A compiled model in training, and what its steps took."""

    recipe: str
    fast: Any
    optimizer: torch.optim.Optimizer
    schedule: fxsparse.Schedule | None = None
    gated: bool = False
    seconds: list[float] = field(default_factory=list)
    graphs: int = 0
    compiled: list[bool] = field(default_factory=list)  # whether the step compiled a graph

    def step_time(self) -> float:
        """The median second of the steps that compiled nothing."""
        pairs = zip(self.seconds, self.compiled, strict=True)
        return statistics.median([taken for taken, compiled in pairs if not compiled] or self.seconds)


def start(recipe: str, model: torch.nn.Module, args: argparse.Namespace) -> Run:
    """All that differs from one recipe to the next is its name."""
    fast = torch.compile(model, backend="fxsparse", options={"recipe": recipe, "compiler": args.compiler})
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    schedule = fxsparse.Schedule(fast, optimizer, total_steps=args.steps)
    return Run(recipe, fast, optimizer, schedule, gated="gates" in str(fxsparse.recipe(recipe)))


def start_dense(model: torch.nn.Module, args: argparse.Namespace) -> Run:
    fast = torch.compile(model, backend="fxsparse", options={"compiler": args.compiler})
    return Run("dense", fast, torch.optim.AdamW(model.parameters(), lr=args.lr))


def train_step(run: Run, batch: dict[str, Tensor]) -> None:
    graphs, begin = counters["stats"]["unique_graphs"], time.perf_counter()
    if run.schedule is not None:
        run.schedule.observe(batch)
    loss = run.fast(**batch).loss
    (loss + fxsparse.sparsity_loss(run.fast) if run.gated else loss).backward()
    run.optimizer.step()
    if run.schedule is not None:
        run.schedule.step()
    run.optimizer.zero_grad()
    run.seconds.append(time.perf_counter() - begin)
    compiled = counters["stats"]["unique_graphs"] - graphs
    run.graphs += compiled
    run.compiled.append(compiled > 0)


@torch.no_grad()
def accuracy(model: Any, data: Snippets) -> float:
    """Percent of the held-out snippets that are classified correctly."""
    model.eval()
    right = sum(int((model(input_ids=ids, labels=y).logits.argmax(-1) == y).sum()) for ids, y in data.test.batches(200))
    model.train()
    return 100 * right / len(data.test)


def step_flops(run: Run, batch: dict[str, Tensor]) -> int:
    """FLOPs of the step that the model takes now."""
    inner = unwrapped(run.fast)
    graph = training_graph(inner) if run.schedule is not None else fxsparse.trace(inner, kwargs=batch)
    return fxsparse.count_flops(graph).step


def result_table(runs: list[Run], levels: list[float], flops: list[int], compiler: str) -> Table:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    table = Table(title=f"{device}, torch {torch.__version__}, {compiler}")
    for column in ("recipe", "accuracy %", "FLOPs / dense, last step", "step time / dense", "trained", "graphs"):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    for run, level, count in zip(runs, levels, flops, strict=True):
        trained = sum(parameter.numel() for parameter in run.fast.parameters() if parameter.requires_grad)
        table.add_row(
            run.recipe, f"{level:.1f}", f"{count / flops[0]:.2f}", f"{run.step_time() / runs[0].step_time():.2f}",
            f"{trained:,}", str(run.graphs),
        )  # fmt: skip
    return table


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="recipe", help=f"of {', '.join(RECIPES)}; all by default")
    parser.add_argument("--first-steps", type=int, default=500, help="steps of the model that all others start from")
    parser.add_argument("--steps", type=int, default=60, help="steps of each recipe")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--classes", type=int, default=8)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compiler", default="inductor", choices=("inductor", "aot_eager", "eager"))
    args = parser.parse_args()
    args.recipes = args.recipes or list(RECIPES)
    if unknown := sorted(set(args.recipes) - set(RECIPES)):
        parser.error(f"no recipe of this example is called {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    return args


def main() -> None:
    args = parse_args()
    console = Console(width=None if sys.stdout.isatty() else 110)
    transformers.logging.set_verbosity_error()
    torch._dynamo.config.recompile_limit = 64  # all runs compile the one forward of their class
    data = read_snippets(classes=args.classes, length=args.length, seed=args.seed)
    console.print(f"{len(data.train)} snippets to train on, {len(data.test)} to test on: {', '.join(data.classes)}")
    torch.manual_seed(args.seed)
    config = transformers.BertConfig(
        vocab_size=data.vocabulary, hidden_size=args.hidden, intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers, num_attention_heads=4, max_position_embeddings=args.length,
        num_labels=args.classes,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).to(args.device)
    draw = torch.Generator().manual_seed(args.seed)

    def next_batch() -> dict[str, Tensor]:
        ids, labels = data.train.batch(args.batch, draw)
        return {"input_ids": ids.to(args.device), "labels": labels.to(args.device)}

    with progress_bar(console) as progress:
        first = start_dense(copy.deepcopy(model), args)
        for _ in progress.track(range(args.first_steps), description="the model that all start from"):
            train_step(first, next_batch())
        trained = first.fast._orig_mod
        console.print(f"accuracy of the model that all start from: {accuracy(trained, data):.1f} %")
        runs = [start_dense(copy.deepcopy(trained), args)]
        runs += [start(recipe, copy.deepcopy(trained), args) for recipe in args.recipes]
        task = progress.add_task("training on", total=args.steps * len(runs))
        for step in range(1, args.steps + 1):
            batch = next_batch()
            for run in runs:
                progress.update(task, description=f"training on: {run.recipe}")
                train_step(run, batch)
                progress.advance(task)
            if not console.is_terminal and step % 10 == 0:  # where no bar is drawn
                console.print(f"step {step} of {args.steps}")
    levels = [accuracy(run.fast, data) for run in runs]
    console.print(result_table(runs, levels, [step_flops(run, batch) for run in runs], args.compiler))


if __name__ == "__main__":
    main()
