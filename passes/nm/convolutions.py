"""N:M convolutions: of every m consecutive weights that a filter reads, its channels and taps flattened, n are kept.

    y = conv(x, W * mask)        W and mask [out, in / groups, taps...], n of every m kept in each W[o].flatten()

They are held masked whatever the linears are: nothing multiplies by a compressed filter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.graph import traits
from fxsparse.graph.record import HeldWeight, record_of

CONVOLUTION = "it is a convolution"


@dataclass(frozen=True)
class Convolution:
    """A convolution with a weight of its own.

    Attributes:
        node: the call.
        weight: the ``get_attr`` node of its weight; None where the weight is computed.
        path: path of the module it is.
    """

    node: Node
    weight: Node | None
    path: str

    @property
    def name(self) -> str:
        """Full name of the weight."""
        return "" if self.weight is None else str(self.weight.target)


def convolutions(gm: GraphModule) -> Iterator[Convolution]:
    """The dense convolutions of a graph in order of execution, but for those that `graph.linears` has."""
    linears = {linear.node for linear in fx.linears(gm)}
    held = {weight.name for weight in masked_convolutions(gm)}
    for node in gm.graph.nodes:
        if node.op != "call_function" or traits.of(node.target).axes != "convolution" or node in linears:
            continue
        weight = _read_through_views(fx.arguments(node)["weight"])
        if weight.op != "get_attr":
            if not any(f"{name}_mask" in _reads(weight) for name in held):
                yield Convolution(node, None, fx.stack_path(node))
        elif isinstance(fx.attribute(gm, str(weight.target)), nn.Parameter):
            yield Convolution(node, weight, fx.module_path(str(weight.target)))


def _read_through_views(node: Node) -> Node:
    """The read of a weight that is used in another shape; Mamba's has an axis taken out and put in again."""
    while traits.of(node.target).axes == "reshape":
        viewed = node.all_input_nodes[0]
        if fx.value(viewed).shape[0] != fx.value(node).shape[0]:
            break
        node = viewed
    return fx.read_of(node)


def _reads(node: Node) -> set[str]:
    return {str(source.target) for source in node.all_input_nodes if source.op == "get_attr"}


def masked_convolutions(gm: GraphModule) -> list[HeldWeight]:
    """How the weights of N:M convolutions are held, of those that the graph still reads."""
    weights = [weight for weight in record_of(gm).weights if weight.storage == "masked" and not weight.experts]
    tensors = fx.tensors_of(gm)
    return [weight for weight in weights if weight.name in tensors and tensors[weight.name].dim() > 2]


def insert_mask(gm: GraphModule, convolution: Convolution) -> None:
    """Multiplies the weight by the buffer ``<weight>_mask`` where the convolution reads it."""

    def masked(weight: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, weight, 0)

    assert convolution.weight is not None
    (reader,) = convolution.weight.users
    sparse = fx.insert_function(gm, masked, convolution.weight, f"{convolution.name}_mask", before=reader)
    reader.replace_input_with(convolution.weight, sparse)
