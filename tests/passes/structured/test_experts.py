"""Gates on experts, and models without those that closed, against plain torch with fewer experts."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

import fxsparse
from fxsparse.analysis.experts import mixtures
from fxsparse.errors import RewriteError
from fxsparse.graph.record import record_of
from fxsparse.passes import GateStructures
from tests.support.experts import Mixture, gpt_oss, mixtral

BY_SIZE = "gates{units=[experts],target=0.35,score=magnitude}"
FORMS = [(form, transposed) for form in ("grouped", "gathered") for transposed in (False, True)]


@functools.cache
def _traced(form: str, transposed: bool, idle: int | None = None) -> tuple[Mixture, GraphModule]:
    torch.manual_seed(0)
    model = Mixture(form, transposed, idle)
    return model, fxsparse.trace(model, (torch.randn(3, 4, 12),))


def mixture(form: str, transposed: bool = False, idle: int | None = None) -> tuple[Mixture, GraphModule]:
    return copy.deepcopy(_traced(form, transposed, idle))


def with_few(model: Mixture, keep: Tensor) -> Mixture:
    """The oracle: the same model with some of its experts."""
    small = copy.deepcopy(model)
    for module, name in ((small.router, "weight"), (small.router, "bias"), (small, "up_proj"), (small, "down_proj")):
        setattr(module, name, torch.nn.Parameter(getattr(module, name).detach()[keep]))
    return small


def step(model: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def test_a_mixture_is_found_by_what_routes_its_rows() -> None:
    for form, transposed in FORMS:
        _, gm = mixture(form, transposed)
        (found,), left = mixtures(gm)
        assert (found.path, found.experts, found.chosen, found.router.path) == ("", 5, 2, "router") and not left
        assert [product.name for product in found.products] == ["up_proj", "down_proj"]
        assert found.per_expert == 24 * 16 * 2 + 16 + 1


@pytest.mark.parametrize(("form", "transposed"), FORMS)
def test_closed_experts_are_as_if_they_were_not_there(form: str, transposed: bool, tmp_path: Path) -> None:
    """Gated with masks, and taken out: outputs and gradients at another batch size, train and eval; save and load."""
    model, gm = mixture(form, transposed)
    gated = fxsparse.rewrite(copy.deepcopy(gm), BY_SIZE)
    assert [change.detail for change in record_of(gated).entries[-1].rewritten] == [
        "gates on experts, 3,925 parameters"
    ]
    keep = gated.get_buffer("experts_gate_mask").bool()
    sizes = sum(getattr(model, name).detach().square().flatten(1).sum(1) for name in ("up_proj", "down_proj"))
    assert int(keep.sum()) == 3 and set(sizes.argsort()[:2].tolist()) == set((~keep).nonzero().flatten().tolist())
    oracle = with_few(model, keep)
    small = fxsparse.rewrite(copy.deepcopy(gated), "materialize")
    assert record_of(small).entries[-1].rewritten[0].detail == "3 of 5 experts stay"
    assert {name: tuple(p.shape) for name, p in small.named_parameters()} == {
        name: tuple(p.shape) for name, p in oracle.named_parameters()
    }
    for mode in (True, False):
        x = torch.randn(5, 3, 12)
        y, dx = step(oracle.train(mode), x)
        for each in (gated, small):
            for one, other in zip(step(each.train(mode), x), (y, dx), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for name, parameter in oracle.named_parameters():
        torch.testing.assert_close(small.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-4)
    fxsparse.save(small, tmp_path / "small.safetensors")
    loaded = fxsparse.load(tmp_path / "small.safetensors", model, (torch.randn(3, 4, 12),))
    torch.testing.assert_close(loaded.eval()(x), small(x))


def test_gates_learn_and_close_and_are_taken_out() -> None:
    """Their gradient is that of the scores plus log z; as many stay as a token is routed to."""
    _, gm = mixture("grouped")
    gated = fxsparse.rewrite(gm, [GateStructures(units=("experts",), target=0.5, warmup=0.0, every=1)])
    optimizer = torch.optim.SGD(gated.parameters(), lr=0.01)
    schedule = fxsparse.Schedule(gated, optimizer, total_steps=30)
    before = gated.get_parameter("experts_gate").detach().clone()
    for _ in range(30):
        optimizer.zero_grad()
        (gated(torch.randn(4, 3, 12)).square().mean() + fxsparse.sparsity_loss(gated)).backward()
        optimizer.step()
        schedule.step()
    assert not torch.equal(gated.get_parameter("experts_gate"), before)
    keep = gated.get_buffer("experts_gate_mask").bool()
    assert int(keep.sum()) == 2
    gated.eval()
    x = torch.randn(5, 3, 12)
    small = fxsparse.rewrite(copy.deepcopy(gated), "materialize")
    torch.testing.assert_close(small(x), gated(x), rtol=1e-4, atol=1e-5)


def test_an_open_gate_scales_the_share_of_its_expert() -> None:
    """z times its softmax, shared out again; a closed one has no gradient and makes no NaN."""
    from fxsparse.passes.structured.nodes import _shifted

    scores, gate = torch.randn(6, 4), torch.tensor([1.0, 0.5, 0.0, 0.25], requires_grad=True)
    shares = scores.softmax(-1) * gate
    shifted = _shifted(scores, gate).softmax(-1)
    torch.testing.assert_close(shifted, shares / shares.sum(-1, keepdim=True))
    shifted.square().sum().backward()
    assert gate.grad is not None and gate.grad.isfinite().all() and gate.grad[2] == 0 and gate.grad[1] != 0
    assert _shifted(scores, torch.zeros(4)).softmax(-1).isfinite().all()


@pytest.mark.parametrize("target", [0.7, 0.9])
def test_a_target_that_leaves_a_router_too_few_is_refused(target: float) -> None:
    _, gm = mixture("grouped")
    with pytest.raises(RewriteError, match=r"above what can go, 0\.6, since a router chooses"):
        fxsparse.rewrite(gm, f"gates{{units=[experts],target={target},score=random}}")


def test_scores_by_activation_are_not_of_experts() -> None:
    _, gm = mixture("grouped")
    item = GateStructures(units=("experts",), score="activation", calibration=[torch.randn(3, 4, 12)])
    with pytest.raises(RewriteError, match="experts have no score by activation"):
        fxsparse.rewrite(gm, [item])


class Biased(Mixture):
    """Adds a bias to scores before it chooses."""

    def __init__(self) -> None:
        super().__init__("grouped", idle=1)


class Balanced(Mixture):
    """Has a loss of its router's scores too."""

    def __init__(self) -> None:
        super().__init__("grouped")

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.router(self.enter(x).flatten(0, 1)).logsumexp(-1, keepdim=True)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (Biased, "is between its router and topk: only a softmax may be"),
        (Balanced, "used more than once"),
        (functools.partial(Mixture, "every"), "no topk over the scores of a router routes its rows"),
        (functools.partial(Mixture, "grouped", top_k=5), "routed to 5 of 5 experts, so none can go"),
    ],
    ids=["biased", "balanced", "every", "all"],
)
def test_mixtures_that_cannot_lose_experts_say_why(build: Any, reason: str) -> None:
    torch.manual_seed(0)
    gm = fxsparse.trace(build(), (torch.randn(3, 4, 12),))
    assert not mixtures(gm)[0]
    with pytest.raises(RewriteError, match=reason):
        fxsparse.rewrite(gm, BY_SIZE)


# --- channels of experts ----------------------------------------------------------------------------------------------

CHANNELS = "gates{units=[intermediate],target=0.4,score=magnitude}"


def narrower(model: Mixture, keep: Tensor) -> Mixture:
    """The oracle: the same model with some channels of every expert."""
    small = copy.deepcopy(model)
    up, down = model._times(model.up_proj.detach())[..., keep], model._times(model.down_proj.detach())[:, keep]
    small.up_proj, small.down_proj = (torch.nn.Parameter(model._times(weight).contiguous()) for weight in (up, down))
    return small


@pytest.mark.parametrize(("form", "transposed"), [*FORMS, ("every", False), ("every", True)])
def test_closed_channels_are_as_if_they_were_not_there(form: str, transposed: bool, tmp_path: Path) -> None:
    model, gm = mixture(form, transposed)
    gated = fxsparse.rewrite(copy.deepcopy(gm), CHANNELS)
    assert record_of(gated).entries[-1].rewritten[0].detail == "gates on intermediate, 3,840 parameters"
    keep = gated.get_buffer("intermediate_gate_mask").bool()
    up, down = model._times(model.up_proj.detach()), model._times(model.down_proj.detach())
    sizes = up.square().sum((0, 1)) + down.square().sum((0, 2))
    assert set(sizes.argsort()[: int((~keep).sum())].tolist()) == set((~keep).nonzero().flatten().tolist())
    assert 0 < int((~keep).sum()) < 24
    stays, detail = keep, f"{int(keep.sum())} of 24 channels of every expert stay"
    if form == "grouped":  # whose products take rows of 16 bytes
        missing = -int(keep.sum()) % 4
        stays = keep.index_fill(0, (~keep).nonzero().flatten()[:missing], True)
        detail += f", and {missing} of weight 0, as grouped products take multiples of 4"
        assert missing
    oracle = narrower(model, stays)
    with torch.no_grad():
        oracle._times(oracle.down_proj)[:, ~keep[stays]] = 0
    small = fxsparse.rewrite(copy.deepcopy(gated), "materialize")
    assert record_of(small).entries[-1].rewritten[0].detail == detail
    for mode in (True, False):
        x = torch.randn(5, 3, 12)
        y, dx = step(oracle.train(mode), x)
        for each in (gated, small):
            for one, other in zip(step(each.train(mode), x), (y, dx), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for name, parameter in oracle.named_parameters():
        torch.testing.assert_close(small.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-4)
    fxsparse.save(small, tmp_path / "small.safetensors")
    loaded = fxsparse.load(tmp_path / "small.safetensors", model, (torch.randn(3, 4, 12),))
    torch.testing.assert_close(loaded.eval()(x), small(x))


class Mixing(Mixture):
    """Sorts the channels of an expert."""

    def _gathered(self, x: Tensor, scores: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        rows, expert = x.repeat_interleave(self.top_k, dim=0), chosen.flatten()
        rows = torch.bmm(self.up_proj[expert], rows.unsqueeze(-1)).squeeze(-1).sort(-1).values
        rows = torch.bmm(self.down_proj[expert], rows.unsqueeze(-1)).squeeze(-1)
        return (rows.view(*chosen.shape, -1) * weights[..., None]).sum(1)


class Joined(Mixture):
    """Adds to the channels what comes from elsewhere."""

    def _gathered(self, x: Tensor, scores: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        rows, expert = x.repeat_interleave(self.top_k, dim=0), chosen.flatten()
        rows = torch.bmm(self.up_proj[expert], rows.unsqueeze(-1)).squeeze(-1) + rows.sum(-1, keepdim=True)
        rows = torch.bmm(self.down_proj[expert], rows.unsqueeze(-1)).squeeze(-1)
        return (rows.view(*chosen.shape, -1) * weights[..., None]).sum(1)


@pytest.mark.parametrize(("kind", "reason"), [(Mixing, "only worked on one by one"), (Joined, "channels meet sum")])
def test_channels_that_cannot_go_say_why(kind: type[Mixture], reason: str) -> None:
    torch.manual_seed(0)
    gm = fxsparse.trace(kind("gathered"), (torch.randn(3, 4, 12),))
    with pytest.raises(RewriteError, match=reason):
        fxsparse.rewrite(gm, CHANNELS)


def test_channels_and_experts_count_once() -> None:
    _, gm = mixture("grouped")
    gated = fxsparse.rewrite(gm, "gates{units=[intermediate,experts],target=0.35,score=magnitude}")
    assert {name for name, _ in gated.named_buffers()} == {"experts_gate_mask"}


# --- models of transformers -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[mixtral, gpt_oss], ids=lambda build: build.__name__)
def family(request: pytest.FixtureRequest) -> tuple[Any, GraphModule]:
    made = request.param()
    return made, fxsparse.trace(made.model, kwargs=made.make_batch(batch=4))


def test_models_lose_experts(family: tuple[Any, GraphModule], tmp_path: Path) -> None:
    """The same from every layer: the model of a configuration with fewer of them, also after it was saved."""
    made, gm = family
    kept = ",".join(f'"model.layers.{layer}.mlp.experts_gate":"0,2-3"' for layer in range(3))
    gated = fxsparse.rewrite(copy.deepcopy(gm), "gates{units=[experts],target=0.2,score=magnitude}")
    small = fxsparse.rewrite(copy.deepcopy(gated), f"materialize{{kept={{{kept}}}}}")
    assert [change.detail for change in record_of(small).entries[-1].rewritten] == ["3 of 4 experts stay"] * 3
    config = copy.deepcopy(made.model.config)
    config.num_local_experts = 3
    oracle = type(made.model)(config).train()
    oracle.load_state_dict(fxsparse.dense_state_dict(small))
    batch = made.make_batch(batch=3)
    mine, theirs = small(**batch), oracle(**batch)
    torch.testing.assert_close(mine.logits, theirs.logits, rtol=1e-4, atol=1e-5)
    mine.loss.backward()
    theirs.loss.backward()
    for name, parameter in oracle.named_parameters():
        torch.testing.assert_close(small.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-5)
    module = fxsparse.to_module(small, made.model)
    torch.testing.assert_close(module.eval()(**batch).logits, small.eval()(**batch).logits, rtol=1e-4, atol=1e-5)
    fxsparse.save_pretrained(small, made.model, tmp_path / "folder")
    for read in (type(made.model), fxsparse):
        again: Any = read.from_pretrained(tmp_path / "folder")  # type: ignore[attr-defined]
        torch.testing.assert_close(again.eval()(**batch).logits, small.eval()(**batch).logits, rtol=1e-4, atol=1e-5)


def test_models_lose_channels_of_experts(family: tuple[Any, GraphModule], tmp_path: Path) -> None:
    """Halves and interleaved gates, biases in tables; each layer its own number, also after it was saved."""
    made, gm = family
    gated = fxsparse.rewrite(copy.deepcopy(gm), CHANNELS).eval()
    kept = {
        "model.layers.0.mlp.experts": "0-39",
        "model.layers.1.mlp.experts": "4-15,20-55",
        "model.layers.2.mlp.experts": "7-62",
    }
    with torch.no_grad():
        for path, places in kept.items():
            mask = gated.get_buffer(f"{path}.intermediate_gate_mask").zero_()
            for part in places.split(","):
                low, high = map(int, part.split("-"))
                mask[low : high + 1] = 1
    small = fxsparse.rewrite(copy.deepcopy(gated), "materialize").eval()
    details = [change.detail for change in record_of(small).entries[-1].rewritten]
    assert details == [f"{left} of 64 channels of every expert stay" for left in (40, 48, 56)]
    batch = made.make_batch(batch=3)
    torch.testing.assert_close(small(**batch).logits, gated(**batch).logits, rtol=1e-4, atol=1e-5)
    fxsparse.save_pretrained(small, made.model, tmp_path / "folder")
    again = fxsparse.from_pretrained(tmp_path / "folder")
    torch.testing.assert_close(again.eval()(**batch).logits, small(**batch).logits, rtol=1e-4, atol=1e-5)


def test_models_with_experts_lose_hidden_dimensions(family: tuple[Any, GraphModule]) -> None:
    made, gm = family
    gated = fxsparse.rewrite(copy.deepcopy(gm), "gates{units=[hidden],target=0.3,score=magnitude}").eval()
    keep = gated.get_buffer("model.layers.hidden_gate_mask").bool()
    assert 0 < int((~keep).sum()) < 32
    small = fxsparse.rewrite(copy.deepcopy(gated), "materialize").eval()
    for leaf in ("gate_up_proj", "down_proj", "down_proj_bias"):
        name = f"model.layers.1.mlp.experts.{leaf}"
        for before in (dict(gm.named_parameters()).get(name),):
            if before is not None:
                axis = [size == 32 for size in before.shape].index(True)
                assert small.get_parameter(name).shape[axis] == int(keep.sum())
    batch = made.make_batch(batch=3)
    torch.testing.assert_close(small(**batch).logits, gated(**batch).logits, rtol=1e-4, atol=1e-5)
    small(**batch).loss.backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_layers_that_differ_in_experts(family: tuple[Any, GraphModule], tmp_path: Path) -> None:
    made, gm = family
    kept = '"model.layers.0.mlp.experts_gate":"1,3","model.layers.1.mlp.experts_gate":"0-3"'
    kept += ',"model.layers.2.mlp.experts_gate":"0-2"'
    gated = fxsparse.rewrite(copy.deepcopy(gm), "gates{units=[experts],target=0.2,score=magnitude}")
    small = fxsparse.rewrite(gated, f"materialize{{kept={{{kept}}}}}").eval()
    batch = made.make_batch(batch=3)
    fxsparse.save_pretrained(small, made.model, tmp_path / "folder")
    again = fxsparse.from_pretrained(tmp_path / "folder")
    torch.testing.assert_close(again.eval()(**batch).logits, small(**batch).logits, rtol=1e-4, atol=1e-5)
