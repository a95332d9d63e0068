"""Whether a module computes what a graph does, on a batch of the traced sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fxsparse import graph as fx
from fxsparse.graph.outputs import largest, named_floats, tolerance


@torch.no_grad()
def difference(gm: GraphModule, model: Any) -> str | None:
    """The first difference between module and graph in their outputs for a batch of the traced sizes, or None."""
    was_training = {module: module.training for module in gm.modules()}
    device = next(gm.parameters()).device
    try:
        gm.eval(), model.to(device)
        # A library may have wrapped the graph's forward, for mixed precision; the class has it as it is.
        args, kwargs, output = _run(functools.partial(type(gm).forward, gm), gm)
        outputs = [named_floats(output), named_floats(model(*args, **kwargs))]
    except Exception as error:  # the class cannot run with these sizes
        return f"it cannot run: {error}"
    finally:
        for module, training in was_training.items():
            module.training = training
    theirs, mine = outputs
    if len(theirs) != len(mine):
        return f"outputs of {len(mine)} tensors are not those of {len(theirs)}"
    for (name, wanted), (_, got) in zip(theirs, mine, strict=True):
        if wanted.shape != got.shape and wanted.dim() > 1:
            # A graph with fewer hidden dimensions returns hidden states of the old width, with zeros for the others.
            wanted = wanted[..., wanted.flatten(0, -2).any(0)]
        if wanted.shape != got.shape:
            return f"{name}: an output of shape {tuple(got.shape)} is not that of {tuple(wanted.shape)}"
        most, off = largest(wanted), largest(wanted - got)
        if not off <= tolerance(wanted.dtype) * most:
            return f"{name}: outputs of up to {most:.3g} differ by {off:.3g}"
    return None


def _run(forward: Callable[..., Any], gm: GraphModule) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """A batch and what the graph makes of it; integers are zeros if it cannot read random ones (boxes of a page)."""
    try:
        args, kwargs = _batch(gm)
        return args, kwargs, forward(*args, **kwargs)
    except Exception:
        args, kwargs = pytree.tree_map_only(Tensor, _integers_as_zeros, _batch(gm))
        return args, kwargs, forward(*args, **kwargs)


def _integers_as_zeros(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_floating_point() else torch.zeros_like(tensor)


def _batch(gm: GraphModule) -> tuple[tuple[Any, ...], dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    device = next(gm.parameters()).device
    leaves = []
    for node in gm.graph.find_nodes(op="placeholder"):
        value = fx.value(node)
        if isinstance(value, Tensor):
            sizes = [size.node.hint if isinstance(size, SymInt) else size for size in value.shape]
            if value.is_floating_point():
                value = torch.randn(sizes, generator=generator).to(device, value.dtype)
            elif "mask" in node.name:
                value = torch.ones(sizes, dtype=value.dtype, device=device)
            else:
                value = torch.randint(0, _classes(node), sizes, generator=generator).to(device, value.dtype)
        leaves.append(value)
    args, kwargs = pytree.tree_unflatten(leaves, gm._in_spec)
    return tuple(args), dict(kwargs)


def _classes(ids: Node) -> int:
    """The number of values of an integer input: the rows of the embedding that reads it, else two, the fewest classes
    of any task."""
    embedding = torch.ops.aten.embedding.default
    tables = [user.args[0] for user in ids.users if user.target is embedding]
    return min((int(fx.value(table).shape[0]) for table in tables if isinstance(table, Node)), default=2)
