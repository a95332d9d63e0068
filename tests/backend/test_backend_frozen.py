"""Frozen weights that already are N:M: found, run from compressed form on request, and followed when they change."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fxsparse.backend.backend import compiled_graphs, invalidate
from fxsparse.lowering.frozen import pattern_of
from fxsparse.ops.nm import Pattern, nm_mask
from tests.support.families import FAMILIES

COMPRESSED = {"compiler": "aot_eager", "lower": {"nm_linear": "compressed"}}


@torch.no_grad()
def prune_(model: nn.Module, pattern: str = "2:4") -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.mul_(nm_mask(module.weight.abs(), Pattern.parse(pattern)))
        elif isinstance(module, Conv1D):
            module.weight.t().mul_(nm_mask(module.weight.t().abs(), Pattern.parse(pattern)))
    return model


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 64, bias=False))


def implementations(compiled: Any) -> list[tuple[str, str]]:
    return [(choice.site, choice.implementation) for graph in compiled_graphs(compiled) for choice in graph.choices]


@pytest.mark.parametrize(
    ("pruned", "found"), [("1:4", "1:4"), ("2:8", "2:8"), ("2:4", "2:4"), ("1:2", "2:4"), ("4:8", "4:8")]
)
def test_the_sparsest_true_pattern_is_found(pruned: str, found: str) -> None:
    weight = torch.randn(40, 64)
    assert str(pattern_of(weight * nm_mask(weight.abs(), Pattern.parse(pruned)))) == found


def test_weights_that_are_not_nm_are_left_alone() -> None:
    weight = torch.randn(64, 64)
    pruned = weight * nm_mask(weight.abs(), Pattern(2, 4))
    almost = pruned.clone()
    almost[-1, :4] = 1.0
    for other in (weight, torch.zeros(64, 64), pruned[:8, :8], almost, pruned.to(torch.complex64), pruned[:, :63]):
        assert pattern_of(other) is None


def test_on_a_cpu_dense_is_chosen_and_the_reason_is_recorded() -> None:
    model, x = prune_(mlp()).requires_grad_(False), torch.randn(3, 64)
    compiled = torch.compile(model, backend="fxsparse", options={"compiler": "eager"})
    torch.testing.assert_close(compiled(x), model(x))
    (graph,) = compiled_graphs(compiled)
    assert implementations(compiled) == [("0.weight", "dense"), ("2.weight", "dense")]
    assert all("2:4" in choice.reason and "memory anyway" in choice.reason for choice in graph.choices)


def test_trainable_weights_are_not_frozen_but_are_without_gradients() -> None:
    model, x = prune_(mlp()), torch.randn(3, 64)
    compiled = torch.compile(model, backend="fxsparse", options=COMPRESSED)
    compiled(x)
    assert implementations(compiled) == []
    with torch.no_grad():
        compiled(x)
    assert implementations(compiled) == [("0.weight", "compressed"), ("2.weight", "compressed")]


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8"])
def test_compressed_equals_dense(pattern: str) -> None:
    model = prune_(mlp(), pattern).requires_grad_(False)
    compiled = torch.compile(model, backend="fxsparse", options=COMPRESSED)
    for shape in ((3, 64), (5, 64), (2, 7, 64)):
        x = torch.randn(*shape, requires_grad=True)
        y = compiled(x)
        torch.testing.assert_close(y, model(x))
        (ours,), (theirs,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(model(x).sum(), x)
        torch.testing.assert_close(ours, theirs)
    assert {choice for _, choice in implementations(compiled)} == {"compressed"}


def test_transposed_weights_of_conv1d() -> None:
    model, x = prune_(nn.Sequential(Conv1D(48, 64), nn.GELU(), Conv1D(64, 48))), torch.randn(2, 5, 64)
    compiled = torch.compile(model.requires_grad_(False), backend="fxsparse", options=COMPRESSED)
    torch.testing.assert_close(compiled(x), model(x))
    assert implementations(compiled) == [("0.weight", "compressed"), ("2.weight", "compressed")]


def test_a_changed_weight_is_compressed_anew_or_runs_dense() -> None:
    model, x = prune_(mlp()).requires_grad_(False), torch.randn(3, 64)
    compiled = torch.compile(model, backend="fxsparse", options=COMPRESSED)
    compiled(x)
    (graph,) = compiled_graphs(compiled)

    def check() -> None:
        torch.testing.assert_close(compiled(x), model(x))
        assert len(compiled_graphs(compiled)) == 1

    model[0].weight.mul_(2)
    check()
    model.load_state_dict(prune_(mlp()).state_dict())
    check()
    model[2].weight = nn.Parameter(prune_(mlp())[2].weight.detach(), requires_grad=False)
    check()
    assert graph.notes == []
    model[0].weight.add_(1)
    check()
    assert "no longer satisfies" in graph.notes[0]
    prune_(model)
    check()


def test_a_write_behind_autograd_needs_invalidate() -> None:
    model, x = prune_(mlp()).requires_grad_(False), torch.randn(3, 64)
    compiled = torch.compile(model, backend="fxsparse", options=COMPRESSED)
    compiled(x)
    model[0].weight.data.mul_(2)
    stale = compiled(x)
    assert not torch.allclose(stale, model(x))  # the documented hole; without it invalidate() would have no use
    invalidate(model)
    torch.testing.assert_close(compiled(x), model(x))


def test_weights_made_in_inference_mode_run_dense() -> None:
    with torch.inference_mode():
        model, x = prune_(mlp()), torch.randn(3, 64)
        compiled = torch.compile(model, backend="fxsparse", options=COMPRESSED)
        torch.testing.assert_close(compiled(x), model(x))
        assert {choice for _, choice in implementations(compiled)} == {"dense"}


def test_inference_mode_over_ordinary_weights_follows_them() -> None:
    model, x = prune_(mlp()), torch.randn(3, 64)
    compiled = torch.compile(model, backend="fxsparse", options=COMPRESSED)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), model(x))
    with torch.no_grad():
        model[0].weight.mul_(3)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), model(x))
    assert {choice for _, choice in implementations(compiled)} == {"compressed"}


def test_identical_layers_that_share_a_graph_have_their_own_copies() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(mlp() for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
                torch._dynamo.graph_break()
            return x

    model, x = prune_(Broken()).requires_grad_(False), torch.randn(3, 64)
    compiled = torch.compile(model, backend="fxsparse", options=COMPRESSED)
    torch.testing.assert_close(compiled(x), model(x))
    assert len(compiled_graphs(compiled)) < 4


def test_no_weight_is_kept_alive() -> None:
    model = prune_(mlp()).requires_grad_(False)
    compiled = torch.compile(model, backend="fxsparse", options=COMPRESSED)
    compiled(torch.randn(3, 64))
    references = [weakref.ref(parameter) for parameter in model.parameters()]
    del model, compiled
    gc.collect()
    assert not [reference for reference in references if reference() is not None]


def test_generate_with_compressed_weights() -> None:
    family = FAMILIES["llama"]()
    model = prune_(family.model.eval())
    ids = family.make_batch(2, 6)["input_ids"]
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **settings)
    plain = copy.copy(model.forward)
    model.forward = torch.compile(plain, backend="fxsparse", options=COMPRESSED | {"compiler": "eager"})
    assert torch.equal(model.generate(ids, **settings), expected)
    assert {choice for _, choice in implementations(model.forward)} == {"compressed"}


@pytest.mark.inductor
def test_compressed_under_inductor_and_its_dense_way_out() -> None:
    model = prune_(mlp()).requires_grad_(False)
    compiled = torch.compile(model, backend="fxsparse", dynamic=True, options={"lower": {"nm_linear": "compressed"}})
    for batch in (3, 6):
        x = torch.randn(batch, 64)
        torch.testing.assert_close(compiled(x), model(x))
    model[0].weight.add_(1)
    for batch in (3, 6):
        x = torch.randn(batch, 64)
        torch.testing.assert_close(compiled(x), model(x))
