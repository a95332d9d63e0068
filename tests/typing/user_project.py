"""A project of a user, as a strict mypy sees it through ``py.typed``; `.ci/types` checks it and nothing runs it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.fx import GraphModule

import fxsparse
from fxsparse import Pipeline, RewriteError
from fxsparse import graph as fx
from fxsparse.passes import Change, InsertNMMasks, Pass, rewrote


@dataclass(frozen=True)
class Nothing(Pass):
    """A pass of the user's."""

    name: ClassVar[str] = "nothing"
    times: int = 1

    def rewrite(self, graph: GraphModule) -> Iterable[Change]:
        for linear in fx.linears(graph):
            yield rewrote(linear.path, "looked at")


def prune(model: nn.Module, batch: dict[str, torch.Tensor], path: Path) -> GraphModule:
    pipeline = Pipeline([InsertNMMasks("2:4"), Nothing(times=2)])
    try:
        gm: GraphModule = fxsparse.rewrite(model, pipeline, kwargs=batch)
    except RewriteError as error:
        raise SystemExit(str(error)) from error
    text: str = fxsparse.explain(gm)
    data: dict[str, Any] = fxsparse.explain(gm).to_dict()
    print(text, data["version"], fxsparse.record_of(gm).entries[0].after.step_flops + 1)
    page: Path = fxsparse.report(gm, path)
    print(page, fxsparse.count_flops(gm).step)
    return gm


def train(gm: GraphModule, batches: Iterable[dict[str, torch.Tensor]]) -> None:
    optimizer = torch.optim.AdamW(gm.parameters())
    schedule = fxsparse.Schedule(gm, optimizer, total_steps=10)
    for batch in batches:
        loss: torch.Tensor = gm(**batch).loss
        torch.autograd.backward(loss)  # Tensor.backward has no types
        optimizer.step()
        schedule.step(loss)
    fxsparse.save(gm, "model.safetensors")
    state: dict[str, torch.Tensor] = fxsparse.dense_state_dict(gm)
    print(len(state), schedule.values(), len(schedule.history.points))
