"""Fine-tunes a small OPT on real text within a budget of FLOPs (GreenTrainer), and compares with other cheap ways.

    python examples/finetune_greentrainer.py                   # two packages of the standard library; a few minutes
    python examples/finetune_greentrainer.py --data my.txt     # fine-tune on your own text
    python examples/finetune_greentrainer.py --compiler inductor --hidden 512     # step times of compiled code

An OPT on bytes is pretrained on one package's source and then fine-tuned on another's. The runs train:

* every tensor;
* the tensors that ``select-tensors`` chooses at the start of each epoch, at rho = 0.4, 0.5 and 0.7;
* the last two layers;
* the embedding and the head (FT-Top2 in GreenTrainer's comparison);
* the biases (BitFit);
* LoRA branches on queries and values.

All runs start from the same weights, see the same batches and take their steps in turn, so that step times can be
compared on a busy machine. The results are a table and two plots, written to ``--out``: of the loss against FLOPs with
the chosen tensors, and of the backward pass of the last choice at rho = 0.5.
"""

from __future__ import annotations

import argparse
import copy
import re
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from corpus import random_windows, read_corpus
from pretraining import pretrain, progress_bar
from rich.console import Console
from rich.table import Table
from torch.fx import GraphModule

import fxsparse
from fxsparse.passes import AddLowRankBranches, Pass, SelectTensors

RHO = (0.4, 0.5, 0.7)


@dataclass
class Run:
    """One way of fine-tuning, with its losses, step times, FLOPs and chosen tensors."""

    name: str
    model: GraphModule
    compiled: Callable[..., object]
    optimizer: torch.optim.Optimizer
    schedule: fxsparse.Schedule
    rho: float | None
    step_flops: int = 0
    flops: int = 0
    validation: list[tuple[int, float]] = field(default_factory=list)  # (FLOPs so far, loss)
    seconds: list[float] = field(default_factory=list)  # of steps that compiled nothing
    chosen: list[set[str]] = field(default_factory=list)


def ways(args: argparse.Namespace) -> dict[str, tuple[list[Pass], float, float | None]]:
    """Passes, learning rate and rho of each way; ways with few parameters take larger steps."""
    branches = AddLowRankBranches(rank=args.rank, start=0.0, layers=("*.q_proj", "*.v_proj"))
    return {
        "full": ([], args.lr, None),
        **{f"rho {rho:g}": ([SelectTensors(rho=rho, times=args.epochs)], args.lr, rho) for rho in RHO},
        "last two layers": ([SelectTensors(last_layers=2)], args.lr, None),
        "embedding, head": ([SelectTensors(embeddings_and_head=True)], args.lr, None),
        "BitFit": ([SelectTensors(tensors="*bias")], 5 * args.lr, None),
        f"LoRA, rank {args.rank}": ([branches, SelectTensors(tensors=("*_down", "*_up"))], 5 * args.lr, None),
    }


def start(
    name: str,
    way: tuple[list[Pass], float, float | None],
    model: torch.nn.Module,
    batch: torch.Tensor,
    args: argparse.Namespace,
) -> Run:
    """A run before its first step."""
    passes, lr, rho = way
    gm = fxsparse.rewrite(copy.deepcopy(model), passes, kwargs={"input_ids": batch, "labels": batch})
    optimizer = torch.optim.AdamW(gm.parameters(), lr=lr, weight_decay=0.01)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=args.epochs * args.epoch_steps)
    compiled = torch.compile(gm, backend="fxsparse", options={"compiler": args.compiler})
    return Run(name, gm, compiled, optimizer, schedule, rho, step_flops=fxsparse.count_flops(gm).step)


def choose(run: Run, graph: fxsparse.BackpropGraph, batch: dict[str, torch.Tensor]) -> None:
    """Shows the schedule the first batch of an epoch, and counts the FLOPs of measuring importances."""
    if run.rho is None:
        return
    run.schedule.observe(batch)
    budget = graph.budget(run.rho)
    measured = [name for name in graph.trainable if graph.cost([name]) <= budget]
    run.flops += 2 * (graph.forward() + graph.cost(measured))
    run.step_flops = fxsparse.count_flops(run.model).step
    run.chosen.append({name for name, parameter in run.model.named_parameters() if parameter.requires_grad})


def train_step(run: Run, batch: dict[str, torch.Tensor], *, compiles: bool) -> None:
    begin = time.perf_counter()
    loss = run.compiled(**batch).loss
    loss.backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.schedule.step()
    loss.item()
    run.flops += run.step_flops
    if not compiles:
        run.seconds.append(time.perf_counter() - begin)


@torch.no_grad()
def validate(run: Run, batches: list[torch.Tensor]) -> None:
    run.model.eval()
    loss = statistics.fmean(run.model(input_ids=batch, labels=batch).loss.item() for batch in batches)
    run.model.train()
    run.validation.append((run.flops, loss))


def result_table(runs: list[Run], args: argparse.Namespace) -> Table:
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    table = Table(title=f"{device}, torch {torch.__version__}, fxsparse {fxsparse.__version__}, {args.compiler}")
    for column in ("", "validation loss", "FLOPs / full", "step FLOPs / full", "step time / full", "trained"):
        table.add_column(column, justify="left" if not column else "right")
    full = runs[0]
    for run in runs:
        ratios = [mine / its for mine, its in zip(run.seconds, full.seconds, strict=True)]
        trained = [p for p in run.model.parameters() if p.requires_grad]
        table.add_row(
            run.name,
            f"{run.validation[0][1]:.3f} -> {run.validation[-1][1]:.3f}",
            f"{run.flops / full.flops:.3f}",
            f"{run.step_flops / full.step_flops:.3f}",
            f"{statistics.median(ratios):.2f}",
            f"{len(trained)} tensors, {sum(p.numel() for p in trained):,}",
        )
    return table


def from_the_input(graph: fxsparse.BackpropGraph) -> list[str]:
    """The tensors in the order of their first use in the forward pass."""
    place = {node: position for position, node in enumerate(reversed(list(graph.networkx)))}
    return sorted(graph.trainable, key=lambda name: min(place[user] for user in graph.networkx.predecessors(name)))


def plot(runs: list[Run], names: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, choices) = plt.subplots(1, 2, figsize=(13, 6), layout="constrained")
    for run in runs:
        flops, losses = zip(*run.validation, strict=True)
        curves.plot([count / 1e12 for count in flops], losses, marker="o", markersize=3, label=run.name)
    curves.set(xlabel="TFLOPs, choosing included", ylabel="validation loss (nats per byte)", title="loss against FLOPs")
    curves.grid(alpha=0.3)
    curves.legend()

    chosen = [(run, epoch, names_) for run in runs for epoch, names_ in enumerate(run.chosen, 1)]
    picture = [[name in tensors for _, _, tensors in chosen] for name in names]
    choices.imshow(picture, aspect="auto", cmap="Greens", vmin=0, vmax=1.3, interpolation="none")
    choices.set_xticks(range(len(chosen)), [f"{epoch}" for _, epoch, _ in chosen])
    epochs = len(runs[1].chosen)
    for place, run in enumerate(run for run in runs if run.chosen):
        choices.axvline(place * epochs - 0.5, color="black", linewidth=0.8)
        choices.text((place + 0.5) * epochs - 0.5, -1.5, run.name, ha="center")
    blocks = [re.sub(r"(layers\.\d+|[^.]+)\..*", r"\1", name.removeprefix("model.decoder.")) for name in names]
    firsts = [place for place, block in enumerate(blocks) if place == 0 or blocks[place - 1] != block]
    firsts = [
        place for place, following in zip(firsts, [*firsts[1:], len(names) + 3], strict=True) if following - place > 2
    ]
    choices.set_yticks(firsts, [blocks[place] for place in firsts], fontsize=7)
    choices.set(xlabel="epoch")
    choices.set_title("trained tensors, input at the top", pad=20)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def parse_args() -> argparse.Namespace:
    library = Path(sysconfig.get_paths()["stdlib"])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrain-data", default=str(library / "email"), help="a text file or folder")
    parser.add_argument("--data", default=str(library / "asyncio"), help="a text file or folder to fine-tune on")
    parser.add_argument("--pretrain-steps", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--epoch-steps", type=int, default=25, help="optimizer steps in an epoch")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens in a window")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--rank", type=int, default=8, help="rank of LoRA")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compiler",
        default="inductor" if torch.cuda.is_available() else "aot_eager",
        choices=("inductor", "aot_eager", "eager"),
        help="compiler of the graphs; every new choice of tensors is compiled, which Inductor does slowly on a CPU",
    )
    parser.add_argument("--out", type=Path, default=Path("out"))
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    console = Console(width=None if sys.stdout.isatty() else 110)
    transformers.logging.set_verbosity_error()
    torch._dynamo.config.cache_size_limit = max(64, args.epochs * 8)  # one code object has a graph for every choice
    torch.manual_seed(args.seed)
    config = transformers.OPTConfig(
        vocab_size=256, hidden_size=args.hidden, word_embed_proj_dim=args.hidden, ffn_dim=4 * args.hidden,
        num_hidden_layers=args.layers, num_attention_heads=args.heads, max_position_embeddings=args.length,
        dropout=0.0, attention_dropout=0.0, layerdrop=0.0, use_cache=False, pad_token_id=None, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config).to(args.device)
    draw = torch.Generator().manual_seed(args.seed)
    pretrain(model, read_corpus(args.pretrain_data, seed=args.seed).train, args, draw, console)

    corpus = read_corpus(args.data, seed=args.seed, validation=0.1)
    console.print(f"{len(corpus.train):,} bytes to fine-tune on, {len(corpus.validation):,} to validate on")
    held_out = [random_windows(corpus.validation, 16, args.length, draw).to(args.device) for _ in range(8)]
    example = random_windows(corpus.train, args.batch, args.length, draw).to(args.device)
    runs = [start(name, way, model, example, args) for name, way in ways(args).items()]
    graph = fxsparse.BackpropGraph(runs[0].model)
    for run in runs:
        validate(run, held_out)
    with progress_bar(console) as progress:
        task = progress.add_task("fine-tuning", total=args.epochs * args.epoch_steps)
        for step in range(args.epochs * args.epoch_steps):
            ids = random_windows(corpus.train, args.batch, args.length, draw).to(args.device)
            batch = {"input_ids": ids, "labels": ids}
            for run in runs:
                if step % args.epoch_steps == 0:
                    choose(run, graph, batch)
                train_step(run, batch, compiles=step % args.epoch_steps == 0)
                if (step + 1) % max(1, args.epoch_steps // 2) == 0:
                    validate(run, held_out)
            progress.update(task, advance=1, description=f"fine-tuning, loss {runs[0].validation[-1][1]:.2f}")
    for run in runs:
        validate(run, held_out)
    console.print(result_table(runs, args))
    plot(runs, from_the_input(graph), args.out / "finetune_greentrainer.png")
    console.print(f"plot: {args.out / 'finetune_greentrainer.png'}")
    run = next(run for run in runs if run.rho == 0.5)
    console.print(f"plot: {graph.plot(args.out / 'backward_pass.png', run.chosen[-1])}")


if __name__ == "__main__":
    main()
