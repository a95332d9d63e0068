"""Modules made of rewritten graphs in training: schedules drive them as they drive the graph, step for step."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.optim.swa_utils import AveragedModel

import fxsparse
from fxsparse.errors import OptionError, RewriteError
from fxsparse.modules.sites import STARTED, module_sites
from tests.support.families import Family
from tests.support.traced import traced

STEPS = 6


def pair(name: str, passes: str) -> tuple[Family, GraphModule, nn.Module]:
    """A rewritten graph in evaluation mode, so that nothing is random, and the module of a copy of it."""
    family, base = traced(name)
    gm = fxsparse.rewrite(base, passes)
    twin = copy.deepcopy(gm)
    return family, gm.eval(), fxsparse.to_module(twin, family.model).eval()


def train(model: nn.Module, batches: list[dict[str, Any]], run: Any = None, total: int = STEPS) -> fxsparse.Schedule:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = fxsparse.Schedule(model, optimizer, total_steps=total)
    for batch in batches:
        optimizer.zero_grad()
        (model if run is None else run)(**batch).loss.backward()
        optimizer.step()
        schedule.step()
    return schedule


RECIPES = {
    "SLoPe": "nm-masks{pattern=2:4},double-prune{every=2},low-rank{rank=2,start=0.5}",
    "SR-STE": "nm-masks{pattern=2:4,storage=masked,dynamic=true,every=2,decay=0.02}",
    "transposable": "nm-masks{pattern=2:4,storage=masked,dynamic=true,transposable=true},low-rank{rank=2,start=0.3}",
    "dense with lazy branches": "low-rank{rank=3,start=0.5,layers=*}",
}


@pytest.mark.parametrize(
    "name, recipe",
    [
        ("gpt2", "SLoPe"),
        ("gpt2", "SR-STE"),
        ("opt", "SLoPe"),
        ("bert", "transposable"),
        ("opt", "dense with lazy branches"),
    ],
)
def test_a_schedule_drives_a_module_as_the_graph(name: str, recipe: str) -> None:
    family, gm, module = pair(name, RECIPES[recipe])
    start = {key: tensor.clone() for key, tensor in gm.state_dict().items()}
    batches = [family.make_batch(batch=3) for _ in range(STEPS)]
    train(gm, batches)
    train(module, batches)
    theirs, ours = gm.state_dict(), module.state_dict()
    shared = theirs.keys() & ours.keys()
    assert len(shared) > 10
    for key in shared:
        torch.testing.assert_close(
            ours[key], theirs[key], rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )
    changed = [key for key in shared if not torch.equal(start[key], ours[key])]
    assert any(key.endswith(("_column_mask", "_mask")) for key in changed) or "dense" in recipe
    if "low-rank" in RECIPES[recipe]:
        assert ours[STARTED].all() and any(key.endswith("_up") for key in changed)
        assert all(site.form.started for site in module_sites(module))
    assert fxsparse.explain(module) == fxsparse.explain(gm)


def test_a_pull_on_tied_weights_counts_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(torch.tanh(self.first(x)))
            return y

    model, x = Tied(), torch.randn(4, 16)
    gm = fxsparse.rewrite(
        model, "nm-masks{keep_first=false,keep_head=false,storage=masked,dynamic=true,decay=0.5}", (torch.randn(3, 16),)
    )
    module: Any = fxsparse.to_module(copy.deepcopy(gm), model)
    for each in (gm, module):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        schedule = fxsparse.Schedule(each, optimizer, total_steps=3)
        for _ in range(3):
            optimizer.zero_grad()
            each(x).pow(2).sum().backward()
            optimizer.step()
            schedule.step()
    torch.testing.assert_close(module.first.weight, gm.first.weight)
    assert torch.equal(module.first.weight_mask, module.second.weight_mask)


# --- whether branches have started ------------------------------------------------------------------------------------

LAZY = "nm-masks{pattern=2:4},low-rank{rank=2,start=0.5}"


def test_started_branches_are_part_of_the_state() -> None:
    family, gm, module = pair("opt", LAZY)
    fresh = copy.deepcopy(module)
    batches = [family.make_batch(batch=2) for _ in range(STEPS)]
    train(module, batches)
    train(gm, batches)
    batch = family.make_batch(batch=3)
    for state in (module.state_dict(), gm.state_dict()):
        loaded = copy.deepcopy(fresh)
        assert not any(site.form.started for site in module_sites(loaded))
        loaded.load_state_dict(state)
        torch.testing.assert_close(loaded(**batch).loss, module(**batch).loss)
        assert not torch.equal(loaded(**batch).loss, fresh(**batch).loss)
    old = {key: tensor for key, tensor in fresh.state_dict().items() if key != STARTED}
    copy.deepcopy(fresh).load_state_dict(old)  # checkpoints of earlier versions


def test_flags_written_in_place_are_followed_at_the_next_call() -> None:
    family, _, module = pair("opt", LAZY)
    average = AveragedModel(module, use_buffers=True)
    batches = [family.make_batch(batch=2) for _ in range(STEPS)]
    train(module, batches)
    average.update_parameters(module)
    batch = family.make_batch(batch=3)
    torch.testing.assert_close(average(**batch).loss, module(**batch).loss)
    assert all(site.form.started for site in module_sites(average.module))


def test_a_run_that_is_resumed_equals_one_that_is_not() -> None:
    family, _, module = pair("opt", "nm-masks,double-prune{every=2},low-rank{rank=2,start=0.5}")
    batches = [family.make_batch(batch=2) for _ in range(STEPS)]
    whole = copy.deepcopy(module)
    train(whole, batches)
    for stop in (2, 4):  # before and after branches start
        first, second = copy.deepcopy(module), copy.deepcopy(module)
        optimizer = torch.optim.AdamW(first.parameters(), lr=1e-2, weight_decay=0.1)
        schedule = fxsparse.Schedule(first, optimizer, total_steps=STEPS)
        again = torch.optim.AdamW(second.parameters(), lr=1e-2, weight_decay=0.1)
        resumed = fxsparse.Schedule(second, again, total_steps=STEPS)
        for step, batch in enumerate(batches):
            if step == stop:
                second.load_state_dict(first.state_dict())
                again.load_state_dict(optimizer.state_dict())
                resumed.load_state_dict(schedule.state_dict())
                first, optimizer, schedule = second, again, resumed
            optimizer.zero_grad()
            first(**batch).loss.backward()
            optimizer.step()
            schedule.step()
        for key, tensor in whole.state_dict().items():
            assert torch.equal(first.state_dict()[key], tensor), key


def test_a_new_choice_of_tensors_needs_the_graph() -> None:
    family, base = traced("opt")
    gm = fxsparse.rewrite(base, "select-tensors{rho=0.6}")
    module = fxsparse.to_module(gm, family.model)
    with pytest.raises(RewriteError, match="select-tensors: modules go on training the tensors chosen last"):
        fxsparse.Schedule(module, torch.optim.SGD(module.parameters()), total_steps=3)
    static = fxsparse.to_module(fxsparse.rewrite(base, "select-tensors{tensors=*fc1*}"), family.model)
    fxsparse.Schedule(static, torch.optim.SGD(static.parameters()), total_steps=3).step()
    with pytest.raises(OptionError, match="holds none of the graph module's parameters"):
        fxsparse.Schedule(static, torch.optim.SGD(nn.Linear(4, 4).parameters()), total_steps=3)


@pytest.mark.parametrize("form", ["graph", "module"])
def test_an_optimizer_of_matrices_on_compressed_values_is_warned_of(form: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))

    def schedule(passes: str, kind: type[torch.optim.Optimizer]) -> fxsparse.Schedule:
        gm = fxsparse.rewrite(model, passes, (torch.randn(3, 16),))
        rewritten = gm if form == "graph" else fxsparse.to_module(gm, model)
        matrices = [parameter for parameter in rewritten.parameters() if parameter.dim() == 2]
        return fxsparse.Schedule(rewritten, kind(matrices, lr=1e-3), total_steps=2)  # type: ignore[call-arg]

    with pytest.warns(UserWarning, match=r"Muon works on matrices, and 2\.weight_values are none.*AdamW"):
        schedule("nm-masks", torch.optim.Muon)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule("nm-masks{storage=masked}", torch.optim.Muon)
        schedule("nm-masks", torch.optim.AdamW)


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def choices(compiled: Any) -> set[str]:
    return {line.split()[0] for line in fxsparse.explain(compiled).splitlines() if "weight_values" in line}


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_module_is_lowered_without_graph_breaks_and_starts_its_branches() -> None:
    family, gm, module = pair("llama", "nm-masks{pattern=2:4},double-prune{every=2},low-rank{rank=2,start=0.5}")
    fast = torch.compile(module, backend="fxsparse", options={"compiler": "aot_eager"}, fullgraph=True)
    batches = [family.make_batch(batch=3) for _ in range(STEPS)]
    train(gm, batches)
    train(module, batches, run=fast)
    ours, theirs = module.state_dict(), gm.state_dict()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    assert {"nm_linear", "nm_linear_low_rank", "nm_linear_grad_input", "nm_linear_grad_values"} <= choices(fast)
    assert ours[STARTED].all()


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_frozen_compiled_module_is_lowered_like_its_graph() -> None:
    family, gm, module = pair("gpt2", "nm-masks{pattern=2:4}")
    sites = []
    batch = family.make_batch(batch=3, labels=False)
    for model in (gm, module):
        if model is gm:
            batch = family.make_batch(batch=3)
        torch._dynamo.reset()
        fast = torch.compile(model, backend="fxsparse", options={"compiler": "aot_eager"})
        with torch.no_grad():
            torch.testing.assert_close(fast(**batch).logits, model(**batch).logits)
        sites.append(sorted(line for line in fxsparse.explain(fast).splitlines() if "weight_values" in line))
    assert sites[0] == sites[1] and len(sites[0]) >= 4


@pytest.mark.usefixtures("fresh_dynamo")
def test_weights_read_by_their_module_compile_whole() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    model, x = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(32, 8)), torch.randn(3, 5, 32)
    module = fxsparse.to_module(fxsparse.rewrite(model, "nm-masks", (x,)), model).train()
    fast = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(fast(x), module(x), rtol=1e-5, atol=1e-5)
