"""The products of a graph that an implementation is chosen for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import GraphModule, Node

from fxsparse.graph import arguments
from fxsparse.graph.dynamo import placeholders
from fxsparse.lowering.frozen import frozen_linears
from fxsparse.lowering.masked import COMPRESSED_FORM, Masks, masks_of
from fxsparse.lowering.sites import Site, fake_of, operators, rows_of, site_of
from fxsparse.ops.nm import Pattern


@dataclass(frozen=True)
class Product:
    """An operator's call, or a linear whose frozen weight is N:M.

    Attributes:
        node: the call.
        site: what it computes.
        name: full name of its weight, or the node's name.
        x: its input.
        weights: where its weight is among the graph's own inputs: the dense one, or the values and the indices; empty
            where they are not inputs and of operators on other weights.
        bias: its bias.
        transposed: whether a dense weight is stored ``[in, out]``.
        masks: of an operator on a masked weight that could run compressed.
    """

    node: Node
    site: Site
    name: str
    x: Node
    weights: tuple[int, ...] = ()
    bias: Node | None = None
    transposed: bool = False
    masks: Masks | None = None

    @property
    def pattern(self) -> Pattern:
        """Of its weight, which is N:M."""
        assert self.site.pattern is not None
        return self.site.pattern

    @property
    def out_features(self) -> int:
        return int(fake_of(self.node).shape[-1])


def find_products(
    gm: GraphModule, example_inputs: Sequence[Any], names: dict[int, str], inference: bool
) -> list[Product]:
    """The linears of a graph with a frozen N:M weight, and then the calls of operators.

    Args:
        gm: Dynamo's graph, or one like it.
        example_inputs: its real inputs; what a pass added comes after those.
        names: full names of those that are parameters or buffers, by position.
        inference: whether the graph is not differentiated.
    """
    return [
        *_frozen(gm, example_inputs, names, inference),
        *_operators(gm, example_inputs, names, inference),
    ]


def _frozen(
    gm: GraphModule, example_inputs: Sequence[Any], names: dict[int, str], inference: bool
) -> Iterator[Product]:
    for linear in frozen_linears(gm, example_inputs, names):
        weight, rows = example_inputs[linear.position], rows_of(fake_of(linear.node))
        shape = tuple(weight.t().shape if linear.transposed else weight.shape)
        site = Site("nm_linear", weight.device.type, weight.dtype, shape, linear.pattern, rows, True, True, inference)
        name, weights = names[linear.position], (linear.position,)
        yield Product(linear.node, site, name, linear.x, weights, linear.bias, linear.transposed)


def _operators(
    gm: GraphModule, example_inputs: Sequence[Any], names: dict[int, str], inference: bool
) -> Iterator[Product]:
    inputs = placeholders(gm)
    positions = {node: position for position, node in enumerate(inputs[: len(example_inputs)])}
    named = {node: names[position] for position, node in enumerate(inputs) if position in names}
    for op, node in operators(gm):
        site = site_of(op, node)
        if site is None:
            continue
        args = arguments(node)
        stored = [positions.get(args.get(name)) for name in ("values", "indices")]  # type: ignore[arg-type]
        weights = tuple(position for position in stored if position is not None)
        weights = weights if len(weights) == 2 else ()
        tensors = [example_inputs[position] for position in weights]
        frozen = bool(weights) and not any(tensor.requires_grad or tensor.is_inference() for tensor in tensors)
        site = replace(site, inference=inference and bool(weights), frozen=frozen)
        name = next((named[source] for source in node.all_input_nodes if source in named), node.name)
        masks = masks_of(node, positions, example_inputs) if op in COMPRESSED_FORM else None
        yield Product(node, site, name, node.all_input_nodes[0], weights, args.get("bias"), masks=masks)
