"""Masks that move while training runs: FST's dense last part, and Bi-Mask, against their formulas in plain torch."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxsparse
from fxsparse.errors import OptionError
from fxsparse.graph.record import record_of
from fxsparse.ops.nm import Pattern, nm_mask
from fxsparse.passes import DoublePruneBackward, InsertNMMasks
from fxsparse.passes.nm.rules import ColumnMask
from tests.support.oracle import masks_of

FST = "nm-masks{pattern=2:4,storage=masked,transposable=true,dynamic=true,decay=0.01,dense_after=0.6}"
BI_MASK = (
    "nm-masks{pattern=2:4,storage=masked,dynamic=true,decay=0.01},double-prune{every=1,permutations=20,permute_every=3}"
)


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4)
    )


def trained(gm: GraphModule, xs: list[Tensor], total: int, lr: float = 0.3) -> fxsparse.Schedule:
    optimizer = torch.optim.SGD(gm.parameters(), lr=lr)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=total)
    for x in xs:
        step(gm, optimizer, schedule, x)
    return schedule


def step(gm: GraphModule, optimizer: torch.optim.Optimizer, schedule: fxsparse.Schedule, x: Tensor) -> None:
    gm(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()


def is_transposable(mask: Tensor) -> bool:
    return bool((mask.unflatten(1, (-1, 4)).sum(-1) == 2).all() and (mask.unflatten(0, (-1, 4)).sum(1) == 2).all())


def test_the_last_part_is_dense_and_pruned_weights_live() -> None:
    """Ten steps: six sparse with transposable masks and the pull, four of the dense model, with all weights alive."""
    model, xs = net(), [torch.randn(5, 8) for _ in range(10)]
    gm = fxsparse.rewrite(copy.deepcopy(model), FST, (xs[0],))
    names = [weight.name for weight in record_of(gm).weights]
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.3)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=10)
    pointers = {name: gm.get_buffer(f"{name}_mask").data_ptr() for name in names}
    for number, x in enumerate(xs[:6], 1):
        assert all(is_transposable(gm.get_buffer(f"{name}_mask")) for name in names), number
        step(gm, optimizer, schedule, x)
    masks = {name: gm.get_buffer(f"{name}_mask") for name in names}
    assert all(mask.all() for mask in masks.values())
    assert {name: mask.data_ptr() for name, mask in masks.items()} == pointers, "compiled code reads the old buffer"

    oracle = net()
    oracle.load_state_dict({name: gm.get_parameter(name).detach() for name in oracle.state_dict()})
    live = fxsparse.dense_state_dict(gm)
    assert all((live[name] != 0).all() for name in names), "a pruned weight did not live on"
    dense = torch.optim.SGD(oracle.parameters(), lr=0.3)
    for x in xs[6:]:
        torch.testing.assert_close(gm(x), oracle(x))
        step(gm, optimizer, schedule, x)
        oracle(x).square().mean().backward()
        dense.step()
        dense.zero_grad()
    for name, value in oracle.state_dict().items():
        torch.testing.assert_close(fxsparse.dense_state_dict(gm)[name], value)
    assert all(gm.get_buffer(f"{name}_mask").all() for name in names)


@pytest.mark.parametrize("stop", [3, 6, 8])
def test_a_resumed_training_goes_on_bit_for_bit(stop: int, tmp_path: Path) -> None:
    model, xs = net(), [torch.randn(5, 8) for _ in range(10)]
    whole = fxsparse.rewrite(copy.deepcopy(model), FST, (xs[0],))
    trained(whole, xs, 10)
    first = fxsparse.rewrite(copy.deepcopy(model), FST, (xs[0],))
    schedule = trained(first, xs[:stop], 10)
    fxsparse.save(first, tmp_path / "model.safetensors")
    torch.save(schedule.state_dict(), tmp_path / "schedule.pt")

    second = fxsparse.load(tmp_path / "model.safetensors", net(), (xs[0],))
    optimizer = torch.optim.SGD(second.parameters(), lr=0.3)
    resumed = fxsparse.Schedule(second, optimizer, total_steps=10)
    resumed.load_state_dict(torch.load(tmp_path / "schedule.pt"))
    for x in xs[stop:]:
        step(second, optimizer, resumed, x)
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in second.state_dict().items())


def test_a_schedule_that_goes_back_prunes_again() -> None:
    gm = fxsparse.rewrite(net(), FST, (torch.randn(5, 8),))
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.3)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=10)
    start, state = schedule.state_dict(), copy.deepcopy(gm.state_dict())
    for _ in range(2):
        for number in range(1, 11):
            step(gm, optimizer, schedule, torch.randn(5, 8))
            assert gm.get_buffer("2.weight_mask").all() == (number >= 6)
        schedule.load_state_dict(start)
        gm.load_state_dict(state)


def test_rounding_never_ends_a_training_with_masks_that_nobody_trained() -> None:
    gm = fxsparse.rewrite(net(), FST.replace("0.6", "0.9"), (torch.randn(5, 8),))
    trained(gm, [torch.randn(5, 8) for _ in range(3)], 3)
    assert is_transposable(gm.get_buffer("2.weight_mask"))


def test_what_is_said_and_refused() -> None:
    gm = fxsparse.rewrite(net(), FST, (torch.randn(5, 8),))
    assert "transposable 2:4, magnitude, masked, dense from 60% of the steps on" in fxsparse.explain(gm)
    assert "dense_after=0.6" in record_of(gm).text
    for options in ({"dense_after": 0.0}, {"dense_after": 1.5}, {"dense_after": True}):
        with pytest.raises(OptionError, match=r"must be a number in \(0, 1\]"):
            InsertNMMasks(storage="masked", dynamic=True, **options)
    with pytest.raises(OptionError, match="needs the pruned weights alive"):
        InsertNMMasks(dense_after=0.5)


def columns(weight: Tensor, mask: Tensor, order: Tensor) -> Tensor:
    """Bi-Mask's backward mask for an order of the rows, element by element."""
    pruned, result = (weight * mask)[order], torch.zeros_like(mask)
    for start, column in itertools.product(range(0, len(order), 4), range(mask.shape[1])):
        best = pruned[start : start + 4, column].abs().sort(descending=True, stable=True).indices[:2]
        for place in best:
            result[order[start + place], column] = True
    return result & mask


def test_an_order_is_the_best_of_those_tried() -> None:
    weight = torch.randn(16, 24)
    mask = nm_mask(weight.abs(), Pattern(2, 4))
    rule = ColumnMask("2:4", permutations=30, seed=3)
    order = rule.order(weight * mask, mask)
    assert order is not None and sorted(order.tolist()) == list(range(16))
    chosen = rule(weight * mask, mask)
    assert torch.equal(chosen, columns(weight, mask, order))
    generator = torch.Generator().manual_seed(3)
    tried = [int(columns(weight, mask, torch.randperm(16, generator=generator)).sum()) for _ in range(30)]
    assert int(chosen.sum()) == max(tried) > min(tried)
    plain = int(columns(weight, mask, torch.arange(16)).sum())
    assert int(chosen.sum()) > plain


class BiMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, mask, backward_mask):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight, backward_mask)
        return x @ (weight * mask).t()

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight, backward_mask = ctx.saved_tensors
        return dy @ (weight * backward_mask), dy.t() @ x, None, None


def test_bi_mask_equals_its_formula() -> None:
    """Masks of every step, a backward mask in an order that is found anew every third, a dense dW with a pull."""
    model, xs = net(), [torch.randn(5, 8) for _ in range(7)]
    gm = fxsparse.rewrite(copy.deepcopy(model), BI_MASK, (xs[0],))
    assert len(record_of(gm).entries[1].rewritten) == 2
    names = [weight.name for weight in record_of(gm).weights]
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.3)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=7)
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    orders: dict[str, Tensor] = {}
    event = schedule.events["double-prune.1"]
    changed = 0
    for number, x in enumerate(xs):
        masks = {name: nm_mask(weights[name].abs(), Pattern(2, 4)) for name in names}
        if number % 3 == 0:
            found = {name: event.orders[name].clone() for name in names}
            changed += any(not torch.equal(found[name], orders[name]) for name in orders)
            orders = found
        backward = {name: columns(weights[name], masks[name], orders[name]) for name in names}
        for weight in record_of(gm).weights:
            mask, column_mask = masks_of(gm, weight)
            assert torch.equal(mask, masks[weight.name])
            assert torch.equal(mask & column_mask, backward[weight.name])
        leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
        h = x
        for index in (0, 2, 4, 6):
            name = f"{index}.weight"
            sparse = name in masks
            h = BiMask.apply(h, leaves[name], masks[name], backward[name]) if sparse else h @ leaves[name].t()
            h = h + leaves[f"{index}.bias"]
            h = h.tanh() if index < 6 else h
        torch.testing.assert_close(gm(x), h)
        h.square().mean().backward()
        for name, leaf in leaves.items():
            pull = 0.01 * ~masks[name] * weights[name] if name in masks else 0
            weights[name] = weights[name] - 0.3 * (leaf.grad + pull)
        step(gm, optimizer, schedule, x)
        for name, value in weights.items():
            torch.testing.assert_close(gm.get_parameter(name).detach(), value)
    assert changed, "no order was found anew"


def test_bi_mask_resumes_with_its_orders(tmp_path: Path) -> None:
    model, xs = net(), [torch.randn(5, 8) for _ in range(8)]
    whole = fxsparse.rewrite(copy.deepcopy(model), BI_MASK, (xs[0],))
    trained(whole, xs, 8)
    first = fxsparse.rewrite(copy.deepcopy(model), BI_MASK, (xs[0],))
    schedule = trained(first, xs[:5], 8)
    fxsparse.save(first, tmp_path / "model.safetensors")
    second = fxsparse.load(tmp_path / "model.safetensors", net(), (xs[0],))
    optimizer = torch.optim.SGD(second.parameters(), lr=0.3)
    resumed = fxsparse.Schedule(second, optimizer, total_steps=8)
    resumed.load_state_dict(copy.deepcopy(schedule.state_dict()))
    for x in xs[5:]:
        step(second, optimizer, resumed, x)
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in second.state_dict().items())


def test_bi_mask_ends_dense_as_well() -> None:
    gm = fxsparse.rewrite(net(), BI_MASK.replace("decay=0.01", "dense_after=0.5"), (torch.randn(5, 8),))
    trained(gm, [torch.randn(5, 8) for _ in range(6)], 6)
    plain = net()
    plain.load_state_dict(fxsparse.dense_state_dict(gm))
    x = torch.randn(5, 8)
    grads = []
    for module in (gm, plain):
        module.zero_grad()
        module(x).square().mean().backward()
        grads.append([module.get_parameter(f"{index}.weight").grad for index in (0, 2, 4, 6)])
    torch.testing.assert_close(*grads)


def test_orders_need_masked_weights() -> None:
    x = torch.randn(5, 8)
    with pytest.warns(UserWarning, match="use storage=masked"):
        fxsparse.rewrite(net(), [InsertNMMasks(), DoublePruneBackward(permutations=5)], (x,))
    static = fxsparse.rewrite(net(), "nm-masks{storage=masked},double-prune{permutations=5}", (x,))
    assert len(record_of(static).entries[1].rewritten) == 2
    for options in ({"permutations": -1}, {"permute_every": 0}):
        with pytest.raises(OptionError, match=f"{next(iter(options))}="):
            DoublePruneBackward(**options)


def test_the_recipe_of_bi_mask() -> None:
    masks, twice = fxsparse.recipe("bi-mask").passes
    assert isinstance(masks, InsertNMMasks) and masks.dynamic and masks.storage == "masked"
    assert twice == DoublePruneBackward(every=1, permutations=100, permute_every=100)
