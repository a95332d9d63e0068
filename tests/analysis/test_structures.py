"""Heads and channels are found by what a graph computes, in every layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsparse
from fxsparse.analysis.structures import attentions, mlps, structures
from tests.support.families import FAMILIES, HEADS, HIDDEN, INTERMEDIATE
from tests.support.traced import traced

HEAD = HIDDEN // HEADS


def same(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool((found == expected).all())


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    _, gm = traced(name)
    found = structures(gm)
    layers = {"sequential": 0, "bert": 3, "opt": 3, "llama": 3, "t5": 6, "roberta": 3}.get(name, 2)
    assert len(found.attentions) == layers
    assert len(found.mlps) == {"sequential": 1, "t5": 4}.get(name, layers)
    assert [change.site for change in found.skipped] == (["layers.6"] if name == "sequential" else [])  # after a norm
    kv_heads = 2 if name in ("llama", "qwen2", "mistral") else HEADS
    plain = torch.arange(HIDDEN).view(HEADS, HEAD)
    for attention in found.attentions:
        assert (attention.heads, attention.kv_heads) == (HEADS, kv_heads)
        assert [rows.kind for rows in attention.projections] == ["query", "key", "value"]
        for position, rows in enumerate(attention.projections):
            expected = plain if rows.kind == "query" else plain[:kv_heads]
            assert same(rows.index, expected + (position * HIDDEN if name == "gpt2" else 0))
            assert rows.linear.path.startswith(attention.path)
        assert same(attention.output.index, plain)
    for mlp in found.mlps:
        assert mlp.channels == INTERMEDIATE
        assert len(mlp.projections) == (2 if name in ("llama", "qwen2", "mistral") else 1)
        assert all(same(rows.index, torch.arange(INTERMEDIATE)[:, None]) for rows in mlp.projections)


class Interleaved(nn.Module):
    """Query, key and value of a head side by side (BLOOM, GPT-NeoX), one key head for all queries where asked."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.shared = shared
        self.qkv = nn.Linear(16, 32 if shared else 48)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        fused = self.qkv(x)
        if self.shared:
            query, key, value = fused[..., :16].unflatten(-1, (2, 8)), fused[..., None, 16:24], fused[..., None, 24:]
            key, value = key.expand(*key.shape[:2], 2, 8), value.expand(*value.shape[:2], 2, 8)
        else:
            query, key, value = fused.unflatten(-1, (2, 3, 8)).unbind(-2)
        attended = F.scaled_dot_product_attention(
            self.norm(query).transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True
        )
        return self.out(torch.sigmoid(x) * attended.transpose(1, 2).flatten(2))


def test_interleaved_heads() -> None:
    (found,) = attentions(fxsparse.trace(Interleaved(False), (torch.randn(3, 5, 16),)))
    expected = torch.arange(48).view(2, 3, 8)
    for position, rows in enumerate(found.projections):
        assert same(rows.index, expected[:, position])


def test_one_key_head_for_all_queries() -> None:
    (found,) = attentions(fxsparse.trace(Interleaved(True), (torch.randn(3, 5, 16),)))
    assert (found.heads, found.kv_heads) == (2, 1)
    assert [rows.index.flatten()[0].item() for rows in found.projections] == [0, 16, 24]


class Gated(nn.Module):
    """Gate and value in one linear, as halves or alternating."""

    def __init__(self, alternating: bool) -> None:
        super().__init__()
        self.alternating = alternating
        self.both, self.down = nn.Linear(16, 80), nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        both = self.both(x)
        gate, value = (both[..., ::2], both[..., 1::2]) if self.alternating else both.chunk(2, -1)
        return x + self.down(F.relu(gate) * value)


@pytest.mark.parametrize("alternating", [True, False])
def test_fused_gates(alternating: bool) -> None:
    (found,) = mlps(fxsparse.trace(Gated(alternating), (torch.randn(3, 5, 16),)))
    numbers = torch.arange(80)
    assert same(found.projections[0].index, numbers.view(40, 2) if alternating else numbers.view(2, 40).t())


class Activated(nn.Module):
    """Channels between linears, and what is pointwise between them."""

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fn, self.up, self.down = fn, nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.fn(self.up(x)))


@pytest.mark.parametrize(
    "fn",
    [F.hardswish, F.celu, F.selu, F.hardtanh, nn.ReLU(inplace=True), nn.AlphaDropout(0.2), lambda h: h * (h > 0),
     lambda h: torch.where(h > 0, h, h.exp() - 1), lambda h: h.log1p().nan_to_num(), lambda h: h.narrow(-1, 0, 40)],
    ids=["hardswish", "celu", "selu", "hardtanh", "relu_", "alpha_dropout", "gt", "where", "log1p", "narrow"],
)  # fmt: skip
def test_pointwise_operators_between_linears(fn: Callable[[Tensor], Tensor]) -> None:
    gm = fxsparse.trace(Activated(fn), (torch.randn(3, 5, 16),))
    (found,) = mlps(gm)
    assert found.channels == 40
    gates = fxsparse.rewrite(gm, "gates{units=intermediate,score=random,target=0.4}").eval()
    small, x = fxsparse.rewrite(gates, "materialize"), torch.randn(2, 7, 16)[:, :5]
    assert small.get_parameter("up.weight").shape[0] < 40
    torch.testing.assert_close(small(x), gates(x))


class Mixing(nn.Module):
    """Heads that a norm over all of them mixes, channels that something else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm, self.out = nn.Linear(16, 48), nn.LayerNorm(16), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = self.qkv(x).chunk(3, -1)
        heads = [part.unflatten(-1, (2, 8)).transpose(1, 2) for part in (self.norm(query), key, value)]
        x = x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        channels = F.gelu(self.up(x))
        return self.down(channels), channels.sum(-1)


def test_what_cannot_be_taken_apart_is_skipped_with_a_reason() -> None:
    found = structures(fxsparse.trace(Mixing(), (torch.randn(3, 5, 16),)))
    assert not found.attentions
    assert "query heads share rows" in found.skipped[0].detail
    assert not found.mlps


def test_probing_leaves_the_random_state_and_the_graph() -> None:
    _, gm = traced("llama")
    code, state = gm.code, torch.random.get_rng_state()
    structures(gm)
    assert gm.code == code
    assert torch.equal(torch.random.get_rng_state(), state)
