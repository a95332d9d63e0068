"""Nothing is left out silently: every weight and every attention of a graph is in what a pass says about its sites."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

import fxsparse
from fxsparse.analysis.structures import structures
from fxsparse.graph.record import record_of
from tests.support.traced import traced

PASSES = (
    "nm-masks",
    "nm-masks{keep_first=false},double-prune",
    "nm-masks,low-rank{rank=2}",
    "gates{score=random,target=0.3}",
    "gates{units=heads,score=random,target=0.3},materialize",
    "drop-dims{units=[intermediate],score=random}",
    "select-neurons{multiple=4}",
    "drop-layers{indices=[0]}",
    "prune-operands",
)


class Mixed(nn.Module):
    """A convolution, matrices of experts, a product over indices, a softmax that weighs no values of its own linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(16, 16, 1)
        self.layers = nn.ModuleList([Layer() for _ in range(2)])
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.transpose(1, 2)).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.tensor = nn.Parameter(torch.randn(2, 16, 16)), nn.Parameter(torch.randn(16, 2, 8))
        self.scores, self.out = nn.Linear(16, 5), nn.Linear(16, 16)
        self.qkv, self.norm, self.proj = nn.Linear(16, 48), nn.LayerNorm(16), nn.Linear(16, 16)
        self.up, self.inner, self.down = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        heads = [part.unflatten(-1, (2, 8)).transpose(1, 2) for part in (self.norm(query), key, value)]
        x = x + self.proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        pooled = self.scores(x).softmax(1).mT @ x
        x = x + self.out(pooled.mean(1, keepdim=True)) + (x[:, None] @ self.experts).sum(1)
        x = x + torch.einsum("bte,end->btnd", x, self.tensor).flatten(2)
        return x + self.down(self.inner(F.gelu(self.up(x))))


@functools.cache
def _mixed() -> GraphModule:
    torch.manual_seed(0)
    return fxsparse.trace(Mixed(), (torch.randn(3, 5, 16),))


def graph(name: str) -> GraphModule:
    return copy.deepcopy(_mixed()) if name == "mixed" else traced(name)[1]


def weights(gm: GraphModule) -> set[str]:
    """The modules of matrices and larger parameters that are no tables, by what they are called."""
    tables = ("embed", "wte", "wpe", "position", "cls_token", "relative")
    named = ((name, parameter) for name, parameter in gm.named_parameters() if parameter.dim() > 1)
    return {name.rpartition(".")[0] for name, _ in named if not any(part in name for part in tables)}


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("name", ["mixed", "opt", "vit"])
def test_every_weight_is_in_the_record_of_every_pass(name: str, passes: str) -> None:
    gm = graph(name)
    expected = weights(gm)
    if name == "mixed":
        passes = passes.replace("gates{score", "gates{units=heads,score")
        try:
            rewritten = fxsparse.rewrite(gm, passes)
        except fxsparse.RewriteError as error:  # of structures it has none, and says so of each
            assert "query heads share rows" in str(error) or "found no" in str(error) or "no heads" in str(error)
            return
    else:
        rewritten = fxsparse.rewrite(gm, passes)
    assert len(expected) > 5
    for entry in record_of(rewritten).entries:
        sites = [change.site for change in entry.changes]
        for path in expected:
            assert any(f"{path}.".startswith(f"{site}.") or site.startswith(f"{path}.") for site in sites), (
                entry.text,
                path,
            )
        assert all(change.detail for change in entry.changes)


def test_kinds_and_reasons() -> None:
    entry = record_of(fxsparse.rewrite(graph("mixed"), "nm-masks")).entries[0]
    details = {change.site: change.detail for change in entry.skipped}
    assert "convolution" in details["stem"]
    assert "(experts)" in details["layers.0.experts"] and "(product)" in details["layers.1.tensor"]
    assert {change.site for change in entry.rewritten} >= {"layers.1.proj", "layers.1.up"}


def test_attentions_and_mlps_that_are_left_alone_say_why() -> None:
    found = structures(graph("mixed"))
    assert not found.attentions and not found.mlps
    reasons = [str(change) for change in found.skipped]
    for layer in ("layers.0", "layers.1"):
        assert any(reason.startswith(f"{layer}:") and "share rows" in reason for reason in reasons)
        assert any(reason.startswith(f"{layer}:") and "softmax before a product" in reason for reason in reasons)
        assert any(reason.startswith(f"{layer}.down:") and "layer_norm" in reason for reason in reasons)


@pytest.mark.parametrize("name", ["bert", "t5", "llama"])
def test_as_many_attentions_as_softmaxes(name: str) -> None:
    gm = graph(name)
    fused = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    assert len(structures(gm).attentions) == len(list(fused)) > 0
