"""Keys that are joined to those of a new cache are joined to nothing: ``cat([tensor([]), keys], -2)`` are the keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse import graph as fx

aten = torch.ops.aten


def drop_empty_parts(gm: GraphModule) -> None:
    """Takes tensors of no element and one dimension, which torch lets be joined to any, out of what is joined.

    Args:
        gm: a graph with the fake values that capture gave it; edited in place. Eliminate dead code after.
    """
    for node in gm.graph.find_nodes(op="call_function", target=aten.cat.default):
        parts: Any = node.args[0]
        left = [part for part in parts if not _is_nothing(part)]
        if len(left) == len(parts) or not left or any(fx.value(part).dtype != fx.value(node).dtype for part in left):
            continue
        if len(left) == 1:
            fx.replace(node, left[0])
        else:
            node.update_arg(0, left)


def _is_nothing(part: Node) -> bool:
    value = fx.value(part)
    return isinstance(value, Tensor) and value.dim() == 1 and isinstance(size := value.shape[0], int) and size == 0
