"""Prefix tuning by PEFT: traced, beside a choice of tensors, and on a rewritten module, against the model itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.cost.backprop import BackpropGraph
from fxsparse.graph.trainable import trainable, trained
from fxsparse.passes import SelectTensors
from tests.support.families import FAMILIES, Family

PREFIX = "prompt_encoder.default.embedding.weight"


def tuned(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def gradients(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    model.eval().zero_grad()  # without dropout
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def family() -> Family:
    return FAMILIES["opt"]()


def test_a_traced_model_has_its_prefix_and_a_budget_may_choose_it(family: Family) -> None:
    """The model returns the cache that the prefix is in; the graph does not."""
    model = tuned(copy.deepcopy(family.model))
    gm = fxsparse.trace(model, kwargs=family.make_batch(batch=4))
    batch = family.make_batch(batch=3)
    expected, got = gradients(model, batch), gradients(gm, batch)
    assert expected.keys() == got.keys() == {PREFIX}
    torch.testing.assert_close(got[PREFIX], expected[PREFIX])
    assert gm(**batch).get("past_key_values") is None and model(**batch).past_key_values is not None
    prefix_only = BackpropGraph(gm)
    assert prefix_only.trainable == {PREFIX}

    model.requires_grad_(True)
    full = fxsparse.trace(model, kwargs=family.make_batch(batch=4))
    gm = fxsparse.rewrite(full, [SelectTensors(rho=0.8)])
    assert PREFIX in trainable(gm)
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-3)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=1)
    schedule.observe(batch)
    chosen, graph = trained(gm), BackpropGraph(full)
    assert 0 < prefix_only.full() < graph.full()
    assert 0 < len(chosen) < len(trainable(gm))
    assert graph.forward() + graph.cost(chosen) <= 0.8 * (graph.forward() + graph.full())
    assert gradients(gm, batch).keys() == set(chosen)


def test_a_rewritten_module_takes_a_prefix(family: Family) -> None:
    sparse = fxsparse.rewrite(copy.deepcopy(family.model), "nm-masks", kwargs=family.make_batch(batch=4))
    dense = copy.deepcopy(family.model)
    dense.load_state_dict(fxsparse.dense_state_dict(sparse))
    module, batch = fxsparse.to_module(sparse, family.model), family.make_batch(batch=3)
    expected, got = gradients(tuned(dense), batch), gradients(tuned(module), batch)
    assert expected.keys() == got.keys() == {PREFIX}
    torch.testing.assert_close(got[PREFIX], expected[PREFIX], rtol=1e-4, atol=1e-6)
