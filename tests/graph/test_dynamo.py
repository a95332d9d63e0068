"""What Dynamo's graphs say of the model."""

from __future__ import annotations

import pytest
import torch
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.graph.dynamo import clean_path
from fxsparse.passes import Change, Pass
from tests.support.families import FAMILIES


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self'].model.layers.0.mlp", "model.layers.0.mlp"),
        ("L['self'].layers[12].fc", "layers.12.fc"),
        ("L['self']._modules['fc']._parameters['weight']", "fc.weight"),
        ("L['fn'].0", "0"),
        ("L['self']", ""),
    ],
)
def test_module_paths(source: str, path: str) -> None:
    assert clean_path(source) == path


def test_a_one_line_call_tells_layers_apart() -> None:
    paths: set[str] = set()

    class Looks(Pass):
        name = "test-looks-at-paths"

        def rewrite(self, graph: GraphModule) -> list[Change]:
            paths.update(map(fx.stack_path, graph.graph.nodes))
            return [Change("", True, "looked")]

    family = FAMILIES["llama"]()
    compiled = torch.compile(family.model, backend="fxsparse", options={"passes": [Looks()], "compiler": "eager"})
    compiled(**family.make_batch())
    assert {f"model.layers.{number}.mlp.up_proj" for number in range(3)} <= paths
