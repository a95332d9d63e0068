"""Whether a module computes what a graph does, on a batch of the traced sizes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import SymInt, Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fxsparse import graph as fx
from fxsparse.errors import FxsparseError
from fxsparse.graph.outputs import largest, named_floats, tolerance
from fxsparse.tracing.export import without_cache

_IN_DOUBLE = 1e-6
"""Of outputs in double precision, relative to the largest: norms and rotary positions stay in single precision."""


def difference(gm: GraphModule, model: Any) -> str | None:
    """The first difference between module and graph in their outputs for a batch of the traced sizes, or None.

    Sums in another order differ by rounding, and a deep or badly pruned model makes much of that. So outputs that
    differ a little are compared once more in double precision, where rounding is gone and a true difference stays.
    """
    found = _difference(gm, model, tolerance)
    if found is None or not found.is_small:
        return found and found.text
    try:
        exact = _difference(copy.deepcopy(gm).double(), copy.deepcopy(model).double(), lambda dtype: _IN_DOUBLE)
    except FxsparseError:  # a graph that cannot be made anew in another precision
        return found.text
    return None if exact is None else found.text


class _Found(NamedTuple):
    """A difference in words, and whether it is small enough to be one of rounding."""

    text: str
    is_small: bool = False


@torch.no_grad()
def _difference(gm: GraphModule, model: Any, allowed: Callable[[torch.dtype], float]) -> _Found | None:
    was_training = {module: module.training for module in gm.modules()}
    device = next(gm.parameters()).device
    try:
        gm.eval(), model.to(device)
        # A library may have wrapped the graph's forward, for mixed precision; the class has it as it is.
        args, kwargs, output = _run(functools.partial(type(gm).forward, gm), gm)
        with without_cache(model):  # as the graph was captured; T5Gemma hides padding only then
            outputs = [named_floats(output), named_floats(model(*args, **kwargs))]
    except Exception as error:  # the class cannot run with these sizes
        return _Found(f"it cannot run: {error}")
    finally:
        for module, training in was_training.items():
            module.training = training
    theirs, mine = outputs
    if len(theirs) != len(mine):
        return _Found(f"outputs of {len(mine)} tensors are not those of {len(theirs)}")
    for (name, wanted), (_, got) in zip(theirs, mine, strict=True):
        if wanted.shape != got.shape and wanted.dim() > 1:
            # A graph with fewer hidden dimensions returns hidden states of the old width, with zeros for the others.
            wanted = wanted[..., wanted.flatten(0, -2).any(0)]
        if wanted.shape != got.shape:
            return _Found(f"{name}: an output of shape {tuple(got.shape)} is not that of {tuple(wanted.shape)}")
        most, off = largest(wanted), largest(wanted - got)
        if not off <= allowed(wanted.dtype) * most:
            small = wanted.dtype == torch.float32 and off <= 1e-2 * most
            return _Found(f"{name}: outputs of up to {most:.3g} differ by {off:.3g}", small)
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
    precision = torch.float64 if _is_double(gm) else None
    leaves = []
    for node in gm.graph.find_nodes(op="placeholder"):
        value = fx.value(node)
        if isinstance(value, Tensor):
            sizes = [size.node.hint if isinstance(size, SymInt) else size for size in value.shape]
            if value.is_floating_point():
                value = torch.randn(sizes, generator=generator).to(device, precision or value.dtype)
            elif "mask" in node.name:
                value = torch.ones(sizes, dtype=value.dtype, device=device)
            else:
                value = torch.randint(0, _classes(node), sizes, generator=generator).to(device, value.dtype)
        leaves.append(value)
    args, kwargs = pytree.tree_unflatten(leaves, gm._in_spec)
    return tuple(args), dict(kwargs)


def _is_double(gm: GraphModule) -> bool:
    return all(parameter.dtype == torch.float64 for parameter in gm.parameters())


def _classes(ids: Node) -> int:
    """The number of values of an integer input: the rows of the embedding that reads it, else two, the fewest classes
    of any task."""
    embedding = torch.ops.aten.embedding.default
    tables = [user.args[0] for user in ids.users if user.target is embedding]
    return min((int(fx.value(table).shape[0]) for table in tables if isinstance(table, Node)), default=2)
