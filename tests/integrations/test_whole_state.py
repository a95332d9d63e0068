"""The state of a training is whole: it resumes bit for bit, in any order of loading; copies lose nothing."""

from __future__ import annotations

import copy
import io
import itertools
import os
import pickle
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fxsparse
from fxsparse.errors import CheckpointError, RewriteError
from fxsparse.graph import live
from fxsparse.graph.record import record_of
from fxsparse.passes.nm.branch import Branch
from fxsparse.passes.structured.hard_concrete import gate_names
from tests.support.recipes import RECIPES, TOTAL, Training, batch, language

WHOLE_MATRIX = os.environ.get("FXSPARSE_WHOLE_MATRIX") == "1"
"""Every order of loading at one step and a few at every step, instead of a sample."""

EVENTS = ("model", "optimizer", "scheduler", "build", "schedule")
ORDERS = [order for order in itertools.permutations(EVENTS) if order.index("build") < order.index("schedule")]
SAMPLE = [ORDERS[0], ORDERS[-1], ("optimizer", "build", "schedule", "scheduler", "model"), ORDERS[31]]
"""Each recipe resumes in two of them."""


def resumed(recipe: str, saved: dict[str, Any], order: tuple[str, ...]) -> Training:
    training = Training.start(RECIPES[recipe])
    for name in order:
        if name == "build":
            training.build_schedule()
        else:
            training.parts()[name].load_state_dict(copy.deepcopy(saved[name]))
    return training


def same(ours: Any, theirs: Any) -> bool:
    """Whether states have the same keys and equal values."""
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    return torch.equal(ours.nan_to_num(-1), theirs.nan_to_num(-1)) if isinstance(ours, torch.Tensor) else ours == theirs


@pytest.mark.parametrize("recipe", RECIPES)
def test_any_order_of_loading_continues_bit_for_bit(recipe: str) -> None:
    whole = Training.start(RECIPES[recipe])
    whole.build_schedule()
    states, losses = {}, []
    stops = range(1, TOTAL) if WHOLE_MATRIX else (3, 10, 14)
    for stop in stops:
        losses += whole.run(stop)
        states[stop] = whole.state()
    losses += whole.run(TOTAL)
    expected = whole.gm.state_dict()
    turn = list(RECIPES).index(recipe) % 2
    resumptions = list(zip((14, 3 + 7 * turn), SAMPLE[turn::2], strict=True))
    if WHOLE_MATRIX:
        resumptions = [*itertools.product((10,), ORDERS), *itertools.product(stops, SAMPLE)]
    for stop, order in resumptions:
        training = resumed(recipe, states[stop], order)
        assert training.run(TOTAL) == losses[stop:], (stop, order)
        for name, tensor in training.gm.state_dict().items():
            assert torch.equal(tensor, expected[name]), (stop, order, name)
        assert record_of(training.gm).text == record_of(whole.gm).text
        assert training.schedule is not None and whole.schedule is not None
        assert same(training.schedule.state_dict(), whole.schedule.state_dict())


def started(recipe: str = "branches", steps: int = TOTAL) -> Training:
    training = Training.start(RECIPES[recipe])
    training.build_schedule()
    training.run(steps)
    return training


@pytest.mark.parametrize("recipe", ["branches", "dense-branches"])
def test_an_optimizer_built_without_the_branches_trains_them(recipe: str) -> None:
    whole = started(recipe, 12)
    fresh = RECIPES[recipe].rewrite()
    fresh.load_state_dict(whole.gm.state_dict())
    branches = {name for site in live.sites(fresh, Branch) for name in (site.down, site.up)}
    others = [parameter for name, parameter in fresh.named_parameters() if name not in branches]
    training = Training(RECIPES[recipe], fresh, torch.optim.SGD(others, lr=0.1), whole.scheduler)
    training.build_schedule()
    assert training.schedule is not None and whole.schedule is not None
    training.schedule.load_state_dict(whole.schedule.state_dict())
    before = {name: fresh.get_parameter(name).detach().clone() for name in branches}
    training.run(13)
    assert branches and not any(torch.equal(fresh.get_parameter(name), before[name]) for name in branches)


def test_a_state_without_flags_starts_the_branches_that_were_trained() -> None:
    """As state dicts of earlier versions are."""
    whole = started()
    old = {name: tensor for name, tensor in whole.gm.state_dict().items() if name != "low_rank_started"}
    assert len(old) + 1 == len(whole.gm.state_dict())
    fresh = RECIPES["branches"].rewrite()
    waiting = copy.deepcopy(fresh.state_dict())
    fresh.load_state_dict(old)
    expected = whole.gm(**batch(1))["logits"]
    assert torch.equal(fresh(**batch(1))["logits"], expected)
    assert record_of(fresh).text == record_of(whole.gm).text
    del waiting["low_rank_started"]
    again = RECIPES["branches"].rewrite()
    again.load_state_dict(waiting)
    assert not again.get_buffer("low_rank_started").any(), "untrained branches wait on"


def test_a_schedule_past_the_start_starts_the_branches_of_a_state_without_flags() -> None:
    whole = started(steps=10)  # the branches have started, and no step has trained them
    assert whole.schedule is not None and whole.gm.get_buffer("low_rank_started").all()
    old = {name: tensor for name, tensor in whole.gm.state_dict().items() if name != "low_rank_started"}
    state = whole.state()
    expected = whole.run(TOTAL)
    training = Training.start(RECIPES["branches"])
    training.build_schedule()
    training.gm.load_state_dict({**old, **{name: state["model"][name] for name in old}})
    for name in ("optimizer", "scheduler", "schedule"):
        training.parts()[name].load_state_dict(state[name])
    assert training.run(TOTAL) == expected


# --- averages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "use_buffers"),
    [
        *(("branches", False), ("gates", False), ("dims", False)),
        *itertools.product(("dense-branches", "tensors"), (False, True)),
    ],
)
def test_an_average_made_at_the_start_gets_what_starts_later(recipe: str, use_buffers: bool) -> None:
    training = Training.start(RECIPES[recipe])
    training.build_schedule()
    ema = AveragedModel(training.gm, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    expected = {name: parameter.detach().clone() for name, parameter in training.gm.named_parameters()}
    for step in range(1, TOTAL + 1):
        training.run(step)
        ema.update_parameters(training.gm)
        for name, parameter in training.gm.named_parameters():
            expected[name].lerp_(parameter.detach(), 1.0 if step == 1 else 0.1)
    oracle = RECIPES[recipe].rewrite()
    oracle.load_state_dict({**training.gm.state_dict(), **expected})
    again = AveragedModel(RECIPES[recipe].rewrite())
    again.load_state_dict(ema.state_dict())
    averaged, wanted, whole, loaded = (
        model.eval()(**batch(1))["logits"] for model in (ema, oracle, training.gm, again)
    )
    assert torch.equal(averaged, wanted) and torch.equal(loaded, averaged)
    assert not torch.equal(averaged, whole)


# --- copies and pickles -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["branches", "gates", "neurons", "mux-stages", "distill"])
def test_a_copy_trains_on_like_the_original(recipe: str) -> None:
    """Record, forms, sites and modes are in the copy; it shares nothing with the original."""
    whole = started(recipe, 14)
    saved = whole.state()
    twin = Training.start(RECIPES[recipe], copy.deepcopy(whole.gm))
    twin.build_schedule()
    for name in ("optimizer", "scheduler", "schedule"):
        twin.parts()[name].load_state_dict(saved[name])
    theirs = twin.run(TOTAL)
    assert theirs == whole.run(TOTAL)
    assert record_of(twin.gm).text == record_of(whole.gm).text
    for mode in (False, True):
        torch.manual_seed(0)
        expected = whole.gm.train(mode)(**batch(1))["loss"]
        torch.manual_seed(0)
        assert torch.equal(twin.gm.train(mode)(**batch(1))["loss"], expected)


def test_a_copy_has_the_hooks_of_the_original() -> None:
    x, calls = torch.randn(3, 4, requires_grad=True), []
    gm = fxsparse.trace(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), (x,))
    gm.register_forward_pre_hook(lambda *_: calls.append("before"))
    gm.register_forward_hook(lambda module, *_, **__: calls.append(module), with_kwargs=True)
    gm.register_full_backward_hook(lambda *_: calls.append("backward"))
    gm.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    for twin in (copy.deepcopy(gm), copy.copy(gm), fxsparse.rewrite(gm, "nm-masks{keep_first=false}")):
        twin(x).sum().backward()
        twin.state_dict()
        assert calls == ["before", twin, "backward", "saved"]
        calls.clear()


def test_a_shallow_copy_shares_parameters_and_not_the_graph() -> None:
    gm = RECIPES["branches"].rewrite()
    twin = copy.copy(gm)
    assert type(twin).__mro__[1] is type(gm).__mro__[1] and record_of(twin) == record_of(gm)
    assert all(a is b for a, b in zip(twin.parameters(), gm.parameters(), strict=True))
    training = Training.start(RECIPES["branches"], twin)
    training.build_schedule()
    training.run(TOTAL)
    assert "start=0.0" in record_of(twin).text and "start=0.0" not in record_of(gm).text


def test_pickles_are_refused_by_name(tmp_path: Any) -> None:
    gm = RECIPES["branches"].rewrite()
    for save in (pickle.dumps, lambda module: torch.save(module, io.BytesIO())):
        for module in (gm, nn.Sequential(gm)):
            with pytest.raises(CheckpointError, match=r"cannot be pickled.*fxsparse\.save\(gm, path\).*state_dict"):
                save(module)


def test_symbolic_tracing_is_refused_by_name() -> None:
    with pytest.raises(RewriteError, match=r"symbolic_trace.*record.*copy\.deepcopy\(gm\)"):
        torch.fx.symbolic_trace(RECIPES["branches"].rewrite())


# --- states of version 0.1.0 ------------------------------------------------------------------------------------------


def test_a_gated_training_of_version_0_1_0_resumes_bit_for_bit(tmp_path: Any) -> None:
    """It had taken gates out of the optimizer, held multipliers as scalars and saved whole optimizers of gates."""
    whole = started("gates", 6)
    saved = whole.state()
    multipliers = ["sparsity.lambda_1", "sparsity.lambda_2"]
    names = [name for name, _ in whole.gm.named_parameters()]
    gates = [name for name in names if name.endswith("_gate")]
    for name in multipliers:
        saved["model"][name] = saved["model"][name].squeeze()
    (group,) = saved["optimizer"]["param_groups"]
    numbers = [number for number, name in enumerate(names) if name not in (*gates, *multipliers)]
    group["params"] = list(range(len(numbers)))
    states = saved["optimizer"]["state"]
    saved["optimizer"]["state"] = {new: states[old] for new, old in enumerate(numbers)}
    (key,) = saved["schedule"]["events"]
    event = saved["schedule"]["events"][key]
    moments, order = event.pop("moments"), gate_names(whole.gm)
    assert len(moments) == len(order) + 2 and sorted(order) == sorted(gates)
    event["descent"] = {"state": {i: moments[name] for i, name in enumerate(order)}}
    event["ascent"] = {
        "state": {i: {k: v.squeeze() for k, v in moments[name].items()} for i, name in enumerate(multipliers)}
    }
    training = resumed("gates", saved, ("model", "build", "optimizer", "scheduler", "schedule"))
    assert training.run(TOTAL) == whole.run(TOTAL)
    save_file(saved["model"], tmp_path / "old.safetensors", {"fxsparse": record_of(whole.gm).to_json()})
    loaded = fxsparse.load(tmp_path / "old.safetensors", language(), kwargs=batch(1))
    assert torch.equal(loaded.get_parameter(multipliers[0]).detach(), saved["model"][multipliers[0]].view(1))


def test_an_optimizer_that_was_saved_without_waiting_branches_loads() -> None:
    whole = started("dense-branches", 6)
    branches = {id(p) for n, p in whole.gm.named_parameters() if n.endswith(("_down", "_up"))}
    old = torch.optim.AdamW([p for p in whole.gm.parameters() if id(p) not in branches])
    fresh = torch.optim.AdamW([p for p in whole.gm.parameters() if id(p) not in branches])
    for optimizer, steps in ((old, 1), (fresh, 0)):
        for _ in range(steps):
            whole.gm(**batch(1))["loss"].backward()
            optimizer.step()
    state = copy.deepcopy(old.state_dict())
    fxsparse.Schedule(whole.gm, fresh, total_steps=TOTAL)
    assert len(fresh.param_groups[0]["params"]) == len(state["param_groups"][0]["params"]) + len(branches)
    fresh.load_state_dict(state)
    for mine, theirs in zip(fresh.state.values(), old.state.values(), strict=True):
        assert same(mine, theirs)
    del state["param_groups"][0]["params"][0]
    with pytest.raises(ValueError, match="doesn't match the size"):
        fresh.load_state_dict(state)
