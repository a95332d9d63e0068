"""Pretrains a small GPT on real text four ways: dense, Extended SR-STE, SLoPe, and SLoPe with lazy low-rank branches.

    python examples/pretrain_slope.py                  # the standard library's source; two minutes on two CPU cores
    python examples/pretrain_slope.py --data my.txt    # your own text

The model is GPT-2 from a Hugging Face configuration, on bytes. All four runs start from the same weights, see the same
batches, run through ``torch.compile(..., backend="fxsparse")`` and take their steps in turn, so that their step times
can be compared on a busy machine. The results are a table and a plot of the loss curves, written to ``--out``.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from corpus import random_windows, read_corpus
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.fx import GraphModule

import fxsparse
from fxsparse.passes import AddLowRankBranches, DoublePruneBackward, InsertNMMasks, Pass


@dataclass
class Run:
    """One way of training, with its losses and step times."""

    name: str
    model: GraphModule
    compiled: Callable[..., object]
    optimizer: torch.optim.Optimizer
    schedule: fxsparse.Schedule
    warmup: torch.optim.lr_scheduler.LRScheduler
    losses: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def ways(args: argparse.Namespace) -> dict[str, list[Pass]]:
    masks = InsertNMMasks(args.pattern)
    slope = [masks, DoublePruneBackward(every=args.mask_every)]
    return {
        "dense": [],
        "Extended SR-STE": [InsertNMMasks(args.pattern, storage="masked", dynamic=True)],
        "SLoPe": slope,
        "SLoPe + lazy low-rank": [*slope, AddLowRankBranches(ratio=args.ratio, start=args.low_rank_start)],
    }


def start(name: str, passes: list[Pass], traced: GraphModule, args: argparse.Namespace) -> Run:
    """A run before its first step, on weights of its own."""
    gm = fxsparse.rewrite(traced, passes, copy=True)
    # A branch counts 1 / rank of its product, so at the weights' own rate it would hardly move in so few steps.
    branches = [p for n, p in gm.named_parameters() if n.endswith(("_down", "_up"))]
    rest = [p for n, p in gm.named_parameters() if not n.endswith(("_down", "_up"))]
    groups = [{"params": rest}] + [{"params": branches, "lr": args.lr * args.branch_lr}] * bool(branches)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, args.steps))
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=args.steps)
    compiled = torch.compile(gm, backend="fxsparse", options={"compiler": args.compiler})
    return Run(name, gm, compiled, optimizer, schedule, warmup)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine to a tenth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train_step(run: Run, batch: torch.Tensor) -> float:
    begin = time.perf_counter()
    loss = run.compiled(input_ids=batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.schedule.step()
    run.warmup.step()
    value = loss.item()
    run.seconds.append(time.perf_counter() - begin)
    return value


@torch.no_grad()
def validate(run: Run, batches: list[torch.Tensor]) -> float:
    run.model.eval()
    loss = statistics.fmean(run.model(input_ids=batch, labels=batch).loss.item() for batch in batches)
    run.model.train()
    return loss


def bytes_of(run: Run) -> tuple[int, int]:
    """Bytes of weights, masks and indices, and bytes of the optimizer's state, counted from the tensors."""
    tensors = {id(tensor): tensor for tensor in (*run.model.parameters(), *run.model.buffers())}
    weights = sum(tensor.nbytes for tensor in tensors.values())
    state = sum(
        item.nbytes
        for entry in run.optimizer.state.values()
        for item in entry.values()
        if isinstance(item, torch.Tensor)
    )
    return weights, state


def result_table(runs: list[Run], device: torch.device) -> Table:
    on_gpu = device.type == "cuda"
    table = Table(title=f"{device_name(device)}, torch {torch.__version__}, fxsparse {fxsparse.__version__}")
    for column in ("", "validation loss", "step time" if on_gpu else "step time / dense", "weights", "optimizer state"):
        table.add_column(column, justify="left" if not column else "right")
    dense = statistics.median(runs[0].seconds)
    dense_weights, dense_state = bytes_of(runs[0])
    for run in runs:
        median = statistics.median(run.seconds)
        step = f"{median * 1e3:.1f} ms ({median / dense:.2f})" if on_gpu else f"{median / dense:.2f}"
        weights, state = bytes_of(run)
        table.add_row(
            run.name,
            f"{run.validation[-1][1]:.4f}",
            step,
            f"{weights / 2**20:.2f} MiB ({weights / dense_weights:.2f})",
            f"{state / 2**20:.2f} MiB ({state / dense_state:.2f})",
        )
    return table


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def plot(runs: list[Run], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for position, run in enumerate(runs):
        steps, losses = zip(*smooth(run.losses), strict=True)
        axes.plot(steps, losses, color=f"C{position}", alpha=0.35, linewidth=1)
        steps, losses = zip(*run.validation, strict=True)
        # SLoPe with branches equals SLoPe until the branches start, so its line is dashed to show both.
        style = "--" if "lazy" in run.name else "-"
        axes.plot(steps, losses, color=f"C{position}", linestyle=style, marker="o", markersize=3, label=run.name)
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title="training loss (thin) and validation loss (dots)")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def smooth(points: list[tuple[int, float]], decay: float = 0.9) -> list[tuple[int, float]]:
    """An exponential moving average, corrected for the bias of its start at 0."""
    smoothed, total = [], 0.0
    for count, (step, loss) in enumerate(points, 1):
        total = decay * total + (1 - decay) * loss
        smoothed.append((step, total / (1 - decay**count)))
    return smoothed


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a text file or folder; default: the Python standard library's source")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens in a window")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--mask-every", type=int, default=20, help="steps between two column masks of SLoPe's backward")
    parser.add_argument("--ratio", type=float, default=1 / 16, help="rank of the branches over the hidden size")
    parser.add_argument(
        "--low-rank-start",
        type=float,
        default=0.6,
        help="fraction of the steps before the branches start; SLoPe's 0.99 leaves too few steps in so short a run",
    )
    parser.add_argument("--branch-lr", type=float, default=8.0, help="learning rate of the branches over the weights'")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compiler",
        choices=("inductor", "aot_eager", "eager"),
        help="inductor on a GPU; on a CPU aot_eager, because four models take Inductor minutes there",
    )
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    args.compiler = args.compiler or ("inductor" if args.device.startswith("cuda") else "aot_eager")
    return args


def main() -> None:
    args = parse_args()
    console = Console(width=None if sys.stdout.isatty() else 110)
    transformers.logging.set_verbosity_error()
    device = torch.device(args.device)
    corpus = read_corpus(args.data, seed=args.seed, limit=4_000_000)
    console.print(f"{len(corpus.train) / 1e6:.1f} MB to train on, {len(corpus.validation) / 1e6:.1f} MB to validate on")
    torch.manual_seed(args.seed)
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=args.length, n_embd=args.hidden, n_layer=args.layers, n_head=args.heads,
        bos_token_id=None, eos_token_id=None, use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).to(device)
    batches = torch.Generator().manual_seed(args.seed)
    held_out = torch.Generator().manual_seed(args.seed)
    validation = [random_windows(corpus.validation, 8, args.length, held_out).to(device) for _ in range(4)]
    example = random_windows(corpus.train, args.batch, args.length, batches).to(device)
    traced = fxsparse.trace(model, kwargs={"input_ids": example, "labels": example})
    runs = [start(name, passes, traced, args) for name, passes in ways(args).items()]
    console.print(fxsparse.explain(runs[-1].model), highlight=False, soft_wrap=True)

    every = max(1, args.steps // 10)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("compiling", total=args.steps)
        for step in range(1, args.steps + 1):
            batch = random_windows(corpus.train, args.batch, args.length, batches).to(device)
            for run in runs:
                run.losses.append((step, train_step(run, batch)))
                if step % (2 * every) == 0 or step in (1, args.steps):
                    run.validation.append((step, validate(run, validation)))
            losses = " ".join(f"{run.losses[-1][1]:.2f}" for run in runs)
            progress.update(task, advance=1, description=f"loss {losses}")
            if not sys.stdout.isatty() and (step % every == 0 or step == 1):  # where a bar shows nothing
                print(f"step {step} of {args.steps}, loss {losses}", flush=True)
    console.print(result_table(runs, device))
    plot(runs, args.out / "pretrain_slope.png")
    console.print(f"loss curves: {args.out / 'pretrain_slope.png'}")


if __name__ == "__main__":
    main()
