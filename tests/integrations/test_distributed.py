"""Training on several ranks equals training in one process on the joined batch, for every recipe.

Two processes train each recipe under ``DistributedDataParallel`` and under ``fully_shard``, of the whole graph and of
the blocks of its module form, with two micro-batches to a step and clipped gradients. All recipes share one pair of
processes, because starting it takes longer than training.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fxsparse
from fxsparse.errors import OptionError
from fxsparse.graph.record import record_of
from fxsparse.graph.sharded import whole
from tests.support.clients import WHOLE_MATRIX, cells, refused_or
from tests.support.ranks import on_ranks
from tests.support.recipes import RECIPES, TOTAL, Training, batch, language, loss_of

RANKS, MICRO = 2, 2


def rows_of(step: int, micro: int, rank: int, ranks: int) -> dict[str, Tensor]:
    """The rows of a rank in a micro-batch; together the ranks have those of the only one."""
    size = 8 // MICRO
    part = slice(micro * size + rank * size // ranks, micro * size + (rank + 1) * size // ranks)
    return {name: tensor[part] for name, tensor in batch(step).items()}


def train(training: Training, model: nn.Module, last: int, rank: int = 0, ranks: int = 1) -> list[float]:
    """Trains until optimizer step ``last``; returns the mean loss of all ranks in every step."""
    assert training.schedule is not None
    losses = []
    while training.schedule.steps_done < last:
        step = training.schedule.steps_done + 1
        training.schedule.observe(rows_of(step, 0, rank, ranks))
        total = torch.zeros(())
        for micro in range(MICRO):
            torch.manual_seed(100 * step + micro)
            loss = loss_of(training.recipe, model, training.gm, rows_of(step, micro, rank, ranks)) / MICRO
            loss.backward()
            total += whole(loss.detach())
        nn.utils.clip_grad_norm_(training.gm.parameters(), 1.0)
        training.optimizer.step()
        training.scheduler.step()
        training.optimizer.zero_grad()
        training.schedule.step()
        if ranks > 1:
            torch.distributed.all_reduce(total)
        losses.append(float(total) / ranks)
    return losses


def result(training: Training, losses: list[float]) -> dict[str, Any]:
    state = {name: whole(tensor).clone() for name, tensor in training.gm.state_dict().items()}
    return {"losses": losses, "state": state, "record": record_of(training.gm).text}


class Outer(nn.Module):
    """A module of the user's that holds the graph module."""

    def __init__(self, gm: nn.Module) -> None:
        super().__init__()
        self.gm = gm

    def forward(self, **inputs: Tensor) -> Any:
        return self.gm(**inputs)


def wrap(recipe: str, engine: str) -> tuple[Training, nn.Module]:
    """A training, and the model that an engine runs.

    ``unused`` lets DistributedDataParallel look for unused parameters; ``inside`` shards a module around the graph
    module, and gathers parameters anew for the backward pass; ``module`` shards the blocks of the module form.
    """
    gm: Any = RECIPES[recipe].rewrite()
    if engine == "module":
        gm = fxsparse.to_module(gm, language())
    model: nn.Module = Outer(gm) if "inside" in engine else gm
    if not engine.startswith("ddp"):
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for block in gm.blocks if engine == "module" else ():
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward="inside" in engine)
    training = Training.start(RECIPES[recipe], gm)
    if engine.startswith("ddp"):
        model = DistributedDataParallel(gm, find_unused_parameters=RECIPES[recipe].waits or "unused" in engine)
    training.build_schedule()
    return training, model


def on_a_rank(rank: int, pairs: list[tuple[str, str]], saved: list[tuple[str, int]], folder: Path) -> dict[Any, Any]:
    """The results of all pairs of recipe and engine; and checkpoints of recipes at a step of training under FSDP."""
    results: dict[Any, Any] = {}
    for recipe, engine in pairs:
        training, model = wrap(recipe, engine)
        results[recipe, engine] = result(training, train(training, model, TOTAL, rank, RANKS))
    for recipe, step in saved:
        training, model = wrap(recipe, "fsdp")
        train(training, model, step, rank, RANKS)
        dcp.save(state_of(training), checkpoint_id=folder / f"{recipe}.{step}")
    return results


@functools.cache
def alone(recipe: str, as_module: bool = False) -> dict[str, Any]:
    gm = RECIPES[recipe].rewrite()
    training = Training.start(RECIPES[recipe], fxsparse.to_module(gm, language()) if as_module else gm)
    training.build_schedule()
    return result(training, train(training, training.gm, TOTAL))


def check(ours: dict[str, Any], theirs: dict[str, Any], what: Any) -> None:
    """That two results are equal up to rounding."""
    assert ours["record"] == theirs["record"], what
    torch.testing.assert_close(ours["losses"], theirs["losses"], rtol=1e-5, atol=1e-5, msg=lambda m: f"{what}: {m}")
    assert ours["state"].keys() == theirs["state"].keys()
    for name, tensor in ours["state"].items():
        expected = theirs["state"][name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{what}, {n}: {m}")


# --- checkpoints ------------------------------------------------------------------------------------------------------


def state_of(training: Training) -> dict[str, Any]:
    """What torch.distributed.checkpoint saves, and loads into."""
    return {
        "model": get_model_state_dict(training.gm),
        "optimizer": get_optimizer_state_dict(training.gm, training.optimizer),
        "scheduler": training.scheduler,
        "schedule": training.schedule,
    }


def load(training: Training, path: Path) -> None:
    state = state_of(training)
    dcp.load(state, checkpoint_id=path, planner=DefaultLoadPlanner(allow_partial_load=True))
    set_model_state_dict(training.gm, state["model"])
    options = StateDictOptions(strict=False)  # gates, and what was never trained, have no state in the optimizer
    set_optimizer_state_dict(training.gm, training.optimizer, state["optimizer"], options=options)


def loaded_on_a_rank(rank: int, ranks: int, saved: list[tuple[str, int]], folder: Path) -> dict[Any, Any]:
    results: dict[Any, Any] = {}
    for recipe, step in saved:
        training, model = wrap(recipe, "fsdp") if ranks > 1 else (Training.start(RECIPES[recipe]), None)
        if model is None:
            training.build_schedule()
        load(training, folder / f"{recipe}.{step}")
        results[recipe, step] = result(training, train(training, model or training.gm, TOTAL, rank, ranks))
    return results


def _loaded_by_one(saved: list[tuple[str, int]], folder: Path) -> dict[Any, Any]:
    store = torch.distributed.FileStore(str(folder / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        return loaded_on_a_rank(0, 1, saved, folder)
    finally:
        torch.distributed.destroy_process_group()


# --- tests ------------------------------------------------------------------------------------------------------------

EXACT = [name for name, recipe in RECIPES.items() if not recipe.by_batch]
COLUMNS = {
    "static N:M": "nm",
    "SR-STE": "sr-ste",
    "double-prune": "double-prune",
    "low-rank": "branches",
    "gates": "gates",
    "dimensions": "dims",
    "tensors": "tensors",
    "neurons": "neurons",
    "mux": "mux",
    "distill": "distill",
    "drop-layers": "dropped",
}
"""The recipes here that stand for those in the columns of the table of clients."""
ROWS = {"ddp": cells("DDP"), "fsdp": cells("FSDP2"), "module": cells("FSDP2, module"), "checkpoints": cells("DCP")}


def promised(row: str) -> list[str]:
    """The recipes that a row of the table says train like in one process."""
    return [COLUMNS[column] for column, reason in (cell.values for cell in ROWS[row]) if reason is None]


SAMPLE = [
    ("gates", "ddp unused"),
    ("tensors-branches", "ddp"),
    ("branches", "fsdp"),
    ("gates", "fsdp inside"),
    ("gates-projected", "fsdp inside"),
    ("dims", "fsdp"),
    ("tensors", "fsdp"),
    ("neurons", "fsdp"),
    ("branches", "module"),
]
SAVED = [("branches", 12), ("gates", 12), ("dims", 12), ("neurons", 14), ("tensors", 10), ("branches", 6)]

PARTS: dict[str, tuple[list[tuple[str, str]], list[tuple[str, int]]]] = {"sample": (SAMPLE, SAVED[:1])}
if WHOLE_MATRIX:
    ENGINES = ("ddp", "ddp unused", "fsdp", "fsdp inside")
    PARTS = {engine: ([(recipe, engine) for recipe in EXACT], []) for engine in ENGINES}
    PARTS["module"] = ([(recipe, "module") for recipe in (*promised("module"), "dense-branches")], [])
    others = [(recipe, 12) for recipe in promised("checkpoints") if recipe not in dict(SAVED)]
    PARTS["checkpoints"] = ([], [*SAVED, *others])
    assert {*promised("ddp"), *promised("fsdp")} <= {*EXACT}


@pytest.mark.parametrize(("column", "reason"), ROWS["module"])
def test_the_module_form_trains_or_is_refused(column: str, reason: str | None) -> None:
    refused_or(reason, lambda: alone(COLUMNS[column], as_module=True))


@pytest.mark.parametrize("part", PARTS)
def test_ranks_train_like_one_process_and_checkpoints_load_with_other_numbers_of_ranks(
    part: str, tmp_path: Path
) -> None:
    """One test, because its parts share the processes."""
    pairs, saved = PARTS[part]
    for results in on_ranks(tmp_path / "ranks", on_a_rank, pairs, saved, tmp_path):
        assert len(results) == len(pairs)
        for pair, ours in results.items():
            check(ours, alone(pair[0], as_module=pair[1] == "module"), pair)
    loads = [(saved, _loaded_by_one(saved, tmp_path))]
    if WHOLE_MATRIX and saved:
        by_four = [item for item in saved if item[0] != "mux"]  # a fourth of the rows does not fill a group
        ranks = on_ranks(tmp_path / "four", loaded_on_a_rank, 4, by_four, tmp_path, ranks=4)
        loads += [(by_four, results) for results in ranks]
    for wanted, results in loads:
        assert len(results) == len(wanted)
        for (recipe, step), ours in results.items():
            expected = alone(recipe)
            check(ours, {**expected, "losses": expected["losses"][step:]}, (recipe, step))


@pytest.mark.skipif(not WHOLE_MATRIX, reason="part of the whole matrix: FXSPARSE_WHOLE_MATRIX=1")
def test_ranks_agree_where_they_choose_by_their_own_batches(tmp_path: Path) -> None:
    """Retrieval draws members and dynamic matching pairs layers for each batch: not as one process, but alike."""
    pairs = [(recipe, engine) for recipe in RECIPES if recipe not in EXACT for engine in ("ddp", "fsdp")]
    ours, theirs = on_ranks(tmp_path / "ranks", on_a_rank, pairs, [], tmp_path)
    assert len(ours) == 4
    for pair in pairs:
        check(ours[pair], theirs[pair], pair)
        assert ours[pair]["losses"][-1] < ours[pair]["losses"][0]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp_of_the_first_kind_is_refused_by_name(process_group: None, use_orig_params: bool) -> None:
    gm = RECIPES["branches"].rewrite()
    model = FullyShardedDataParallel(gm, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for module in (gm, model):
        with pytest.raises(OptionError, match=r"Schedule.*FullyShardedDataParallel.*fully_shard"):
            fxsparse.Schedule(module, optimizer, total_steps=2)


def test_layers_sharded_on_their_own_are_refused_by_name(process_group: None) -> None:
    gm = RECIPES["branches"].rewrite()
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(gm.get_submodule("blocks.1"), mesh=mesh)
    fully_shard(gm, mesh=mesh)
    with pytest.raises(OptionError, match=r"blocks\.1 was sharded on its own.*fully_shard\(gm\)"):
        fxsparse.Schedule(gm, torch.optim.SGD(gm.parameters(), lr=0.1), total_steps=2)


@pytest.mark.parametrize("recipe", ["branches", "tensors"] if WHOLE_MATRIX else ["branches"])
def test_a_sharded_graph_is_compiled_evaluated_and_renewed(process_group: None, recipe: str) -> None:
    training, model = wrap(recipe, "fsdp")
    compiled = torch.compile(model, backend="aot_eager")
    expected = alone(recipe)["losses"]
    losses = []
    for step in range(12, TOTAL + 1, 8):
        losses += train(training, compiled, step)
        with torch.no_grad():  # leaves whole parameters in the places of the sharded ones
            model.eval()(**batch(1))
        model.train()
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


def test_gates_are_trained_inside_another_module(process_group: None) -> None:
    """Where DistributedDataParallel does not see what the graph module leaves to the ranks."""
    training = Training.start(RECIPES["gates"])
    model = DistributedDataParallel(Outer(training.gm))
    training.build_schedule()
    check(result(training, train(training, model, TOTAL)), alone("gates"), "gates")
