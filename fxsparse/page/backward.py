"""The backward pass of one block of a graph, as text.

The block is cut out of the graph: what it reads from outside, parameters included, becomes its inputs, at the sizes of
the traced example. AOTAutograd differentiates it on fake tensors, as it would for a compiler, and computes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._functorch.partitioners import default_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node

from fxsparse import graph as fx
from fxsparse.graph.readable import readable
from fxsparse.graph.training_form import training_graph
from fxsparse.page.layers import block_of


def backward_text(gm: GraphModule, block: str) -> str:
    """The backward graph of a block; ``block`` is empty for the whole graph."""
    gm = training_graph(gm)
    nodes = [
        node for node in gm.graph.nodes if _is_call(node) and (not block or block_of(fx.stack_path(node)) == block)
    ]
    cut, inputs = _cut_out(gm, nodes)
    mode = FakeTensorMode()
    fakes = [_fake_of(mode, gm, node) for node in inputs]
    with torch.fx.traceback.preserve_node_meta():
        joint: Any = aot_export_joint_simple(lambda *args: Interpreter(cut).run(*args), tuple(fakes), trace_joint=True)
    outputs: Any = cut.graph.output_node().args[0]
    _, backward = default_partition(joint, fakes, num_fwd_outputs=len(outputs))
    names = {f"primals_{at}": str(node.target) for at, node in enumerate(inputs, 1) if node.op == "get_attr"}
    return readable(backward.graph, "backward", names)


def _is_call(node: Node) -> bool:
    return node.op not in {"placeholder", "get_attr", "output"}


def _cut_out(gm: GraphModule, nodes: list[Node]) -> tuple[GraphModule, list[Node]]:
    """A graph module of the nodes alone, and the nodes of ``gm`` that are its inputs, in order."""
    graph, root = Graph(), torch.nn.Module()
    copies: dict[Node, Any] = {}
    inputs: list[Node] = []
    chosen = set(nodes)
    for node in dict.fromkeys(source for each in nodes for source in each.all_input_nodes if source not in chosen):
        target = fx.attribute(gm, str(node.target)) if node.op == "get_attr" else None
        if isinstance(target, GraphModule):  # a region, such as of autocast
            name = str(node.target).replace(".", "_")
            root.add_module(name, target)
            copies[node] = graph.get_attr(name)
        elif isinstance(node.meta.get("val"), Tensor):
            copies[node] = graph.placeholder(f"input_{len(inputs)}")
            inputs.append(node)
        else:
            copies[node] = _number(node.meta.get("val", target))
    for node in nodes:
        args: Any = torch.fx.node.map_arg(node.args, copies.__getitem__)
        kwargs: Any = torch.fx.node.map_arg(node.kwargs, copies.__getitem__)
        copies[node] = graph.create_node(node.op, node.target, args, kwargs, node.name)
        copies[node].meta = {"nn_module_stack": node.meta.get("nn_module_stack", {})}
    results = [node for node in nodes if any(user not in chosen for user in node.users) and _differs(node)]
    # A copy is no view of an input, which export refuses; its gradient is itself.
    graph.output(tuple(graph.call_function(torch.ops.aten.clone.default, (copies[node],)) for node in results))
    return GraphModule(root, graph), inputs


def _differs(node: Node) -> bool:
    """Whether a result is a tensor that a gradient may come back to."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _number(value: Any) -> Any:
    """A size at the traced example, or a value as it is."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.hint
    return value


def _fake_of(mode: FakeTensorMode, gm: GraphModule, node: Node) -> Tensor:
    """A fake tensor of the sizes of the example, which requires a gradient if a gradient can come back to it."""
    value = node.meta["val"]
    sizes = [int(_number(size)) for size in value.shape]
    strides = [int(_number(stride)) for stride in value.stride()]
    held = fx.attribute(gm, str(node.target)) if node.op == "get_attr" else None
    wants = value.is_floating_point() if held is None else held.requires_grad
    with mode:
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device).requires_grad_(wants)
