"""Continual pre-training with SAT: a byte-level Llama learns one package's source, then another's on fewer neurons.

    python examples/continual_sat.py                   # two packages of the standard library; a few minutes
    python examples/continual_sat.py --data my.txt     # your own text as the second one
    python examples/continual_sat.py --compiler aot_eager --steps 20     # a quick look, without Inductor
    python examples/continual_sat.py --block 1 64      # channels one by one, and in blocks of 64 neighbours

The second phase runs dense and with ``select-neurons`` (arXiv 2406.01392) at omission rates 0.3 and 0.5. Each rate runs
once at a constant rate and once with the ladder (LORS), which ends dense. All runs start from the same weights, see the
same batches and take their steps in turn, so that step times can be compared on a busy machine. Every rung of a ladder
is compiled once. The results are a table and a plot, written to ``--out``.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from corpus import random_windows, read_corpus
from pretraining import pretrain, progress_bar
from rich.console import Console
from rich.table import Table
from torch._dynamo.utils import counters
from torch.fx import GraphModule

import fxsparse
from fxsparse.graph.training_form import FORM_KEY, training_graph
from fxsparse.passes import Pass, SelectNeurons


@dataclass
class Run:
    """One way of continual pre-training, with its losses, step times and FLOPs."""

    name: str
    model: GraphModule
    compiled: Callable[..., Any]
    optimizer: torch.optim.Optimizer
    schedule: fxsparse.Schedule
    validation: list[tuple[int, float]] = field(default_factory=list)  # (steps done, loss)
    seconds: list[float] = field(default_factory=list)
    compiles: list[bool] = field(default_factory=list)  # whether the step compiled or changed the rung
    graphs: int = 0
    flops: list[int] = field(default_factory=list)

    def steady(self) -> list[float]:
        """Seconds of every step; a step that compiled counts like the next one that did not."""
        steady = self.seconds.copy()
        for step in reversed(range(len(steady) - 1)):
            if self.compiles[step]:
                steady[step] = steady[step + 1]
        return steady


def ways(args: argparse.Namespace) -> dict[str, list[Pass]]:
    """The passes of every run, by its name."""
    passes: dict[str, list[Pass]] = {"dense": []}
    for omission in args.omission:
        for block in args.block:
            options: dict[str, Any] = {"multiple": args.multiple, "block": block, "seed": args.seed}
            options |= {"score": args.score, "choice": args.choice}
            name = f"SAT {omission:g}" + (f" in {block}s" if block > 1 else "")
            passes[name] = [SelectNeurons(omission, **options)]
            passes[f"{name} + LORS"] = [SelectNeurons(omission, rungs=args.rungs, **options)]
    return passes


def build(args: argparse.Namespace) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=args.hidden, intermediate_size=3 * args.hidden, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.heads, max_position_embeddings=args.length,
        use_cache=False, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(args.device)


def start(name: str, passes: list[Pass], model: torch.nn.Module, batch: torch.Tensor, args: argparse.Namespace) -> Run:
    """A run before its first step."""
    gm = fxsparse.rewrite(copy.deepcopy(model), passes, kwargs={"input_ids": batch, "labels": batch})
    optimizer = torch.optim.AdamW(gm.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=args.steps)
    compiled = torch.compile(gm, backend="fxsparse", options={"compiler": args.compiler})
    return Run(name, gm, compiled, optimizer, schedule)


def train_step(run: Run, ids: torch.Tensor) -> None:
    graphs, form = counters["stats"]["unique_graphs"], run.model.meta.get(FORM_KEY)
    begin = time.perf_counter()
    loss = run.compiled(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    compiled = counters["stats"]["unique_graphs"] - graphs
    run.flops.append(fxsparse.count_flops(training_graph(run.model)).step if compiled else run.flops[-1])
    run.optimizer.step()
    run.schedule.step()
    run.optimizer.zero_grad()
    loss.item()
    run.seconds.append(time.perf_counter() - begin)
    run.compiles.append(compiled > 0 or run.model.meta.get(FORM_KEY) is not form)
    run.graphs += compiled


@torch.no_grad()
def validate(run: Run, batches: list[torch.Tensor]) -> None:
    """The loss of the dense model, which is the result of training."""
    run.model.eval()
    loss = statistics.fmean(run.model(input_ids=batch, labels=batch).loss.item() for batch in batches)
    run.model.train()
    run.validation.append((len(run.seconds), loss))


def result_table(runs: list[Run], args: argparse.Namespace) -> Table:
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    table = Table(title=f"{device}, torch {torch.__version__}, fxsparse {fxsparse.__version__}, {args.compiler}")
    columns = ("", "validation loss", "FLOPs / dense", "step", "all steps", "/ dense", "graphs (compiling)")
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    dense = runs[0]
    for run in runs:
        steady = run.steady()
        table.add_row(
            run.name,
            f"{run.validation[0][1]:.3f} -> {run.validation[-1][1]:.3f}",
            f"{sum(run.flops) / sum(dense.flops):.2f}",
            f"{statistics.median(steady) * 1e3:.0f} ms",
            f"{sum(steady):.1f} s",
            f"{sum(steady) / sum(dense.steady()):.2f}",
            f"{run.graphs} ({sum(run.seconds) - sum(steady):.0f} s)",
        )
    return table


def plot(runs: list[Run], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (losses, times) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for position, run in enumerate(runs):
        steady = run.steady()
        look = {"color": f"C{(position + 1) // 2}", "linestyle": "--" if "LORS" in run.name else "-", "label": run.name}
        spent = [sum(steady[:step]) for step, _ in run.validation]
        losses.plot(spent, [loss for _, loss in run.validation], marker="o", markersize=3, **look)
        ratios = [mine / its for mine, its in zip(steady, runs[0].steady(), strict=True)]
        edges = sorted({*range(0, len(ratios), max(1, len(ratios) // 20)), len(ratios)})
        shares = [statistics.median(ratios[begin:end]) for begin, end in pairwise(edges)]
        times.stairs(shares, edges, baseline=None, **look)
    losses.set(xlabel="seconds of training, without compiling", ylabel="validation loss (nats per byte)")
    losses.set_title("loss of the dense model against time")
    times.set(xlabel="step", ylabel="step time / dense", title="time of a step", ylim=(0, None))
    for axes in (losses, times):
        axes.grid(alpha=0.3)
    losses.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def parse_args() -> argparse.Namespace:
    library = Path(sysconfig.get_paths()["stdlib"])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrain-data", default=str(library / "email"), help="a text file or folder")
    parser.add_argument(
        "--data", default=str(library / "asyncio"), help="a text file or folder for continual pre-training"
    )
    parser.add_argument("--pretrain-steps", type=int, default=150)
    parser.add_argument("--steps", type=int, default=120, help="steps of continual pre-training")
    parser.add_argument("--omission", nargs="+", type=float, default=[0.3, 0.5])
    parser.add_argument("--rungs", type=int, default=2, help="rungs of the ladder, in the second half of the steps")
    parser.add_argument(
        "--multiple", type=int, default=64, help="the number of channels is rounded to a multiple of this"
    )
    parser.add_argument("--block", nargs="+", type=int, default=[1], help="channels that are chosen together")
    parser.add_argument("--score", default="magnitude", choices=("magnitude", "weighted", "uniform"))
    parser.add_argument("--choice", default="top", choices=("top", "sampled"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens in a window")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compiler", default="inductor", choices=("inductor", "aot_eager", "eager"))
    parser.add_argument("--out", type=Path, default=Path("out"))
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    console = Console(width=None if sys.stdout.isatty() else 110)
    transformers.logging.set_verbosity_error()
    torch._dynamo.config.recompile_limit = max(64, 4 * args.rungs)  # a graph for every rung
    torch.manual_seed(args.seed)
    model = build(args)
    draw = torch.Generator().manual_seed(args.seed)
    pretrain(model, read_corpus(args.pretrain_data, seed=args.seed).train, args, draw, console)

    corpus = read_corpus(args.data, seed=args.seed, validation=0.1)
    console.print(f"{len(corpus.train):,} bytes to train on, {len(corpus.validation):,} to validate on")
    held_out = [random_windows(corpus.validation, 16, args.length, draw).to(args.device) for _ in range(8)]
    example = random_windows(corpus.train, args.batch, args.length, draw).to(args.device)
    runs = [start(name, passes, model, example, args) for name, passes in ways(args).items()]
    console.print(fxsparse.explain(runs[-1].model), highlight=False, soft_wrap=True)
    for run in runs:
        validate(run, held_out)
    every = max(1, args.steps // 8)
    with progress_bar(console) as progress:
        task = progress.add_task("continual pre-training", total=args.steps * len(runs))
        for step in range(args.steps):
            ids = random_windows(corpus.train, args.batch, args.length, draw).to(args.device)
            for run in runs:
                train_step(run, ids)
                if (step + 1) % every == 0 or step + 1 == args.steps:
                    validate(run, held_out)
                description = f"continual pre-training, dense loss {runs[0].validation[-1][1]:.2f}"
                progress.update(task, advance=1, description=description)
    console.print(result_table(runs, args))
    plot(runs, args.out / "continual_sat.png")
    console.print(f"plot: {args.out / 'continual_sat.png'}")


if __name__ == "__main__":
    main()
