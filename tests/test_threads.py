"""Threads, and what all of them share: torch's capture, and the global random state."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.passes import DistillLayers
from tests.support.traced import traced


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 8))


def test_threads_that_rewrite_at_once_wait_for_each_other() -> None:
    """Capture patches torch for the time it runs, which broke the other threads' captures."""
    batch = torch.randn(4, 16)
    wanted: list[Tensor] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            torch.manual_seed(0)
            gm = fxsparse.rewrite(mlp(), "nm-masks{keep_first=false,keep_head=false},double-prune", (batch,))
            gm.train()(batch).sum().backward()
            wanted.append(gm.eval()(batch))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(wanted) == 3


PASSES = [
    "nm-masks,double-prune,low-rank{rank=2,start=0.5}",
    "nm-masks{storage=masked,dynamic=true}",
    "gates",
    "drop-dims{every=1}",
    "drop-layers{indices=[1]}",
    "select-neurons{omission=0.5,multiple=1}",
    "select-tensors{rho=0.8,every=2}",
    "multiplex{stages=[[0.5,0,1],[1,1,0]]}",
]


@pytest.mark.parametrize("passes", [*PASSES, "distill"])
def test_passes_and_events_leave_the_random_state_as_it_was(passes: str) -> None:
    (family, base), (_, teacher) = traced("opt"), traced("opt")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    gm: Any = fxsparse.rewrite(base, [DistillLayers(teacher)] if passes == "distill" else passes)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.01)
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=2)
    assert torch.equal(torch.get_rng_state(), before)
    for _ in range(2):
        batch = family.make_batch()
        before = torch.get_rng_state()
        schedule.observe(batch)
        assert torch.equal(torch.get_rng_state(), before)
        gm(**batch).loss.backward()
        before = torch.get_rng_state()
        optimizer.step()
        schedule.step()
        assert torch.equal(torch.get_rng_state(), before)


def test_saving_and_loading_leave_the_random_state_as_it_was(tmp_path: Path) -> None:
    batch = torch.randn(4, 16)
    gm = fxsparse.rewrite(mlp(), "nm-masks{keep_first=false,keep_head=false}", (batch,))
    fresh, before = mlp(), torch.get_rng_state()
    fxsparse.save(gm, tmp_path / "model.safetensors")
    fxsparse.load(tmp_path / "model.safetensors", fresh, (batch,))
    assert torch.equal(torch.get_rng_state(), before)
