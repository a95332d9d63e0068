"""CoFi, LayerCHOP and DimCHOP on a pretrained model and real text, beside Torch-Pruning at the same budget.

    python -m examples.real.structured            # MiniLM on Rotten Tomatoes, three seeds
    python -m examples.real.structured --quick    # one seed, two sparsities, fewer texts and epochs

For each seed MiniLM is fine-tuned first; it is the teacher. Then, with the same texts and number of steps each:

* CoFi at three sparsities of the core: gates and distillation for half of the steps, then what is left is tuned. The
  gates are projected; at one sparsity CoFi's multipliers hold them as well, for which the steps are too few;
* DimCHOP: half of the hidden dimensions go while half of the steps are trained, then what is left is tuned;
* LayerCHOP: half of the layers go at once, then what is left is tuned;
* Torch-Pruning at the same sparsities: Taylor importance of groups, heads, channels and hidden dimensions at once, then
  what is left is tuned, in plain torch.

Tuning is the same for all: half of the loss is the labels', half the teacher's logits'.

Sparsity counts the weights and biases of attentions and MLPs. Every smaller model is written, read back, and tested as
it was read back; those of the first seed are timed in turn, all compiled by plain Inductor.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn import functional

import fxsparse
from fxsparse.passes import DistillLayers, DropDimensions, DropLayers, GateStructures

from . import harness
from .classify import fit
from .harness import Cell, Results, markdown, spread
from .reviews import Task, accuracy, read_task

Make = Callable[[nn.Module, Task, argparse.Namespace, int, Path], Cell]


def core(model: nn.Module) -> int:
    """Weights and biases of attentions and MLPs."""
    names = {name: parameter for name, parameter in model.named_parameters() if "LayerNorm" not in name}
    return sum(parameter.numel() for name, parameter in names.items() if ".layer." in name)


def teacher_of(task: Task, args: argparse.Namespace, seed: int, folder: Path) -> Cell:
    """The fine-tuned model, written to a folder."""
    model = task.model(seed)
    trained = fit(model, task, epochs=args.epochs, lr=5e-5, seed=seed)
    model.save_pretrained(folder)
    return {"test": accuracy(model, task.test), "dev": trained.dev, "core": core(model)}


def cofi(sparsity: float, constraint: Any = "projection") -> Make:
    def make(teacher: nn.Module, task: Task, args: argparse.Namespace, seed: int, folder: Path) -> Cell:
        gates = GateStructures(target=sparsity, warmup=0.4, constraint=constraint)
        return in_two([gates, DistillLayers(copy.deepcopy(teacher))], teacher, task, args, seed, folder)

    return make


def dimchop(teacher: nn.Module, task: Task, args: argparse.Namespace, seed: int, folder: Path) -> Cell:
    return in_two([DropDimensions(0.5)], teacher, task, args, seed, folder)


def in_two(
    passes: list[Any], teacher: nn.Module, task: Task, args: argparse.Namespace, seed: int, folder: Path
) -> Cell:
    """Trains what a schedule closes, cuts it out, and tunes what is left."""
    gm = fxsparse.rewrite(copy.deepcopy(teacher), passes, kwargs=task.train.rows(slice(0, 32)))
    gated = any(isinstance(item, GateStructures) for item in passes)
    options: dict[str, Any] = {"extra_loss": lambda: fxsparse.sparsity_loss(gm)} if gated else {}
    first = fit(
        gm, task, epochs=args.prune_epochs, lr=1e-4, seed=seed, stop_early=False, schedule=scheduled(gm), **options
    )
    closed = accuracy(gm, task.test)
    small = fxsparse.rewrite(gm, "materialize")
    return {"closed": closed, "values": first.values} | tuned(small, teacher, task, args.tune_epochs, seed, folder)


def tuned(small: GraphModule, teacher: nn.Module, task: Task, epochs: int, seed: int, folder: Path) -> Cell:
    """Trains on labels and the teacher's logits; what was written to a folder is tested as well."""
    cut = accuracy(small, task.test)
    gm = fxsparse.rewrite(small, [DistillLayers(copy.deepcopy(teacher), weights=(0.5, 0.5, 0.0))])
    trained = fit(gm, task, epochs=epochs, lr=1e-4, seed=seed, schedule=scheduled(gm))
    gm = fxsparse.rewrite(gm, "end-distill")
    written = fxsparse.save_pretrained(gm, teacher, folder)
    cell = {"test": accuracy(gm, task.test), "cut": cut, "dev": trained.dev, "core": core(written)}
    return cell | {"read_back": accuracy(fxsparse.from_pretrained(folder), task.test)}


def scheduled(gm: nn.Module) -> Callable[[torch.optim.Optimizer, int], fxsparse.Schedule]:
    return lambda optimizer, steps: fxsparse.Schedule(gm, optimizer, total_steps=steps)


def layerchop(teacher: nn.Module, task: Task, args: argparse.Namespace, seed: int, folder: Path) -> Cell:
    gm = fxsparse.rewrite(copy.deepcopy(teacher), [DropLayers("max-gap")], kwargs=task.train.rows(slice(0, 32)))
    return tuned(gm, teacher, task, args.prune_epochs + args.tune_epochs, seed, folder)


def torch_pruning(sparsity: float) -> Make:
    """What a user of Torch-Pruning would write; the ratio of each dimension gives the sparsity of the products."""

    def make(teacher: nn.Module, task: Task, args: argparse.Namespace, seed: int, folder: Path) -> Cell:
        model = copy.deepcopy(teacher)
        prune_groups(model, task, 1 - (1 - sparsity) ** 0.5)
        cut = accuracy(model, task.test)
        taught = Taught(model, teacher)
        trained = fit(taught, task, epochs=args.prune_epochs + args.tune_epochs, lr=1e-4, seed=seed)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model, folder / "model.pt")
        loaded = torch.load(folder / "model.pt", weights_only=False)  # written above
        cell = {"test": accuracy(model, task.test), "cut": cut, "dev": trained.dev, "core": core(model)}
        return cell | {"read_back": accuracy(loaded, task.test)}

    return make


def prune_groups(model: nn.Module, task: Task, ratio: float) -> None:
    """Torch-Pruning as its documentation shows it for BERT: whole heads, channels and hidden dimensions."""
    import torch_pruning

    attentions = [module for module in model.modules() if hasattr(module, "num_attention_heads")]
    heads = {getattr(m, name): m.num_attention_heads for m in attentions for name in ("query", "key", "value")}
    model.eval()
    for rows in list(task.train.batches(32))[:8]:
        model(**rows).loss.backward()  # Taylor importance reads the gradients
    example = {name: value[:2] for name, value in task.train.rows(slice(0, 2)).items() if name != "labels"}
    pruner = torch_pruning.pruner.BasePruner(
        model, example, importance=torch_pruning.importance.GroupTaylorImportance(), pruning_ratio=ratio, round_to=8,
        num_heads=heads, prune_num_heads=True, prune_head_dims=False, head_pruning_ratio=ratio,
        ignored_layers=[model.classifier], output_transform=lambda out: out.logits.sum(),
    )  # fmt: skip
    pruner.step()
    model.zero_grad()
    for module in attentions:
        module.num_attention_heads = pruner.num_heads[module.query]
        module.all_head_size = module.query.out_features
        module.attention_head_size = module.query.out_features // module.num_attention_heads


class Taught(nn.Module):
    """A model whose loss in training is half the labels' and half the teacher's logits', at temperature 2."""

    def __init__(self, model: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.teacher = (teacher.eval(),)  # in a tuple, so that it is no submodule and stays in evaluation mode

    def forward(self, **rows: torch.Tensor) -> Any:
        out = self.model(**rows)
        if not self.training:
            return out
        with torch.no_grad():
            wanted = self.teacher[0](**rows).logits
        logits = functional.kl_div((out.logits / 2).log_softmax(-1), (wanted / 2).softmax(-1), reduction="batchmean")
        return SimpleNamespace(logits=out.logits, loss=0.5 * out.loss + 0.5 * 4 * logits)


def models_of(results: Results, seed: int) -> Path:
    """Where the models of a seed are written."""
    return results.path.with_suffix("") / f"seed{seed}"


def one_seed(made: dict[str, Make], results: Results, task: Task, args: argparse.Namespace, seed: int) -> None:
    """Fine-tunes the teacher of a seed and makes every smaller model of it."""
    folder = models_of(results, seed)
    results.cell(f"fine-tuned, seed {seed}", lambda: teacher_of(task, args, seed, folder / "fine-tuned"))
    teacher = type(task.model(seed)).from_pretrained(folder / "fine-tuned")
    for name, make in made.items():
        place = folder / safe(name)
        results.cell(
            f"{name}, seed {seed}",
            lambda make=make, place=place: make(teacher, task, args, seed, place),  # type: ignore[misc]
        )


def latencies(names: list[str], task: Task, args: argparse.Namespace, folder: Path) -> Cell:
    """Seconds of a forward pass of each model as it was written, compiled by Inductor, at two batch sizes."""
    cell: Cell = {}
    for batch in (1, 32):
        calls = {}
        for name in names:
            part = folder / safe(name)
            pickled = part / "model.pt"
            model = torch.load(pickled, weights_only=False) if pickled.exists() else fxsparse.from_pretrained(part)
            rows = {key: value for key, value in task.test.rows(slice(0, batch)).items() if key != "labels"}
            torch._dynamo.reset()
            call = torch.compile(model.eval(), backend=args.compiler)
            calls[name] = torch.no_grad()(lambda call=call, rows=rows: call(**rows))
            calls[name]()
        seconds = harness.in_turn(calls, args.rounds)
        whole = seconds[names[0]]
        cell[f"batch {batch}"] = {
            name: {"ms": 1e3 * statistics.median(taken), "speed": harness.ratio(whole, taken)}
            for name, taken in seconds.items()
        }
    return cell


def safe(name: str) -> str:
    return name.replace(" ", "-").replace("%", "")


def tables(results: Results, names: list[str], seeds: list[int]) -> str:
    times = results.cells["latency"]
    whole = results.cells[f"fine-tuned, seed {seeds[0]}"]["core"]
    rows = []
    for name in names:
        cells = [results.cells[f"{name}, seed {seed}"] for seed in seeds]
        teachers = [results.cells[f"fine-tuned, seed {seed}"] for seed in seeds]
        lost = [cell["test"] - its["test"] for cell, its in zip(cells, teachers, strict=True)]
        rows.append(
            (
                name,
                f"{1 - statistics.fmean(cell['core'] for cell in cells) / whole:.1%}",
                spread([cell["test"] for cell in cells]),
                spread(lost),
                spread([cell["read_back"] for cell in cells]) if "read_back" in cells[0] else "",
                *(f"{times[batch][name]['speed']:.2f}" for batch in ("batch 1", "batch 32")),
            )
        )
    head = ("", "core gone", "test accuracy %", "minus fine-tuned", "read back %", "speed, batch 1", "speed, batch 32")
    return markdown(head, rows)


def plot(results: Results, names: list[str], seeds: list[int]) -> None:
    figure, axes = harness.figure()
    kinds = ("CoFi", "multipliers", "Torch-Pruning", "LayerCHOP", "DimCHOP", "fine-tuned")
    for position, kind in enumerate(kinds):
        of_kind = [name for name in names if name.startswith(kind) or name.endswith(kind)]
        of_kind = [name for name in of_kind if kind == "multipliers" or not name.endswith("multipliers")]
        speeds = [results.cells["latency"]["batch 32"][name]["speed"] for name in of_kind]
        tests = [[results.cells[f"{name}, seed {seed}"]["test"] for seed in seeds] for name in of_kind]
        for speed, values in zip(speeds, tests, strict=True):
            axes.scatter([speed] * len(values), values, s=12, alpha=0.5, color=f"C{position}")
        axes.plot(speeds, [statistics.fmean(values) for values in tests], marker="o", color=f"C{position}", label=kind)
    axes.set(xlabel="speed of a forward pass over the whole model's, batch 32", ylabel="test accuracy, %", xscale="log")
    axes.set_title("MiniLM made smaller on Rotten Tomatoes: small marks are seeds", fontsize=10)
    axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(results.path.with_suffix(".svg"))


def main() -> None:
    options = harness.parser(__doc__)
    options.add_argument("--compiler", default="inductor", choices=("inductor", "eager"))
    args = harness.parse(options)
    sizes = {"train": 1024, "dev": 256, "test": 1024, "length": 32}
    sparsities = [0.6, 0.8, 0.95]
    args.epochs, args.prune_epochs, args.tune_epochs, args.rounds = 3, 4, 4, 15
    if args.quick:
        sizes |= {"train": 256, "dev": 128, "test": 512}
        sparsities, args.epochs, args.prune_epochs, args.tune_epochs = [0.6], 2, 2, 2
    if args.tiny:
        sizes |= {"train": 64, "dev": 16, "test": 32}
        args.rounds = 1
    task = read_task("rotten_tomatoes", **sizes)
    epochs = {"epochs": args.epochs, "epochs of pruning": args.prune_epochs, "of tuning": args.tune_epochs}
    results = Results("structured", args, {"data": task.name, **sizes, **epochs, "batch": 32})
    made: dict[str, Make] = {f"CoFi {sparsity:.0%}": cofi(sparsity) for sparsity in sparsities}
    middle = sparsities[len(sparsities) // 2]
    made[f"CoFi {middle:.0%}, multipliers"] = cofi(middle, "multipliers")
    made |= {"LayerCHOP 50%": layerchop, "DimCHOP 50%": dimchop}
    made |= {f"Torch-Pruning {sparsity:.0%}": torch_pruning(sparsity) for sparsity in sparsities}
    for seed in args.seeds:
        one_seed(made, results, task, args, seed)
    names = ["fine-tuned", *made]
    results.cell("latency", lambda: latencies(names, task, args, models_of(results, args.seeds[0])))
    results.finish(tables(results, names, args.seeds))
    plot(results, names, args.seeds)


if __name__ == "__main__":
    main()
