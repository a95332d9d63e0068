"""Training with the compiled form of a rewritten model: every step equals the eager one, whatever changes meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from tests.support.clients import assert_moved, by_hand, cells, optimizer_step, refused_or, rewritten

pytest.importorskip("transformers")

COMPILES = pytest.mark.inductor


def compiled(gm: GraphModule, mode: str) -> Any:
    return torch.compile(gm, backend="fxsparse", mode=mode)


def train_as_eager(recipe: str, train: Callable[[GraphModule], list[float]]) -> None:
    """Asserts that ``train`` gives the losses and the state of the eager loop, and that a compiled graph ran."""
    eager, gm = rewritten(recipe), rewritten(recipe)
    torch._dynamo.utils.counters.clear()
    expected = by_hand(eager, autocast=False)
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch._inductor.config.patch(fallback_random=True):  # else gates would draw other numbers than eager
        losses = train(gm)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    state = gm.state_dict()
    for name, tensor in eager.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    assert_moved(gm, recipe)


def in_mode(recipe: str, mode: str) -> None:
    train_as_eager(recipe, lambda gm: by_hand(gm, autocast=False, run=compiled(gm, mode)))


@COMPILES
@pytest.mark.parametrize(("recipe", "reason"), cells("compile", sample=("low-rank",)))
def test_compiled(recipe: str, reason: str | None) -> None:
    refused_or(reason, lambda: in_mode(recipe, "default"))


@COMPILES
@pytest.mark.parametrize(("recipe", "reason"), cells("compile, max-autotune", sample=()))
def test_max_autotune(recipe: str, reason: str | None) -> None:
    refused_or(reason, lambda: in_mode(recipe, "max-autotune"))


@COMPILES
@pytest.mark.parametrize(("recipe", "reason"), cells("compile, reduce-overhead", sample=()))
def test_reduce_overhead(recipe: str, reason: str | None) -> None:
    refused_or(reason, lambda: in_mode(recipe, "reduce-overhead"))


@pytest.mark.parametrize(("recipe", "reason"), cells("compile, whole step", sample=("low-rank", "gates")))
def test_a_step_compiled_whole(recipe: str, reason: str | None) -> None:
    """Forward and backward passes, clipping and the optimizer in one compiled function; the schedule is outside."""

    def run() -> None:
        options = {"compiler": "aot_eager"}
        step: Callable[..., Tensor] = torch.compile(optimizer_step, backend="fxsparse", options=options)
        train_as_eager(recipe, lambda gm: by_hand(gm, autocast=False, step_of=step))

    refused_or(reason, run)
