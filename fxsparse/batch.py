"""Which inputs a captured graph takes: a free batch size, every other size as in the example.

``torch.export`` freezes a batch of 1 without a word, since a size of 1 cannot be told from a broadcast, and freezes any
batch whose size the model's Python asks for. And a captured graph given a smaller size may broadcast in silence. Each
is found here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx import _pytree as fx_pytree
from torch.utils import _pytree as pytree

from fxsparse import graph as fx
from fxsparse.capture import Inputs, left_as_it_was, tensors, where_batch_was_fixed
from fxsparse.errors import TraceError


def with_two_rows(model: nn.Module, example: Inputs) -> Inputs:
    """``example``, repeated along dimension 0 where every input has one row."""
    rows = [tensor.shape[0] for tensor in tensors(example) if tensor.dim()]
    if not rows or rows[0] != 1:
        return example
    if any(count != 1 for count in rows):
        raise TraceError(
            f"{type(model).__name__}: the first example input has one row and others have {max(rows)}; a batch of 1 is "
            "captured as the only batch size. Give an example of at least two rows, or dynamic_batch=False."
        )
    return pytree.tree_map_only(Tensor, _repeat, example)  # type: ignore[no-any-return]


def _repeat(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor]) if tensor.dim() else tensor


def tensor_inputs(gm: GraphModule) -> list[Node]:
    """The placeholders of ``gm`` that are tensors."""
    return [node for node in gm.graph.find_nodes(op="placeholder") if isinstance(node.meta.get("val"), Tensor)]


def check_batch_is_free(model: nn.Module, gm: GraphModule, example: Inputs) -> list[str]:
    """Notes on inputs whose dimension 0 is fixed; TraceError where that is so for all that the model reads."""
    inputs = [node for node in tensor_inputs(gm) if node.users and fx.value(node).dim()]
    fixed = [node for node in inputs if isinstance(fx.value(node).shape[0], int)]
    if inputs and len(fixed) == len(inputs):
        with left_as_it_was(model):
            where = where_batch_was_fixed(model, example)
        raise TraceError(
            f"{type(model).__name__}: the model works at batch size {fx.value(fixed[0]).shape[0]} only{where}\n"
            "Write sizes as x.shape[0] or -1, or trace with dynamic_batch=False."
        )
    return [f"{node.name}: dimension 0 stays {fx.value(node).shape[0]}" for node in fixed]


def check_one_row(model: nn.Module, gm: GraphModule, example: Inputs) -> None:
    """TraceError where the model does something else with one row (``squeeze``) than the graph captured with two."""
    shapes = []
    for module in (model, gm):
        with left_as_it_was(module), FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            module.eval()
            args, kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, example)
            shapes.append([tuple(tensor.shape) for tensor in tensors(module(*args, **kwargs))])
    if shapes[0] != shapes[1]:
        raise TraceError(
            f"{type(model).__name__}: with one row the model returns sizes {shapes[0]}, the graph captured with two rows "
            f"{shapes[1]}. Give an example of at least two rows, or dynamic_batch=False."
        )


@torch._dynamo.disable
def check_inputs(gm: GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """TraceError where an input is not what ``gm`` was captured for: another size, or another constant."""
    info = gm.graph._codegen.pytree_info  # type: ignore[attr-defined]
    values = dict(zip((name for name in info.orig_args if name != "self"), args, strict=False)) | dict(kwargs)
    positional, named = gm._in_spec.children_specs
    try:
        names = list(values)[: positional.num_children]
        leaves = fx_pytree.tree_flatten_spec(
            ([values[name] for name in names], {name: values[name] for name in named.context}), gm._in_spec
        )
    except (KeyError, ValueError, TypeError):
        return  # missing or unexpected arguments: forward says so
    for node, leaf in zip(gm.graph.find_nodes(op="placeholder"), leaves, strict=False):
        expected = node.meta.get("val")
        if isinstance(expected, Tensor) and isinstance(leaf, Tensor):
            if expected.dim() != leaf.dim():
                raise TraceError(
                    f"{node.name} has {leaf.dim()} dimensions, the graph was captured with {expected.dim()}"
                )
            for dim, (size, given) in enumerate(zip(expected.shape, leaf.shape, strict=True)):
                if isinstance(size, int) and size != given:
                    raise TraceError(
                        f"{node.name} has size {given} in dimension {dim}, the graph was captured with {size}; "
                        "trace the model with an example of that size"
                    )
        elif isinstance(expected, Tensor) or isinstance(leaf, Tensor) or leaf != expected:
            raise TraceError(
                f"{node.name} is {leaf!r}, the graph was captured with {expected!r}; trace the model with it"
            )
