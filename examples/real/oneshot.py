"""SmolLM2 pruned to 2:4 at once, and trained on for a few steps: what is lost, and what comes back.

    python -m examples.real.oneshot            # 100 steps of recovery, with the speed of compiled models
    python -m examples.real.oneshot --quick    # ten steps, no compiling

A pretrained Llama of 135 M parameters is pruned by magnitude, Wanda and SparseGPT, with windows of IMDB reviews as
calibration. Wanda's is then trained on with the same reviews: as SLoPe does it (its values, the backward pass pruned
once more), or with low-rank branches alone, all else frozen. The dense model is trained on as well, because reviews are
news to it too. The perplexity is that of a token of held-out reviews. Every pruned model is written, read back by plain
transformers, and measured again.

The file has weights of 4 bits, so 15 % of the groups of four hold equal magnitudes, and magnitude's choice among them
is arbitrary.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn
from torch.fx import GraphModule

import fxsparse
from fxsparse.passes import AddLowRankBranches, DoublePruneBackward, InsertNMMasks, Pass, SelectTensors

from . import harness
from .classify import rate
from .harness import Cell, Results, markdown, spread
from .reviews import language_model, perplexity, token_windows

CRITERIA = ("magnitude", "wanda", "sparsegpt")
RECOVERY: dict[str, tuple[list[Pass], float]] = {
    "SLoPe": ([DoublePruneBackward(every=20)], 1e-4),
    "low-rank branches": (
        [AddLowRankBranches(rank=16, start=0.0), SelectTensors(tensors=("*_down", "*_up"))],
        3e-3,
    ),
}
"""Passes after Wanda's masks, and the learning rate."""


class Work:
    """The model, its trace, and the windows it is calibrated on, trained on and measured on."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.name, self.model, coded, _ = language_model()
        self.batch, length = 4, 32 if args.tiny else 64 if args.quick else 128
        self.steps = 2 if args.tiny else 10 if args.quick else 100
        count = max(32, self.steps * self.batch)
        self.text, self.windows, self.dev = token_windows(coded, count=count, length=length)
        self.dev = self.dev[: 4 if args.tiny else 16 if args.quick else 48]
        self.calibration = [self.rows(ids) for ids in self.windows[: 8 if args.quick else 32].split(self.batch)]
        self.settings: Cell = {
            "model": self.name, "text": self.text, "tokens of a window": length, "batch": self.batch,
            "steps": self.steps, "calibration windows": len(self.calibration) * self.batch,
            "held-out windows": len(self.dev),
        }  # fmt: skip
        self._traced: GraphModule | None = None

    @property
    def traced(self) -> GraphModule:
        if self._traced is None:
            self._traced = fxsparse.trace(self.model, kwargs=self.calibration[0])
        return self._traced

    @staticmethod
    def rows(ids: Tensor) -> dict[str, Tensor]:
        return {"input_ids": ids, "labels": ids}

    def pruned(self, criterion: str) -> GraphModule:
        """A copy of the model with 2:4 weights."""
        calibration = None if criterion == "magnitude" else self.calibration
        masks = InsertNMMasks("2:4", criterion=criterion, calibration=calibration)  # type: ignore[arg-type]
        return fxsparse.rewrite(self.traced, masks, copy=True)

    def train(self, gm: nn.Module, lr: float, seed: int) -> list[float]:
        """Trains on the windows once, in an order of the seed; the training losses."""
        optimizer = torch.optim.AdamW(
            [p for p in gm.parameters() if p.requires_grad], lr=lr, weight_decay=0.0, fused=True
        )
        schedule = fxsparse.Schedule(gm, optimizer, total_steps=self.steps)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, self.steps))
        order = torch.randperm(len(self.windows), generator=torch.Generator().manual_seed(seed))
        losses = []
        gm.train()
        for step in range(self.steps):
            loss = gm(**self.rows(self.windows[order[step * self.batch : (step + 1) * self.batch]])).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in gm.parameters() if p.grad is not None], 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            decay.step()
            losses.append(loss.item())
        return losses


def once(work: Work, criterion: str) -> Cell:
    gm = work.pruned(criterion)
    sites = fxsparse.record_of(gm).entries[0]
    cell: Cell = {"result": perplexity(gm, work.dev), "pruned": len(sites.rewritten), "dense": len(sites.skipped)}
    return cell | written(work, gm)


def written(work: Work, gm: GraphModule) -> Cell:
    """Perplexity of the checkpoint as transformers reads it, its zeros, and the bytes of its weights."""
    with tempfile.TemporaryDirectory() as folder:
        fxsparse.save_pretrained(gm, work.model, folder)
        read = transformers.AutoModelForCausalLM.from_pretrained(folder)
    inside = [value for name, value in read.named_parameters() if ".layers." in name and value.dim() == 2]
    zeros = sum(int((value == 0).sum()) for value in inside) / sum(value.numel() for value in inside)
    return {"read_back": perplexity(read, work.dev), "zeros": zeros, "bytes": size(gm), "dense_bytes": size(read)}


def size(model: nn.Module) -> int:
    """Bytes of weights, masks and indices."""
    return sum(tensor.nbytes for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())


def recovered(work: Work, name: str, seed: int) -> Cell:
    passes, lr = RECOVERY[name]
    gm = fxsparse.rewrite(work.pruned("wanda"), passes)
    trained = sum(parameter.numel() for parameter in gm.parameters() if parameter.requires_grad)
    losses = work.train(gm, lr, seed)
    cell: Cell = {"result": perplexity(gm, work.dev), "losses": losses, "trained": trained}
    return cell | (written(work, gm) if name == "SLoPe" else {"bytes": size(gm)})


def dense(work: Work, seed: int | None) -> Cell:
    if seed is None:
        return {"result": perplexity(work.model, work.dev), "bytes": size(work.model)}
    gm = fxsparse.rewrite(work.traced, [], copy=True)
    losses = work.train(gm, 2e-5, seed)
    return {"result": perplexity(gm, work.dev), "losses": losses}


def speeds(work: Work, rounds: int) -> Cell:
    """Tokens per second of the compiled dense and 2:4 models, in turn: a window at once, and one token."""
    cell: Cell = {}
    for name, ids in {"window": work.windows[:1], "token": work.windows[:1, :1]}.items():
        calls: dict[str, Callable[[], object]] = {}
        for kind, model in {"dense": work.model, "2:4": fxsparse.to_module(work.pruned("wanda"), work.model)}.items():
            frozen = copy.deepcopy(model).eval().requires_grad_(False)
            call = torch.compile(frozen, backend="fxsparse")
            calls[kind] = torch.no_grad()(lambda call=call, ids=ids: call(input_ids=ids, use_cache=False))
        seconds = harness.in_turn(calls, rounds)
        cell[name] = {kind: ids.numel() / statistics.median(taken) for kind, taken in seconds.items()}
        cell[name]["ratio"] = harness.ratio(seconds["dense"], seconds["2:4"])
    return cell


def tables(results: Results, seeds: list[int]) -> str:
    rows: list[tuple[object, ...]] = []
    whole = results.cells["dense"]

    def row(name: str, cells: list[Cell]) -> None:
        first = cells[0]
        rows.append(
            (
                name,
                spread([cell["result"] for cell in cells]),
                spread([cell["read_back"] for cell in cells]) if "read_back" in first else "",
                f"{first['zeros']:.2f}" if "zeros" in first else "",
                f"{first['bytes'] / whole['bytes']:.2f}" if "bytes" in first else "",
                f"{first['trained'] / 1e6:.1f}" if "trained" in first else "",
            )
        )

    row("dense", [whole])
    row("dense, trained on", [results.cells[f"dense, trained on, seed {seed}"] for seed in seeds])
    for criterion in CRITERIA:
        row(f"2:4, {criterion}", [results.cells[criterion]])
    for name in RECOVERY:
        row(f"Wanda's, then {name}", [results.cells[f"{name}, seed {seed}"] for seed in seeds])
    text = markdown(("", "perplexity", "read back", "zeros in the blocks", "bytes / dense", "trained, M"), rows)
    if "speed" in results.cells:
        speed = results.cells["speed"]
        lines = [
            (name, f"{speed[key]['dense']:.0f}", f"{speed[key]['2:4']:.0f}", f"{speed[key]['ratio']:.2f}")
            for name, key in (("a whole window", "window"), ("one token", "token"))
        ]
        text += "\n\n" + markdown(("tokens per second, compiled", "dense", "2:4", "speed"), lines)
    return text


def plot(results: Results, seeds: list[int]) -> None:
    figure, axes = harness.figure()
    names = {"dense": "dense", "dense, trained on": f"dense, trained on, seed {seeds[0]}"}
    names |= {f"2:4, {criterion}": criterion for criterion in CRITERIA}
    names |= {f"Wanda's, then {name}": f"{name}, seed {seeds[0]}" for name in RECOVERY}
    values = [results.cells[key]["result"] for key in names.values()]
    colours = ["C0" if "dense" in name else "C1" if name.startswith("2:4") else "C2" for name in names]
    bars = axes.barh(list(names), values, color=colours)
    axes.bar_label(bars, [f"{value:.0f}" for value in values], padding=3)
    axes.set(xscale="log", xlabel=f"perplexity of a token, held-out {results.settings['text']}")
    axes.set_title(
        f"{results.settings['model']} pruned to 2:4, {results.settings['steps']} steps of recovery", fontsize=10
    )
    axes.invert_yaxis()
    axes.margins(x=0.15)
    figure.savefig(results.path.with_suffix(".svg"))


def main() -> None:
    args = harness.parse(harness.parser(__doc__))
    args.seeds = args.seeds[:1] if args.quick else args.seeds
    work = Work(args)
    results = Results("oneshot", args, work.settings)
    results.cell("dense", lambda: dense(work, None))
    for criterion in CRITERIA:
        results.cell(criterion, lambda criterion=criterion: once(work, criterion))  # type: ignore[misc]
    for seed in args.seeds:
        for name in RECOVERY:
            results.cell(f"{name}, seed {seed}", lambda name=name, seed=seed: recovered(work, name, seed))  # type: ignore[misc]
        results.cell(f"dense, trained on, seed {seed}", lambda seed=seed: dense(work, seed))  # type: ignore[misc]
    if not args.quick:
        results.cell("speed", lambda: speeds(work, 7))
    results.finish(tables(results, args.seeds))
    plot(results, args.seeds)


if __name__ == "__main__":
    main()
