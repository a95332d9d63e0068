"""A block whose attentions and MLPs have no modules of their own: each of them has gates and units of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

import fxsparse
from fxsparse.analysis.structures import structures
from fxsparse.graph import live
from fxsparse.graph.record import record_of
from fxsparse.passes.neurons.gather_units import Site
from fxsparse.passes.structured.hard_concrete import gate_names, gated, mask_sparsity


class Block(nn.Module):
    """Pairs of an attention and an MLP, of one width each, all linears in one module."""

    def __init__(self, size: int, heads: int, pairs: int) -> None:
        super().__init__()
        self.heads, self.pairs = heads, pairs
        for at in range(pairs):
            for name in "qkvo":
                setattr(self, f"{name}{at}", nn.Linear(size, size))
            setattr(self, f"up{at}", nn.Linear(size, 2 * size))
            setattr(self, f"down{at}", nn.Linear(2 * size, size))
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in range(2 * pairs))

    def forward(self, x: Tensor) -> Tensor:
        for at in range(self.pairs):
            q, k, v, o, up, down = (getattr(self, f"{name}{at}") for name in ("q", "k", "v", "o", "up", "down"))
            h = self.norms[2 * at](x)
            heads = (linear(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (q, k, v))
            x = x + o(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
            x = x + down(F.gelu(up(self.norms[2 * at + 1](x))))
        return x


class Flat(nn.Module):
    def __init__(self, pairs: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(16, 4, pairs) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


@pytest.mark.parametrize("pairs", [1, 2])
def test_each_has_a_path_of_its_own(pairs: int) -> None:
    found = structures(fxsparse.trace(Flat(pairs), (torch.randn(2, 5, 16),)))
    for kind in (found.attentions, found.mlps):
        assert len(kind) == len({site.path for site in kind}) == 2 * pairs
        assert all(site.path.startswith("blocks.") for site in kind)


@pytest.mark.parametrize("target", [0.25, 0.6])
@pytest.mark.parametrize("pairs", [1, 2])
def test_gates_are_of_one_site_each_and_reach_their_target(pairs: int, target: float) -> None:
    model, x = Flat(pairs), torch.randn(2, 5, 16)
    gm = fxsparse.rewrite(model, f"gates{{target={target},score=magnitude}}", (x,))
    assert len(gate_names(gm)) == 8 * pairs and len(record_of(gm).entries[-1].rewritten) == 4 * pairs
    assert sum(item.size for item in gated(gm)) == sum(
        parameter.numel() for name, parameter in model.named_parameters() if "norm" not in name
    )
    assert target <= mask_sparsity(gm) <= target + 0.03
    expected, whole = gm(x), sum(parameter.numel() for parameter in gm.parameters())
    less = fxsparse.rewrite(gm, "materialize")
    torch.testing.assert_close(less(torch.cat([x, x])), expected)
    assert sum(parameter.numel() for parameter in less.parameters()) < (1 - 0.7 * target) * whole


def test_dimensions_and_neurons() -> None:
    x = torch.randn(2, 5, 16)
    gm = fxsparse.trace(Flat(2), (x,))
    dims = fxsparse.rewrite(gm, "drop-dims{units=[intermediate,heads],begin=0.0,end=1.0,every=1}")
    assert len({change.site for change in record_of(dims).entries[-1].changes}) == 8
    neurons = fxsparse.rewrite(gm, "select-neurons{omission=0.5,multiple=1}")
    sites = live.sites(neurons, Site)
    assert len(sites) == len({site.path for site in sites} | {site.key for site in sites}) - 8 == 8
    _trains(dims, x)
    _trains(neurons, x)


def _trains(gm: GraphModule, x: Tensor) -> None:
    gm = copy.deepcopy(gm)
    before = {name: parameter.detach().clone() for name, parameter in gm.named_parameters()}
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=3)
    for _ in range(3):
        schedule.observe((x,))
        loss = gm(x)
        loss.backward()
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        assert loss.isfinite()
    assert any(not torch.equal(parameter, before[name]) for name, parameter in gm.named_parameters())


class Chain(nn.Module):
    """A linear in the middle reads the channels of one MLP and makes those of the next."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y.square().mean()


@pytest.mark.parametrize(
    "text",
    [
        "select-neurons{omission=0.5,multiple=1}",
        "gates{target=0.4,score=magnitude,units=[intermediate]}",
        "gates{target=0.4,score=magnitude,units=[intermediate]},materialize",
        "drop-dims{units=[intermediate],begin=0.0,end=1.0,every=1}",
    ],
)
def test_a_chain_of_linears(text: str) -> None:
    x = torch.randn(6, 8)
    gm = fxsparse.rewrite(Chain(), text, (x,))
    entry = record_of(gm).entries[0]
    assert len(entry.rewritten) == (1 if text.startswith("select") else 2)
    assert not text.startswith("select") or "is a part of" in entry.skipped[0].detail
    _trains(gm, x)
