"""The channels between the products of experts, which can go from all experts together.

    x [rows, in] -> product -> ... -> [rows, channels] -> product -> y

As of an MLP (`fxsparse.analysis.structures`), whose rows of a projection are found by probing. Rows of tables that are
added to a product's result, the biases of experts, are those of the product.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.analysis.experts import NotApart, check_own, is_size
from fxsparse.analysis.heads import common_path
from fxsparse.analysis.probing import CannotRun, between, nearest
from fxsparse.analysis.sections import remembered
from fxsparse.analysis.structures import keeps_channels, rows_of_channels, section_of_channels
from fxsparse.graph import ExpertLinear
from fxsparse.graph.record import Change, skipped

aten = torch.ops.aten


@dataclass(frozen=True)
class ExpertMLP:
    """Channels between products of experts, the same in every expert.

    Attributes:
        path: module path.
        channels: how many.
        projections: the parameters that make them, of products and of tables that are added to those: each read, the
            dimension of its rows, and int64 ``[channels, rows of each]``.
        sources: the results of the products, with the same rows of each channel.
        output: the product that reads them.
    """

    path: str
    channels: int
    projections: tuple[tuple[Node, int, Tensor], ...]
    sources: tuple[tuple[Node, Tensor], ...]
    output: ExpertLinear

    @property
    def columns(self) -> int:
        """The dimension of the output's parameter that holds columns."""
        return 1 if self.output.transposed else 2

    @property
    def per_channel(self) -> int:
        """Parameters that go with a channel."""
        made = sum(
            fx.value(read).numel() // fx.value(read).shape[dim] * index.shape[1]
            for read, dim, index in self.projections
        )
        return made + fx.value(self.output.weight).numel() // self.channels


def expert_mlps(gm: GraphModule) -> tuple[list[ExpertMLP], list[Change]]:
    """The MLPs of experts in order of execution, and those that are left alone with the reason."""
    found: list[ExpertMLP] = []
    left: list[Change] = []
    products = {product.result: product for product in fx.expert_linears(gm) if product.result is not None}
    stops = {*products, *(linear.node for linear in fx.linears(gm))}
    for output in fx.expert_linears(gm):
        nearby = nearest(output.input, stops)
        sources = {node: products[node] for node in nearby if _routed_alike(products.get(node), output)}
        reads_a_stream = output.routing is None and len(sources) < len(nearby)
        if sources and not reads_a_stream and output.input not in sources:
            try:
                found.append(_mlp(gm, output, sources))
            except (NotApart, CannotRun) as reason:
                left.append(skipped(output.path, str(reason)))
    return found, left


def _routed_alike(product: ExpertLinear | None, other: ExpertLinear) -> bool:
    return product is not None and product.routing is other.routing


def _mlp(gm: GraphModule, output: ExpertLinear, sources: dict[Node, ExpertLinear]) -> ExpertMLP:
    way = between(set(sources), [output.input])
    tables = _tables(gm, sources, way)
    _check_alone(gm, output, sources, way, tables)
    check_own(gm, [output.weight, *(product.weight for product in sources.values()), *tables])
    channels = output.in_features
    section = section_of_channels(sources, output.input, channels)
    key = ("channels of experts", channels, section.key)
    rows: dict[Node, Tensor] = {}
    answers = remembered(gm, key, lambda: rows_of_channels(section, output.input, channels))
    for (source, product), answer in zip(sources.items(), answers, strict=True):
        if isinstance(answer, str):
            raise NotApart(answer.format(row=product.path))
        rows[source] = answer
    made = [(product.weight, 2 if product.transposed else 1, rows[source]) for source, product in sources.items()]
    made += [(table, 1, rows[source]) for table, source in tables.items()]
    path = common_path([fx.stack_path(product.node) for product in (output, *sources.values())])
    return ExpertMLP(path, channels, tuple(made), tuple(rows.items()), output)


def _tables(gm: GraphModule, sources: Collection[Node], way: Iterable[Node]) -> dict[Node, Node]:
    """The tables ``[experts, rows]`` of which a row is added to a source, each with that source."""
    tables: dict[Node, Node] = {}
    for node in way:
        if node.target is not aten.add.Tensor:
            continue
        terms = [arg for arg in node.args[:2] if isinstance(arg, Node)]
        added = [term for term in terms if term.target is aten.index.Tensor]
        beside = [term for term in terms if term in sources]
        read = added[0].args[0] if len(added) == len(beside) == 1 else None
        if isinstance(read, Node) and read.op == "get_attr":
            held = fx.attribute(gm, str(read.target))
            if isinstance(held, nn.Parameter) and held.dim() == 2 and len(added[0].users) == 1:
                tables[read] = beside[0]
    return tables


def _check_alone(
    gm: GraphModule, output: ExpertLinear, sources: Iterable[Node], way: list[Node], tables: Mapping[Node, Node]
) -> None:
    """Between the products each channel is worked on alone, and nothing else reads or joins it."""
    if mixing := [node for node in way if not keeps_channels(node)]:
        raise NotApart(
            f"its channels are not only worked on one by one: {mixing[0].name} ({mixing[0].target}) is between"
        )
    own = {output.node, *output.node.all_input_nodes, *way}
    for node in (*sources, *way):
        if others := [user for user in node.users if user not in own and not is_size(user)]:
            raise NotApart(f"its channels are also read by {others[0].name}")
    computed = fx.depends_on_inputs(gm)
    rows = {user for table in tables for user in table.users}
    for node in way:
        for beside in node.all_input_nodes:
            if beside in computed and beside not in {*sources, *way, *rows} and not is_size(beside):
                raise NotApart(f"its channels meet {beside.name}, which its products do not make")
