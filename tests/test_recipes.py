"""Named pipelines, and those that take a teacher."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import fxsparse
from fxsparse.errors import OptionError
from fxsparse.graph.record import record_of
from fxsparse.passes import DistillLayers, GateStructures, Materialize
from fxsparse.recipes import RECIPES, TAUGHT, recipe
from tests.support.traced import traced


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_without_a_teacher_are_pipelines(name: str) -> None:
    pipeline = recipe(name)
    assert pipeline.passes and fxsparse.Pipeline.parse(str(pipeline)) == pipeline
    if name not in TAUGHT:
        with pytest.raises(OptionError, match=f"the recipe {name} has no teacher; those with one are cofi, prumux"):
            recipe(name, teacher=nn.Identity())


def test_what_a_recipe_lacks_is_said() -> None:
    with pytest.raises(OptionError, match=r"the recipe cofi distils: give it the trained model, recipe\('cofi'"):
        recipe("cofi")
    with pytest.raises(OptionError, match=r"unknown recipe 'cofy'; did you mean.*cofi"):
        recipe("cofy")
    compiled = torch.compile(nn.Linear(4, 4), backend="fxsparse", options={"recipe": "cofi"})
    with pytest.raises(OptionError, match="distils"):
        compiled(torch.randn(2, 4))


def trained(gm: GraphModule, make_batch, steps: int = 3) -> None:  # type: ignore[no-untyped-def]
    optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-3)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=steps)
    for _ in range(steps):
        loss = gm(**make_batch(batch=4)).loss
        (loss + fxsparse.sparsity_loss(gm) if hasattr(gm, "sparsity") else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    schedule.remove()


def test_cofi_distils_through_one_shared_projection_that_starts_as_the_identity() -> None:
    family, base = traced("bert")
    pipeline = recipe("cofi", teacher=base)
    gates, distill = pipeline.passes
    assert isinstance(gates, GateStructures) and "hidden" in gates.units
    assert isinstance(distill, DistillLayers) and distill.teacher is base
    gm = fxsparse.rewrite(copy.deepcopy(base), pipeline)
    (projection,) = gm.distillation.projections[0]
    assert torch.equal(projection.weight, torch.eye(32)) and not projection.bias.any()
    without = fxsparse.rewrite(copy.deepcopy(base), [gates, DistillLayers(base)])
    batch = family.make_batch(batch=3)
    losses = []
    for module in (gm, without):
        torch.manual_seed(0)
        losses.append(module.train()(**batch).loss)
    torch.testing.assert_close(*losses)
    trained(gm, family.make_batch)
    assert not torch.equal(projection.weight, torch.eye(32)), "the projection does not learn"
    small = fxsparse.rewrite(gm, [Materialize()])
    assert not any(name.startswith("distillation") for name in small.state_dict())


def test_prumux_prunes_a_multiplexed_model_with_itself_as_the_teacher() -> None:
    family, base = traced("bert")
    mux = fxsparse.rewrite(base, recipe("datamux"))
    trained(mux, family.make_batch, steps=1)
    pipeline = recipe("prumux", teacher=mux)
    gm = fxsparse.rewrite(mux, pipeline)
    assert [entry.text.partition("{")[0] for entry in record_of(gm).entries] == ["multiplex", "gates", "distill"]
    assert "projection=shared" in record_of(gm).text
    before = copy.deepcopy(gm.distillation.held.module.state_dict())
    trained(gm, family.make_batch)
    after = gm.distillation.held.module.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items()), "the teacher was trained"
    small = fxsparse.rewrite(gm, "end-distill,materialize").eval()
    batch = family.make_batch(batch=6)
    torch.testing.assert_close(small(**batch).logits, gm.eval()(**batch).logits, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in mux.parameters())
