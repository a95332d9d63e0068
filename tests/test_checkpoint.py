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
from torch import Tensor, nn
from torch.fx import GraphModule

import fxsparse
from fxsparse import stored
from fxsparse.errors import CheckpointError, TraceError
from fxsparse.graph.record import Record, record_of
from tests.fuzz.models import Spec, batch_of, build
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


class OfOneSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.head(self.linear(x).relu())[i] for i in range(len(x))])


def test_a_model_of_one_batch_size_is_loaded_as_it_was_traced(tmp_path: Path) -> None:
    model, x = OfOneSize(), torch.randn(3, 16)
    passes = "nm-masks{keep_first=false,keep_head=false}"
    gm = fxsparse.rewrite(copy.deepcopy(model), passes, (x,), dynamic_batch=False)
    fxsparse.save(gm, tmp_path / "model.safetensors")
    with pytest.raises(TraceError, match="dynamic_batch=False"):
        fxsparse.load(tmp_path / "model.safetensors", copy.deepcopy(model), (x,))
    loaded = fxsparse.load(tmp_path / "model.safetensors", copy.deepcopy(model), (x,), dynamic_batch=False)
    torch.testing.assert_close(loaded(x), gm(x))


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
    record = {"fxsparse": metadata["fxsparse"]}
    damaged = tmp_path / "damaged.safetensors"
    key = "model.decoder.layers.1.fc1.weight_values"

    stored.write(damaged, {name: tensor for name, tensor in tensors.items() if name != key}, record)
    with pytest.raises(CheckpointError, match=f"lacks {key}"):
        load(damaged)
    stored.write(damaged, {**tensors, "extra": torch.zeros(1)}, record)
    with pytest.raises(CheckpointError, match="has unknown extra"):
        load(damaged)
    stored.write(damaged, {**tensors, key: torch.zeros(3)}, record)
    with pytest.raises(CheckpointError, match=rf"{key} is \[3\], expected \[{tensors[key].shape[0]}, "):
        load(damaged)
    bias = "model.decoder.layers.1.fc1.bias"
    stored.write(damaged, {**tensors, bias: torch.zeros(3)}, record)
    with pytest.raises(CheckpointError, match=f"has other shapes for {bias}"):
        load(damaged)
    save_file(tensors, damaged)
    with pytest.raises(CheckpointError, match="holds no record"):
        load(damaged)
    indices = "model.decoder.layers.1.fc1.weight_indices"
    stored.write(damaged, {**tensors, indices: torch.zeros_like(tensors[indices])}, record)
    with pytest.raises(CheckpointError, match=r"fc1\.weight"):
        load(damaged)
    damaged.write_bytes(b"not a file")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(damaged)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path / "missing.safetensors")
    assert json.loads(metadata["fxsparse"])["version"] == fxsparse.__version__


# --- every tensor -----------------------------------------------------------------------------------------------------


class Repeated(nn.Module):
    """One block at several places, and parameters that are slices of one storage."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
        self.blocks = nn.ModuleList([block] * 3)
        self.head = nn.Linear(16, 8)
        flat = torch.randn(16 * 8 + 8)
        self.head.weight = nn.Parameter(flat[: 16 * 8].view(8, 16))
        self.head.bias = nn.Parameter(flat[16 * 8 :])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@pytest.mark.parametrize("passes", ["", "nm-masks{keep_first=false}", "nm-masks{keep_first=false,storage=masked}"])
def test_slices_of_one_storage_and_a_block_at_several_places_are_saved(passes: str, tmp_path: Path) -> None:
    batch = (torch.randn(4, 16),)
    gm = fxsparse.trace(Repeated(), batch)
    if passes:
        gm = fxsparse.rewrite(gm, passes)
        assert len(record_of(gm).entries[0].rewritten) == 2
    fxsparse.save(gm, tmp_path / "model.safetensors")
    loaded = fxsparse.load(tmp_path / "model.safetensors", Repeated(), batch)
    assert torch.equal(loaded.eval()(*batch), gm.eval()(*batch))
    dense = fxsparse.dense_state_dict(gm)
    fresh = Repeated()
    assert dense.keys() == fresh.state_dict().keys()
    fresh.load_state_dict(dense)
    torch.testing.assert_close(fresh(*batch), gm(*batch))


def test_other_dtypes_are_refused_with_what_to_do(tmp_path: Path) -> None:
    family, gm = traced("opt")
    fxsparse.save(fxsparse.rewrite(gm, "nm-masks"), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has torch.float32 where the model has torch.bfloat16; call model.to"):
        fxsparse.load(tmp_path / "model.safetensors", family.model.bfloat16(), kwargs=family.make_batch(labels=False))


# --- dense weights, or a refusal --------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(16, 16), nn.Linear(16, 16, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


def test_a_branch_beside_a_tied_embedding_has_no_dense_weight() -> None:
    ids = torch.randint(16, (4, 8))
    passes = "low-rank{rank=2,start=0.0,layers=[head]}"
    for tied in (True, False):
        gm = fxsparse.rewrite(Tied(tied), passes, (ids,))
        with torch.no_grad():
            dict(gm.named_parameters())[f"{'embedding' if tied else 'head'}.weight_up"].normal_()
        if tied:
            with pytest.raises(CheckpointError, match=r"embedding reads the same weight without it"):
                fxsparse.dense_state_dict(gm)
            continue
        plain = Tied(tied)
        plain.load_state_dict(fxsparse.dense_state_dict(gm))
        torch.testing.assert_close(plain(ids), gm(ids))


@pytest.mark.parametrize(
    "passes", ["gates{target=0.3}", "gates{score=magnitude,target=0.3}", "drop-dims{fraction=0.5}"]
)
def test_gates_have_no_dense_weights(passes: str) -> None:
    gm = fxsparse.rewrite(traced("opt")[1], passes)
    with pytest.raises(CheckpointError, match="materialize"):
        fxsparse.dense_state_dict(gm)


@pytest.mark.parametrize("before", ["", "nm-masks{keep_first=false},"])
def test_a_block_at_several_places_has_no_dense_weights_once_a_place_is_dropped(before: str) -> None:
    """The original would load them and compute the place that was dropped."""
    spec = Spec(blocks=3, sharing="blocks")
    gm = fxsparse.rewrite(build(spec), f"{before}drop-layers{{indices=[1]}}", kwargs=batch_of(spec))
    with pytest.raises(CheckpointError, match="share all weights with layers that stay"):
        fxsparse.dense_state_dict(gm)
    spec = Spec(blocks=3, sharing="weights")  # of the MLPs alone
    gm = fxsparse.rewrite(build(spec), f"{before}drop-layers{{indices=[1]}}", kwargs=batch_of(spec))
    assert fxsparse.dense_state_dict(gm).keys() < build(spec).state_dict().keys()


@pytest.mark.parametrize("passes", ["multiplex{n=2}", "multiplex{n=2},nm-masks{keep_first=false,keep_head=false}"])
def test_what_multiplexing_added_is_left_out(passes: str) -> None:
    family, base = traced("bert")
    dense = fxsparse.dense_state_dict(fxsparse.rewrite(base, passes))
    assert dense.keys() == family.model.state_dict().keys()


# --- versions ---------------------------------------------------------------------------------------------------------


def rewritten_record(path: Path, change: Any) -> None:
    """Writes a file again whose record was changed on purpose, with checksums that are right."""
    file = stored.read(path)
    record = json.loads(file.texts["fxsparse"])
    change(record)
    tensors = {name: tensor.clone() for name, tensor in file.tensors.items()}
    stored.write(path, tensors, {**file.texts, "fxsparse": json.dumps(record)})


def test_formats_older_are_read_newer_refused_and_unknown_fields_kept(tmp_path: Path) -> None:
    family, base = traced("opt")
    gm, path = fxsparse.rewrite(base, "nm-masks"), tmp_path / "model.safetensors"
    fxsparse.save(gm, path)
    file = stored.read(path)
    old = json.loads(file.texts["fxsparse"])
    del old["format"]
    save_file(
        {name: tensor.clone() for name, tensor in file.tensors.items()}, tmp_path / "old", {"fxsparse": json.dumps(old)}
    )
    assert record_of(fxsparse.load(tmp_path / "old", traced("opt")[1])) == record_of(gm)

    def add(record: dict[str, Any]) -> None:
        record["hardware"] = {"of": "later"}
        record["weights"][0]["scale"] = 2

    rewritten_record(path, add)
    again = fxsparse.load(path, traced("opt")[1])
    fxsparse.save(again, path)
    record = json.loads(stored.read(path).texts["fxsparse"])
    assert record["hardware"] == {"of": "later"} and record["weights"][0]["scale"] == 2

    rewritten_record(path, lambda record: record.update(format=99, version="9.1"))
    with pytest.raises(CheckpointError, match=r"format 99.*install fxsparse 9\.1 or later"):
        fxsparse.load(path, family.model)


def test_the_one_wrong_entry_of_a_long_list_is_named() -> None:
    notes = ["read"] * 1000
    assert Record.from_json(json.dumps({"notes": notes})).notes == tuple(notes)
    notes[700] = 7  # type: ignore[call-overload]
    with pytest.raises(CheckpointError, match=r"record\.notes\[700\] must be a text, not 7"):
        Record.from_json(json.dumps({"notes": notes}))
