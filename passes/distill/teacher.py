"""Reading a graph's loss and logits, and turning a model into a frozen teacher."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import SymInt, Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fxsparse import graph as fx
from fxsparse.errors import RewriteError
from fxsparse.graph.record import TRACE_KEY
from fxsparse.tracing.trace import trace


def _outputs(gm: GraphModule) -> tuple[dict[str, Node], list[Node]]:
    """The floating-point outputs by the field they are returned in, and all of them."""
    (returned,) = gm.graph.output_node().args
    leaves = pytree.tree_leaves(returned)
    info = getattr(gm.graph._codegen, "pytree_info", None)
    fields: dict[str, Node] = {}
    if info is not None and info.out_spec is not None and info.out_spec.num_leaves == len(leaves):
        outputs = pytree.tree_unflatten(leaves, info.out_spec)
        if isinstance(outputs, Mapping):
            fields = {str(name): out for name, out in outputs.items() if isinstance(out, Node)}
    floating = [leaf for leaf in leaves if isinstance(leaf, Node) and _is_floating(leaf)]
    return fields, floating


def _is_floating(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def loss_of(gm: GraphModule) -> Node:
    fields, floating = _outputs(gm)
    scalars = [node for node in floating if fx.value(node).dim() == 0]
    if "loss" in fields or len(scalars) == 1:
        return fields.get("loss") or scalars[0]
    raise RewriteError(
        "the model returns no loss to add to; trace it with labels, or let it return one scalar",
        pass_name="distill",
    )


def logits_of(gm: GraphModule) -> Node | None:
    """The output called ``logits``, else the first floating-point output that is no scalar."""
    fields, floating = _outputs(gm)
    return fields.get("logits") or next((node for node in floating if fx.value(node).dim() > 0), None)


def frozen_teacher(gm: GraphModule, teacher: nn.Module) -> tuple[GraphModule, bool]:
    """A graph of the teacher, in evaluation mode, with a graph and flags of its own; and whether its parameters had to
    be copied, which is warned about."""
    traced: Any = teacher if _is_traced(teacher) else trace(teacher, *_example(gm), **_free(gm))
    shared = _shared(traced, gm)
    if shared:
        more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
        warnings.warn(
            f"distill: the teacher shares {shared[0]}{more} with the model that is trained, so a copy of it teaches; "
            "fxsparse.rewrite(..., copy=True) gives the trained model tensors of its own instead",
            stacklevel=2,
        )
    frozen = copy.deepcopy(traced) if shared else fx.copy_sharing_state(traced)
    for module in frozen.modules():
        module.training = False
    return frozen, bool(shared)


def _shared(traced: GraphModule, gm: GraphModule) -> list[str]:
    """The parameters and buffers of ``traced`` whose memory ``gm`` uses too, by name."""
    ours = {tensor.untyped_storage().data_ptr() for tensor in fx.tensors_of(gm).values() if tensor.numel()}
    theirs = fx.tensors_of(traced).items()
    return [name for name, tensor in theirs if tensor.numel() and tensor.untyped_storage().data_ptr() in ours]


def _is_traced(module: nn.Module) -> bool:
    return isinstance(module, GraphModule) and TRACE_KEY in module.meta


def _example(gm: GraphModule) -> tuple[Any, Any]:
    """Inputs of the sizes the student was traced with; capture does not look at their values."""
    device = next(gm.parameters()).device
    leaves = []
    for node in gm.graph.find_nodes(op="placeholder"):
        value = fx.value(node)
        if isinstance(value, Tensor):
            sizes = [size.node.hint if isinstance(size, SymInt) else size for size in value.shape]
            value = torch.zeros(sizes, dtype=value.dtype, device=device)
        leaves.append(value)
    args, kwargs = pytree.tree_unflatten(leaves, gm._in_spec)
    return tuple(args), kwargs


def _free(gm: GraphModule) -> dict[str, Any]:
    shapes = [fx.value(node).shape for node in gm.graph.find_nodes(op="placeholder") if _is_tensor(node)]
    return {
        option: any(len(shape) > dim and isinstance(shape[dim], SymInt) for shape in shapes)
        for dim, option in enumerate(("dynamic_batch", "dynamic_sequence"))
    }


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def tapped(traced: GraphModule, taps: list[Any]) -> GraphModule:
    """The teacher as a function that returns the tensors to compare, and computes nothing else."""
    graph = traced.graph
    output = graph.output_node()
    output.args = (tuple(taps),)
    graph.set_codegen(torch.fx.graph.CodeGen())
    fx.eliminate_dead_code(traced)
    for node in graph.find_nodes(op="placeholder"):
        if not node.users:
            graph.erase_node(node)
    return GraphModule(traced, graph)
