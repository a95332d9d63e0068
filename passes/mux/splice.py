"""Writing a module into a graph: its operators become nodes, its parameters and buffers the graph module's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.func import functional_call
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from fxsparse import graph as fx


def adopt(gm: GraphModule, path: str, module: nn.Module) -> None:
    """Registers the parameters and buffers of ``module`` under ``path``, and the tree of modules that holds them."""
    for name, child in [("", module), *((name, child) for name, child in module.named_modules() if name)]:
        owner, _, leaf = f"{path}.{name}".rstrip(".").rpartition(".")
        twin = nn.Module()
        twin.training = gm.training
        twin._parameters.update(child._parameters)
        twin._buffers.update(child._buffers)
        (gm.get_submodule(owner) if owner else gm).add_module(leaf, twin)


def splice(gm: GraphModule, path: str, module: nn.Module, inputs: Sequence[Node | None], *, before: Node) -> Node:
    """What ``module(*inputs)`` computes, as nodes inserted before ``before``.

    Args:
        gm: the graph; it has adopted the module's state under ``path``.
        inputs: nodes of tensors, or None.

    Returns:
        the node of the result, one tensor.
    """
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    reads = [fx.insert_attribute(gm, f"{path}.{name}", before=before) for name in names]

    def run(state: Sequence[Tensor], args: Sequence[Tensor | None]) -> Tensor:
        return functional_call(module, dict(zip(names, state, strict=True)), tuple(args))

    values = [None if node is None else fx.value(node) for node in inputs]
    with fx.fake_mode(gm), enable_python_dispatcher(), torch.no_grad():
        traced = make_fx(run, pre_dispatch=True)([fx.value(read) for read in reads], values)
    traced.graph.eliminate_dead_code()
    placeholders = traced.graph.find_nodes(op="placeholder")
    twins: dict[Node, Node] = dict(zip(placeholders, (*reads, *inputs), strict=True))  # type: ignore[arg-type]
    with gm.graph.inserting_before(before):
        result = gm.graph.graph_copy(traced.graph, twins)  # a list of what was returned
    for node in (*twins.values(), *reads):
        if node is not None and node not in inputs:
            node.meta["nn_module_stack"] = {path: (path, type(module).__name__)}
    for read in reads:
        if not read.users:
            gm.graph.erase_node(read)
    return result[0]  # type: ignore[index, return-value]
