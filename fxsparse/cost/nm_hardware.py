"""FLOPs of a training step on hardware that multiplies by n:m weights, as sparse tensor cores do.

Such hardware skips what is pruned only along the dimension that a product sums over:

    y  = x W^T     sums over ``in``     W^R is n:m along it: n/m of the dense product
    dx = dy W      sums over ``out``    n/m where W^{R,C} or a transposable mask is n:m along it, else dense
    dW = dy^T x    both are dense       dense

So a mask alone saves in the forward pass, and double pruning in the backward pass too (SLoPe, arXiv 2405.16325).
The other counts of this package are by stored elements and know nothing of hardware.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.cost.backprop import BackpropGraph, Costs
from fxsparse.cost.dataflow import Operation
from fxsparse.cost.sizes import Sizes
from fxsparse.graph.record import HeldWeight, record_of
from fxsparse.ops.nm import Pattern
from fxsparse.ops.operator import operator_name

_COMPRESSED = {"nm_linear", "nm_linear_low_rank", "nm_expert_linear"}
_MASKED = {"masked_linear", "masked_linear_low_rank", "masked_expert_linear"}


def nm_step_flops(gm: GraphModule, graph: BackpropGraph) -> int:
    """FLOPs of a step that trains all trainable tensors, forward and backward, where n:m products skip what is pruned.

    Args:
        gm: the graph module that runs in training, at its traced sizes; its record says how weights are held.
        graph: of ``gm``.
    """
    costs, sizes = graph.costs(), Sizes(gm, {})
    forward, gradients = dict(costs.forward), dict(costs.gradients)
    for operation, held in _sparse_linears(gm, graph):
        assert operation.call is not None
        value, pattern = operation.values[-1], Pattern.parse(held.pattern)
        base = next(iter(operation.call.products(sizes)[-1].gradients.values()))  # of the product without a branch
        dense = base if held.storage == "masked" else base // pattern.n * pattern.m
        forward[value] += dense // pattern.m * pattern.n - base
        along = Pattern.parse(held.backward) if held.backward else None
        for edge in graph.edges_of(value, 0):  # to the input
            gradients[edge] += (dense if along is None else dense // along.m * along.n) - base
    return sum(forward.values()) + sum(graph.paid(graph.trainable, Costs(forward, gradients)).values())


def _sparse_linears(gm: GraphModule, graph: BackpropGraph) -> Iterator[tuple[Operation, HeldWeight]]:
    held = {weight.name: weight for weight in record_of(gm).weights}
    for operation in graph.operations:
        name = operator_name(operation.node.target)
        if name in _COMPRESSED | _MASKED:
            argument, suffix = ("values", "_values") if name in _COMPRESSED else ("mask", "_mask")
            weight = str(fx.read_of(fx.arguments(operation.node)[argument]).target).removesuffix(suffix)
            if weight in held:
                yield operation, held[weight]
