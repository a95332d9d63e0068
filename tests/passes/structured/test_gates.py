"""Gates on heads, channels and sublayers; and models that shrink by them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

import fxsparse
from fxsparse.analysis.structures import structures
from fxsparse.errors import OptionError, RewriteError
from fxsparse.graph.record import record_of
from fxsparse.passes import GateStructures, Materialize, Pipeline
from fxsparse.passes.structured import hard_concrete
from fxsparse.passes.structured.hard_concrete import gate_names, gated, mask_name
from tests.support.families import FAMILIES
from tests.support.outputs import outputs
from tests.support.traced import traced

UNITS = ("heads", "attention", "intermediate", "ffn", "hidden")
KINDS = [(unit,) for unit in UNITS] + [UNITS]


def _sites(gm: GraphModule) -> list[Any]:
    found = structures(gm)
    return [*found.attentions, *found.mlps]


def draw_masks(gm: GraphModule, share: float = 0.6) -> None:
    """Random masks with a few sublayers closed and, elsewhere, at least one unit left."""
    layers = {item.layer for item in gated(gm)}
    for name in gate_names(gm):
        mask = gm.get_buffer(mask_name(name))
        mask.copy_(torch.rand_like(mask) < share)
        if name not in layers and not mask.any():
            mask[torch.randint(len(mask), ())] = 1


def applicable(name: str, units: tuple[str, ...]) -> bool:
    return name != "sequential" or "intermediate" in units


@pytest.mark.parametrize("units", KINDS, ids="+".join)
@pytest.mark.parametrize("name", FAMILIES)
def test_materialized_equals_gated(name: str, units: tuple[str, ...]) -> None:
    if name == "sequential" and units != ("intermediate",):
        pytest.skip("has one MLP and no stream that it adds to")
    family, gm = traced(name)
    gates = Pipeline([GateStructures(units, score="random")])(gm).eval()
    draw_masks(gates)
    small = Pipeline([Materialize()])(gates)
    assert small.meta["fxsparse"].entries[-1].rewritten
    kept = sum(int(parameter.numel()) for parameter in small.parameters())
    assert kept < sum(int(parameter.numel()) for parameter in gates.parameters())
    for batch in (1, 3, 6):
        inputs = family.make_batch(batch=batch)
        for mine, its in zip(outputs(small, inputs), outputs(gates, inputs), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("score", ["magnitude", "activation"])
@pytest.mark.parametrize("name", ["bert", "opt", "gpt2", "llama", "t5"])
def test_the_count_of_the_tensors_is_the_accounting(name: str, score: str) -> None:
    family, gm = traced(name)
    linears = {part.linear.path for site in _sites(gm) for part in (*site.projections, site.output)}

    def count(module: GraphModule) -> int:
        named = module.named_parameters()
        return sum(parameter.numel() for name, parameter in named if name.rpartition(".")[0] in linears)

    before = count(gm)
    calibration = [family.make_batch(batch=3)]
    gates = Pipeline([GateStructures(UNITS, target=0.5, score=score, calibration=calibration)])(gm)
    total = sum(item.size for item in gated(gates))
    sparsity = hard_concrete.mask_sparsity(gates)
    assert any(0 < gates.get_buffer(mask_name(item.hidden)).mean() < 1 for item in gated(gates))
    assert sparsity >= 0.5
    small = Pipeline([Materialize()])(gates)
    assert before == total
    assert before - count(small) == round(sparsity * total)
    entry = record_of(small).entries[-1]
    assert entry.after.parameters == sum(parameter.numel() for parameter in small.parameters())
    assert entry.after.step_flops < entry.before.step_flops


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_no_unit_left_but_a_bias(name: str) -> None:
    family, gm = traced(name)
    gates = Pipeline([GateStructures(("heads", "intermediate"), score="random")])(gm).eval()
    for item in gated(gates):
        gates.get_buffer(mask_name(item.units)).zero_()
    small = Pipeline([Materialize()])(gates)
    batch = family.make_batch(batch=2)
    torch.testing.assert_close(outputs(small, batch)[1], outputs(gates, batch)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_materialized_trains_and_compiles(name: str) -> None:
    family, gm = traced(name)
    gates = Pipeline([GateStructures(score="magnitude", target=0.4)])(gm).eval()
    small = Pipeline([Materialize()])(gates)
    compiled = torch.compile(small, backend="aot_eager", dynamic=True)
    for batch in (3, 5):
        inputs = family.make_batch(batch=batch)
        first, second = outputs(compiled, inputs)[0], outputs(gates, inputs)[0]
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
        first.backward()
        second.backward()
        names = dict(gates.named_parameters())
        same = [p for n, p in small.named_parameters() if names[n].shape == p.shape and p.grad is not None]
        assert same
        for n, parameter in small.named_parameters():
            if names[n].shape == parameter.shape and parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, names[n].grad, rtol=1e-3, atol=1e-5)
            parameter.grad = names[n].grad = None


def test_the_gate_is_a_hard_concrete_draw_shared_by_the_batch() -> None:
    family, gm = traced("opt")
    gates = Pipeline([GateStructures(("heads",), layers=("*layers.1.*",))])(gm)
    (item,) = gated(gates)
    log_alpha = gates.get_parameter(item.units)
    batch = family.make_batch(batch=3)
    gates.train()
    for module in gates.modules():
        module.training = False  # no dropout
    gates.training = True
    log_alpha.data.copy_(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    torch.manual_seed(3)
    loss = gates(**batch).loss
    loss.backward()
    torch.manual_seed(3)
    own = log_alpha.detach().clone().requires_grad_()
    u = torch.rand_like(own).clamp(1e-6, 1 - 1e-6)
    s = torch.sigmoid((u.log() - (1 - u).log() + own) / hard_concrete.BETA)
    z = (s * 1.2 - 0.1).clamp(0, 1)
    # By hand: the same z on the columns of the output projection that read each head.
    plain = copy.deepcopy(gm).eval()
    name = "model.decoder.layers.1.self_attn.out_proj.weight"
    weight = plain.get_parameter(name)
    scaled = (weight.detach().view(weight.shape[0], 4, -1) * z.view(1, 4, 1)).flatten(1)
    expected = torch.func.functional_call(plain, {name: scaled}, (), batch).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(log_alpha.grad, own.grad, rtol=1e-4, atol=1e-7)


def test_expected_sparsity_is_the_mean_over_draws() -> None:
    _, gm = traced("llama")
    gates = Pipeline([GateStructures(UNITS)])(gm)
    with torch.no_grad():
        for name in gate_names(gates):
            gates.get_parameter(name).uniform_(-2, 2)
    draws = []
    for _ in range(600):
        for name in gate_names(gates):
            keep = hard_concrete.probability(gates.get_parameter(name))
            gates.get_buffer(mask_name(name)).copy_(torch.rand_like(keep) < keep)
        draws.append(hard_concrete.mask_sparsity(gates))
    expected = float(hard_concrete.expected_sparsity(gates).detach())
    assert abs(sum(draws) / len(draws) - expected) < 0.02


def test_closing_stays_within_a_hundredth_of_the_target_where_units_are_fine() -> None:
    for name in ("bert", "llama", "t5"):
        _, gm = traced(name)
        gates = Pipeline([GateStructures(UNITS, target=0.1, score="random")])(gm)
        for target in (0.2, 0.45, 0.6, 0.8, 0.93):
            scores = {gate: torch.rand(len(gates.get_buffer(mask_name(gate)))) for gate in gate_names(gates)}
            for item in gated(gates):
                scores[item.layer] *= 0.2  # whole sublayers first, too large a step at the end
            reached = hard_concrete.close(gates, target, scores)
            assert target <= reached <= target + 0.01, (name, target)


@pytest.mark.parametrize(("target", "units"), [(0.3, UNITS[:4]), (0.6, UNITS[:4]), (0.6, UNITS)])
def test_training_reaches_the_target(target: float, units: tuple[str, ...]) -> None:
    family, gm = traced("bert")
    gates = Pipeline([GateStructures(units, target=target, every=10, warmup=0.3)])(gm)
    optimizer = torch.optim.AdamW(gates.parameters(), lr=1e-3)
    schedule = fxsparse.Schedule(gates, optimizer, total_steps=120)
    trained = [gates.get_parameter(name) for name in (*gate_names(gates), "sparsity.lambda_1", "sparsity.lambda_2")]
    for _ in range(120):
        loss = gates(**family.make_batch(batch=4)).loss + fxsparse.sparsity_loss(gates)
        loss.backward()
        optimizer.step()
        assert not any(parameter in optimizer.state for parameter in trained), "the schedule's optimizers train them"
        optimizer.zero_grad()
        schedule.step()
    assert abs(float(hard_concrete.expected_sparsity(gates).detach()) - target) < 0.1
    reached = hard_concrete.mask_sparsity(gates)
    largest = max(item.size for item in gated(gates)) / sum(item.size for item in gated(gates))
    assert target <= reached < target + max(0.01, largest)
    small = Pipeline([Materialize()])(gates.eval())
    batch = family.make_batch(batch=2)
    torch.testing.assert_close(outputs(small, batch)[0], outputs(gates, batch)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("units", [UNITS[:4], UNITS])
def test_projected_gates_meet_the_target_in_every_step(units: tuple[str, ...]) -> None:
    family, gm = traced("bert")
    gates = Pipeline([GateStructures(units, target=0.6, every=10, warmup=0.4, constraint="projection")])(gm)
    optimizer = torch.optim.AdamW(gates.parameters(), lr=1e-3)
    schedule = fxsparse.Schedule(gates, optimizer, total_steps=30)
    for step in range(30):
        target = float(gates.get_buffer("sparsity.target"))
        assert target == pytest.approx(0.6 * min(1, (step + 1) / 12))
        loss = gates(**family.make_batch(batch=4)).loss
        assert float(fxsparse.sparsity_loss(gates).detach()) == 0
        (loss + fxsparse.sparsity_loss(gates)).backward()
        optimizer.step()
        optimizer.zero_grad()
        reached = float(hard_concrete.expected_sparsity(gates).detach())
        assert reached == pytest.approx(target, abs=2e-4) or (reached > target and step < 3), "all open is above 0"
        schedule.step()
    values = torch.cat([gates.get_parameter(name).detach() for name in gate_names(gates)])
    assert values.std() > 0.1, "the gates are not all alike"
    assert hard_concrete.mask_sparsity(gates) >= 0.6


def test_what_would_change_the_sparsity_is_taken_out_of_the_gradient() -> None:
    _, gm = traced("llama")
    gm = Pipeline([GateStructures(UNITS, constraint="projection")])(gm)
    gates = [gm.get_parameter(name) for name in gate_names(gm)]
    own = torch.autograd.grad(hard_concrete.expected_sparsity(gm), gates)
    for gate in gates:
        gate.grad = torch.randn_like(gate)
    wanted = torch.cat([gate.grad.double() for gate in gates])
    normal = torch.cat([each.double() for each in own])
    wanted -= normal * (wanted @ normal) / (normal @ normal)
    hard_concrete.keep_sparsity(gm, gates)
    torch.testing.assert_close(torch.cat([gate.grad.double() for gate in gates]), wanted, rtol=1e-4, atol=1e-5)


def test_projected_gates_keep_what_the_loss_needs_in_a_short_training() -> None:
    """Of the channels of an MLP a quarter decides the loss."""

    class Needed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(16, 64), torch.nn.Linear(64, 16)

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden + self.down(torch.relu(self.up(hidden)))

    model, hidden = Needed(), torch.randn(64, 16)
    with torch.no_grad():
        model.down.weight[:, 16:] *= 0.1
    wanted = model(hidden).detach()
    gates = GateStructures(("intermediate",), target=0.7, warmup=0.4, constraint="projection")
    gm = fxsparse.rewrite(model, [gates], args=(hidden,))
    optimizer = torch.optim.AdamW(gm.parameters(), lr=0.0)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=60)
    for _ in range(60):
        (10 * torch.nn.functional.mse_loss(gm(hidden), wanted)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    (name,) = gate_names(gm)
    assert float(gm.get_buffer(mask_name(name))[:16].mean()) > 0.9


def test_a_materialized_model_is_saved_and_loaded(tmp_path: Any) -> None:
    family, gm = traced("llama")
    gates = Pipeline([GateStructures(UNITS, score="magnitude", target=0.5)])(gm).eval()
    small = Pipeline([Materialize()])(gates)
    fxsparse.save(small, tmp_path / "small.safetensors")
    fresh = FAMILIES["llama"]()
    loaded = fxsparse.load(tmp_path / "small.safetensors", fresh.model, kwargs=family.make_batch(batch=4)).eval()
    batch = family.make_batch(batch=3)
    assert all(torch.equal(a, b) for a, b in zip(outputs(loaded, batch), outputs(small, batch), strict=True))


@pytest.mark.parametrize("constraint", ["multipliers", "projection"])
def test_a_gated_training_resumes_bit_for_bit(constraint: Any, tmp_path: Any) -> None:
    def run(steps: int, gm: GraphModule, state: dict[str, Any] | None = None, first: int = 0) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-3)
        schedule = fxsparse.Schedule(gm, optimizer, total_steps=8)
        if state is not None:
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
        for step in range(first, first + steps):
            torch.manual_seed(step)
            loss = gm(**family.make_batch(batch=4)).loss + fxsparse.sparsity_loss(gm)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return {"optimizer": copy.deepcopy(optimizer.state_dict()), "schedule": copy.deepcopy(schedule.state_dict())}

    family, gm = traced("opt")
    gates = Pipeline([GateStructures(UNITS, every=2, constraint=constraint)])(gm)
    whole = copy.deepcopy(gates)
    run(8, whole)
    state = run(5, gates)
    fxsparse.save(gates, tmp_path / "half.safetensors")
    again = fxsparse.load(tmp_path / "half.safetensors", FAMILIES["opt"]().model, kwargs=family.make_batch(batch=4))
    again.train()
    run(3, again, state, first=5)
    for (name, mine), its in zip(again.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(mine, its), name


class MixerBlock(torch.nn.Module):
    """A norm, then a square linear beside an MLP."""

    def __init__(self, size: int):
        super().__init__()
        self.norm, self.mix = torch.nn.LayerNorm(size), torch.nn.Linear(size, size)
        self.up, self.down = torch.nn.Linear(size, 24), torch.nn.Linear(24, size)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.mix(y) + self.down(self.up(y).relu())


class Mixer(torch.nn.Module):
    """Blocks on a stream that is the model's input and output."""

    def __init__(self, size: int):
        super().__init__()
        self.blocks = torch.nn.Sequential(*(MixerBlock(size) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def test_a_stream_that_enters_and_leaves_the_model_keeps_its_width_outside() -> None:
    model = Mixer(20)
    gates = fxsparse.rewrite(model, "gates{units=hidden,score=random,target=0.4}", (torch.randn(3, 20),)).eval()
    small = fxsparse.rewrite(gates, "materialize")
    keep = gates.get_buffer("blocks.hidden_gate_mask").bool()
    assert 0 < keep.sum() < 20 and small.get_parameter("blocks.1.mix.weight").shape == (keep.sum(), keep.sum())
    x = torch.randn(5, 20)
    # By hand: the same blocks on the open dimensions alone.
    y = x[:, keep]
    for block in model.blocks:
        norm, mix, up, down = block.norm, block.mix, block.up, block.down
        z = torch.nn.functional.layer_norm(y, y.shape[1:], norm.weight[keep], norm.bias[keep])
        mixed = z @ mix.weight[keep][:, keep].T + mix.bias[keep]
        y = y + mixed + (z @ up.weight[:, keep].T + up.bias).relu() @ down.weight[keep].T + down.bias[keep]
    expected = torch.zeros(5, 20).index_copy(1, keep.nonzero().flatten(), y)
    torch.testing.assert_close(gates(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(small(x), expected, rtol=1e-5, atol=1e-5)


def test_an_operator_that_mixes_hidden_dimensions_is_named() -> None:
    class Sorted(Mixer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(-1)

    with pytest.raises(RewriteError, match=r"blocks: hidden dimensions: softmax .*does not keep them apart"):
        fxsparse.rewrite(Sorted(20), "gates{units=hidden,score=random}", (torch.randn(3, 20),))


def test_open_gates_change_nothing_and_hidden_ones_learn() -> None:
    for name in ("bert", "llama"):
        family, gm = traced(name)
        gates = Pipeline([GateStructures(("hidden",))])(gm)
        batch = family.make_batch(batch=3)
        assert torch.equal(outputs(gates.eval(), batch)[1], outputs(gm.eval(), batch)[1])
        gates.training = True
        outputs(gates, batch)[0].backward()
        (gate,) = {item.hidden for item in gated(gates)}
        assert gates.get_parameter(gate).grad.abs().sum() >= 0
        with torch.no_grad():
            gates.get_parameter(gate).zero_()
        gates.zero_grad()
        outputs(gates, batch)[0].backward()
        assert (gates.get_parameter(gate).grad != 0).sum() > 10  # of 32; the others were drawn as 0 or 1


def test_what_is_refused() -> None:
    _, gm = traced("opt")
    gates = Pipeline([GateStructures(score="magnitude")])(gm)
    with pytest.raises(RewriteError, match="gates: cannot follow gates"):
        Pipeline([GateStructures()])(gates)
    with pytest.raises(RewriteError, match="the order that works is gates,materialize"):
        Pipeline([Materialize()])(gm)
    with pytest.raises(RewriteError, match="above what trained gates can reach"):
        Pipeline([GateStructures(("heads",), target=0.999)])(gm)
    with pytest.raises(RewriteError, match="are not trained"):
        fxsparse.sparsity_loss(gates)
    with pytest.raises(RewriteError, match="has no gates"):
        fxsparse.sparsity_loss(gm)
    with pytest.raises(RewriteError, match="matches nothing"):
        Pipeline([GateStructures(layers=("*.nothing",))])(gm)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": ("tails",)}, r"units\[0\]='tails' must be one of heads"),
        ({"units": ()}, "not empty"),
        ({"target": 1.0}, "must be a number in"),
        ({"score": "best"}, "one of magnitude, activation, random"),
        ({"warmup": 2.0}, r"a number in \[0, 1\]"),
        ({"lr": 0.0}, "a number above 0"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        GateStructures(**options)
