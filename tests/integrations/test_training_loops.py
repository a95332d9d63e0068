"""Rewritten models in training loops of others: what a library puts on a model stays there and goes on working."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import fxsparse
from tests.support.families import FAMILIES


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))


def rewritten(passes: str, model: nn.Module | None = None) -> GraphModule:
    return fxsparse.rewrite(model or net(), passes, (torch.randn(3, 8),))


@pytest.fixture
def accelerator() -> Iterator[Any]:
    accelerate = pytest.importorskip("accelerate")
    yield accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def first_product_dtype(model: nn.Module, *args: Any, **kwargs: Any) -> torch.dtype:
    """The dtype of the first matrix product that runs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    dtypes: list[torch.dtype] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "mm" in str(func) or "nm_linear" in str(func):
                dtypes.append(next(arg.dtype for arg in args if isinstance(arg, torch.Tensor)))
            return func(*args, **(kwargs or {}))

    with Watch():
        model(*args, **kwargs)
    return dtypes[0]


# --- forward, wrapped by a library ------------------------------------------------------------------------------------


def test_mixed_precision_of_accelerate_survives_evaluation(accelerator: Any) -> None:
    model, x = net(), torch.randn(4, 8)
    gm = accelerator.prepare(fxsparse.trace(copy.deepcopy(model), (x,)))
    model = accelerator.prepare(model)
    expected = model(x)
    for mode in (True, False, True):
        gm.train(mode)
        assert first_product_dtype(gm, x) is torch.bfloat16
        assert torch.equal(gm(x), expected)
    assert gm(x).dtype is expected.dtype


def test_a_wrapped_forward_follows_the_mode_and_later_changes_of_the_graph(accelerator: Any) -> None:
    family = FAMILIES["llama"]()
    batch = family.make_batch()
    gm = fxsparse.rewrite(family.model, "select-neurons{omission=0.5,multiple=16}", kwargs=batch)
    prepared = accelerator.prepare(gm)
    dense = gm.eval()(**batch).loss
    assert not torch.equal(gm.train()(**batch).loss, dense), "training runs the smaller form"
    assert torch.equal(gm.eval()(**batch).loss, dense), "evaluation the dense one"
    assert prepared is gm

    lazy, x = rewritten("nm-masks,low-rank{rank=2,start=0.5}"), torch.randn(4, 8)
    accelerator.prepare(lazy)
    schedule = fxsparse.Schedule(lazy, torch.optim.SGD(lazy.parameters(), lr=0.1), total_steps=2)
    before = lazy(x)
    nn.init.ones_(lazy.get_parameter("2.weight_up"))
    schedule.step()
    assert not torch.equal(lazy(x), before), "branches have started"


def test_a_wrapped_forward_can_be_unwrapped_and_copied(accelerator: Any) -> None:
    gm, x = rewritten("nm-masks,low-rank{rank=2,start=0.5}"), torch.randn(4, 8)
    names = list(inspect.signature(gm.forward).parameters)
    plain = gm(x)
    prepared = accelerator.prepare(gm)
    twin = copy.deepcopy(prepared)
    assert torch.equal(twin(x), prepared(x)) and not torch.equal(twin(x), plain)
    with torch.no_grad():
        twin.get_parameter("0.bias").add_(1)
    assert not torch.equal(twin(x), prepared(x)), "the copy's forward reads the copy"
    bare = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert bare is gm and torch.equal(bare(x), plain)
    assert list(inspect.signature(bare.forward).parameters) == names == ["input"]
