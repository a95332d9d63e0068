"""What varies while training runs: SR-STE's masks, column masks, lazy branches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import fxsparse
from fxsparse.errors import CheckpointError, OptionError
from fxsparse.graph.record import record_of
from fxsparse.ops.nm import Pattern, nm_mask
from fxsparse.passes import AddLowRankBranches, DoublePruneBackward, InsertNMMasks
from fxsparse.passes.nm.sparse_linear import sparse_linears
from tests.support.families import FAMILIES
from tests.support.oracle import masks_of


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4)
    )


def rewritten(passes: str, model: nn.Module | None = None) -> GraphModule:
    return fxsparse.rewrite(model or net(), passes, (torch.randn(3, 8),))


def step(gm: GraphModule, optimizer: torch.optim.Optimizer, schedule: fxsparse.Schedule, x: torch.Tensor) -> None:
    gm(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()


def test_sr_ste_equals_its_formula() -> None:
    """Zhou et al.: forward masked, gradient dense, plus decay times the pruned weights; then a new mask."""
    model = net()
    gm = rewritten("nm-masks{pattern=2:4,storage=masked,dynamic=true,decay=0.01,every=2}", copy.deepcopy(model))
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.3)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=8)
    oracle = copy.deepcopy(model)
    sparse = [weight.name for weight in record_of(gm).weights]
    assert sparse == ["2.weight", "4.weight"]
    masks = {name: nm_mask(oracle.get_parameter(name).detach().abs(), Pattern(2, 4)) for name in sparse}
    first = {name: mask.clone() for name, mask in masks.items()}
    for number in range(1, 9):
        x = torch.randn(5, 8)
        step(gm, optimizer, schedule, x)
        dense = {name: parameter.detach().clone().requires_grad_() for name, parameter in oracle.named_parameters()}
        used = {name: weight * masks[name] if name in masks else weight for name, weight in dense.items()}
        for name in masks:
            used[name].retain_grad()
        torch.func.functional_call(oracle, used, (x,)).square().mean().backward()
        with torch.no_grad():
            for name, parameter in oracle.named_parameters():
                grad = used[name].grad if name in masks else dense[name].grad
                if name in masks:
                    grad = grad + 0.01 * ~masks[name] * parameter
                parameter -= 0.3 * grad
            if number % 2 == 0:
                masks = {name: nm_mask(oracle.get_parameter(name).abs(), Pattern(2, 4)) for name in sparse}
    for name, parameter in oracle.named_parameters():
        torch.testing.assert_close(gm.get_parameter(name), parameter)
    for weight in record_of(gm).weights:
        assert torch.equal(masks_of(gm, weight)[0], masks[weight.name])
    assert any(not torch.equal(first[name], masks[name]) for name in sparse), "no mask ever moved"


def test_the_pull_is_added_once_under_accumulation_and_after_clipping() -> None:
    gm = rewritten("nm-masks{pattern=2:4,storage=masked,dynamic=true,decay=0.5}")
    optimizer = torch.optim.SGD(gm.parameters(), lr=1.0)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=1)
    weight, mask = gm.get_parameter("2.weight"), gm.get_buffer("2.weight_mask").clone()
    before = weight.detach().clone()
    for _ in range(3):
        (gm(torch.randn(5, 8)) * 0).sum().backward()  # three micro-batches without a gradient of their own
    optimizer.step()
    schedule.step()
    torch.testing.assert_close(weight.detach(), before - 0.5 * before * ~mask)


def test_transposable_dynamic_masks_stay_transposable() -> None:
    gm = rewritten("nm-masks{pattern=2:4,storage=masked,dynamic=true,transposable=true}")
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.5)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=5)
    before = gm.get_buffer("2.weight_mask").clone()
    for _ in range(5):
        step(gm, optimizer, schedule, torch.randn(5, 8))
    mask = gm.get_buffer("2.weight_mask")
    assert not torch.equal(mask, before)
    assert (mask.unflatten(1, (-1, 4)).sum(-1) == 2).all() and (mask.unflatten(0, (-1, 4)).sum(1) == 2).all()


@pytest.mark.parametrize(("every", "moves"), [(0, set()), (1, {1, 2, 3, 4, 5, 6}), (3, {3, 6})])
def test_column_masks_are_chosen_anew_on_their_steps_only(every: int, moves: set[int]) -> None:
    gm = rewritten(f"nm-masks,double-prune{{every={every}}}")
    optimizer = torch.optim.SGD(gm.parameters(), lr=2.0)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=6)
    name = "2.weight_column_mask"
    address, moved = gm.get_buffer(name).data_ptr(), set()
    for number in range(1, 7):
        before = gm.get_buffer(name).clone()
        nn.init.normal_(gm.get_parameter("2.weight_values"))
        step(gm, optimizer, schedule, torch.randn(5, 8))
        if not torch.equal(gm.get_buffer(name), before):
            moved.add(number)
        assert gm.get_buffer(name).data_ptr() == address, "compiled code would read the old buffer"
    assert moved == moves


@pytest.mark.parametrize("own_group", [False, True])
def test_lazy_branches_join_at_their_step_and_in_the_optimizer(own_group: bool) -> None:
    gm = rewritten("nm-masks,double-prune,low-rank{rank=2,start=0.5}")
    down = gm.get_parameter("2.weight_down")
    start = down.detach().clone()
    sparse = [parameter for name, parameter in gm.named_parameters() if not name.endswith(("_down", "_up"))]
    optimizer = torch.optim.AdamW(sparse if own_group else gm.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=6)
    for number in range(1, 7):
        step(gm, optimizer, schedule, torch.randn(5, 8))
        active = all(linear.has_branch for linear in sparse_linears(gm))
        assert active == (number >= 3)
        if number <= 3:
            assert torch.equal(down, start), "a waiting branch was decayed"
            assert down not in optimizer.state
    assert not torch.equal(down, start)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert id(down) in held and len(held) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert len(optimizer.param_groups) == 1
    assert "start=0.0" in record_of(gm).text


@pytest.mark.parametrize("total", [2, 40, 50])
def test_the_default_start_trains_branches_in_short_trainings_too(total: int) -> None:
    """0.99 of 50 steps and fewer rounds to all of them."""
    gm = rewritten("nm-masks,low-rank{rank=2}")
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=total)
    for number in range(1, total + 1):
        assert all(linear.has_branch for linear in sparse_linears(gm)) == (number == total)
        step(gm, optimizer, schedule, torch.randn(5, 8))
    assert gm.get_parameter("2.weight_up").abs().sum() > 0


def test_branches_that_start_after_the_last_step_are_not_trained() -> None:
    gm = rewritten("nm-masks,low-rank{rank=2,start=1.0}")
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=3)
    for _ in range(3):
        step(gm, optimizer, schedule, torch.randn(5, 8))
    assert gm.get_parameter("2.weight_up").abs().sum() == 0


def test_a_running_compile_takes_the_branches_up() -> None:
    gm = rewritten("nm-masks,low-rank{rank=2,start=0.5}")
    compiled = torch.compile(gm, backend="aot_eager")
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=4)
    for _ in range(4):
        compiled(torch.randn(5, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert gm.get_parameter("2.weight_up").abs().sum() > 0
    x = torch.randn(5, 8)
    torch.testing.assert_close(compiled(x), gm(x))


def test_default_is_the_last_hundredth() -> None:
    gm = rewritten("nm-masks,low-rank{rank=2}")
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.0)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=200)
    first = next(
        number for number in range(1, 201) if schedule.step() or any(linear.has_branch for linear in sparse_linears(gm))
    )
    assert first == 198


def test_dense_linears_can_have_branches_too() -> None:
    model = net()
    gm = rewritten('low-rank{rank=3,start=0.0,layers=["[24]"]}', model)
    assert len(record_of(gm).entries[0].rewritten) == 2
    x = torch.randn(5, 8)
    assert torch.equal(gm(x), model(x))
    nn.init.normal_(gm.get_parameter("2.weight_up"))
    branch = (
        nn.functional.linear(model[1](model[0](x)), gm.get_parameter("2.weight_up") @ gm.get_parameter("2.weight_down"))
        / 3
    )
    expected = model[6](model[5](model[4](model[3](model[2](model[1](model[0](x))) + branch))))
    torch.testing.assert_close(gm(x), expected)
    merged = net()
    merged.load_state_dict(fxsparse.dense_state_dict(gm))
    torch.testing.assert_close(merged(x), expected)


def test_a_transposed_dense_weight_merges_in_its_own_layout() -> None:
    family = FAMILIES["gpt2"]()
    batch = family.make_batch()
    gm = fxsparse.rewrite(family.model, [AddLowRankBranches(rank=3, start=0.0, layers="*c_*")], kwargs=batch).eval()
    for name, parameter in gm.named_parameters():
        if name.endswith("_up"):
            nn.init.normal_(parameter, std=0.2)
    merged = copy.deepcopy(family.model).eval()
    merged.load_state_dict(fxsparse.dense_state_dict(gm))
    torch.testing.assert_close(gm(**batch).logits, merged(**batch).logits, rtol=1e-4, atol=1e-5)


def test_what_a_schedule_refuses() -> None:
    gm = rewritten("nm-masks,double-prune")
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    with pytest.raises(OptionError, match="total_steps=0"):
        fxsparse.Schedule(gm, optimizer, total_steps=0)
    with pytest.raises(OptionError, match=r"gm\.parameters\(\)"):
        fxsparse.Schedule(gm, torch.optim.SGD(net().parameters(), lr=0.1), total_steps=3)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=3)
    with pytest.raises(CheckpointError, match="low-rank"):
        schedule.load_state_dict({"steps_done": 1, "total_steps": 3, "events": {"low-rank.0": {"at": 1}}})


def test_a_pass_of_others_can_schedule() -> None:
    from collections.abc import Iterable
    from dataclasses import dataclass
    from typing import ClassVar

    from fxsparse.passes import Change, Event, Pass, rewrote

    seen: list[str] = []

    class Log(Event):
        def before_step(self, step: int) -> None:
            seen.append(f"before {step}")

        def after_step(self, step: int) -> None:
            seen.append(f"after {step}")

        def state_dict(self) -> dict[str, object]:
            return {"seen": len(seen)}

        def load_state_dict(self, state: dict[str, object]) -> None:
            seen.append(f"loaded {state['seen']}")

    @dataclass(frozen=True)
    class Logged(Pass):
        name: ClassVar[str] = "test-logged"

        def rewrite(self, graph: GraphModule) -> Iterable[Change]:
            yield rewrote("", "logs")

        def schedule(self, graph: GraphModule, optimizer: torch.optim.Optimizer, total_steps: int) -> Iterable[Event]:
            yield Log()

    gm = rewritten("test-logged")
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=2)
    step(gm, optimizer, schedule, torch.randn(2, 8))
    state = schedule.state_dict()
    fxsparse.Schedule(gm, optimizer, total_steps=2).load_state_dict(state)
    assert seen == ["before 1", "after 1", "loaded 2"]


def test_double_prune_refuses_dynamic_masks_with_the_reason() -> None:
    with pytest.warns(UserWarning, match="mask is dynamic"):
        fxsparse.rewrite(
            net(), [InsertNMMasks(storage="masked", dynamic=True), DoublePruneBackward()], (torch.randn(3, 8),)
        )


def test_a_closure_computes_the_gradients_before_they_are_used() -> None:
    """Lightning hands the backward pass to the optimizer; masks, gates and their kin act on the gradients after it."""
    states = []
    for by_closure in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16), torch.nn.Linear(16, 4)
        )
        passes = "nm-masks{storage=masked,dynamic=true,decay=0.5}"
        gm, x = fxsparse.rewrite(model, passes, (torch.randn(3, 8),)), torch.randn(3, 8)
        optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
        schedule = fxsparse.Schedule(gm, optimizer, total_steps=2)

        def closure(gm: GraphModule = gm, x: torch.Tensor = x, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = gm(x).square().sum()
            loss.backward()
            return loss

        for _ in range(2):
            if not by_closure:
                closure()
            loss = optimizer.step(closure) if by_closure else optimizer.step()
            assert (loss is not None) == by_closure
            schedule.step()
        states.append(gm.state_dict())
    assert all(torch.equal(one, other) for one, other in zip(*(state.values() for state in states), strict=True))
