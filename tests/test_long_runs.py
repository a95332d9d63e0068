"""Long trainings stay flat: in objects, hooks, compiled graphs and texts of code.

``FXSPARSE_TEST_STEPS=2000 pytest tests/test_long_runs.py`` takes as many steps of every schedule.
"""

from __future__ import annotations

import gc
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.graph_module import _loader as fx_sources

import fxsparse
from fxsparse.backend.compiled import compiled_graphs
from tests.support.traced import traced

STEPS = int(os.environ.get("FXSPARSE_TEST_STEPS", "16"))
SCHEDULES = [
    "nm-masks,double-prune{every=2},low-rank{rank=2,start=0.25}",
    "nm-masks{storage=masked,dynamic=true}",
    "gates{every=2}",
    "drop-dims{every=2}",
    "select-neurons{omission=0.5,multiple=1,every=2}",
    "select-tensors{rho=0.8,every=2}",
    "multiplex{stages=[[0.5,0,1],[1,1,0]]}",
]


def resident() -> int:
    """Megabytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20


def held(gm: nn.Module, optimizer: Any) -> dict[str, int]:
    """What could grow: objects, hooks, texts of code."""
    gc.collect()
    hooks = sum(len(item) for module in gm.modules() for name, item in vars(module).items() if name.endswith("hooks"))
    hooks += len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
    return {"objects": len(gc.get_objects()), "hooks": hooks, "texts": len(fx_sources.eval_cache)}


@pytest.mark.parametrize("passes", SCHEDULES)
def test_a_schedule_holds_no_more_at_the_end_than_in_the_middle(passes: str) -> None:
    family, base = traced("opt")
    gm: Any = fxsparse.rewrite(base, passes)
    optimizer = torch.optim.SGD(gm.parameters(), lr=1e-3)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=STEPS)
    batch = family.make_batch()
    for step in range(STEPS):
        schedule.observe(batch)
        optimizer.zero_grad()
        gm(**batch).loss.backward()
        optimizer.step()
        schedule.step()
        if step == STEPS // 2:
            middle, megabytes = held(gm, optimizer), resident()
    end = held(gm, optimizer)
    assert end["hooks"] == middle["hooks"] and end["texts"] <= middle["texts"]
    assert end["objects"] - middle["objects"] < 1000, (middle, end)
    assert STEPS < 1000 or resident() - megabytes < 50


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return (x**2).mean()


def test_graphs_of_earlier_choices_are_dropped() -> None:
    """Dynamo's limit of recompiles is 8, after which it would go on without compiling.

    Hooks alone are counted: Dynamo keeps hundreds of objects and the texts of every graph, even after its reset.
    """
    batch = torch.randn(8, 16)
    gm: Any = fxsparse.rewrite(Residual(), "select-tensors{rho=0.6,every=1}", (batch,))
    optimizer = torch.optim.AdamW(gm.parameters())
    rhos = {"select-tensors.rho": lambda step: 0.55 + 0.1 * (step % 4)}
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=12, signals=rhos)
    compiled = torch.compile(gm, backend="fxsparse", options={"compiler": "eager"})
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for step in range(12):
            schedule.observe((batch,))
            optimizer.zero_grad()
            compiled(batch).backward()
            optimizer.step()
            schedule.step()
            gc.collect()
            assert len(compiled_graphs(compiled)) == 1
            if step == 6:
                middle = held(gm, optimizer)
    assert held(gm, optimizer)["hooks"] == middle["hooks"]
