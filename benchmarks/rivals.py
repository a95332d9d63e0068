"""What others give for the same: one real model, one machine, one run.

    python -m examples.assets && python -m benchmarks.rivals
    python -m benchmarks.rivals --quick         # without Inductor

All on MiniLM with reviews of Rotten Tomatoes (or the stand-ins of ``examples/real``), in turn where times are compared:

* GreenTrainer's dynamic program beside the exact choice, on importances measured on the model;
* PEFT's LoRA beside ``low-rank`` with ``select-tensors``: FLOPs and time of a step;
* Inductor beside this backend, on the dense model and on one whose weights are 2:4;
* torch's own 2:4 tensors, where they run;
* Torch-Pruning beside ``gates`` and ``materialize``: time to prune, and what is left.

Accuracies of Torch-Pruning, PEFT and the rest after training are in ``examples/real``.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import torch
from torch import nn

import fxsparse
from examples.real import harness
from examples.real.classify import counted
from examples.real.harness import Cell, Results, markdown
from examples.real.reviews import Task, read_task
from examples.real.structured import core, prune_groups
from fxsparse.cost.selector import dp_baseline
from fxsparse.passes import AddLowRankBranches, GateStructures, InsertNMMasks, SelectTensors

Rows = dict[str, torch.Tensor]


def selection(task: Task, rows: Rows) -> Cell:
    """Importance that a choice has, of all there is, and the share of the budget it costs, at three rho."""
    gm = fxsparse.trace(task.model(0, dropout=0.0), kwargs=rows).train()
    optimizer = torch.optim.AdamW(gm.parameters(), lr=5e-5)
    importance = fxsparse.tensor_importance(gm, optimizer, rows)
    graph, cell = fxsparse.BackpropGraph(gm), {}
    positive = sum(max(0.0, value) for value in importance.values())
    for rho in (0.4, 0.5, 0.7):
        budget, instance = graph.budget(rho), graph.instance()
        choices = {
            "exact": lambda rho=rho: graph.select(importance, rho),
            "published": lambda: dp_baseline(instance, importance, budget),  # noqa: B023
            "rounded up": lambda: dp_baseline(instance, importance, budget, rounding="ceil"),  # noqa: B023
        }
        for name, choose in choices.items():
            begin = time.perf_counter()
            chosen = choose()
            cell[f"rho {rho:g}, {name}"] = {
                "ms": 1e3 * (time.perf_counter() - begin),
                "importance": sum(importance[tensor] for tensor in chosen) / positive,
                "budget": instance.cost(chosen) / budget,
            }
    return cell


def lora(task: Task, rows: Rows, rounds: int) -> Cell:
    """FLOPs and time of a step with LoRA on queries and values, over full training's."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    branches = AddLowRankBranches(rank=8, start=0.0, layers=("*.query", "*.value"))
    chosen = SelectTensors(tensors=("*_down", "*_up", "classifier.*"))
    models: dict[str, nn.Module] = {
        "full": task.model(0),
        "PEFT": get_peft_model(task.model(0), config),
        "low-rank, select-tensors": fxsparse.rewrite(task.model(0), [branches, chosen], kwargs=rows),
    }
    calls, flops, trained = {}, {}, {}
    for name, model in models.items():
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
        model.train()

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            model(**rows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        flops[name], calls[name] = counted(step), step
        trained[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    seconds = harness.in_turn(calls, rounds)
    return {
        name: {
            "time": harness.ratio(seconds[name], seconds["full"]),
            "flops": flops[name] / flops["full"],
            "trained": trained[name],
        }
        for name in models
    }


def compiled(task: Task, rows: Rows, rounds: int) -> Cell:
    """Time of a forward pass over Inductor's of the dense model."""
    inputs = {name: value for name, value in rows.items() if name != "labels"}
    dense = task.model(0).eval().requires_grad_(False)
    pruned = fxsparse.rewrite(copy.deepcopy(dense), InsertNMMasks("2:4"), kwargs=inputs)
    module = fxsparse.to_module(pruned, dense)
    zeros = copy.deepcopy(dense)
    zeros.load_state_dict(fxsparse.dense_state_dict(pruned))
    models = {
        "dense, Inductor": (dense, "inductor"),
        "dense, fxsparse": (copy.deepcopy(dense), "fxsparse"),
        "2:4 with zeros, Inductor": (zeros, "inductor"),
        "2:4 compressed, fxsparse": (module.eval().requires_grad_(False), "fxsparse"),
    }
    calls = {}
    for name, (model, backend) in models.items():
        torch._dynamo.reset()
        call = torch.compile(model, backend=backend)
        calls[name] = torch.no_grad()(lambda call=call: call(**inputs))
        calls[name]()
    seconds = harness.in_turn(calls, rounds)
    whole = seconds["dense, Inductor"]
    return {name: harness.ratio(taken, whole) for name, taken in seconds.items()}


def semi_structured() -> Cell:
    """Whether torch's own 2:4 tensors run on this device, and what they say if not."""
    weight = torch.randn(128, 128)
    weight[:, ::2] = 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        sparse: Any = torch.sparse.to_sparse_semi_structured(weight.half().to(device))
        torch.nn.functional.linear(torch.randn(128, 128, device=device).half(), sparse)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return {"device": device, "runs": False, "says": str(error).splitlines()[0][:120]}
    return {"device": device, "runs": True, "says": ""}


def pruning(task: Task, rows: Rows) -> Cell:
    """Seconds to take out 60 % of the core by magnitude or Taylor importance, and how the result compares."""
    theirs = task.model(0, dropout=0.0)
    whole = core(theirs)
    begin = time.perf_counter()
    prune_groups(theirs, task, 1 - 0.4**0.5)
    cell: Cell = {"Torch-Pruning": {"seconds": time.perf_counter() - begin, "gone": 1 - core(theirs) / whole}}
    ours = task.model(0, dropout=0.0).eval()
    begin = time.perf_counter()
    closed = fxsparse.rewrite(ours, [GateStructures(target=0.6, score="magnitude")], kwargs=rows).eval()
    cut = fxsparse.rewrite(closed, "materialize").eval()
    cell["gates, materialize"] = {"seconds": time.perf_counter() - begin, "gone": 1 - core(cut) / whole}
    with torch.no_grad():
        off = (closed(**rows).logits - cut(**rows).logits).abs().max()
    cell["gates, materialize"]["off"] = float(off)
    return cell


def tables(results: Results) -> str:
    cells = results.cells
    extra = {"took_s", "load"}
    parts = [
        markdown(
            ("choice of tensors", "ms", "importance reached", "cost / budget"),
            [
                (name, f"{row['ms']:.1f}", f"{row['importance']:.3f}", f"{row['budget']:.3f}")
                for name, row in cells["selection"].items()
                if name not in extra
            ],
        ),
        markdown(
            ("LoRA, rank 8", "FLOPs / full", "time / full", "trained"),
            [
                (name, f"{row['flops']:.2f}", f"{row['time']:.2f}", f"{row['trained']:,}")
                for name, row in cells["lora"].items()
                if name not in extra
            ],
        ),
        markdown(
            ("60 % of the core taken out", "seconds", "gone", "off the masked model"),
            [
                (name, f"{row['seconds']:.1f}", f"{row['gone']:.1%}", f"{row['off']:.1e}" if "off" in row else "")
                for name, row in cells["pruning"].items()
                if name not in extra
            ],
        ),
    ]
    if "compiled" in cells:
        rows = [(name, f"{value:.2f}") for name, value in cells["compiled"].items() if name not in extra]
        parts.append(markdown(("a forward pass", "time / dense of Inductor"), rows))
    sparse = cells["torch.sparse 2:4"]
    parts.append(f"torch's own 2:4 tensors on {sparse['device']}: {'run' if sparse['runs'] else sparse['says']}")
    return "\n\n".join(parts)


def main() -> None:
    args: argparse.Namespace = harness.parse(harness.parser(__doc__))
    sizes = {"train": 320, "dev": 16, "test": 32, "length": 32}
    task = read_task("rotten_tomatoes", **sizes)
    rows = task.train.rows(slice(0, 32))
    results = Results("rivals", args, {"data": task.name, "batch": 32, "length": 32})
    rounds = 1 if args.tiny else 3 if args.quick else 9
    results.cell("selection", lambda: selection(task, rows))
    results.cell("lora", lambda: lora(task, rows, rounds))
    results.cell("pruning", lambda: pruning(task, rows))
    results.cell("torch.sparse 2:4", semi_structured)
    if not args.quick:
        results.cell("compiled", lambda: compiled(task, rows, rounds))
    results.finish(tables(results))


if __name__ == "__main__":
    main()
