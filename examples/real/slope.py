"""SLoPe: a GPT pretrained from scratch on real reviews, beside other ways to a 2:4 model.

    python -m examples.real.slope            # three seeds, 1,000 steps each
    python -m examples.real.slope --quick    # one seed, 100 steps

A GPT of 4 layers with rotary positions (GPT-NeoX) learns IMDB reviews byte by byte in seven ways, from the same weights
and on the same batches:

* dense, and the same model pruned to 2:4 afterwards by Wanda, without a further step;
* SLoPe: 2:4 masks of the first weights, the backward pass pruned once more;
* SLoPe with low-rank branches in the last 1 % of the steps (the paper's) and in their second half;
* Extended SR-STE, which chooses its masks anew in every step;
* FST, whose masks are 2:4 along both dimensions and which trains dense in the last sixth: it ends dense.

Perplexity is that of a byte. Bytes are those of the tensors; step times are of steps taken in turn.
"""

from __future__ import annotations

import argparse
import math
import statistics
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.fx import GraphModule

import fxsparse
from examples.corpus import random_windows
from fxsparse.passes import AddLowRankBranches, DoublePruneBackward, InsertNMMasks, Pass

from . import harness
from .harness import Cell, Results, markdown, spread
from .reviews import read_text

BATCH, LENGTH = 16, 128


def ways() -> dict[str, list[Pass]]:
    slope = [InsertNMMasks("2:4"), DoublePruneBackward(every=20)]
    return {
        "dense": [],
        "SLoPe": slope,
        "SLoPe, branches in the last 1 %": [*slope, AddLowRankBranches(ratio=1 / 16, start=0.99)],
        "SLoPe, branches in the second half": [*slope, AddLowRankBranches(ratio=1 / 16, start=0.5)],
        "Extended SR-STE": [InsertNMMasks("2:4", storage="masked", dynamic=True)],
        "FST (ends dense)": [InsertNMMasks("2:4", storage="masked", dynamic=True, transposable=True, dense_after=0.83)],
    }


def build(seed: int, args: argparse.Namespace) -> Any:
    torch.manual_seed(seed)
    config = transformers.GPTNeoXConfig(
        vocab_size=256, max_position_embeddings=LENGTH, hidden_size=args.hidden, intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers, num_attention_heads=4, rotary_pct=1.0, use_parallel_residual=False,
        bos_token_id=None, eos_token_id=None, use_cache=False,
    )  # fmt: skip
    return transformers.GPTNeoXForCausalLM(config)


def rewritten(passes: list[Pass], model: nn.Module, train: Tensor) -> GraphModule:
    ids = random_windows(train, BATCH, LENGTH, torch.Generator().manual_seed(0))
    return fxsparse.rewrite(model, passes, kwargs={"input_ids": ids, "labels": ids})


def optimizer_of(gm: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(gm.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def pretrain(gm: GraphModule, train: Tensor, dev: Tensor, seed: int, args: argparse.Namespace) -> Cell:
    """Trains with a warm-up of a twentieth of the steps and a cosine to a tenth."""
    optimizer = optimizer_of(gm)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=args.steps)
    warmup = max(1, args.steps // 20)

    def rate(step: int) -> float:
        done = (step - warmup) / max(1, args.steps - warmup)
        return (step + 1) / warmup if step < warmup else 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    draw = torch.Generator().manual_seed(seed)
    call = torch.compile(gm, backend="fxsparse", options={"compiler": args.compiler})
    losses = []
    for step in range(args.steps):
        ids = random_windows(train, BATCH, LENGTH, draw)
        loss = call(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        decay.step()
        if (step + 1) % max(1, args.steps // 10) == 0:
            losses.append((step + 1, perplexity(gm, dev, args)))
    state = [item for entry in optimizer.state.values() for item in entry.values() if isinstance(item, Tensor)]
    return {
        "perplexity": losses[-1][1],
        "curve": losses,
        "weight_bytes": sum(t.nbytes for t in {id(t): t for t in (*gm.parameters(), *gm.buffers())}.values()),
        "optimizer_bytes": sum(tensor.nbytes for tensor in state),
        "zeros": zeros(gm),
    }


def zeros(gm: GraphModule) -> float:
    """The share of zeros in the matrices of the blocks, as the dense checkpoint has them."""
    matrices = [
        value for name, value in fxsparse.dense_state_dict(gm).items() if ".layers." in name and value.dim() == 2
    ]
    return sum(int((value == 0).sum()) for value in matrices) / sum(value.numel() for value in matrices)


@torch.no_grad()
def perplexity(model: nn.Module, dev: Tensor, args: argparse.Namespace) -> float:
    """Of a byte, on windows of the held-out reviews that are the same for every way."""
    draw = torch.Generator().manual_seed(1)
    was_training = model.training
    model.eval()
    losses = []
    for _ in range(args.windows):
        ids = random_windows(dev, 16, LENGTH, draw)
        losses.append(model(input_ids=ids, labels=ids).loss.item())
    model.train(was_training)
    return math.exp(statistics.fmean(losses))


def one_way(passes: list[Pass], train: Tensor, dev: Tensor, seed: int, args: argparse.Namespace) -> Cell:
    """Pretrains in one way; of a dense model Wanda's 2:4 as well, and whatever it is, in its own class again."""
    model = build(seed, args)
    gm = rewritten(passes, model, train)
    cell = pretrain(gm, train, dev, seed, args)
    if not any(isinstance(item, AddLowRankBranches) for item in passes):
        plain = build(seed, args)
        plain.load_state_dict(fxsparse.dense_state_dict(gm))
        cell["in_its_class"] = perplexity(plain, dev, args)
    if not passes:
        draw = torch.Generator().manual_seed(2)
        batches = [random_windows(train, 16, LENGTH, draw) for _ in range(8)]
        calibration = [{"input_ids": ids, "labels": ids} for ids in batches]
        pruned = rewritten([InsertNMMasks("2:4", criterion="wanda", calibration=calibration)], plain, train)
        cell["wanda"], cell["wanda_zeros"] = perplexity(pruned, dev, args), zeros(pruned)
    return cell


def step_times(train: Tensor, args: argparse.Namespace) -> Cell:
    """Time of a step over the dense one's, in turn; branches are there from the first step on."""
    ids = random_windows(train, BATCH, LENGTH, torch.Generator().manual_seed(0))
    calls = {}
    for name, passes in ways().items():
        if "1 %" in name:
            continue
        passes = [
            AddLowRankBranches(ratio=1 / 16, start=0.0) if isinstance(p, AddLowRankBranches) else p for p in passes
        ]
        gm = rewritten(passes, build(0, args), train)
        optimizer = optimizer_of(gm)
        schedule = fxsparse.Schedule(gm, optimizer, total_steps=1000)
        call = torch.compile(gm, backend="fxsparse", options={"compiler": args.compiler})

        def step(call: Any = call, optimizer: Any = optimizer, schedule: Any = schedule) -> None:
            call(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

        calls[name] = step
    seconds = harness.in_turn(calls, args.rounds, warmup=3)
    return {name: harness.ratio(taken, seconds["dense"]) for name, taken in seconds.items()}


def tables(results: Results, seeds: list[int]) -> str:
    times = results.cells["step times"]
    cells = {name: [results.cells[f"{name}, seed {seed}"] for seed in seeds] for name in ways()}
    dense = cells["dense"][0]
    rows = []
    for name, of_seeds in cells.items():
        # One per cent of the steps is too short to be timed: before the branches start, it is a step of SLoPe.
        time = times["SLoPe" if "last 1 %" in name else name]
        rows.append(
            (
                name,
                spread([cell["perplexity"] for cell in of_seeds], 2),
                spread([cell["in_its_class"] for cell in of_seeds], 2) if "in_its_class" in of_seeds[0] else "",
                f"{of_seeds[0]['zeros']:.2f}",
                f"{time:.2f}" + (" with branches" if "half" in name else ""),
                f"{of_seeds[0]['weight_bytes'] / dense['weight_bytes']:.2f}",
                f"{of_seeds[0]['optimizer_bytes'] / dense['optimizer_bytes']:.2f}",
            )
        )
    wanda = spread([cell["wanda"] for cell in cells["dense"]], 2)
    rows.insert(1, ("dense, then Wanda", wanda, "", f"{dense['wanda_zeros']:.2f}", "", "", ""))
    head = (
        "",
        "perplexity of a byte",
        "in its class",
        "zeros in the blocks",
        "step time / dense",
        "weights",
        "optimizer",
    )
    return markdown(head, rows)


def plot(results: Results, seeds: list[int]) -> None:
    figure, (left, right) = harness.figure(1, 2, (11, 4.5))
    dense = [results.cells[f"dense, seed {seed}"]["curve"] for seed in seeds]
    for position, name in enumerate(ways()):
        curves = [results.cells[f"{name}, seed {seed}"]["curve"] for seed in seeds]
        steps = [step for step, _ in curves[0]]
        values = [[value for _, value in curve] for curve in curves]
        above = [
            [mine[1] - its[1] for mine, its in zip(*pair, strict=True)] for pair in zip(curves, dense, strict=True)
        ]
        for axes, lines in ((left, values), (right, above)):
            at_steps = list(zip(*lines, strict=True))
            means = [statistics.fmean(of_seeds) for of_seeds in at_steps]
            axes.plot(steps, means, marker="o", markersize=3, color=f"C{position}", label=name)
            axes.fill_between(
                steps, *zip(*((min(v), max(v)) for v in at_steps), strict=True), color=f"C{position}", alpha=0.15
            )
    wanda = [results.cells[f"dense, seed {seed}"]["wanda"] for seed in seeds]
    left.plot(steps[-1], statistics.fmean(wanda), "x", color="black", label="dense, then Wanda")
    left.set(ylabel="perplexity of a byte, held-out reviews", xlabel="step")
    right.set(ylabel="above the dense model of the same seed", xlabel="step")
    figure.suptitle(f"pretraining on {results.settings['text']}: mean and range of {len(seeds)} seeds", fontsize=10)
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(results.path.with_suffix(".svg"))


def main() -> None:
    options = harness.parser(__doc__)
    options.add_argument("--compiler", default="aot_eager", choices=("inductor", "aot_eager", "eager"))
    args = harness.parse(options)
    args.steps, args.hidden, args.layers, args.windows, args.rounds = 1000, 128, 4, 8, 9
    if args.quick:
        args.steps, args.windows, args.rounds = 100, 4, 3
    if args.tiny:
        args.steps, args.hidden, args.layers = 10, 32, 2
    text, train, dev = read_text(limit=400_000 if args.quick else 8_000_000)
    settings = {
        "text": text,
        "steps": args.steps,
        "hidden": args.hidden,
        "layers": args.layers,
        "batch": BATCH,
        "length": LENGTH,
    }
    results = Results("slope", args, settings)
    for seed in args.seeds:
        for name, passes in ways().items():
            results.cell(
                f"{name}, seed {seed}", lambda passes=passes, seed=seed: one_way(passes, train, dev, seed, args)
            )  # type: ignore[misc]
    results.cell("step times", lambda: step_times(train, args))
    results.finish(tables(results, args.seeds))
    plot(results, args.seeds)


if __name__ == "__main__":
    main()
