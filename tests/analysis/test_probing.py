"""Running parts of a graph on random values, and parts that do not run so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph

import fxsparse
from fxsparse.analysis import structures as module
from fxsparse.analysis.probing import CannotRun, evaluate
from fxsparse.analysis.reach import Runs, reached
from fxsparse.analysis.sections import Section
from fxsparse.analysis.structures import structures


def test_a_node_whose_sizes_are_data_ends_the_search() -> None:
    """How many rows an expert gets is data, so parts of random sizes need not sum up."""
    graph = Graph()
    x, sizes = graph.placeholder("x"), graph.placeholder("sizes")
    parts = graph.call_function(torch.ops.aten.split_with_sizes.default, (x, sizes))
    with pytest.raises(CannotRun, match=r"split_with_sizes.* does not run on random values: split_with_sizes expects"):
        evaluate([parts], {x: torch.randn(7, 2)}, {sizes: [3, 3]})


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def test_a_structure_that_cannot_be_run_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = fxsparse.trace(nn.Sequential(FeedForward(), FeedForward()), (torch.randn(3, 8),))

    def fails(*args: Any) -> Any:
        node = next(node for node in gm.graph.nodes if "relu" in node.name)
        raise CannotRun(node, RuntimeError("sizes are data"))

    monkeypatch.setattr(module, "reached", fails)
    found = structures(gm)
    assert not found.mlps
    assert {change.site: "sizes are data" in change.detail for change in found.skipped} == {
        "0.down": True,
        "1.down": True,
    }


class Choosing(nn.Module):
    """Its second linear reads which of the first one's results are the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).argsort(-1).to(x.dtype))


def test_what_is_chosen_by_values_has_no_gradient() -> None:
    gm = fxsparse.trace(Choosing(), (torch.randn(3, 8),))
    first, second = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    target = second.args[0]
    section = Section({first: (0,)}, [target], 8)
    (rows,) = reached(section, target, -1, torch.eye(8, dtype=torch.bool))
    assert not rows.any()
    assert not Runs(section, target).rows(torch.ones(8, dtype=torch.bool))[first].any()
