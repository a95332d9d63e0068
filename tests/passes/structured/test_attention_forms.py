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
from fxsparse.errors import RewriteError
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


class Eager(Block):
    """Two products and a softmax, under a mask, soft-capped."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = 5 * (query @ key.transpose(2, 3) / 3 / 5).tanh()
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        return scores.masked_fill(~seen, -torch.inf).softmax(-1).type_as(value) @ value


class Hiding(Block):
    """A mask of what is hidden, made as large as the scores, and keys joined to those of a new cache, as in XLM."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (torch.cat([torch.tensor([]), part], -2) for part in (key, value))
        scores = query / 3 @ key.mT
        hidden = (torch.arange(scores.shape[-1]) > 4).view(1, 1, 1, -1).expand_as(scores)
        return scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1) @ value


class ByHand(Block):
    """A softmax written out, a bias for each head, and sinks that take their share."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes, self.sinks = nn.Parameter(torch.randn(HEADS)), nn.Parameter(torch.randn(HEADS))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = torch.matmul(query, key.transpose(2, 3)) / 3
        scores = scores + self.slopes[:, None, None] * torch.arange(scores.shape[-1])
        sinks = self.sinks.view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        together = torch.cat([scores, sinks], -1)
        weights = (together - together.amax(-1, keepdim=True)).exp()
        return (weights / weights.sum(-1, keepdim=True))[..., :-1] @ value


class Merged(Block):
    """Heads merged with the batch, as BLOOM has them, and a bias made so."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.randn(HEADS))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, tokens, size = query.shape
        query, key, value = (part.reshape(batch * heads, tokens, size) for part in (query, key, value))
        bias = (self.slopes[None, :, None, None] * torch.arange(tokens)).expand(batch, heads, 1, tokens)
        bias = bias.reshape(batch * heads, 1, tokens)
        scores = bias.baddbmm(query, key.transpose(1, 2), beta=1.0, alpha=0.3)
        mixed = torch.bmm(scores.view(batch, heads, tokens, tokens).softmax(-1).view(-1, tokens, tokens), value)
        return mixed.view(batch, heads, tokens, size)


class Einsum(Block):
    """Products written as sums over indices."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = torch.einsum("bnid,bnjd->bnij", query, key) / 3
        return torch.einsum("bnij,bnjd->bnid", scores.softmax(-1), value)


class Grouped(nn.Module):
    """Two heads of keys and values for four of queries, repeated by hand; norms of heads."""

    def __init__(self, kv_heads: int = 2, how: str = "by hand") -> None:
        super().__init__()
        self.kv_heads, self.how, size = kv_heads, how, DIM // HEADS
        self.norm, self.query, self.proj = nn.LayerNorm(DIM), nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, DIM)
        self.keys, self.values = nn.Linear(DIM, kv_heads * size), nn.Linear(DIM, kv_heads * size)
        self.of_head, self.scale = nn.LayerNorm(size), nn.Parameter(torch.randn(kv_heads, size))
        self.up, self.gate, self.down = nn.Linear(DIM, CHANNELS), nn.Linear(DIM, CHANNELS), nn.Linear(CHANNELS, DIM)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        heads = [linear(y).unflatten(-1, (-1, DIM // HEADS)) for linear in (self.query, self.keys, self.values)]
        query, key, value = (part.transpose(1, 2) for part in (self.of_head(heads[0]), heads[1] * self.scale, heads[2]))
        if self.kv_heads > 1 and self.how != "fused":
            shape = (x.shape[0], self.kv_heads, HEADS // self.kv_heads, *key.shape[2:])
            key, value = (part[:, :, None].expand(shape).flatten(1, 2) for part in (key, value))
        if self.how == "by hand":
            mixed = (query @ key.mT / 3).softmax(-1) @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, enable_gqa=self.how == "fused")
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Together(Block):
    """Groups and their heads are two axes of one view, as in Falcon: a head cannot go without its group."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 2 * DIM)

    def forward(self, x: Tensor) -> Tensor:
        every = self.qkv(self.norm(x)).unflatten(-1, (2, 4, -1))
        heads = (every[..., :2, :].flatten(2, 3), every[..., 2, :], every[..., 3, :])
        query, key, value = (part.transpose(1, 2) for part in heads)
        mixed = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Joined(Block):
    """A bias made of three, as BEiT has it; the parts of another come from a split."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList([torch.randn(DIM), torch.randn(DIM)])
        self.register_buffer("of_keys", torch.zeros(DIM), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.parts[0], self.of_keys, self.parts[1]])
        every = F.linear(self.norm(x), self.qkv.weight, bias).unflatten(-1, (3, HEADS, -1))
        query, key, value = every.permute(2, 0, 3, 1, 4)
        x = x + self.proj(self.attend(query, key, value).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class PostNorm(Block):
    """What a sublayer adds is normalised first, as in Gemma 2."""

    def forward(self, x: Tensor) -> Tensor:
        every = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = self.proj(self.attend(*every).transpose(1, 2).flatten(2))
        x = x + mixed * (mixed.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Weighted(Block):
    """What attention gives is weighted column by column, and by a number for each head, before it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.share = nn.Parameter(torch.rand(DIM) + 0.5), nn.Parameter(torch.randn(HEADS))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = super().attend(query, key, value) * self.share.sigmoid()[:, None, None]
        return (mixed.transpose(1, 2).flatten(2) * self.scale).unflatten(-1, (HEADS, -1)).transpose(1, 2)


class GatedOutput(Block):
    """What attention gives meets the outputs of a linear of its own, for each column or (``size`` 1) for each head."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.gate = size, nn.Linear(DIM, HEADS * size)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        query, key, value = self.qkv(y).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = self.attend(query, key, value).transpose(1, 2)
        if self.size == 1:
            mixed = (mixed * self.gate(y).sigmoid()[..., None]).flatten(2)
        else:
            mixed = mixed.flatten(2) * self.gate(y).sigmoid()
        x = x + self.proj(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GatedQueries(Block):
    """As :class:`GatedOutput`; queries and what meets the result come from one linear, head by head."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.keys_values = nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, 2 * DIM)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        query, gate = self.query(y).unflatten(-1, (HEADS, -1)).chunk(2, -1)
        key, value = self.keys_values(y).unflatten(-1, (2, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = self.attend(query.transpose(1, 2), key, value).transpose(1, 2).flatten(2)
        x = x + self.proj(mixed * gate.flatten(2).sigmoid())
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Table(Block):
    """A bias of each head from a table of distances, and one of its queries as long as all heads together."""

    def __init__(self, table: nn.Embedding | None = None) -> None:
        super().__init__()
        self.table, self.of_queries = table or nn.Embedding(13, HEADS), nn.Parameter(torch.randn(DIM))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        places = torch.arange(query.shape[2])
        bias = self.table((places[:, None] - places).clamp(-6, 6) + 6).permute(2, 0, 1)[None]
        query = query + self.of_queries.view(1, 1, HEADS, -1).transpose(1, 2)
        return ((query @ key.mT / 3 + 16 * bias.sigmoid()).softmax(-1)) @ value


class Relative(Block):
    """Scores of content and of positions, whose keys the same projection makes, as in DeBERTa-v2."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(13, DIM))
        self.query, self.key, self.value = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        y = self.norm(x)
        query, key, value = (
            linear(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for linear in (self.query, self.key, self.value)
        )
        places = self.key(self.positions).unflatten(-1, (HEADS, -1)).transpose(0, 1)
        distance = (torch.arange(tokens)[:, None] - torch.arange(tokens)).clamp(-6, 6) + 6
        scores = query @ key.mT / 3
        scores = scores + (query @ places.mT).gather(-1, distance.expand(batch, HEADS, tokens, tokens))
        x = x + self.proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Torch(nn.Module):
    """Torch's own attention, with the weights that it is asked for or without."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.norm, self.attention = nn.LayerNorm(DIM), nn.MultiheadAttention(DIM, HEADS, dropout=0.1, batch_first=True)
        self.up, self.down = nn.Linear(DIM, CHANNELS), nn.Linear(CHANNELS, DIM)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=self.need_weights)[0]
        return x + self.down(F.relu(self.up(x)))


def _encoder(batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(DIM, HEADS, CHANNELS, batch_first=batch_first, norm_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Layers(nn.Module):
    """Blocks one after the other."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.h = nn.ModuleList([block() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.h:
            x = block(x)
        return x


class OneTable(Layers):
    """Blocks with one table."""

    def __init__(self) -> None:
        table = nn.Embedding(13, HEADS)
        super().__init__(lambda: Table(table))


@dataclass(frozen=True)
class Form:
    """A way to write attention.

    Attributes:
        model: seeded and small.
        batch: its arguments for a batch size.
        kv_heads: of keys and values.
        heads: of queries.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, Any]]
    kv_heads: int = HEADS
    heads: int = HEADS


def _tokens(batch: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, 7, DIM)}


FORMS: dict[str, Form] = {
    "nanogpt": Form(lambda: Layers(Block), _tokens),
    "eager": Form(lambda: Layers(Eager), _tokens),
    "hiding": Form(lambda: Layers(Hiding), _tokens),
    "by hand": Form(lambda: Layers(ByHand), _tokens),
    "merged": Form(lambda: Layers(Merged), _tokens),
    "einsum": Form(lambda: Layers(Einsum), _tokens),
    "grouped": Form(lambda: Layers(Grouped), _tokens, 2),
    "grouped, repeated": Form(lambda: Layers(lambda: Grouped(2, "repeated")), _tokens, 2),
    "grouped, fused": Form(lambda: Layers(lambda: Grouped(2, "fused")), _tokens, 2),
    "multi-query": Form(lambda: Layers(lambda: Grouped(1)), _tokens, 1),
    "together": Form(lambda: Layers(Together), _tokens, 2, 2),
    "joined": Form(lambda: Layers(Joined), _tokens),
    "post-norm": Form(lambda: Layers(PostNorm), _tokens),
    "relative": Form(lambda: Layers(Relative), _tokens),
    "weighted": Form(lambda: Layers(Weighted), _tokens),
    "gated columns": Form(lambda: Layers(lambda: GatedOutput(DIM // HEADS)), _tokens),
    "gated heads": Form(lambda: Layers(lambda: GatedOutput(1)), _tokens),
    "gated queries": Form(lambda: Layers(GatedQueries), _tokens),
    "table": Form(lambda: Layers(Table), _tokens),
    "one table": Form(OneTable, _tokens),
    "torch": Form(lambda: Layers(lambda: Torch(False)), _tokens),
    "torch with weights": Form(lambda: Layers(lambda: Torch(True)), _tokens),
    "encoder": Form(lambda: _encoder(True), lambda batch: {"src": torch.randn(batch, 7, DIM)}),
    "encoder of sequences": Form(lambda: _encoder(False), lambda batch: {"src": torch.randn(7, batch, DIM)}),
}


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
    for size in (2, 5):
        batch = FORMS[name].batch(size)
        for mine, its in zip(results(one, batch), results(other, batch), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FORMS)
def test_every_attention_is_found(name: str, gm: GraphModule) -> None:
    found = structures(gm)
    assert not found.skipped
    assert [(site.heads, site.kv_heads) for site in found.attentions] == [(FORMS[name].heads, FORMS[name].kv_heads)] * 2


@pytest.mark.parametrize("name", FORMS)
def test_a_closed_gate_is_columns_of_zeros(name: str, gm: GraphModule) -> None:
    found = structures(gm).attentions
    gates = fxsparse.rewrite(gm, "gates{units=heads,score=random,target=0.3}").eval()
    plain = copy.deepcopy(gm).eval()
    assert len(gated(gates)) == len(found) == 2
    for item, site in zip(gated(gates), found, strict=True):
        mask = (torch.rand(site.heads) < 0.5).float()
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
        order = torch.randperm(len(mask))
        mask[order[:1]], mask[order[1:2]] = 1, 0
    small = fxsparse.rewrite(gates, "materialize").eval()
    entry = small.meta["fxsparse"].entries[-1]
    assert entry.rewritten and entry.after.parameters < entry.before.parameters
    assert_same(small, gates, name)


@pytest.mark.parametrize("name", ["gated columns", "gated heads"])
def test_linears_that_gate_heads_go_with_them(name: str, gm: GraphModule) -> None:
    size = gm.get_parameter("h.0.gate.weight").shape[0] // HEADS
    for site in structures(gm).attentions:
        (gate,) = (rows for rows in site.projections if rows.kind == "gate")
        assert torch.equal(gate.index, torch.arange(HEADS * size).view(HEADS, size))
    gates = fxsparse.rewrite(gm, "gates{units=heads,score=random,target=0.3}")
    gates.get_buffer("h.0.heads_gate_mask").copy_(torch.tensor([1, 0, 1, 1]))
    small = fxsparse.rewrite(gates, "materialize")
    assert small.get_parameter("h.0.gate.weight").shape == (3 * size, DIM)
    assert small.get_parameter("h.0.gate.bias").shape == (3 * size,)


@pytest.mark.parametrize("size", [HEADS, DIM])
def test_a_batch_as_large_as_heads_or_channels_stays_free(size: int) -> None:
    """Sizes that are equal by chance are not one."""
    torch.manual_seed(0)
    gm = fxsparse.trace(Layers(Table), kwargs=_tokens(size))
    gates = fxsparse.rewrite(gm, "gates{score=magnitude,target=0.3}").eval()
    gates.get_buffer("h.0.heads_gate_mask").copy_(torch.tensor([1, 0, 1, 1]))
    small = fxsparse.rewrite(copy.deepcopy(gates), "materialize").eval()
    for module in (gm, gates, small):
        (x,) = module.graph.find_nodes(op="placeholder")
        assert isinstance(x.meta["val"].shape[0], torch.SymInt) and not x.meta["val"].shape[0].node.expr.is_number
    assert_same(small, gates, "table")


@pytest.mark.parametrize("name", ["table", "one table"])
def test_parameters_that_heads_meet_lose_them(name: str, gm: GraphModule) -> None:
    """What the attentions of two blocks read stays whole, and each selects its heads."""
    gates = fxsparse.rewrite(gm, "gates{units=heads,score=random,target=0.3}")
    for i in range(2):
        gates.get_buffer(f"h.{i}.heads_gate_mask").copy_(torch.tensor([1, 0, 1, 1 - i]))
    small = fxsparse.rewrite(gates, "materialize")
    for i in range(2):
        left, size = [0, 2, 3][: 3 - i], DIM // HEADS
        of_queries = gm.get_parameter(f"h.{i}.of_queries").view(HEADS, size)[left].flatten()
        torch.testing.assert_close(small.get_parameter(f"h.{i}.of_queries").data, of_queries)
        table = gm.get_parameter(f"h.{i}.table.weight")
        if name == "table":
            torch.testing.assert_close(small.get_parameter(f"h.{i}.table.weight").data, table[:, left])
        else:
            assert small.get_parameter(f"h.{i}.table.weight") is small.get_parameter("h.0.table.weight")
            assert small.get_parameter(f"h.{i}.table.weight").shape == table.shape


@pytest.mark.parametrize("name", ["grouped", "grouped, repeated", "grouped, fused", "multi-query", "eager"])
def test_any_heads_may_go_and_more_of_them_later(name: str, gm: GraphModule) -> None:
    for masks in ([[1, 0, 1, 1], [1, 1, 0, 1]], [[0, 1, 1, 1], [0, 0, 0, 1]], [[0, 1, 0, 1], [1, 1, 1, 0]]):
        small, kept = gm, [4, 4]
        for turn in range(2):
            found = structures(small)
            if turn and len(found.attentions) < 2:  # groups of different sizes stay as they are
                assert all("different numbers of heads" in change.detail for change in found.skipped)
                break
            gates = fxsparse.rewrite(small, "gates{units=heads,score=random,target=0.01}").eval()
            for item, mask, count in zip(gated(gates), masks, kept, strict=True):
                gates.get_buffer(mask_name(item.units)).copy_(torch.tensor(mask[:count]))
                gates.get_buffer(mask_name(item.units))[-1] = 1
            kept = [int(gates.get_buffer(mask_name(item.units)).sum()) for item in gated(gates)]
            small = fxsparse.rewrite(gates, "materialize").eval()
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
    reason = "has a single unit" if FORMS[name].kv_heads == 1 else "bias of .* is computed"
    if FORMS[name].kv_heads == 1 or name == "joined":
        with pytest.warns(UserWarning, match=reason):
            fxsparse.rewrite(gm, "select-neurons{omission=0.5,structures=[heads]}")
        return
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


class Embedded(nn.Module):
    """Tokens looked up, before blocks."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.table, self.layers, self.head = nn.Embedding(20, DIM), Layers(block), nn.Linear(DIM, 20)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layers(self.table(ids)))


@pytest.mark.parametrize("block", [Eager, Merged])
def test_scores_masked_by_hand_are_multiplexed_but_not_with_a_prefix(block: Callable[[], nn.Module]) -> None:
    gm = fxsparse.trace(Embedded(block), (torch.randint(20, (4, 7)),))
    mixed = fxsparse.rewrite(gm, "multiplex{n=2,demux=repeat}").eval()
    ids = torch.randint(20, (1, 7)).repeat(3, 1)
    result = mixed(ids)  # rows of a group are alike, so each row is
    assert result.shape == (3, 7, 20)
    torch.testing.assert_close(result[0], result[1])
    with pytest.raises(RewriteError, match=r'use attn_implementation="sdpa", or demux=keys'):
        fxsparse.rewrite(gm, "multiplex{n=2,demux=prefix}")


class Shared(nn.Module):
    """One block that runs twice, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


def test_shared_layers_are_refused_when_gates_are_inserted() -> None:
    for passes in ("gates", "gates{units=heads,score=magnitude}", "drop-dims{units=heads}"):
        with pytest.raises(RewriteError, match=r"found no.*qkv.weight is used more than once"):
            fxsparse.rewrite(Shared(), passes, (torch.randn(3, 7, DIM),))


def test_an_attention_whose_output_linear_serves_another_is_left_alone() -> None:
    class Twice(Block):
        """The output linear reads what a second stream has too, as in ProphetNet."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.proj(self.up(x)[..., :DIM])

    gm = fxsparse.trace(Layers(Twice), (torch.randn(3, 7, DIM),))
    found = structures(gm)
    assert not found.attentions
    assert "h.1: h.1.proj.weight is used more than once" in map(str, found.skipped)
    with pytest.raises(RewriteError, match=r"found no.*used more than once"):
        fxsparse.rewrite(gm, "gates{units=heads,score=magnitude,target=0.3}")


def test_heads_of_axes_that_are_mixed_are_left_alone_with_a_reason() -> None:
    class Talking(Block):
        """Scores of all heads mixed, and norms over all of them."""

        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Parameter(torch.randn(HEADS, HEADS))

        def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            scores = torch.einsum("bhij,hg->bgij", query @ key.mT / 3, self.mix)
            return scores.softmax(-1) @ value

    gm = fxsparse.trace(Layers(Talking), (torch.randn(3, 7, DIM),))
    found = structures(gm)
    assert not found.attentions
    assert {change.site for change in found.skipped} == {"h.0", "h.1"}
