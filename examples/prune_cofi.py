"""CoFi on a task that needs no download: which package of the standard library does a snippet of code come from?

    python examples/prune_cofi.py                                   # 60, 80 and 95 %; a few minutes on two CPU cores
    python examples/prune_cofi.py --sparsities 0.6 --scale 0.1      # a quick look

1. A BERT from a Hugging Face configuration is trained on the task. It is the teacher.
2. For every sparsity, a copy learns which heads, channels and sublayers to close (CoFi, arXiv 2204.00408). Its loss
   compares its hidden states and logits with the teacher's.
3. The closed parts are cut out, and the smaller model is tuned on the labels.

The results are a table (accuracy, parameters, measured speed-up of a forward pass), and under ``--out`` a plot and the
smallest model as a checkpoint. As in the paper, sparsity counts the weights and biases of attentions and MLPs;
embeddings and the classifier are not pruned.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from snippets import Snippets, Split, read_snippets
from torch.fx import GraphModule

import fxsparse
from fxsparse.passes import DistillLayers, GateStructures, Materialize
from fxsparse.passes.structured.hard_concrete import expected_sparsity, sparsity_loss


@dataclass
class Result:
    """A model and its measurements.

    Attributes:
        accuracy: percent of the held-out snippets that are classified correctly.
        closed: accuracy with closed gates, before cutting and tuning.
        sparsities: (step, target, expected sparsity) during the training of the gates.
        seconds: of each measured forward pass.
    """

    name: str
    model: GraphModule
    accuracy: float
    closed: float | None = None
    sparsities: list[tuple[int, float, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def core(self) -> int:
        """Parameters of the encoder's layers without norms, counted from the tensors."""
        return sum(
            parameter.numel()
            for name, parameter in self.model.named_parameters()
            if ".layer." in name and "LayerNorm" not in name
        )

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def speedup(self, whole: Result) -> float:
        """Speed-up of a forward pass over the whole model: the median of the ratios turn by turn."""
        return statistics.median(its / mine for its, mine in zip(whole.seconds, self.seconds, strict=True))


def train(
    gm: GraphModule, data: Split, steps: int, lr: float, args: argparse.Namespace, *, gated: bool = False
) -> Iterator[int]:
    """Trains with a linear warm-up over a tenth of the steps and a linear decay; yields after every step."""
    optimizer = torch.optim.AdamW(gm.parameters(), lr=lr, weight_decay=0.01)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=steps)
    warmup = max(1, steps // 10)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    generator = torch.Generator().manual_seed(args.seed)
    call = torch.compile(gm, backend="fxsparse", options={"compiler": args.compiler})
    gm.train()
    for step in range(1, steps + 1):
        ids, labels = data.batch(args.batch, generator)
        loss = call(input_ids=ids, labels=labels).loss
        if gated:
            loss = loss + sparsity_loss(gm)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        decay.step()
        yield step
    schedule.remove()


@torch.no_grad()
def accuracy(gm: GraphModule, data: Split) -> float:
    """Percent of the snippets that are classified correctly."""
    gm.eval()
    right = sum(int((gm(input_ids=ids, labels=y).logits.argmax(-1) == y).sum()) for ids, y in data.batches(250))
    return 100 * right / len(data)


def pruned(
    teacher: GraphModule, sparsity: float, data: Snippets, tick: Callable[[str], None], args: argparse.Namespace
) -> Result:
    """A copy of the teacher without a share of its core."""
    passes = [GateStructures(args.units, target=sparsity, warmup=args.warmup), DistillLayers(teacher)]
    gm = fxsparse.rewrite(copy.deepcopy(teacher), passes)
    sparsities = []
    for step in train(gm, data.train, args.prune_steps, args.lr, args, gated=True):
        with torch.no_grad():
            sparsities.append((step, float(gm.get_buffer("sparsity.target")), float(expected_sparsity(gm))))
        tick(f"{sparsity:.0%}: expected {sparsities[-1][2]:.2f}")
    closed = accuracy(gm, data.test)
    small = fxsparse.rewrite(gm, [Materialize()])
    for _ in train(small, data.train, args.tune_steps, args.tune_lr, args):
        tick(f"{sparsity:.0%}: tuning")
    return Result(f"{sparsity:.0%}", small, accuracy(small, data.test), closed, sparsities)


@torch.no_grad()
def measure(results: list[Result], data: Snippets, args: argparse.Namespace) -> None:
    """Times forward passes; the models take turns, so that a busy machine slows all of them."""
    ids, labels = data.test.batch(args.measure_batch, torch.Generator().manual_seed(args.seed))
    calls = []
    for result in results:
        result.model.eval()
        calls.append(torch.compile(result.model, backend="fxsparse", options={"compiler": args.compiler}))
    for turn in range(args.rounds + 2):
        for result, call in zip(results, calls, strict=True):
            begin = time.perf_counter()
            call(input_ids=ids, labels=labels)
            if turn >= 2:  # the first turns compile and warm up
                result.seconds.append(time.perf_counter() - begin)


def result_table(results: list[Result]) -> Table:
    title = f"{torch.get_num_threads()} threads, torch {torch.__version__}, fxsparse {fxsparse.__version__}"
    table = Table(title=title)
    for column in ("sparsity", "reached", "accuracy %", "before tuning", "parameters", "core", "speed-up", "by FLOPs"):
        table.add_column(column, justify="right")
    whole = results[0]
    flops = [fxsparse.count_flops(result.model).forward for result in results]
    for result, count in zip(results, flops, strict=True):
        table.add_row(
            result.name,
            f"{1 - result.core / whole.core:.1%}",
            f"{result.accuracy:.1f}",
            "" if result.closed is None else f"{result.closed:.1f}",
            f"{result.parameters:,}",
            f"{result.core:,}",
            f"{result.speedup(whole):.2f}",
            f"{flops[0] / count:.2f}",
        )
    return table


def plot(results: list[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for position, result in enumerate(results[1:]):
        steps, targets, expected = zip(*result.sparsities, strict=True)
        left.plot(steps, expected, color=f"C{position}", label=f"{result.name}, expected")
        left.plot(steps, targets, color=f"C{position}", linestyle="--", linewidth=1)
    left.set(xlabel="step", ylabel="sparsity", title="expected sparsity and its target (dashed)", ylim=(0, 1))
    left.legend()
    whole, *smaller = results
    right.axhline(whole.accuracy, color="grey", linestyle="--", linewidth=1, label="whole model")
    right.plot([result.speedup(whole) for result in smaller], [result.accuracy for result in smaller], marker="o")
    for result in smaller:
        place = (result.speedup(whole), result.accuracy)
        right.annotate(result.name, place, textcoords="offset points", xytext=(0, -16), ha="center")
    accuracies = [result.accuracy for result in results]
    right.set_ylim(min(accuracies) - 3, max(accuracies) + 3)  # differences below a point are noise
    right.set(xlabel="speed-up of a forward pass", ylabel="accuracy %", title="accuracy of the smaller models")
    right.margins(x=0.15)
    right.legend(loc="lower left")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.6, 0.8, 0.95])
    parser.add_argument(
        "--units", nargs="+", default=["heads", "attention", "intermediate", "ffn"], help="also: hidden"
    )
    parser.add_argument("--teacher-steps", type=int, default=600)
    parser.add_argument("--prune-steps", type=int, default=800)
    parser.add_argument("--tune-steps", type=int, default=200, help="after pruning, on the smaller model")
    parser.add_argument("--scale", type=float, default=1.0, help="factor for all numbers of steps")
    parser.add_argument(
        "--warmup", type=float, default=0.4, help="share of the pruning steps over which the target rises"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--measure-batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--classes", type=int, default=8)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--tune-lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compiler", default="inductor", choices=("inductor", "aot_eager", "eager"))
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    for name in ("teacher_steps", "prune_steps", "tune_steps"):
        setattr(args, name, max(1, round(getattr(args, name) * args.scale)))
    return args


def main() -> None:
    args = parse_args()
    console = Console(width=None if sys.stdout.isatty() else 110)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    data = read_snippets(classes=args.classes, length=args.length, seed=args.seed)
    console.print(f"{len(data.train)} snippets to train on, {len(data.test)} to test on: {', '.join(data.classes)}")
    torch.manual_seed(args.seed)
    config = transformers.BertConfig(
        vocab_size=data.vocabulary, hidden_size=args.hidden, intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers, num_attention_heads=4, max_position_embeddings=args.length,
        num_labels=args.classes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    ids, labels = data.train.batch(args.batch, torch.Generator().manual_seed(args.seed))
    teacher = fxsparse.trace(model, kwargs={"input_ids": ids, "labels": labels})
    steps = args.teacher_steps + len(args.sparsities) * (args.prune_steps + args.tune_steps)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("teacher", total=steps)

        def tick(description: str) -> None:
            progress.update(task, advance=1, description=description)

        for _ in train(teacher, data.train, args.teacher_steps, args.lr, args):
            tick("teacher")
        results = [Result("whole", teacher, accuracy(teacher, data.test))]
        for sparsity in args.sparsities:
            results.append(pruned(teacher, sparsity, data, tick, args))
    console.print(fxsparse.explain(results[-1].model), highlight=False, markup=False, soft_wrap=True)
    measure(results, data, args)
    console.print(result_table(results))
    plot(results, args.out / "prune_cofi.png")
    console.print(f"sparsities and accuracies: {args.out / 'prune_cofi.png'}")
    folder = args.out / "pruned"
    written = fxsparse.save_pretrained(results[-1].model, model, folder)
    console.print(f'{written.num_parameters():,} parameters as a checkpoint: fxsparse.from_pretrained("{folder}")')


if __name__ == "__main__":
    main()
