"""Attention however a model writes it: found, gated, made smaller, chosen from, and right against plain torch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

import fxsparse
from fxsparse.analysis.structures import structures
from fxsparse.passes.structured.hard_concrete import gate_names, gated, mask_name

DIM, HEADS, CHANNELS = 32, 4, 48


class Block(nn.Module):
    """A block of nanoGPT: ``.contiguous()`` before the view, which capture drops where it copies nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(DIM), nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.norm2, self.up, self.down = nn.LayerNorm(DIM), nn.Linear(DIM, CHANNELS), nn.Linear(CHANNELS, DIM)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        heads = (part.view(batch, tokens, HEADS, -1).transpose(1, 2) for part in self.qkv(self.norm(x)).split(dim, 2))
        x = x + self.proj(self.attend(*heads).transpose(1, 2).contiguous().view(batch, tokens, dim))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Layers(nn.Module):
    """Blocks one after the other."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.h = nn.ModuleList([block() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.h:
            x = block(x)
        return x


@dataclass(frozen=True)
class Form:
    """A way to write attention.

    Attributes:
        model: seeded and small.
        batch: its arguments for a batch size.
        kv_heads: of keys and values.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, Any]]
    kv_heads: int = HEADS


def _tokens(batch: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, 7, DIM)}


FORMS: dict[str, Form] = {"nanogpt": Form(lambda: Layers(Block), _tokens)}


@functools.cache
def _traced(name: str) -> GraphModule:
    torch.manual_seed(0)
    model = FORMS[name].model()
    return fxsparse.trace(model, kwargs=FORMS[name].batch(3))


@pytest.fixture
def gm(name: str) -> GraphModule:
    return copy.deepcopy(_traced(name))


def results(gm: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        leaves = torch.utils._pytree.tree_leaves(gm(**batch))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def assert_same(one: nn.Module, other: nn.Module, name: str) -> None:
    for size in (1, 2, 5):
        batch = FORMS[name].batch(size)
        for mine, its in zip(results(one, batch), results(other, batch), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FORMS)
def test_every_attention_is_found(name: str, gm: GraphModule) -> None:
    found = structures(gm)
    assert not found.skipped
    assert [(site.heads, site.kv_heads) for site in found.attentions] == [(HEADS, FORMS[name].kv_heads)] * 2


@pytest.mark.parametrize("name", FORMS)
def test_a_closed_gate_is_columns_of_zeros(name: str, gm: GraphModule) -> None:
    found = structures(gm).attentions
    gates = fxsparse.rewrite(gm, "gates{units=heads,score=random,target=0.3}").eval()
    plain = copy.deepcopy(gm).eval()
    assert len(gated(gates)) == len(found) == 2
    for item, site in zip(gated(gates), found, strict=True):
        mask = (torch.rand(HEADS) < 0.5).float()
        gates.get_buffer(mask_name(item.units)).copy_(mask)
        weight = plain.get_parameter(site.output.linear.name)
        columns = weight.data if site.output.linear.transposed else weight.data.t()
        columns[site.output.index[mask == 0].flatten()] = 0
    assert_same(gates, plain, name)


@pytest.mark.parametrize("units", ["heads", "heads,attention,intermediate,ffn,hidden"])
@pytest.mark.parametrize("name", FORMS)
def test_materialized_equals_gated(name: str, units: str, gm: GraphModule) -> None:
    gates = fxsparse.rewrite(gm, f"gates{{units=[{units}],score=random,target=0.3}}").eval()
    for gate in gate_names(gates):
        mask = gates.get_buffer(mask_name(gate))
        mask.copy_(torch.rand(len(mask)) < 0.6)
        mask[int(torch.randint(len(mask), ()))] = 1
    small = fxsparse.rewrite(gates, "materialize").eval()
    entry = small.meta["fxsparse"].entries[-1]
    assert entry.rewritten and entry.after.parameters < entry.before.parameters
    assert_same(small, gates, name)


@pytest.mark.parametrize("name", FORMS)
def test_dropped_dimensions_are_taken_out(name: str, gm: GraphModule) -> None:
    dropped = fxsparse.rewrite(gm, "drop-dims{units=[heads,intermediate,hidden],score=random,fraction=0.5}").eval()
    small = fxsparse.rewrite(dropped, "materialize").eval()
    assert len(small.meta["fxsparse"].entries[-1].rewritten) == 5
    assert_same(small, dropped, name)


@pytest.mark.parametrize("name", FORMS)
def test_heads_that_take_part_are_as_without_the_others(name: str, gm: GraphModule) -> None:
    """A step with some heads computes, and gives gradients, as the model does with the others' columns at zero."""
    found = structures(gm).attentions
    neurons = fxsparse.rewrite(gm, "select-neurons{omission=0.5,structures=[heads]}")
    optimizer = torch.optim.SGD(neurons.parameters(), lr=0.0)
    fxsparse.Schedule(neurons, optimizer, total_steps=4)
    plain = copy.deepcopy(gm)
    for site in found:
        weight = site.output.linear.name
        taken = dict(neurons.named_buffers())[f"{weight}_columns"]
        assert 0 < len(taken) < site.output.linear.in_features
        columns = plain.get_parameter(weight).data
        columns = columns if site.output.linear.transposed else columns.t()
        columns[~torch.isin(torch.arange(len(columns)), taken)] = 0
    batch = FORMS[name].batch(2)
    for module in (neurons, plain):
        for part in module.modules():
            part.training = part is neurons  # no dropout
    one, other = (torch.utils._pytree.tree_leaves(module(**batch))[0] for module in (neurons, plain))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for result in (one, other):
        result.square().mean().backward()
    for site in found:
        query = site.projections[0].linear.name
        mine, its = (module.get_parameter(query).grad for module in (neurons, plain))
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-6)
