"""Which products run as one: a linear and the one that it gates, linears side by side on one input, or each alone.

    act(x G^T) * (x U^T)        one product on a weight whose rows alternate between G and U
    x A^T, x B^T, ...           one product on A, B, ... below each other; its columns are split again

Few rows leave a GPU waiting for launches, and many read the input once. Products join where they read the same input
and their weights are compressed alike; what was measured says whether that pays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from fxsparse.lowering import timings
from fxsparse.lowering.choose import cpp_kernel, is_cpp
from fxsparse.lowering.find import Product
from fxsparse.lowering.first_use import FirstUse
from fxsparse.lowering.fusion import GatedPair, following, gated_pair, has_epilogues
from fxsparse.lowering.memory import Room
from fxsparse.lowering.sites import Site
from fxsparse.ops.operator import COMPRESSED, OPERATOR, SPARSE_TENSOR_CORES, SPARSE_WGMMA


@dataclass(frozen=True)
class Group:
    """Products that run as one.

    Attributes:
        products: in the order of the graph; of a pair the one that gates first.
        implementation: how they run.
        pair: the pair they are, where one gates the other.
    """

    products: tuple[Product, ...]
    implementation: str
    pair: GatedPair | None = None


@dataclass(frozen=True)
class FusionDecision:
    """Whether linears on one input should run as one product, and why."""

    holds: bool
    why: str

    def __str__(self) -> str:
        return f"{'as one product' if self.holds else 'apart'}, {self.why}"


class Grouping:
    """Puts products into groups.

    Args:
        example_inputs: the graph's real inputs.
        first_use: measures joint products.
        room: memory for copies of weights.

    Attributes:
        notes: why products run as one or apart.
    """

    def __init__(self, example_inputs: Sequence[Any], first_use: FirstUse, room: Room):
        self.example_inputs, self.first_use, self.room = example_inputs, first_use, room
        self.notes: list[str] = []

    def groups(self, chosen: Sequence[Group]) -> list[Group]:
        """The groups of products that were chosen one by one."""
        pairs = self._gated(chosen)
        paired = {product.node for pair in pairs for product in pair.products}
        return [*pairs, *self._side_by_side([group for group in chosen if group.products[0].node not in paired])]

    def _gated(self, chosen: Sequence[Group]) -> list[Group]:
        able = {single.products[0].node: single for single in chosen if _can_gate(single)}
        pairs = []
        for pair in map(gated_pair, able):
            if pair is None or pair.up not in able or _form(able[pair.gate]) != _form(able[pair.up]):
                continue
            products = tuple(able[node].products[0] for node in (pair.gate, pair.up))
            implementation = able[pair.gate].implementation
            if self._can_gate_as(pair, products[0].site, implementation) and self._has_room(products):
                decision = self._decide(products, implementation)
                self.notes.append(f"{products[0].name} gates {products[1].name} and they run {decision}")
                pairs += [Group(products, implementation, pair)] if decision.holds else []
        return pairs

    def _can_gate_as(self, pair: GatedPair, site: Site, implementation: str) -> bool:
        """Whether the kernel with the pair's step is there: a C++ one has to be built."""
        return not is_cpp(site) or cpp_kernel(site, implementation, (pair.step,)) is not None

    def _side_by_side(self, chosen: Sequence[Group]) -> list[Group]:
        alike: dict[Any, list[Group]] = {}
        for single in chosen:
            alike.setdefault(_form(single) if _can_stack(single) else single, []).append(single)
        groups = []
        for singles in alike.values():
            products = tuple(single.products[0] for single in singles)
            if len(singles) > 1 and self._has_room(products):
                decision = self._decide(products, singles[0].implementation)
                names = ", ".join(product.name for product in products)
                self.notes.append(f"{names} read the same input and run {decision}")
                singles = [replace(singles[0], products=products)] if decision.holds else singles
            groups += singles
        return groups

    def _has_room(self, products: Sequence[Product]) -> bool:
        """Whether there is memory for one more copy of weights; a dense one's compressed copy has its room already."""
        if products[0].site.in_memory:
            return True
        values = [self.example_inputs[product.weights[0]] for product in products]
        return self.room.take(sum(2 * tensor.nbytes for tensor in values), values[0].device)

    def _decide(self, products: Sequence[Product], implementation: str) -> FusionDecision:
        apart, joint = [product.site for product in products], joint_site(products)
        self.first_use.measure(joint)
        return faster_together(apart, joint, implementation)


def joint_site(products: Sequence[Product]) -> Site:
    """The product of linears on one input, their weights below each other."""
    first = products[0].site
    return replace(first, shape=(sum(product.site.shape[0] for product in products), first.shape[1]))


def faster_together(apart: Sequence[Site], joint: Site, implementation: str) -> FusionDecision:
    """Judges by times, and for one product where not all were measured: it launches less and reads the input once."""
    every = [timings.times(site.problem, site.device).get(implementation) for site in (joint, *apart) if site.problem]
    times = [time for time in every if time is not None]
    if len(times) != 1 + len(apart):
        return FusionDecision(True, "not measured")
    why = f"measured {times[0] * 1e3:.0f} us together, {sum(times[1:]) * 1e3:.0f} us apart"
    return FusionDecision(times[0] <= sum(times[1:]), why)


def _can_gate(single: Group) -> bool:
    """Whether a linear's kernel may compute it and another, and what follows them."""
    site = single.products[0].site
    if not _runs_frozen(single):
        return False
    return is_cpp(site) or has_epilogues(site.device, site.dtype, single.products[0].pattern)


def _can_stack(single: Group) -> bool:
    """Whether a linear may be a part of a product, and no kernel could take over what follows it alone."""
    (product,) = single.products
    joins = product.site.in_memory and single.implementation in (COMPRESSED, SPARSE_TENSOR_CORES, SPARSE_WGMMA)
    if not joins and not _runs_frozen(single):
        return False
    computes_bias = product.bias is not None and product.bias.op != "placeholder"
    # A C++ kernel leaves what follows to Inductor, whose loops are as good.
    return not computes_bias and (is_cpp(product.site) or not following(product.node))


def _runs_frozen(single: Group) -> bool:
    """Whether a linear's own kernel runs on a weight that nothing trains, in a graph that is not differentiated."""
    site = single.products[0].site
    is_kernel = single.implementation in (COMPRESSED, OPERATOR)
    return is_kernel and site.op == "nm_linear" and site.frozen and site.inference


def _form(single: Group) -> tuple[Node, Any, bool, bool, str]:
    """What products that run as one have in common."""
    (product,) = single.products
    return product.x, product.pattern, product.transposed, product.bias is None, single.implementation
