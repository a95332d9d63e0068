"""Orders of passes: the composed model computes what the methods mean together, or the order is refused with one that
works. Models are tiny, without dropout, and traced once."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

import fxsparse
from fxsparse.graph import live
from fxsparse.passes import Pass
from fxsparse.passes.structured.drop_dims import Dimensions
from fxsparse.passes.structured.hard_concrete import Gated, gate_names, mask_name
from tests.support import families

MAKE = {"bert": families._bert, "opt": families._opt, "llama": families._llama}


@functools.cache
def _family(name: str) -> families.Family:
    family = MAKE[name]()
    for module in family.model.modules():
        for option in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, option, None), float):
                setattr(module, option, 0.0)
    return family


@functools.cache
def _traced(name: str) -> GraphModule:
    return fxsparse.trace(_family(name).model, kwargs=_batch(name))


def _batch(name: str, seed: int = 0, batch: int = 4) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return dict(_family(name).make_batch(batch, 8))


def _rewritten(name: str, passes: Iterable[Pass | str] | str) -> GraphModule:
    """A rewritten copy with parameters of its own."""
    return fxsparse.rewrite(copy.deepcopy(_traced(name)), passes)


def _train(gm: GraphModule, name: str, steps: int = 4) -> list[float]:
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.05)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=steps)
    losses = []
    for step in range(steps):
        batch = _batch(name, seed=step)
        schedule.observe(batch)
        optimizer.zero_grad()
        loss = gm(**batch).loss
        losses.append(float(loss.detach()))
        loss = loss + fxsparse.sparsity_loss(gm) if hasattr(gm, "sparsity") else loss
        loss.backward()
        optimizer.step()
        schedule.step()
    schedule.remove()
    return losses


def _masks(gm: GraphModule) -> dict[str, list[bool]]:
    return {name: gm.get_buffer(mask_name(name)).bool().tolist() for name in gate_names(gm)}


@torch.no_grad()
def _logits(gm: GraphModule, name: str) -> Tensor:
    gm.eval()
    logits: Tensor = gm(**_batch(name, seed=9)).logits
    gm.train()
    return logits


# --- sites stay true while the graph changes --------------------------------------------------------------------------

DIMS = "drop-dims{units=[hidden,intermediate,heads],begin=0.0,end=1.0,every=2}"


@pytest.mark.parametrize("name", MAKE)
def test_dimensions_are_chosen_on_weights_that_were_compressed_afterwards(name: str) -> None:
    """The compressed model scores the values that stayed; pruned weights add nothing to the score of the masked one."""
    compressed = _rewritten(name, [DIMS, "nm-masks"])
    masked = _rewritten(name, [DIMS, "nm-masks{storage=masked}"])
    assert live.sites(compressed, Dimensions)
    losses = _train(compressed, name)
    assert losses == pytest.approx(_train(masked, name), abs=1e-5)
    masks = _masks(compressed)
    assert masks == _masks(masked)
    for group in live.sites(compressed, Dimensions):
        assert sum(masks[group.gate]) == group.count // 2


@pytest.mark.parametrize("passes", ["gates{units=[heads,intermediate],score=magnitude}", "gates", DIMS])
def test_gates_of_dropped_layers_end_with_them(passes: str) -> None:
    """Afterwards the model is the gated one of the layers that are left."""
    gm = _rewritten("opt", [passes, "drop-layers{count=1}"])
    assert len(live.sites(gm, Gated)) == 4
    assert not any("layers.1." in name for name in gate_names(gm))
    _train(gm, "opt")
    expected = _logits(gm, "opt")
    small = fxsparse.rewrite(gm, "materialize")
    assert float((_logits(small, "opt") - expected).abs().max()) < 1e-5
