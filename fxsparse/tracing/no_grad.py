"""Flattening: what a model computes under ``torch.no_grad()`` joins the graph.

Capture wraps such code (rotary embeddings, for one) into a submodule called through ``wrap_with_set_grad_enabled``. Its
operators without gradients are the same operators followed by ``detach``, so a flat graph says the same, and every pass
can read it.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.tracing.views import may_require_grad

_GRAD_MODE = torch.ops.higher_order.wrap_with_set_grad_enabled


def inline_no_grad(gm: GraphModule) -> int:
    """Inlines the regions of ``gm`` that run without gradients, and returns their number.

    A region that writes in place (into a parameter, without gradients) keeps its form.
    """
    count = 0
    for node in gm.graph.find_nodes(op="call_function", target=_GRAD_MODE):
        enabled, source, *inputs = node.args
        region = fx.attribute(gm, str(source.target))
        if (
            not enabled
            and isinstance(region, GraphModule)
            and not any(_is_mutable(inner) for inner in region.graph.nodes)
        ):
            inline_no_grad(region)
            _inline(gm, node, region, inputs)
            if not source.users:
                gm.graph.erase_node(source)
                fx.delete(gm, str(source.target))
            count += 1
    return count


def _is_mutable(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _inline(gm: GraphModule, call: Node, region: GraphModule, inputs: list[Any]) -> None:
    differentiable = any(may_require_grad(gm, node) for node in inputs if isinstance(node, Node))
    copies: dict[Node, Node] = {}
    with gm.graph.inserting_before(call):
        for inner, outer in zip(region.graph.find_nodes(op="placeholder"), inputs, strict=True):
            copies[inner] = outer
        for inner in region.graph.nodes:
            if inner.op not in {"placeholder", "output"}:
                copies[inner] = gm.graph.node_copy(inner, copies.__getitem__)
            if inner.op == "get_attr":  # a region inside the region
                copies[inner].target = _free_name(gm, str(inner.target))
                setattr(gm, str(copies[inner].target), fx.attribute(region, str(inner.target)))
        outputs: Any = region.graph.output_node().args[0]
        results: list[Any] = [copies[inner] for inner in outputs]
        if differentiable:
            results = [_detach(gm, result) for result in results]
    for user in list(call.users):
        if user.target is not operator.getitem:
            raise TypeError(f"{user} reads a region of several outputs without getitem")
        fx.replace(user, results[user.args[1]])  # type: ignore[index]
    gm.graph.erase_node(call)


def _free_name(gm: GraphModule, name: str) -> str:
    names = itertools.chain([name], (f"{name}_{count}" for count in itertools.count()))
    return next(free for free in names if not hasattr(gm, free))


def _detach(gm: GraphModule, node: Node) -> Node:
    fake = node.meta.get("val")
    if not isinstance(fake, Tensor):
        return node
    detached = gm.graph.call_function(torch.ops.aten.detach.default, (node,))
    detached.meta = {**node.meta, "val": fake}
    return detached
