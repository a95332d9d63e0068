"""PruMUX on a task that needs no download: which package of the standard library does a snippet of code come from?

    python examples/prumux_classify.py                          # N in 1, 2, 5, 10 and s in 0, 0.6, 0.8
    python examples/prumux_classify.py --members 1 2 --sparsities 0 0.6 --scale 0.2         # a quick look

1. A plain BERT from a Hugging Face configuration is trained.
2. For every N, also 1, a copy trains on for the same number of steps; with N > 1 it learns to tell its members apart.
3. For every s, a copy of the model of each N is pruned with CoFi's gates, with that model as its teacher, and cut.
4. Each (N, s) is measured: accuracy on held-out snippets, and throughput at a batch of ``--batch`` times N.
5. Auto-PruMUX is fitted to a part of the grid and predicts the rest.

The results are three tables, and under ``--out`` the measurements as CSV and a plot of accuracy over throughput.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from snippets import CLS, PAD, UNKNOWN, Snippets, read_snippets
from torch.fx import GraphModule

import fxsparse
from fxsparse import graph as fx
from fxsparse.autoprumux import AutoPruMUX, Point
from fxsparse.passes import DistillLayers, Multiplex


@dataclass(frozen=True)
class Result:
    """The measurements at one (N, s): accuracy in percent, throughput in inputs per second, number of parameters."""

    members: int
    sparsity: float
    accuracy: float
    throughput: float
    parameters: int

    @property
    def point(self) -> Point:
        return self.members, self.sparsity


def train(
    gm: GraphModule, data: Snippets, members: int, steps: int, args: argparse.Namespace, gated: bool = False
) -> None:
    """Trains with linear warm-up over a tenth of the steps and linear decay; a step has ``--train-batch`` groups."""
    optimizer = torch.optim.AdamW(gm.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=steps)
    warmup = max(1, steps // 10)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    generator = torch.Generator().manual_seed(args.seed)
    call = torch.compile(gm, backend="fxsparse", dynamic=True) if args.compile else gm
    gm.train()
    for _ in range(steps):
        ids, labels = data.train.batch(args.train_batch * members, generator)
        loss = call(input_ids=ids, labels=labels).loss
        (loss + fxsparse.sparsity_loss(gm) if gated else loss).backward()
        torch.nn.utils.clip_grad_norm_(gm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        decay.step()
    schedule.remove()


def multiplexed(first: GraphModule, data: Snippets, members: int, args: argparse.Namespace) -> GraphModule:
    """A copy of the first model, multiplexed if N > 1, trained on for ``--mux-steps`` steps."""
    stages = ((args.warmup, 0.0, 1.0), (1.0, 0.9, 0.1)) if args.warmup else ((1.0, 0.9, 0.1),)
    mux = Multiplex(members, demux=args.demux, stages=stages, ignore=(PAD, UNKNOWN, CLS), seed=args.seed)
    gm = fxsparse.rewrite(copy.deepcopy(first), [mux] if members > 1 else [])
    train(gm, data, members, args.mux_steps, args)
    return gm


def serving(gm: GraphModule) -> GraphModule:
    """A copy without the loss and all that only the loss needs, such as labels and retrieval."""
    copied = fx.copy_sharing_state(gm)
    output = copied.graph.output_node()
    _, logits = output.args[0]
    output.args = ((logits, logits),)
    fx.eliminate_dead_code(copied)
    copied.recompile()
    return copied


@torch.no_grad()
def accuracy(gm: GraphModule, data: Snippets) -> float:
    """Percent of the held-out snippets that are classified correctly."""
    gm.eval()
    right = sum(int((gm(input_ids=ids, labels=y).logits.argmax(-1) == y).sum()) for ids, y in data.test.batches(250))
    return 100 * right / len(data.test)


def throughputs(models: dict[Point, GraphModule], data: Snippets, args: argparse.Namespace) -> dict[Point, float]:
    """Inputs per second of each model; the models take turns, so that a busy machine slows all of them."""
    calls: dict[Point, Callable[[], object]] = {}
    for point, gm in models.items():
        ids, labels = data.train.batch(args.batch * point[0], torch.Generator().manual_seed(args.seed))
        served = serving(gm.eval())
        run = torch.compile(served, backend="fxsparse") if args.compile else served
        calls[point] = lambda run=run, ids=ids, labels=labels: run(input_ids=ids, labels=labels)  # type: ignore[misc]
    seconds: dict[Point, list[float]] = {point: [] for point in calls}
    with torch.no_grad():
        for turn in range(args.rounds + 1):
            for point, call in calls.items():
                begin = time.perf_counter()
                call()
                if turn:  # the first turn warms up
                    seconds[point].append(time.perf_counter() - begin)
    return {point: args.batch * point[0] / statistics.median(times) for point, times in seconds.items()}


def predictions(results: list[Result]) -> Table:
    """Predictions for the middle of the grid by Auto-PruMUX, fitted without it, beside the measurements."""
    inner = {item.point for item in results if item.point not in corners(results)}
    table = Table(title="Auto-PruMUX, fitted to the other points")
    for column in ("N, s", "accuracy", "predicted", "inputs / s", "predicted", ""):
        table.add_column(column, justify="right" if column else "left")
    known = {item.point: (item.accuracy, item.throughput) for item in results if item.point not in inner}
    auto = AutoPruMUX.fit(known)
    for item in results:
        if item.point in inner:
            level, speed = auto.accuracy(*item.point), auto.throughput(*item.point)
            table.add_row(
                f"{item.members}, {item.sparsity:g}", f"{item.accuracy:.1f}", f"{level.value:.1f}",
                f"{item.throughput:.0f}", f"{speed.value:.0f}", "extrapolated" if level.extrapolated else "",
            )  # fmt: skip
    return table


def corners(results: list[Result]) -> set[Point]:
    """The points for fitting: the smallest and largest s at the two smallest N and at the largest."""
    members = sorted({item.members for item in results})
    sparsities = sorted({item.sparsity for item in results})
    ends, edges = {members[0], members[-1], *members[:2]}, {sparsities[0], sparsities[-1]}
    return {item.point for item in results if item.members in ends and item.sparsity in edges}


def choices(results: list[Result]) -> Table:
    """The fastest measured point of each kind within a loss budget, to compare PruMUX with each part alone."""
    plain = next((item for item in results if item.point == (1, 0.0)), results[0])
    kinds: dict[str, Callable[[Result], bool]] = {
        "pruned": lambda item: item.members == 1,
        "multiplexed": lambda item: item.sparsity == 0,
        "PruMUX": lambda item: True,
    }
    table = Table(title="fastest within a loss budget, throughput over the plain model's")
    for column in ("points lost", *kinds):
        table.add_column(column, justify="right")
    for budget in (1, 2, 4, 6, 8, 10, 15, 20):
        row = []
        for allowed in kinds.values():
            eligible = [item for item in results if allowed(item) and item.accuracy >= plain.accuracy - budget]
            best = max(eligible, key=lambda item: item.throughput)
            row.append(f"{best.throughput / plain.throughput:.2f} (N={best.members}, s={best.sparsity:g})")
        table.add_row(f"{budget}", *row)
    return table


def result_table(results: list[Result]) -> Table:
    table = Table(
        title=f"{torch.get_num_threads()} threads, torch {torch.__version__}, fxsparse {fxsparse.__version__}"
    )
    for column in ("N", "s", "accuracy %", "inputs / s", "over plain", "parameters"):
        table.add_column(column, justify="right")
    for item in results:
        table.add_row(
            str(item.members), f"{item.sparsity:g}", f"{item.accuracy:.1f}", f"{item.throughput:.0f}",
            f"{item.throughput / results[0].throughput:.2f}", f"{item.parameters:,}",
        )  # fmt: skip
    return table


def write_csv(results: list[Result], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("N", "s", "accuracy", "throughput", "parameters"))
        writer.writerows(
            (item.members, item.sparsity, item.accuracy, item.throughput, item.parameters) for item in results
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, nargs="+", default=[1, 2, 5, 10])
    parser.add_argument(
        "--sparsities", type=float, nargs="+", default=[0.0, 0.6, 0.8], help="pruned shares of the core"
    )
    parser.add_argument("--first-steps", type=int, default=600, help="steps of the model from which all others start")
    parser.add_argument("--mux-steps", type=int, default=1200)
    parser.add_argument("--prune-steps", type=int, default=500)
    parser.add_argument("--tune-steps", type=int, default=150, help="after pruning, on the smaller model")
    parser.add_argument("--scale", type=float, default=1.0, help="factor for all numbers of steps")
    parser.add_argument(
        "--warmup", type=float, default=0.0, help="fraction of the multiplexed steps that train retrieval only"
    )
    parser.add_argument("--demux", default="mlp", choices=("keys", "mlp", "prefix"), help="see Multiplex")
    parser.add_argument("--train-batch", type=int, default=16, help="groups in a training step")
    parser.add_argument("--batch", type=int, default=128, help="groups in a batch for measuring throughput")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--classes", type=int, default=8)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="train and measure through torch.compile")
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    for name in ("first_steps", "mux_steps", "prune_steps", "tune_steps"):
        setattr(args, name, max(1, round(getattr(args, name) * args.scale)))
    args.members, args.sparsities = sorted({1, *args.members}), sorted({0.0, *args.sparsities})
    return args


def pruned(teacher: GraphModule, data: Snippets, point: Point, args: argparse.Namespace) -> GraphModule:
    """The model of this N without a share s of its core, with the whole model as its teacher."""
    members, sparsity = point
    gm = fxsparse.rewrite(copy.deepcopy(teacher), [f"gates{{target={sparsity}}}", DistillLayers(teacher)])
    train(gm, data, members, args.prune_steps, args, gated=True)
    small = fxsparse.rewrite(gm, "end-distill,materialize")
    train(small, data, members, args.tune_steps, args)
    return small


def main() -> None:
    args = parse_args()
    console = Console(width=None if sys.stdout.isatty() else 110)
    transformers.logging.set_verbosity_error()
    data = read_snippets(classes=args.classes, length=args.length, seed=args.seed)
    console.print(f"{len(data.train)} snippets to train on, {len(data.test)} to test on: {', '.join(data.classes)}")
    torch.manual_seed(args.seed)
    config = transformers.BertConfig(
        vocab_size=data.vocabulary, hidden_size=args.hidden, intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers, num_attention_heads=4, max_position_embeddings=args.length,
        num_labels=args.classes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    ids, labels = data.train.batch(2 * max(args.members), torch.Generator().manual_seed(args.seed))
    first = fxsparse.trace(model, kwargs={"input_ids": ids, "labels": labels})
    train(first, data, 1, args.first_steps, args)
    models: dict[Point, GraphModule] = {}
    levels: dict[Point, float] = {}
    for members in args.members:
        models[members, 0.0] = multiplexed(first, data, members, args)
        for sparsity in args.sparsities:
            point = (members, sparsity)
            if sparsity:
                models[point] = pruned(models[members, 0.0], data, point, args)
            levels[point] = accuracy(models[point], data)
            console.print(f"N={members}, s={sparsity:g}: {levels[point]:.1f} %")
    speeds = throughputs(models, data, args)
    results = [
        Result(*point, levels[point], speeds[point], sum(p.numel() for p in models[point].parameters()))
        for point in models
    ]
    for table in (result_table(results), choices(results), predictions(results)):
        console.print(table)
    write_csv(results, args.out / "prumux_classify.csv")
    AutoPruMUX.fit(args.out / "prumux_classify.csv").plot(args.out / "prumux_classify.png", title="PruMUX")
    console.print(f"measurements: {args.out / 'prumux_classify.csv'}, plot: {args.out / 'prumux_classify.png'}")


if __name__ == "__main__":
    main()
