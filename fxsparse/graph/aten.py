"""Functions of plain torch put into ATen graphs, as Inductor's passes get them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx


def insert_aten(graph: Graph, function: Callable[..., Any], inputs: Sequence[Node], *, before: Node) -> Node:
    """Inserts the operators of ``function(*inputs)``, decomposed as Inductor does, and gives the node of its result.

    Args:
        graph: an ATen graph of fake tensors; it is edited.
        function: of as many tensors as there are inputs; it returns one.
        inputs: nodes with a tensor each.
        before: the node to insert before.
    """
    from torch._inductor.decomposition import select_decomp_table

    values = [source.meta["val"] for source in inputs]
    with detect_fake_mode(values) or contextlib.nullcontext(), enable_python_dispatcher():
        traced = make_fx(function, select_decomp_table())(*values)
    with graph.inserting_before(before):
        twins = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
        result = graph.graph_copy(traced.graph, twins)
    assert isinstance(result, Node)
    return result
