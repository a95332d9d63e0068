"""Mixtures of experts: a router that chooses some experts for each row, and the weights that hold them.

    router            softmax, before or after        topk          products of experts (`graph.experts`)
    x [rows, in] -> scores [rows, experts] ---------> chosen -----> y [rows, out]

Found from the products backwards: what routes their rows comes from a `topk` over the scores of one linear. A closed
expert has the lowest score there is, so that it is never chosen and has no share of a softmax; to take it out is to
take its row out of the router and its matrix out of every weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.analysis.heads import common_path
from fxsparse.analysis.probing import between, nearest
from fxsparse.graph import ExpertLinear, Linear, traits
from fxsparse.graph.record import Change, skipped

aten = torch.ops.aten


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts whose experts can be taken out.

    Attributes:
        path: module path of router and experts.
        experts: how many.
        chosen: how many of them a row is routed to.
        router: the linear that gives each expert a score.
        products: with the matrices of the experts.
        weights: the ``get_attr`` nodes of all parameters whose first dimension is that of the experts.
        counts: for calls that write the number of experts down, those arguments for a number.
    """

    path: str
    experts: int
    chosen: int
    router: Linear
    products: tuple[ExpertLinear, ...]
    weights: tuple[Node, ...]
    counts: dict[Node, Callable[[int], dict[str, Any]]]

    @property
    def per_expert(self) -> int:
        """Parameters that go with an expert."""
        own = sum(fx.value(weight)[0].numel() for weight in self.weights)
        return own + self.router.in_features + (self.router.bias is not None)


class NotApart(Exception):
    """Why experts cannot be taken out."""


def mixtures(gm: GraphModule) -> tuple[list[Mixture], list[Change]]:
    """The mixtures of a graph in order of execution, and those that are left alone with the reason."""
    found: list[Mixture] = []
    left: list[Change] = []
    for chosen, products in _routed(gm).items():
        try:
            found.append(_mixture(gm, chosen, products))
        except NotApart as reason:
            left += [skipped(path, str(reason)) for path in dict.fromkeys(product.path for product in products)]
    return found, left


def _routed(gm: GraphModule) -> dict[Node | None, list[ExpertLinear]]:
    """The products of experts by the `topk` that routes their rows; by None those without one."""
    choices = set(gm.graph.find_nodes(op="call_function", target=aten.topk.default))
    routed: dict[Node | None, list[ExpertLinear]] = {}
    for product in fx.expert_linears(gm):
        sources = nearest(product.routing, choices) if product.routing is not None else []
        routed.setdefault(sources[0] if len(sources) == 1 else None, []).append(product)
    return routed


def _mixture(gm: GraphModule, chosen: Node | None, products: list[ExpertLinear]) -> Mixture:
    if chosen is None:
        raise NotApart("no topk over the scores of a router routes its rows, so its experts cannot be told apart")
    experts = products[0].experts
    router = _router(gm, chosen, experts)
    weights = _weights(gm, chosen, products)
    count: Any = fx.arguments(chosen)["k"]
    if not isinstance(count, int):
        raise NotApart("how many experts a row is routed to is computed")
    if count >= experts:
        raise NotApart(f"each row is routed to {count} of {experts} experts, so none can go")
    path = common_path([router.path, *(fx.stack_path(product.node) for product in products)])
    counts = _counts(_way(chosen, products, weights), experts)
    return Mixture(path, experts, count, router, tuple(products), tuple(weights), counts)


def _router(gm: GraphModule, chosen: Node, experts: int) -> Linear:
    """The linear whose scores, perhaps as shares, a `topk` chooses among."""
    linears = {linear.node: linear for linear in fx.linears(gm)}
    written = fx.arguments(chosen)
    if written["dim"] not in (-1, fx.value(written["self"]).dim() - 1) or not written["largest"]:
        raise NotApart("its topk is not over the scores of a row")
    node, after = written["self"], chosen
    while True:
        if others := [user for user in node.users if user is not after and not is_size(user)]:
            raise NotApart(f"the scores of its router are also read by {others[0].name}, which would lose experts too")
        if node in linears:
            break
        known = traits.of(node.target)
        if node.op != "call_function" or not (known.copies or known.axes == "softmax"):
            raise NotApart(f"{node.name} ({node.target}) is between its router and topk: only a softmax may be")
        node, after = node.all_input_nodes[0], node
    router = linears[node]
    if router.out_features != experts:
        raise NotApart(f"its router has {router.out_features} scores for {experts} experts")
    if sum(linear.name == router.name for linear in linears.values()) > 1:
        raise NotApart(f"{router.name} is used more than once")
    return router


def is_size(node: Node) -> bool:
    """Whether a node reads nothing but sizes."""
    return bool(traits.of(node.target).shaped_like)


def _weights(gm: GraphModule, chosen: Node, products: list[ExpertLinear]) -> list[Node]:
    """The reads of the parameters of experts: of products, and of tables that rows are taken from by expert."""
    reads = {product.weight: None for product in products}
    choices = set(gm.graph.find_nodes(op="call_function", target=aten.topk.default))
    for table in gm.graph.find_nodes(op="call_function", target=aten.index.Tensor):
        source, positions = table.args[:2]
        held = fx.attribute(gm, str(source.target)) if source.op == "get_attr" else None
        is_of_experts = isinstance(held, nn.Parameter) and held.shape[0] == products[0].experts
        if is_of_experts and len(positions) == 1 and nearest(positions[0], choices) == [chosen]:
            reads[source] = None
    check_own(gm, reads)
    return list(reads)


def check_own(gm: GraphModule, reads: Iterable[Node]) -> None:
    """NotApart where anything else reads a parameter than the one node that each of its reads has."""
    names, every = fx.parameter_names(gm), fx.reads(gm)
    for read in reads:
        held = fx.attribute(gm, str(read.target))
        if len(names[id(held)]) > 1 or len(every[id(held)]) > 1 or len(read.users) > 1:
            raise NotApart(f"{read.target} is shared: what else reads it would lose parts too")


def _way(chosen: Node, products: Iterable[ExpertLinear], weights: Iterable[Node]) -> set[Node]:
    """The nodes that make offsets and positions of what was chosen, and what they read beside."""
    ends = [product.routing for product in products if product.routing is not None]
    tables = {user for weight in weights for user in weight.users if user.target is aten.index.Tensor}
    ends += [position for table in tables for position in table.args[1]]  # type: ignore[union-attr, misc]
    way = between({chosen}, ends)
    return {*way, *(source for node in way for source in node.all_input_nodes)}


def _counts(nodes: Iterable[Node], experts: int) -> dict[Node, Callable[[int], dict[str, Any]]]:
    """The calls that write the number of experts down."""
    counts: dict[Node, Callable[[int], dict[str, Any]]] = {}
    for node in nodes:
        written = fx.arguments(node) if node.op == "call_function" and hasattr(node.target, "_schema") else {}
        if node.target is aten.histc.default and (written["bins"], written["max"]) == (experts, experts - 1):
            counts[node] = lambda number: {"bins": number, "max": number - 1}
        for argument in ("end", "num_classes", "minlength"):
            if written.get(argument) == experts:
                counts[node] = lambda number, argument=argument: {argument: number}  # type: ignore[misc]
    return counts
