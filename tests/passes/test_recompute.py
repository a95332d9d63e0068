"""Blocks that are recomputed in the backward pass: what is kept, and that nothing else changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxsparse
from fxsparse.errors import OptionError, RewriteError
from fxsparse.graph.record import record_of
from tests.support.families import FAMILIES
from tests.support.traced import traced

FAMILIES_OF_BLOCKS = ["bert", "opt", "gpt2", "llama", "t5"]


def saved_bytes(model: Any, gm: nn.Module, batch: dict[str, Tensor]) -> int:
    """The bytes of all tensors but parameters and buffers that a forward pass keeps for the backward pass."""
    held = {tensor.untyped_storage().data_ptr() for tensor in (*gm.parameters(), *gm.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).loss
    total = sum(kept.values())
    del loss
    return total


def step(model: Any, gm: nn.Module, batch: dict[str, Tensor], seed: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and gradients of a training step, dropout included."""
    gm.zero_grad()
    torch.manual_seed(seed)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in gm.named_parameters() if p.grad is not None}


def same(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.equal(ours[0], theirs[0])
    assert ours[1].keys() == theirs[1].keys() and len(ours[1]) > 4
    for name, gradient in ours[1].items():
        assert torch.equal(gradient, theirs[1][name]), name


@pytest.mark.parametrize("name", FAMILIES_OF_BLOCKS)
def test_less_is_kept_and_gradients_are_the_same(name: str) -> None:
    """With dropout, at another batch size, and again after an evaluation."""
    family, plain = traced(name)
    gm = fxsparse.rewrite(copy.deepcopy(plain), "recompute")
    batch = family.make_batch(6, 8)
    assert saved_bytes(gm, gm, batch) < 0.4 * saved_bytes(plain, plain, batch)
    same(step(gm, gm, batch), step(plain, plain, batch))
    with torch.no_grad():
        assert torch.equal(gm.eval()(**batch).logits, plain.eval()(**batch).logits)
    gm.train(), plain.train()
    same(step(gm, gm, batch, 5), step(plain, plain, batch, 5))
    blocks = [change for change in record_of(gm).entries[-1].changes if change.rewritten]
    assert len(blocks) == {"t5": 4}.get(name, len([*_layers(family.model)]))


def _layers(model: nn.Module) -> nn.ModuleList:
    return max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)


def test_every_second_block() -> None:
    family, plain = traced("opt")
    batch = family.make_batch(4, 8)
    kept = [saved_bytes(fxsparse.rewrite(plain, f"recompute{{every={n}}}"), plain, batch) for n in (1, 2, 3)]
    assert kept[0] < kept[1] < kept[2] < saved_bytes(plain, plain, batch)
    entry = record_of(fxsparse.rewrite(plain, "recompute{every=2}")).entries[-1]
    assert [change.rewritten for change in entry.changes] == [True, False, True]


PASSES = {
    "slope": "nm-masks,double-prune{every=1},low-rank{rank=2,start=0.5}",
    "sr-ste": "nm-masks{storage=masked,dynamic=true}",
    "gates": "gates{score=magnitude,target=0.3}",
    "trained gates": "gates",
    "neurons": "select-neurons{omission=0.5,multiple=1}",
    "layers": "drop-layers{count=1}",
    "small": "gates{score=magnitude,target=0.3},materialize",
    "tensors": "select-tensors{last_layers=1}",
}


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES)
def test_it_goes_before_and_after_other_passes(passes: str, first: bool) -> None:
    """Training under a schedule is the same, and less is kept."""
    results = []
    for text in (passes, f"recompute,{passes}" if first else f"{passes},recompute"):
        family, gm = traced("opt")
        gm = fxsparse.rewrite(gm, text)
        optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
        schedule = fxsparse.Schedule(gm, optimizer, total_steps=4)
        losses = []
        for number in range(4):
            torch.manual_seed(number)
            batch = family.make_batch(4, 8)
            losses.append(step(gm, gm, batch)[0])
            optimizer.step()
            schedule.step()
        results.append((losses, saved_bytes(gm, gm, batch), gm))
    (losses, kept, plain), (ours, less, gm) = results
    assert losses == ours
    assert less < 0.6 * kept
    state = plain.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in gm.state_dict().items())


@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", "fxsparse"])
def test_compiled_code_keeps_as_little(backend: str) -> None:
    """The partitioner of AOTAutograd would keep more without the marks."""
    options = {"compiler": "aot_eager"} if backend == "fxsparse" else None
    results = []
    for passes in ("nm-masks", "nm-masks,recompute"):
        torch.manual_seed(0)
        batch = FAMILIES["opt"]().make_batch(4, 16)
        gm = fxsparse.rewrite(_without_dropout(), passes, kwargs=batch)
        compiled = torch.compile(gm, backend=backend, options=options)
        results.append((saved_bytes(compiled, gm, batch), step(compiled, gm, batch), step(gm, gm, batch)))
    (kept, _, plain), (less, ours, eager) = results
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    if backend != "fxsparse":  # aot_eager partitions without regard to what it keeps
        assert less < 0.7 * kept


def _without_dropout() -> nn.Module:
    """Compiled code draws other numbers than eager code."""
    model = FAMILIES["opt"]().model
    for module in model.modules():
        for option in ("p", "dropout"):
            if isinstance(getattr(module, option, None), float):
                setattr(module, option, 0.0)
    return model


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_model_with_checkpointing_on_is_recomputed(reentrant: bool) -> None:
    family = FAMILIES["llama"]()
    plain = fxsparse.rewrite(copy.deepcopy(family.model), "nm-masks", kwargs=family.make_batch())
    family.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    gm = fxsparse.rewrite(family.model, "nm-masks", kwargs=family.make_batch())
    batch = family.make_batch(3, 8)
    assert saved_bytes(gm, gm, batch) < 0.4 * saved_bytes(plain, plain, batch)
    same(step(gm, gm, batch), step(plain, plain, batch))
    assert "recomputed in the backward pass, because the model had checkpointing on" in fxsparse.explain(gm)
    again = fxsparse.rewrite(gm, "recompute")
    assert not record_of(again).entries[-1].rewritten
    assert {change.detail for change in record_of(again).entries[-1].changes} == {"recomputed already"}


def test_costs_name_what_is_computed_twice() -> None:
    _, plain = traced("opt")
    gm = fxsparse.rewrite(plain, "recompute")
    ours, before = fxsparse.count_flops(gm), fxsparse.count_flops(plain)
    blocks = sum(cost.forward for path, cost in before.modules.items() if path.startswith("model.decoder.layers."))
    top = sum(before.modules[f"model.decoder.layers.{number}"].forward for number in range(3))
    assert ours.recomputed == top > 0 and blocks > top
    assert ours.step == before.step + ours.recomputed and ours.forward == before.forward
    entry = record_of(gm).entries[-1]
    assert entry.after.step_flops == entry.before.step_flops + ours.recomputed
    assert "recomputed in the backward pass, up to" in fxsparse.explain(gm)


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    family, gm = traced("llama")
    gm = fxsparse.rewrite(gm, "nm-masks,recompute")
    fxsparse.save(gm, tmp_path / "model.safetensors")
    loaded = fxsparse.load(tmp_path / "model.safetensors", family.model, kwargs=family.make_batch())
    batch = family.make_batch(3, 8)
    same(step(loaded, loaded, batch), step(gm, gm, batch))
    assert saved_bytes(loaded, loaded, batch) == saved_bytes(gm, gm, batch)
    twin: GraphModule = copy.deepcopy(gm)
    assert saved_bytes(twin, twin, batch) == saved_bytes(gm, gm, batch)


def test_what_cannot_be_recomputed_is_refused() -> None:
    for every in (0, -1, True, 1.5):
        with pytest.raises(OptionError, match=f"every={every} must be a whole number of at least 1"):
            fxsparse.Pipeline([f"recompute{{every={every}}}".replace("True", "true")])
    _, gm = traced("sequential")
    with pytest.raises(RewriteError, match="has no stack of blocks"):
        fxsparse.rewrite(gm, "recompute")
