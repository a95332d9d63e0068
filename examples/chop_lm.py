"""Pretrains a 12-layer GPT on real text, drops half its layers in each of CHOP's configurations, and trains on.

    python examples/chop_lm.py                  # the standard library's source; a few minutes on two CPU cores
    python examples/chop_lm.py --data my.txt    # your own text

After pretraining, these runs see the same batches:

* the whole model;
* every configuration of LayerCHOP (arXiv 2305.14864), each from the pretrained weights and optimizer state;
* DimCHOP (the same paper), which drops the same share of hidden dimensions during training;
* a model with as few layers, from scratch.

The results are a table and a plot of the validation losses, written to ``--out``.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from corpus import Corpus, random_windows, read_corpus
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.fx import GraphModule

import fxsparse
from fxsparse.passes import DropDimensions, DropLayers, Materialize
from fxsparse.passes.drop_layers import CONFIGURATIONS


@dataclass
class Run:
    """A model in training, with its step times and validation losses."""

    name: str
    model: GraphModule
    optimizer: torch.optim.Optimizer
    call: Any
    schedule: fxsparse.Schedule | None = None
    seconds: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)


def start(name: str, gm: GraphModule, optimizer: torch.optim.Optimizer, compiler: str) -> Run:
    return Run(name, gm, optimizer, torch.compile(gm, backend="fxsparse", options={"compiler": compiler}))


def adamw(gm: GraphModule, args: argparse.Namespace) -> torch.optim.Optimizer:
    return torch.optim.AdamW(gm.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)


def chopped(configuration: str, run: Run, args: argparse.Namespace) -> Run:
    """Continues the pretrained run with fewer layers and the optimizer state of the remaining parameters."""
    before = copy.deepcopy(run.model)
    optimizer = adamw(before, args)
    optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    gm = fxsparse.rewrite(before, [DropLayers(configuration, count=args.layers - args.keep)])
    fxsparse.forget_dropped(optimizer, before, gm)
    return start(configuration, gm, optimizer, args.compiler)


def narrowed(run: Run, args: argparse.Namespace) -> Run:
    """Continues the pretrained run and drops hidden dimensions during training."""
    gm = fxsparse.rewrite(copy.deepcopy(run.model), [DropDimensions(1 - args.keep / args.layers, every=args.window)])
    optimizer = adamw(gm, args)
    optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    continued = start("DimCHOP", gm, optimizer, args.compiler)
    continued.schedule = fxsparse.Schedule(gm, optimizer, total_steps=args.steps)
    return continued


def train_step(run: Run, batch: torch.Tensor) -> None:
    begin = time.perf_counter()
    run.call(input_ids=batch, labels=batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    if run.schedule is not None:
        run.schedule.step()
    run.optimizer.zero_grad()
    run.seconds.append(time.perf_counter() - begin)


@torch.no_grad()
def validate(run: Run, batches: list[torch.Tensor], step: int) -> None:
    run.model.eval()
    loss = statistics.fmean(run.model(input_ids=batch, labels=batch).loss.item() for batch in batches)
    run.model.train()
    run.validation.append((step, loss))


def train(
    runs: list[Run], steps: range, corpus: Corpus, validation: list[torch.Tensor], args: argparse.Namespace, title: str
) -> None:
    """Trains all runs on the same batches; in every step the runs take turns."""
    generator = torch.Generator().manual_seed(args.seed + steps.start)
    every = max(1, len(steps) // 8)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(title, total=len(steps))
        for run in runs:
            validate(run, validation, steps.start)
        for step in steps:
            batch = random_windows(corpus.train, args.batch, args.length, generator).to(args.device)
            for run in runs:
                train_step(run, batch)
                if (step + 1 - steps.start) % every == 0 or step + 1 == steps.stop:
                    validate(run, validation, step + 1)
            progress.update(task, advance=1, description=f"{title}, loss {runs[0].validation[-1][1]:.2f}")


def result_table(runs: list[Run], device: str) -> Table:
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    table = Table(title=f"{name}, torch {torch.__version__}, fxsparse {fxsparse.__version__}")
    for column in ("", "layers", "width", "parameters", "loss at first", "validation loss", "step time / whole"):
        table.add_column(column, justify="right" if column else "left")
    whole = statistics.median(runs[0].seconds)
    for run in runs:
        layers = len({n.split(".")[2] for n, _ in run.model.named_parameters() if n.startswith("transformer.h.")})
        parameters = sum(parameter.numel() for parameter in run.model.parameters())
        step = f"{statistics.median(run.seconds) / whole:.2f}"
        first, last = run.validation[0][1], run.validation[-1][1]
        width = str(run.model.get_parameter("transformer.ln_f.weight").numel())
        table.add_row(run.name, str(layers), width, f"{parameters / 1e6:.2f} M", f"{first:.3f}", f"{last:.3f}", step)
    return table


def plot(pretraining: Run, runs: list[Run], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.plot(*zip(*pretraining.validation, strict=True), color="black", label="pretraining", marker="o", markersize=3)
    for position, run in enumerate(runs):
        axes.plot(*zip(*run.validation, strict=True), color=f"C{position}", label=run.name, marker="o", markersize=3)
    axes.axvline(pretraining.validation[-1][0], color="grey", linewidth=1, linestyle=":")
    axes.set(
        xlabel="step",
        ylabel="validation loss (nats per byte)",
        title="layers dropped at the dotted line; DimCHOP drops dimensions during training",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a text file or folder; default: the Python standard library's source")
    parser.add_argument("--pretrain-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=100, help="steps after the drop")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="tokens in a window")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--keep", type=int, default=6, help="layers that remain")
    parser.add_argument("--window", type=int, default=5, help="steps between two choices of DimCHOP's dimensions")
    parser.add_argument("--hidden", type=int, default=96)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compiler", default="aot_eager", choices=("inductor", "aot_eager", "eager"))
    parser.add_argument("--out", type=Path, default=Path("out"))
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    console = Console(width=None if sys.stdout.isatty() else 110)
    transformers.logging.set_verbosity_error()
    corpus = read_corpus(args.data, seed=args.seed)
    torch.manual_seed(args.seed)

    def build(layers: int) -> GraphModule:
        config = transformers.GPT2Config(
            vocab_size=256, n_positions=args.length, n_embd=args.hidden, n_layer=layers, n_head=args.heads,
            bos_token_id=None, eos_token_id=None, use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config).to(args.device)
        return fxsparse.trace(model, kwargs={"input_ids": example, "labels": example})

    held_out = torch.Generator().manual_seed(args.seed)
    validation = [random_windows(corpus.validation, 16, args.length, held_out).to(args.device) for _ in range(4)]
    example = validation[0]
    gm = build(args.layers)
    pretraining = start("whole", gm, adamw(gm, args), args.compiler)
    train([pretraining], range(args.pretrain_steps), corpus, validation, args, "pretraining")

    whole = start("whole model", pretraining.model, pretraining.optimizer, args.compiler)
    runs = [whole, *(chopped(configuration, pretraining, args) for configuration in CONFIGURATIONS)]
    dimchop = narrowed(pretraining, args)
    runs.append(dimchop)
    scratch = build(args.keep)
    runs.append(start("from scratch", scratch, adamw(scratch, args), args.compiler))
    console.print(fxsparse.explain(runs[1].model), highlight=False, soft_wrap=True)
    stop = args.pretrain_steps + args.steps
    train(runs, range(args.pretrain_steps, stop), corpus, validation, args, "training on")
    dimchop.model = fxsparse.rewrite(dimchop.model, [Materialize()])
    validate(dimchop, validation, stop)
    console.print(fxsparse.explain(dimchop.model), highlight=False, soft_wrap=True)
    console.print(result_table(runs, args.device))
    plot(pretraining, runs, args.out / "chop_lm.png")
    console.print(f"loss curves: {args.out / 'chop_lm.png'}")


if __name__ == "__main__":
    main()
