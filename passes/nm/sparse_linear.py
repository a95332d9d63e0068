"""The sparse linears of a graph, those of experts too: fxsparse's own operators, read and edited by the names of their
schema."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.graph import Linear
from fxsparse.graph.record import HeldWeight, record_of
from fxsparse.graph.sharded import whole
from fxsparse.modules.sites import ModuleSite, module_sites
from fxsparse.ops.nm import Pattern, pack_column_mask, unpack, unpack_mask
from fxsparse.passes.base import Pass, sites_of_others

COMPRESSED = (torch.ops.fxsparse.nm_linear.default, torch.ops.fxsparse.nm_linear_low_rank.default)
MASKED = (torch.ops.fxsparse.masked_linear.default, torch.ops.fxsparse.masked_linear_low_rank.default)
LOW_RANK = (COMPRESSED[1], MASKED[1])
EXPERTS = (torch.ops.fxsparse.nm_expert_linear.default, torch.ops.fxsparse.masked_expert_linear.default)
_VALUES = (*COMPRESSED, EXPERTS[0])


@dataclass(frozen=True)
class SparseLinear:
    """A call of an N:M operator.

    Attributes:
        node: the call.
        held: how its weight is held.
    """

    node: Node
    held: HeldWeight

    @property
    def name(self) -> str:
        """Full name of the original weight."""
        return self.held.name

    @property
    def path(self) -> str:
        return fx.weight_site(self.held.name) if self.held.experts else fx.module_path(self.held.name)

    @property
    def pattern(self) -> Pattern:
        return Pattern.parse(self.held.pattern)

    @property
    def compressed(self) -> bool:
        return self.node.target in _VALUES

    @property
    def has_branch(self) -> bool:
        return self.node.target in LOW_RANK

    @property
    def out_features(self) -> int:
        return int(fx.value(self["values" if self.compressed else "mask"]).shape[-2])

    @property
    def in_features(self) -> int:
        return self.held.in_features

    @property
    def parameter_name(self) -> str:
        """Full name of the parameter that holds the weight now: the values, or the dense weight."""
        return f"{self.name}_values" if self.compressed else self.name

    def __getitem__(self, argument: str) -> Any:
        """An argument of the call by its name in the schema; None if it is absent."""
        return fx.arguments(self.node).get(argument)


def sparse_linears(gm: GraphModule) -> Iterator[SparseLinear]:
    """The N:M linears of a graph in order of execution."""
    held = {weight.name: weight for weight in record_of(gm).weights}
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in (*COMPRESSED, *MASKED, *EXPERTS):
            name = _weight_name(node)
            if name in held:
                yield SparseLinear(node, held[name])


def sparse_sites(model: nn.Module) -> Iterator[SparseLinear | ModuleSite]:
    """The N:M linears of a graph, or the N:M weights of its module form, as they are now."""
    if isinstance(model, GraphModule):
        yield from sparse_linears(model)
    else:
        yield from (site for site in module_sites(model) if site.form.m)


def name_in_graph(linear: Linear | SparseLinear | ModuleSite) -> str:
    """The name that a weight has, or had, in the graph."""
    return linear.form.name if isinstance(linear, ModuleSite) else linear.name


def of_pass(item: Pass, model: nn.Module) -> list[SparseLinear | ModuleSite]:
    """The N:M linears, one for each weight, that no other pass of the same name has rewritten."""
    others = sites_of_others(item, model)
    weights = {linear.name: linear for linear in sparse_sites(model)}
    return [linear for linear in weights.values() if _site(linear) not in others]


def _site(linear: SparseLinear | ModuleSite) -> str:
    """The site that the record has of a weight."""
    if isinstance(linear, SparseLinear):
        return linear.path
    return fx.weight_site(linear.form.name) if linear.form.experts else fx.module_path(linear.form.name)


def _weight_name(node: Node) -> str:
    if node.target in _VALUES:
        return str(fx.read_of(fx.arguments(node)["values"]).target).removesuffix("_values")
    return str(fx.arguments(node)["mask"].target).removesuffix("_mask")


def replace_call(gm: GraphModule, node: Node, target: Any, **changed: Any) -> Node:
    """Replaces a call of an operator by one of ``target``; arguments that are not named in ``changed`` stay."""
    named = {**fx.arguments(node), **changed}
    args = tuple(named.get(argument.name, argument.default_value) for argument in target._schema.arguments)
    return fx.replace_with_call(gm, node, target, args)


def dense_and_mask(gm: nn.Module, linear: SparseLinear | ModuleSite) -> tuple[Tensor, Tensor]:
    """W^R and its mask, both ``[..., out, in]``, of the tensors as they are now."""
    if linear.compressed:
        values = whole(fx.attribute(gm, f"{linear.name}_values").detach())
        indices = fx.attribute(gm, f"{linear.name}_indices")
        return (
            unpack(values, indices, linear.pattern, linear.in_features),
            unpack_mask(indices, linear.pattern, linear.in_features),
        )
    weight = whole(fx.attribute(gm, linear.name).detach())
    mask = fx.attribute(gm, f"{linear.name}_mask")
    return (weight.mT if linear.held.transposed else weight) * mask, mask


def store_column_mask(gm: nn.Module, linear: SparseLinear | ModuleSite, column_mask: Tensor, mask: Tensor) -> Tensor:
    """A column mask ``[..., out, in]`` as the operator takes it: packed bits of kept values, or the mask itself."""
    return pack_column_mask(column_mask, mask, linear.pattern) if linear.compressed else column_mask
