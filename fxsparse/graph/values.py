"""What a node carries: its fake value with symbolic sizes, and the path of the module it came from."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node


def value(node: Node) -> Any:
    """The fake value of ``node``, with symbolic sizes."""
    return node.meta["val"]


def example_of(arg: Any) -> Any:
    """``arg`` with every node replaced by its fake value."""
    return torch.fx.node.map_arg(arg, value)


def stack_path(node: Node) -> str:
    """Path of the module ``node`` came from; an empty string for the model itself."""
    stack = node.meta.get("nn_module_stack")
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    if path.startswith("_empty_nn_module_stack"):  # what export writes on sizes that it read itself
        return ""
    return re.sub(r"@\d+", "", path)  # a module that is called again has a numbered path


def fake_mode(gm: GraphModule) -> FakeTensorMode:
    """The fake mode the graph's values live in."""
    for node in gm.graph.nodes:
        fake = node.meta.get("val")
        if isinstance(fake, FakeTensor):
            return fake.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)
