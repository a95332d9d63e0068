"""Putting references in the place of operators, in a graph that Inductor is about to lower.

The time for it is after AOTAutograd has cut its graph into a forward and a backward one. Where a reference is inlined
before, through ``decompositions=``, what the backward pass computes from weights alone becomes forward work: W^{R,C} is
made dense there and held until the backward pass, together with the positions of all kept values in int64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from fxsparse.custom_op import DECOMPOSITIONS


def inline_references(graph: Graph, wanted: Callable[[Node], bool] = lambda node: True) -> int:
    """Replaces calls of fxsparse operators by the ATen of their references, in place.

    Args:
        graph: an ATen graph of fake tensors, as a ``post_grad_custom_pre_pass`` of Inductor gets it.
        wanted: which calls.

    Returns:
        how many.
    """
    calls = [node for node in graph.nodes if node.op == "call_function" and node.target in DECOMPOSITIONS]
    calls = [node for node in calls if wanted(node)]
    for node in calls:
        _inline(graph, node)
    return len(calls)


def _inline(graph: Graph, call: Node) -> None:
    from torch._inductor.decomposition import select_decomp_table

    sources = call.all_input_nodes
    values = [source.meta["val"] for source in sources]

    def compute(*tensors: Any) -> torch.Tensor:
        given = dict(zip(sources, tensors, strict=True))
        args, kwargs = torch.fx.map_arg((call.args, call.kwargs), given.__getitem__)
        return DECOMPOSITIONS[call.target](*args, **kwargs)  # type: ignore[index]

    with detect_fake_mode(values) or contextlib.nullcontext(), enable_python_dispatcher():
        traced = make_fx(compute, select_decomp_table())(*values)
    with graph.inserting_before(call):
        twins = dict(zip(traced.graph.find_nodes(op="placeholder"), sources, strict=True))
        result = graph.graph_copy(traced.graph, twins)
    assert isinstance(result, Node)  # operators return one tensor
    call.replace_all_uses_with(result)
    graph.erase_node(call)
