"""Dimension drops: scores, masks and their ramp, and the smaller models they become."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxsparse
from fxsparse.errors import OptionError, RewriteError
from fxsparse.graph.record import record_of
from fxsparse.passes import DropDimensions, Materialize, Pipeline
from fxsparse.passes.structured.hard_concrete import gate_names, mask_name
from tests.support.families import FAMILIES
from tests.support.outputs import outputs
from tests.support.traced import traced

UNITS = ("hidden", "intermediate", "heads")


def masks(gm: GraphModule) -> dict[str, Tensor]:
    return {name: gm.get_buffer(mask_name(name)).bool() for name in gate_names(gm)}


@pytest.mark.parametrize("units", [("hidden",), UNITS], ids="+".join)
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "sequential"])
def test_one_shot_by_activation_and_materialized(name: str, units: tuple[str, ...]) -> None:
    family, gm = traced(name)
    calibration = [family.make_batch(batch=size) for size in (2, 3)]
    dropped = Pipeline([DropDimensions(0.5, units, score="activation", calibration=calibration)])(gm).eval()
    assert all(mask.sum() == len(mask) // 2 for mask in masks(dropped).values())
    small = Pipeline([Materialize()])(dropped)
    before, after = (sum(p.numel() for p in model.parameters()) for model in (dropped, small))
    assert after < 0.7 * before
    for batch in (1, 5):
        inputs = family.make_batch(batch=batch)
        for mine, its in zip(outputs(small, inputs), outputs(dropped, inputs), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)


class Block(nn.Module):
    def __init__(self, size: int, channels: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(size), nn.Linear(size, channels), nn.Linear(channels, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Stack(nn.Module):
    def __init__(self, size: int = 12, channels: int = 10, out: int = 5):
        super().__init__()
        self.first, self.last = nn.Linear(7, size), nn.Linear(size, out)
        self.blocks = nn.Sequential(*(Block(size, channels) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks(self.first(x)))


def by_hand(model: Stack, x: Tensor, hidden: Tensor, channels: list[Tensor]) -> Tensor:
    """The model on the open dimensions alone; closed ones get the gradient of those that stand for them."""

    def masked(y: Tensor, mask: Tensor) -> Tensor:
        return y - (y * ~mask).detach()

    y = masked(model.first(x), hidden)
    for block, mask in zip(model.blocks, channels, strict=True):
        k = hidden.sum()
        mean = y.sum(-1, keepdim=True) / k
        centred = y + mean * ~hidden - mean  # where closed, what a dimension would do from the mean on
        z = centred / (centred.square().sum(-1, keepdim=True) / k + block.norm.eps).sqrt()
        z = masked(z * block.norm.weight + block.norm.bias, hidden)
        y = y + masked(block.down(masked(block.up(z).relu(), mask)), hidden)
    return model.last(y)


@pytest.mark.parametrize("ramp", ["cubic", "exponential"])
def test_training_follows_platon(ramp: str) -> None:
    """Against PLATON by hand: importance, uncertainty, the ramp, and columns that come back."""
    model = Stack().double()  # AdamW's first steps go by the signs of gradients, however small
    plain = copy.deepcopy(model)
    text = f"drop-dims{{fraction=0.5,units=[hidden,intermediate],ramp={ramp},every=3,begin=0.1,end=0.8}}"
    gm = fxsparse.rewrite(model, text, (torch.randn(3, 7).double(),)).train()
    steps = 40
    first, second = (torch.optim.AdamW(each.parameters(), lr=3e-2) for each in (gm, plain))
    schedule = fxsparse.Schedule(gm, first, total_steps=steps)
    groups: dict[str, list[nn.Linear]] = {"blocks.hidden_gate": [plain.first]}
    for i, block in enumerate(plain.blocks):
        groups["blocks.hidden_gate"].append(block.down)
        groups[f"blocks.{i}.intermediate_gate"] = [block.up]
    kept = {name: torch.ones(12 if "hidden" in name else 10, dtype=torch.bool) for name in groups}
    linears = {linear for makers in groups.values() for linear in makers}
    summed, mean, spread = ({linear: torch.zeros_like(linear.weight) for linear in linears} for _ in range(3))
    in_window = 0
    for step in range(1, steps + 1):
        x, target = torch.randn(8, 7).double(), torch.randn(8, 5).double()
        loss = (gm(x) - target).square().mean()
        channels = [kept[f"blocks.{i}.intermediate_gate"] for i in range(3)]
        expected = (by_hand(plain, x, kept["blocks.hidden_gate"], channels) - target).square().mean()
        torch.testing.assert_close(loss, expected, rtol=2e-4, atol=1e-5)
        for value, optimizer in ((loss, first), (expected, second)):
            optimizer.zero_grad()
            value.backward()
        if step <= 32:
            in_window += 1
            for linear in linears:
                summed[linear] += (linear.weight * linear.weight.grad).abs().detach()
        first.step()
        second.step()
        schedule.step()
        with torch.no_grad():
            for mine, its in zip(gm.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-5)
                its.copy_(mine)  # rounding does not add up
        if step <= 32 and (step % 3 == 0 or step == 32):
            progress = min(1, max(0, (step - 4) / 28))
            share = 0.5 * (1 - (1 - progress) ** 3) if ramp == "cubic" else 1 - 0.5**progress
            for linear in linears:
                window = summed[linear] / in_window
                mean[linear] = 0.85 * mean[linear] + 0.15 * window
                spread[linear] = 0.95 * spread[linear] + 0.05 * (window - mean[linear]).abs()
                summed[linear].zero_()
            in_window = 0
            for name, makers in groups.items():
                scores = sum((mean[linear] * spread[linear]).sum(1) for linear in makers)
                chosen = scores.argsort(descending=True)[: round(len(scores) * (1 - share))]
                kept[name] = torch.zeros_like(kept[name]).index_fill(0, chosen, True)
        own = masks(gm)
        assert own.keys() == kept.keys() and all(torch.equal(own[name], kept[name]) for name in own), step
    assert all(mask.sum() == len(mask) // 2 for mask in masks(gm).values())
    small = fxsparse.rewrite(gm.eval(), "materialize")
    x = torch.randn(6, 7).double()
    torch.testing.assert_close(small(x), gm(x), rtol=1e-5, atol=1e-5)


def test_what_is_masked_learns_and_comes_back() -> None:
    text = "drop-dims{fraction=0.5,every=1,begin=0.0,end=1.0,beta1=0.5,beta2=0.5}"
    gm = fxsparse.rewrite(Stack(), text, (torch.randn(3, 7),)).train()
    optimizer = torch.optim.SGD(gm.parameters(), lr=1e-2)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=40)

    def train(steps: int) -> Tensor:
        for _ in range(steps):
            optimizer.zero_grad()
            (gm(torch.randn(8, 7)) - 1).square().mean().backward()
            optimizer.step()
            schedule.step()
        return ~masks(gm)["blocks.hidden_gate"]

    closed = train(20)
    assert 4 <= closed.sum() <= 6
    gradient = gm.get_parameter("first.weight").grad
    assert gradient[closed].abs().sum(1).min() > 0
    with torch.no_grad():
        gm.get_parameter("first.weight")[closed] *= 30
    assert (closed & ~train(6)).any()


def test_half_of_the_hidden_dimensions_are_half_of_every_matrix() -> None:
    _, gm = traced("opt")
    small = Pipeline([DropDimensions(score="magnitude"), Materialize()])(gm)
    before = dict(gm.named_parameters())
    for name, parameter in small.named_parameters():
        if parameter.dim() == 2 and "layers" in name:
            assert 2 * parameter.numel() == before[name].numel()


def test_training_resumes_bit_for_bit(tmp_path: Any) -> None:
    def run(gm: GraphModule, steps: range, state: dict[str, Any] | None = None) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-2)
        schedule = fxsparse.Schedule(gm, optimizer, total_steps=12)
        if state is not None:
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
        for step in steps:
            torch.manual_seed(step)
            gm(torch.randn(8, 7)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return copy.deepcopy({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()})

    model = Stack()
    fresh = copy.deepcopy(model)
    text = "drop-dims{fraction=0.5,every=2}"
    whole = fxsparse.rewrite(model, text, (torch.randn(3, 7),)).train()
    part = copy.deepcopy(whole)
    run(whole, range(12))
    state = run(part, range(5))
    fxsparse.save(part, tmp_path / "half.safetensors")
    again = fxsparse.load(tmp_path / "half.safetensors", fresh, (torch.randn(3, 7),)).train()
    run(again, range(5, 12), state)
    assert masks(whole)["blocks.hidden_gate"].sum() == 6
    for (name, mine), its in zip(again.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(mine, its), name


def test_multiples_text_and_record() -> None:
    model = Stack(size=24)
    item = DropDimensions(0.4, score="random", multiple=8)
    assert Pipeline.parse(str(Pipeline([item]))) == Pipeline([item])
    gm = fxsparse.rewrite(model, [item], (torch.randn(3, 7),))
    assert masks(gm)["blocks.hidden_gate"].sum() == 16
    (change,) = (change for change in record_of(gm).entries[-1].changes if change.rewritten)
    assert change.site == "blocks" and "8 of 24 hidden dimensions dropped" in change.detail
    small = fxsparse.rewrite(gm, "materialize")
    assert small.get_parameter("last.weight").shape == (5, 16)
    entry = record_of(small).entries[-1]
    assert entry.after.parameters < entry.before.parameters and entry.after.step_flops < entry.before.step_flops


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, r"must be a number in \(0, 1\)"),
        ({"fraction": 1.0}, r"must be a number in \(0, 1\)"),
        ({"units": "attention"}, "units='attention' must be a list of any of hidden"),
        ({"score": "best"}, "one of platon, magnitude"),
        ({"ramp": "steep"}, "one of cubic, exponential"),
        ({"begin": 0.8, "end": 0.3}, "must not be above end"),
        ({"beta1": 1.0}, "must be a number in"),
        ({"every": 0}, "at least 1"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DropDimensions(**options)


def test_what_is_refused() -> None:
    example = (torch.randn(3, 7),)
    gm = fxsparse.rewrite(Stack(), "drop-dims", example)
    with pytest.raises(RewriteError, match="cannot follow drop-dims"):
        fxsparse.rewrite(gm, "gates")
    with pytest.raises(RewriteError, match="need calibration"):
        fxsparse.rewrite(Stack(), "drop-dims{score=activation}", example)
    with pytest.raises(RewriteError, match="found nothing of heads to drop"):
        fxsparse.rewrite(Stack(), "drop-dims{units=heads}", example)
