"""Reads the meta of a node: its fake value with symbolic sizes, and the path of its module."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch._ops import OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node


def value(node: Node) -> Any:
    """The fake value of ``node``, with symbolic sizes."""
    return node.meta["val"]


def example_of(arg: Any) -> Any:
    """``arg``, a node or a structure of nodes, with every node replaced by its fake value."""
    return torch.fx.node.map_arg(arg, value)


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of an operator's call by the names in its schema, in its order; defaults for those not written."""
    specs = _specs(node)
    written = dict(zip((spec.name for spec in specs), node.args, strict=False)) | dict(node.kwargs)
    defaults = {spec.name: spec.default_value for spec in specs if spec.has_default_value()}
    return {spec.name: written.get(spec.name, defaults.get(spec.name)) for spec in specs}


def set_argument(node: Node, name: str, item: Any) -> None:
    """Sets an argument of an operator's call by its name in the schema, by position if it can be."""
    specs, written = _specs(node), len(node.args)
    position = [spec.name for spec in specs].index(name)
    skipped = specs[written:position]
    if position < written:
        node.update_arg(position, item)
    elif specs[position].kwarg_only or any(spec.name in node.kwargs for spec in (*skipped, specs[position])):
        node.update_kwarg(name, item)
    else:
        node.args = (*node.args, *(spec.default_value for spec in skipped), item)


def _specs(node: Node) -> Any:
    target: Any = node.target
    return (target.default if isinstance(target, OpOverloadPacket) else target)._schema.arguments


def stack_path(node: Node) -> str:
    """The path of the module whose code made ``node``; an empty string for the model itself."""
    stack = node.meta.get("nn_module_stack")
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    if path.startswith("_empty_nn_module_stack"):  # torch.export's name on nodes for sizes that it reads itself
        return ""
    return re.sub(r"@\d+", "", path)  # the second and later calls of a module are numbered


def fake_mode(gm: GraphModule) -> FakeTensorMode:
    """The fake mode of the graph's values; a new one if it has none."""
    for node in gm.graph.nodes:
        fake = node.meta.get("val")
        if isinstance(fake, FakeTensor):
            return fake.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps torch from logging the tracebacks of operators that fail on fake values: whoever tries them says why."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before
