"""The way back to the dense model, and to the same point of a training."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.fx import GraphModule

import fxsparse
from fxsparse.errors import CheckpointError
from fxsparse.graph.record import record_of
from tests.support.families import FAMILIES
from tests.support.traced import traced

CORE = ("sequential", "bert", "opt", "gpt2", "llama", "t5")
PASSES = "nm-masks{pattern=2:4},double-prune{every=2},low-rank{rank=2,start=0.5}"


@pytest.mark.parametrize("storage", ["compressed", "masked"])
@pytest.mark.parametrize("name", CORE)
def test_dense_state_dict_has_the_original_keys_and_loads(name: str, storage: str) -> None:
    family, base = traced(name)
    gm = fxsparse.rewrite(base, f"nm-masks{{storage={storage}}},double-prune")
    dense = fxsparse.dense_state_dict(gm)
    original = family.model.state_dict()
    assert dense.keys() == original.keys()
    assert all(dense[key].shape == original[key].shape and dense[key].dtype == original[key].dtype for key in dense)
    model = copy.deepcopy(family.model).eval()
    model.load_state_dict(dense)
    batch = family.make_batch(batch=3)
    for ours, theirs in zip(_tensors(gm.eval()(**batch)), _tensors(model(**batch)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    held = {weight.name for weight in record_of(gm).weights}
    assert all((dense[key] == 0).float().mean() == 0.5 for key in held)


def _tensors(output: object) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", CORE)
def test_a_saved_model_loads_into_a_fresh_one(name: str, tmp_path: Path) -> None:
    family, base = traced(name)
    gm = fxsparse.rewrite(base, "nm-masks,double-prune,low-rank{rank=2,start=0.0}").eval()
    with torch.no_grad():
        for parameter in gm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    path = tmp_path / "model.safetensors"
    fxsparse.save(gm, path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    fresh = FAMILIES[name]()
    with torch.no_grad():
        for parameter in fresh.model.parameters():
            parameter.normal_()
    loaded = fxsparse.load(path, fresh.model, kwargs=fresh.make_batch()).eval()
    state = gm.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())
    assert record_of(loaded) == record_of(gm)
    batch = family.make_batch(batch=3)
    assert all(torch.equal(a, b) for a, b in zip(_tensors(gm(**batch)), _tensors(loaded(**batch)), strict=True))


def test_masks_chosen_by_calibration_load_without_it(tmp_path: Path) -> None:
    family = FAMILIES["opt"]()
    batch = family.make_batch(labels=False)
    passes = [fxsparse.passes.InsertNMMasks(criterion="wanda", calibration=[batch])]
    gm = fxsparse.rewrite(family.model, passes, kwargs=batch).eval()
    fxsparse.save(gm, tmp_path / "wanda.safetensors")
    fresh = FAMILIES["opt"]()
    loaded = fxsparse.load(tmp_path / "wanda.safetensors", fresh.model, kwargs=batch).eval()
    assert torch.equal(loaded(**batch).logits, gm(**batch).logits)


Training = tuple[Any, torch.optim.Optimizer, fxsparse.Schedule]


def eight_batches() -> list[dict[str, Any]]:
    torch.manual_seed(7)
    family = traced("gpt2")[0]
    return [family.make_batch() for _ in range(8)]


def start(gm: GraphModule, compiled: bool) -> Training:
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-2)
    run = torch.compile(gm, backend="aot_eager") if compiled else gm
    return run, optimizer, fxsparse.Schedule(gm, optimizer, total_steps=8)


def train(training: Training, batches: list[dict[str, Any]]) -> None:
    run, optimizer, schedule = training
    for batch in batches:
        torch.manual_seed(schedule.steps_done + 100)  # dropout
        run(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@functools.cache
def trained_in_one_go(compiled: bool) -> GraphModule:
    gm = fxsparse.rewrite(traced("gpt2")[1], PASSES)
    train(start(gm, compiled), eight_batches())
    return gm


@pytest.mark.parametrize("stop_at", [2, 5])
@pytest.mark.parametrize("compiled", [False, True])
def test_resuming_is_bit_identical(stop_at: int, compiled: bool, tmp_path: Path) -> None:
    """Eight steps in one go equal the same eight with a restart in between, before and after the branches join."""
    whole, data = trained_in_one_go(compiled), eight_batches()

    first = fxsparse.rewrite(traced("gpt2")[1], PASSES)
    parts = start(first, compiled)
    train(parts, data[:stop_at])
    fxsparse.save(first, tmp_path / "model.safetensors")
    torch.save({"optimizer": parts[1].state_dict(), "schedule": parts[2].state_dict()}, tmp_path / "rest.pt")

    second = fxsparse.load(tmp_path / "model.safetensors", traced("gpt2")[0].model, kwargs=data[0])
    parts = start(second, compiled)
    rest = torch.load(tmp_path / "rest.pt")
    parts[1].load_state_dict(rest["optimizer"])
    parts[2].load_state_dict(rest["schedule"])
    train(parts, data[stop_at:])
    expected = whole.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in second.state_dict().items())
    assert record_of(second).text == record_of(whole).text


def test_files_that_do_not_fit_say_why(tmp_path: Path) -> None:
    gm = fxsparse.rewrite(traced("opt")[1], "nm-masks")
    path = tmp_path / "model.safetensors"
    fxsparse.save(gm, path)

    def load(file: Path) -> None:
        fxsparse.load(file, traced("opt")[1])

    with safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    damaged = tmp_path / "damaged.safetensors"
    key = "model.decoder.layers.1.fc1.weight_values"

    save_file({name: tensor for name, tensor in tensors.items() if name != key}, damaged, metadata)
    with pytest.raises(CheckpointError, match=f"lacks {key}"):
        load(damaged)
    save_file({**tensors, "extra": torch.zeros(1)}, damaged, metadata)
    with pytest.raises(CheckpointError, match="has unknown extra"):
        load(damaged)
    save_file({**tensors, key: torch.zeros(3)}, damaged, metadata)
    with pytest.raises(CheckpointError, match=f"has other shapes for {key}"):
        load(damaged)
    save_file(tensors, damaged)
    with pytest.raises(CheckpointError, match="holds no record"):
        load(damaged)
    indices = "model.decoder.layers.1.fc1.weight_indices"
    save_file({**tensors, indices: torch.zeros_like(tensors[indices])}, damaged, metadata)
    with pytest.raises(CheckpointError, match=r"fc1\.weight"):
        load(damaged)
    damaged.write_bytes(b"not a file")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(damaged)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path / "missing.safetensors")
    assert json.loads(metadata["fxsparse"])["version"] == fxsparse.__version__
