"""The picture of a selection: the graph it is drawn from, its lanes, and what the file says."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fxsparse.cost import plot
from fxsparse.cost.backprop import BackpropGraph
from fxsparse.errors import OptionError
from fxsparse.tracing.trace import trace
from tests.support.traced import traced

FAMILIES = ("opt", "llama", "t5", "bert")


def operations(rows: plot.DiGraph) -> list[str]:
    return [name for name, kind in rows.nodes(data="operator") if kind != "parameter"]


@pytest.mark.parametrize("name", FAMILIES)
def test_fewer_rows_cost_the_same(name: str) -> None:
    graph, rng = BackpropGraph(traced(name)[1]), random.Random(0)
    rows = plot.condensed(graph.networkx)
    assert len(operations(rows)) < len(operations(graph.networkx))
    for _ in range(10):
        trained = rng.sample(sorted(graph.trainable), rng.choice([1, 2, 5, 20]))
        depends = plot.paying(rows, trained)
        assert sum(flops for _, u, flops in rows.edges(data="flops") if u in depends) == graph.cost(trained)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_operation_stands_on_a_line_of_others(name: str) -> None:
    rows = plot.condensed(BackpropGraph(traced(name)[1]).networkx)
    order = operations(rows)
    lane, row = plot.lanes(rows, order), {name: place for place, name in enumerate(order)}
    for user, source in rows.edges:
        if source in row:
            assert row[user] < row[source]
            between = order[row[user] + 1 : row[source]]
            assert all(lane[other] != lane[source] for other in between), (user, source)


def test_the_file_says_what_is_trained_and_what_it_costs(tmp_path: Path) -> None:
    graph = BackpropGraph(traced("opt")[1])
    chosen = graph.select({name: random.Random(name).random() for name in sorted(graph.trainable)}, 0.5)
    text = graph.plot(tmp_path / "deep" / "selection.svg", chosen).read_text()
    share = (graph.forward() + graph.cost(chosen)) / (graph.forward() + graph.full())
    assert f"{len(chosen)} of {len(graph.trainable)} tensors are trained" in text
    assert f"{share:.1%} of a full training step" in text
    assert all(f"layers.{layer}.fc1 linear" in text for layer in range(3))
    uses = sum(graph.networkx.in_degree(name) for name in chosen)
    assert len(re.findall(f'style="fill: {plot._TRAINED}; stroke: {plot._TRAINED}', text)) == uses > 0
    assert graph.plot(tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).detach().sum()


def test_there_must_be_something_to_draw(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="nothing to draw"):
        BackpropGraph(trace(Frozen(), (torch.randn(2, 4),))).plot(tmp_path / "no.png")
    with pytest.raises(OptionError, match="no parameter of that name"):
        BackpropGraph(traced("opt")[1]).plot(tmp_path / "no.png", {"lm_head.wait"})
