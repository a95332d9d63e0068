"""Casting and placing after tracing gives what casting and placing the model before it gives, or is refused."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

import fxsparse
from fxsparse import graph as fx
from fxsparse.errors import RewriteError
from fxsparse.graph.record import record_of
from fxsparse.passes import DistillLayers
from fxsparse.tracing.casting import _outline as outline
from tests.support.families import FAMILIES
from tests.support.traced import traced

NM = "nm-masks{keep_first=false,keep_head=false}"
DTYPES = [torch.bfloat16, torch.float16, torch.float64]


class Norm(nn.Module):
    """T5's: upcasts always, and casts back in half precision only."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size))

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            x = x.to(self.weight.dtype)
        return self.weight * x


class Mixed(nn.Module):
    """Constants that follow the dtype of the parameters, and others that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(32, 32), Norm(32), nn.Linear(32, 32)
        self.register_buffer("table", torch.randn(8, 32), persistent=False)
        self.plain = torch.rand(32)  # neither a parameter nor a buffer: a cast does not reach it

    def forward(self, x: Tensor) -> Tensor:
        hidden, length = self.norm(self.first(x)), x.shape[1]
        scores = hidden @ hidden.transpose(1, 2)
        lowest = torch.full((length, length), torch.finfo(scores.dtype).min, dtype=scores.dtype, device=x.device)
        weights = (scores + lowest.triu(1)).softmax(-1, dtype=torch.float32).to(hidden.dtype)
        positions = torch.arange(length, device=x.device, dtype=hidden.dtype)
        with torch.autocast("cpu", enabled=False):
            angles = (positions.float() / 7).cos().to(hidden.dtype)
        if hidden.dtype == torch.float16:
            hidden = hidden.clamp(-100, 100)
        mixed = weights @ hidden + angles[:, None] + self.table[:length] + self.plain.to(hidden.dtype)
        return self.second(mixed + torch.tensor(0.1, dtype=hidden.dtype, device=x.device))


def example(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 6, 32).to(dtype)


def assert_cast(gm: GraphModule, before: GraphModule) -> None:
    """Asserts that ``gm`` has the graph and the dtypes of a model that was cast before it was rewritten."""
    assert outline(gm) == outline(before)
    ours, theirs = fx.tensors_of(gm), fx.tensors_of(before)
    assert {name: tensor.dtype for name, tensor in ours.items()} == {name: t.dtype for name, t in theirs.items()}
    for node, other in zip(gm.graph.nodes, before.graph.nodes, strict=True):
        for value, expected in zip(*map(pytree.tree_leaves, (node.meta["val"], other.meta["val"])), strict=True):
            assert not isinstance(value, Tensor) or value.dtype == expected.dtype, node


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cast_after_rewriting_is_one_before(dtype: torch.dtype) -> None:
    model = Mixed()
    gm = fxsparse.rewrite(model, NM, (example(),))
    values = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    assert gm.to(dtype) is gm
    assert_cast(gm, fxsparse.rewrite(copy.deepcopy(model).to(dtype), NM, (example(dtype),)))
    for name, tensor in gm.state_dict().items():
        torch.testing.assert_close(tensor, values[name].to(tensor.dtype), rtol=0, atol=0)
    model.to(dtype).load_state_dict(fxsparse.dense_state_dict(gm))
    x = example(dtype)
    torch.testing.assert_close(gm(x), model(x), rtol=0, atol=0)
    assert len(record_of(gm).entries) == 1


def test_the_model_goes_on_after_a_cast(tmp_path: Any) -> None:
    """Copies, loaded files, models in a model, started branches, further passes, and casts there and back."""
    model = Mixed()
    fresh = copy.deepcopy(model)
    gm = fxsparse.rewrite(model, f"{NM},low-rank{{rank=2,start=0.5}}", (example(),))
    optimizer = torch.optim.SGD(gm.parameters(), lr=1e-3)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=2)
    for _ in range(2):
        gm(example()).sum().backward()
        optimizer.step()
        schedule.step()
    fxsparse.save(gm, tmp_path / "gm.safetensors")
    loaded = fxsparse.load(tmp_path / "gm.safetensors", fresh, (example(),))
    half = nn.Sequential(copy.deepcopy(loaded)).bfloat16()[0]
    expected = copy.deepcopy(gm).bfloat16()
    assert outline(half) == outline(expected) != outline(gm)
    started = [node for node in half.graph.nodes if node.target is torch.ops.fxsparse.nm_linear_low_rank.default]
    assert len(started) == 2
    x = example(torch.bfloat16)
    torch.testing.assert_close(half(x), expected(x), rtol=0, atol=0)
    assert outline(half.float()) == outline(gm) and half.first.weight_values.dtype == torch.float32
    again = fxsparse.rewrite(loaded.bfloat16(), "double-prune")
    assert outline(again.float()) == outline(fxsparse.rewrite(gm, "double-prune"))


def test_gates_stay_as_precise_as_they_are_made() -> None:
    """A cast before rewriting does not reach what passes add, and one after it reaches what that would have."""
    family, gm = traced("sequential")
    before = copy.deepcopy(family.model).bfloat16()
    batch = pytree.tree_map_only(
        Tensor, lambda x: x.bfloat16() if x.is_floating_point() else x, family.make_batch(batch=4)
    )
    passes = "gates{target=0.5,units=[intermediate]}"
    assert_cast(fxsparse.rewrite(gm, passes).bfloat16(), fxsparse.rewrite(before, passes, kwargs=batch))


@pytest.mark.skipif(
    not os.environ.get("FXSPARSE_ALL_FAMILIES"), reason="FXSPARSE_ALL_FAMILIES=1 traces every family twice"
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, dtype: torch.dtype) -> None:
    family = FAMILIES[name]()
    batch = pytree.tree_map_only(
        Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, family.make_batch(batch=4)
    )
    gm = fxsparse.rewrite(family.model, "nm-masks", kwargs=family.make_batch(batch=4))
    assert_cast(gm.to(dtype), fxsparse.rewrite(family.model.to(dtype), "nm-masks", kwargs=batch))


def refused(gm: GraphModule, reason: str) -> None:
    """Asserts that a cast is refused and changes nothing."""
    code, dtypes = gm.code, [tensor.dtype for tensor in fx.tensors_of(gm).values()]
    with pytest.raises(RewriteError, match=f"cannot follow to torch.float16: .*{reason}(.|\n)*Cast the model before"):
        gm.half()
    assert gm.code == code and [tensor.dtype for tensor in fx.tensors_of(gm).values()] == dtypes


def test_what_cannot_follow_is_refused() -> None:
    family, gm = traced("sequential")
    edited = copy.deepcopy(gm)
    fx.transform(
        edited, edited.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[0], lambda y: y * 2
    )
    edited.recompile()
    refused(edited, "it was edited")
    refused(fxsparse.rewrite(edited, "nm-masks{keep_first=false}"), "it was edited")
    refused(fxsparse.to_aten(gm), "not known how it was made")
    refused(fxsparse.rewrite(gm, [DistillLayers(copy.deepcopy(family.model), weights=(1, 1, 0))]), "end-distill")
    family.model.handle = (number for number in ())
    refused(fxsparse.trace(family.model, kwargs=family.make_batch(batch=4)), "MLP cannot be copied")


def test_devices_that_the_graph_names_follow() -> None:
    gm = fxsparse.rewrite(Mixed(), NM, (example(),))
    written = "device(type='cpu')"
    assert gm.code.count(written) >= 2
    placed = copy.deepcopy(gm).to("meta")
    assert placed.code == gm.code.replace(written, "device(type='meta')")  # meta has no autocast
    assert placed(example().to("meta")).is_meta
    values = [node.meta["val"] for node in placed.graph.nodes if isinstance(node.meta["val"], Tensor)]
    assert {value.device.type for value in values} == {"meta"}
    both = copy.deepcopy(gm).to("meta", torch.bfloat16)
    assert both(example(torch.bfloat16).to("meta")).dtype == torch.bfloat16
    back = both.to_empty(device="cpu")
    back.load_state_dict(copy.deepcopy(gm).bfloat16().state_dict())
    assert outline(back) == outline(copy.deepcopy(gm).bfloat16())
