"""Graphs as Python: names, types and headings; regions, and the graphs of Dynamo."""

from __future__ import annotations

import ast
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxsparse
from fxsparse.graph.readable import readable
from tests.support.families import FAMILIES
from tests.support.traced import traced


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Dropout(0.5)])
        self.scale = nn.Parameter(torch.ones(8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Any:
        first, second = self.layers[1](self.layers[0](x)).split(4, -1)
        with torch.autocast("cpu", torch.bfloat16):
            y = self.layers[0](x)
        largest = x.max(-1)
        kept = x[:, torch.tensor(list(range(8)) * 3)].float().isfinite()
        return {"y": y, "z": [first * second.sum(), largest.indices], "kept": kept, "s": self.scale[None] * x.shape[0]}


EXPECTED = """
def forward(
    self,
    x,                                                                            # f32[s0, 8]
):

    # layers.0    weight: f32[8, 8], bias: f32[8]
    linear = aten.linear(x, layers[0].weight, layers[0].bias)                     # f32[s0, 8]

    # layers.1
    dropout = aten.dropout(linear, 0.5, layers[1].training)                       # f32[s0, 8]

    # the model itself
    split = aten.split.Tensor(dropout, 4, -1)                                     # (f32[s0, 4], f32[s0, 4])

    # the model itself    lifted_tensor_0: i64[24], scale: f64[8]
    max_1 = aten.max.dim(x, -1)                                                   # (f32[s0], i64[s0])
    detach = aten.detach(lift_fresh_copy)                                         # i64[24]
    slice_1 = aten.slice.Tensor(x, 0, 0, END)                                     # f32[s0, 8]
    index = aten.index.Tensor(slice_1, [None, detach])                            # f32[s0, 24]
    isfinite = aten.isfinite(to)                                                  # bool[s0, 24]
    unsqueeze = aten.unsqueeze(self.scale, 0)                                     # f64[1, 8]
"""


def test_names_types_and_headings() -> None:
    text = readable(fxsparse.trace(Mixed(), (torch.randn(4, 8),)).graph)
    main, _, region = text.partition("\n\n\n")
    lines = main.splitlines()
    for line in EXPECTED.strip().splitlines():
        assert line in lines, line
    assert "= split[0]  " in main and "= wrap_with_autocast('cpu', torch.bfloat16, True, False, self.submod_1, " in main
    returned = lines[-1]
    assert returned.startswith("    return {'y': ") and "'z': [mul, " in returned and "'kept': isfinite" in returned
    assert region.startswith("def submod_1(") and "    # layers.0\n" in region and "# bf16[s0, 8]" in region
    assert len(ast.parse(text).body) == 2


def test_long_lists_and_the_end_of_a_dimension() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    view = graph.call_function(torch.ops.aten.view.default, (x, list(range(40))))
    end = graph.call_function(torch.ops.aten.slice.Tensor, (view, 0, 2, 2**63 - 1))
    graph.output((end,))
    text = readable(graph)
    assert "aten.view(x, [0, 1, 2, 3, 4, 5, ..., 39])" in text and "aten.slice.Tensor(view_default, 0, 2, END)" in text
    assert "    return (slice_tensor,)" in text


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_python(name: str) -> None:
    _, gm = traced(name)
    text = readable(gm.graph)
    assert isinstance(ast.parse(text).body[0], ast.FunctionDef)
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    assert sum(line.startswith("    ") and " = " in line for line in text.splitlines()) == len(calls)
    assert "torch.ops" not in text and ".default(" not in text


def test_a_graph_of_dynamo() -> None:
    seen: list[GraphModule] = []

    def look(gm: GraphModule, inputs: list[Tensor]) -> Any:
        seen.append(gm)
        return gm.forward

    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
    torch.compile(model, backend=look)(torch.randn(3, 8))
    (graph,) = (gm.graph for gm in seen)
    weight = next(node.name for node in graph.find_nodes(op="placeholder") if "weight" in node.name)
    text = readable(graph, state={weight: "0.weight"})
    assert "torch._C._nn.linear(" in text and "self[0].weight" in text and weight not in text
    assert "f32[3, 4]" in text and "# 0    weight: f32[4, 8]" in text
    ast.parse(text)
