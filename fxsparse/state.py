"""The way back: the original model's state dict from a rewritten graph module."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.nm import Pattern, unpack
from fxsparse.passes.low_rank import merged
from fxsparse.passes.multiplex import PATH as MULTIPLEXER
from fxsparse.record import HeldWeight, record_of

_SUFFIXES = ("_values", "_indices", "_column_mask", "_mask", "_down", "_up")


@torch.no_grad()
def dense_state_dict(gm: GraphModule) -> dict[str, Tensor]:
    """The state dict of the model as it was before the rewrite: its keys, dense values, pruned weights zero.

    Low-rank branches that take part are merged into their weight, which is then no longer sparse, so that the result
    computes what the graph computes. It loads into the original model with ``load_state_dict``. What multiplexing added
    is no part of it.

    Args:
        gm: a traced or rewritten graph module.

    Returns:
        every key of the original's ``state_dict``; tied weights under all their names.
    """
    state = {name: tensor.detach() for name, tensor in gm.state_dict().items()}
    branches = {
        str(node.target) for node in gm.graph.nodes if node.op == "get_attr" and str(node.target).endswith("_down")
    }
    held = {weight.name: weight for weight in record_of(gm).weights}
    own = {f"{name}{suffix}" for name in held for suffix in _SUFFIXES}
    own |= {name for name in state if _is_branch(name, state)}
    own |= {name for name in state if name.startswith(f"{MULTIPLEXER}.") and "multiplex{" in record_of(gm).text}
    dense = {name: tensor for name, tensor in state.items() if name not in own}
    for weight in held.values():
        values = _dense(weight, state)
        dense.update((name, values) for name in weight.names)
    stored_transposed = {linear.name: linear.transposed for linear in fx.linears(gm)}
    for down in sorted(branches & set(state)):
        name = down.removesuffix("_down")
        transposed = held[name].transposed if name in held else stored_transposed[name]
        original = dense[name].t() if transposed else dense[name]
        total = merged(original, state[down], state[f"{name}_up"])
        names = held[name].names if name in held else (name,)
        dense.update((alias, total.t().contiguous() if transposed else total) for alias in names)
    return dense


def _is_branch(name: str, state: dict[str, Tensor]) -> bool:
    stem = name.removesuffix("_down").removesuffix("_up")
    return stem != name and f"{stem}_down" in state and f"{stem}_up" in state


def _dense(weight: HeldWeight, state: dict[str, Tensor]) -> Tensor:
    """A held weight as it was stored before, with its pruned positions zero."""
    if weight.storage == "masked":
        mask = state[f"{weight.name}_mask"]
        return state[weight.name] * (mask.t() if weight.transposed else mask)
    pattern = Pattern.parse(weight.pattern)
    values, indices = state[f"{weight.name}_values"], state[f"{weight.name}_indices"]
    dense = unpack(values, indices, pattern, weight.in_features)
    return dense.t().contiguous() if weight.transposed else dense
