"""Gates of sublayers whose result passes a norm before it is added: a factor before the norm would change nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.analysis.added import acts_on
from fxsparse.analysis.structures import mlps
from fxsparse.graph.record import record_of
from fxsparse.passes import GateStructures


class Block(nn.Module):
    def __init__(self, norm: nn.Module):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 24), nn.Linear(24, 16), norm
        self.dropout, self.scale = nn.Dropout(0.3), nn.Parameter(torch.rand(16))

    def added(self, x: Tensor) -> Tensor:
        return self.scale * self.dropout(self.norm(self.down(self.up(x).relu())))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.added(x)


class Model(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        norms: dict[str, Any] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "none": lambda size: nn.Identity()}
        self.read = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(Block(norms[kind](16)) for _ in range(3))
        for block in self.blocks:
            if kind == "layer":
                nn.init.normal_(block.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.read(x)
        for block in self.blocks:
            x = block(x)
        return x


KINDS = ["layer", "rms", "none"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_gate_acts_behind_the_norm(kind: str) -> None:
    gm = fxsparse.trace(Model(kind), (torch.randn(3, 8),))
    for mlp in mlps(gm):
        node = acts_on(mlp.output.linear)
        assert (node is mlp.output.linear.node) == (kind == "none")
        assert kind == "none" or "norm" in str(node.target)


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_sublayer_adds_nothing_and_goes(kind: str) -> None:
    model = Model(kind).eval()
    gm = fxsparse.trace(model, (torch.randn(3, 8),))
    gated = fxsparse.rewrite(gm, "gates{units=[ffn],target=0.3,score=magnitude}").eval()
    closed = [i for i in range(3) if not gated.get_buffer(f"blocks.{i}.ffn_gate_mask").item()]
    assert len(closed) == 1
    x = torch.randn(5, 8)
    oracle = copy.deepcopy(model)
    oracle.blocks[closed[0]] = nn.Identity()
    torch.testing.assert_close(gated(x), oracle(x))
    small = fxsparse.rewrite(gated, "materialize").eval()
    assert "taken out" in [change.detail for change in record_of(small).entries[-1].rewritten]
    torch.testing.assert_close(small(x), oracle(x))
    assert not [name for name, _ in small.named_parameters() if name.startswith(f"blocks.{closed[0]}.")]


@pytest.mark.parametrize("kind", KINDS)
def test_its_gradient_is_that_of_a_factor_of_what_is_added(kind: str) -> None:
    torch.manual_seed(0)
    model = Model(kind).eval()
    gm = fxsparse.trace(model, (torch.randn(3, 8),))
    gated = fxsparse.rewrite(gm, [GateStructures(units=("ffn",), warmup=0.0)]).eval()
    for i in range(3):
        gated.get_buffer(f"blocks.{i}.ffn_gate_mask").requires_grad_()
    x = torch.randn(5, 8)
    gated(x).square().sum().backward()
    factors = torch.ones(3, requires_grad=True)
    y = model.read(x)
    for block, factor in zip(model.blocks, factors, strict=True):
        y = y + factor * block.added(y)
    y.square().sum().backward()
    grads = torch.cat([gated.get_buffer(f"blocks.{i}.ffn_gate_mask").grad for i in range(3)])  # type: ignore[misc]
    assert grads.abs().min() > 1e-3
    torch.testing.assert_close(grads, factors.grad)


class Shared(nn.Module):
    """What an expert that all tokens go to adds to the others', cast to its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList((Block(nn.Identity()), nn.Linear(16, 16))) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for shared, others in self.blocks:
            y = shared.down(shared.up(x).relu())
            x = x + (y + others(x).sin()).type_as(y)
        return x


def test_a_term_whose_dtype_is_read_goes() -> None:
    model = Shared().eval()
    gm = fxsparse.trace(model, (torch.randn(3, 16),))
    gated = fxsparse.rewrite(gm, "gates{units=[ffn],target=0.5,score=magnitude}").eval()
    small = fxsparse.rewrite(copy.deepcopy(gated), "materialize").eval()
    x = torch.randn(5, 16)
    torch.testing.assert_close(small(x), gated(x))
    details = [change.detail for change in record_of(small).entries[-1].rewritten]
    assert details == ["taken out"]
    assert len([name for name, _ in small.named_parameters() if ".up." in name or ".down." in name]) == 4


class Routed(nn.Module):
    """An MLP weighs two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.scores = nn.Linear(16, 12), nn.Linear(12, 2)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.scores(self.up(x).relu()).softmax(-1)
        return x + sum(shares[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


def test_a_routers_mlp_has_no_gate_of_what_experts_add() -> None:
    gm = fxsparse.trace(Routed(), (torch.randn(3, 16),))
    gated = fxsparse.rewrite(gm, "gates{units=[intermediate,ffn],target=0.3,score=magnitude}").eval()
    (detail,) = (change.detail for change in record_of(gated).entries[-1].rewritten)
    assert detail.startswith("gates on intermediate, none on ffn as its result goes into no sum with its stream")
    x = torch.randn(5, 16)
    small = fxsparse.rewrite(copy.deepcopy(gated), "materialize").eval()
    torch.testing.assert_close(small(x), gated(x))


@pytest.mark.parametrize("kind", KINDS)
def test_without_channels_the_norms_bias_stays(kind: str) -> None:
    model = Model(kind).eval()
    for block in model.blocks:
        block.down.bias = None  # type: ignore[assignment]
    gm = fxsparse.trace(model, (torch.randn(3, 8),))
    gated = fxsparse.rewrite(gm, "gates{units=[intermediate],target=0.3,score=magnitude}").eval()
    gated.get_buffer("blocks.1.intermediate_gate_mask").zero_()
    x = torch.randn(5, 8)
    small = fxsparse.rewrite(copy.deepcopy(gated), "materialize").eval()
    torch.testing.assert_close(small(x), gated(x))
