"""Lowering a graph: find products, choose how each runs, group those that run as one, and put that into a copy.

find_products -> choose -> group -> apply
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule

from fxsparse.graph import arguments
from fxsparse.graph.runtime_state import Slot
from fxsparse.lowering import timings
from fxsparse.lowering.after_partition import deviates
from fxsparse.lowering.apply import LoweredGraph
from fxsparse.lowering.choice import Choice
from fxsparse.lowering.choose import (
    GRAD_INPUT,
    choose,
    choose_gradient,
    cpp_kernel,
    gradients_of,
    runs_below_autograd,
)
from fxsparse.lowering.columns import Columns
from fxsparse.lowering.find import Product, find_products
from fxsparse.lowering.first_use import FirstUse
from fxsparse.lowering.group import Group, Grouping, joint_site
from fxsparse.lowering.masked import Masks, compressed_site, pays, products
from fxsparse.lowering.memory import Room
from fxsparse.lowering.pins import Pin, Pins
from fxsparse.lowering.sites import Site, is_inference
from fxsparse.ops.operator import COMPRESSED, CUSPARSELT, DENSE, OPERATOR, REFERENCE


@dataclass(frozen=True)
class Lowered:
    """A graph with its implementations chosen.

    Attributes:
        module: a copy of the graph with extra inputs, or the graph itself if it stays as it is.
        slots: where the extra inputs come from, in their order.
        choices: the implementation of every operator and of every frozen N:M weight.
        overrides: implementations of operators that stay in the graph and that fixed rules would not choose, by
            `timings.key` of their problem.
        notes: what else a user should know.
    """

    module: GraphModule
    slots: tuple[Slot, ...]
    choices: tuple[Choice, ...]
    overrides: Mapping[str, str]
    notes: tuple[str, ...]


def lower_graph(
    gm: GraphModule, example_inputs: Sequence[Any], names: dict[int, str], pins: Pins, seconds: float
) -> Lowered:
    """Chooses how the fxsparse operators and the frozen N:M weights of a graph run, and edits a copy of it for what
    needs that: compressed or expanded weights come in as extra inputs, and in inference kernels take over the
    pointwise operators that follow.

    Args:
        gm: Dynamo's graph, or one like it; it stays as it is.
        example_inputs: its real inputs.
        names: full names of those that are parameters or buffers, by position.
        pins: what the user said of implementations.
        seconds: for measuring products nobody measured before.
    """
    inference = is_inference(gm)
    first_use, room = FirstUse(pins, seconds), Room()
    choosing = _Choosing(example_inputs, first_use, room, Columns(gm, example_inputs))
    grouping = Grouping(example_inputs, first_use, room)
    alone = find_products(gm, example_inputs, names, inference)
    first_use.measure_all(site for product in alone for site in _sites(product, inference))
    groups = grouping.groups([Group((product,), choosing.choose(product, inference)) for product in alone])
    lowered = LoweredGraph(gm, example_inputs, names)
    for group in groups:
        lowered.apply(group)
        if len(group.products) > 1 and group.pair is None:
            choosing.override(joint_site(group.products), group.implementation)
    if inference:
        lowered.fuse(pins)
    notes = dict.fromkeys([*first_use.failures, *grouping.notes])
    return Lowered(*lowered.finish(), tuple(choosing.choices), choosing.overrides, tuple(notes))


def _sites(product: Product, inference: bool) -> list[Site]:
    """A product and its gradients, where each is chosen on its own."""
    if product.masks is not None:
        return []
    has_gradients = not inference and not product.site.in_memory
    return [product.site, *(gradients_of(product.site, product.node) if has_gradients else ())]


class _Choosing:
    """Chooses implementations of products, and of their gradients.

    Args:
        example_inputs: the graph's real inputs.
        first_use: measures products.
        room: memory for copies of weights.
        columns: the graph's column masks.
    """

    def __init__(self, example_inputs: Sequence[Any], first_use: FirstUse, room: Room, columns: Columns):
        self.example_inputs, self.first_use, self.room, self.pins = example_inputs, first_use, room, first_use.pins
        self.columns = columns
        self.choices: list[Choice] = []
        self.overrides: dict[str, str] = {}

    def choose(self, product: Product, inference: bool) -> str:
        """The implementation of a product; notes it, and those of the gradients its backward pass takes."""
        site, name = product.site, product.name
        if product.masks is not None:
            return self._masked(product, product.masks, inference)
        if site.in_memory:
            implementation, reason = self._frozen(product)
            self._note(site, name, implementation, reason)
            return implementation
        implementation, reason = self._operator(product)
        self._note(site, name, implementation, reason)
        for gradient in [] if inference else gradients_of(site, product.node):
            doubly_pruned = arguments(product.node).get("column_mask") is not None
            columns = self.columns.obstacle if doubly_pruned and gradient.op == GRAD_INPUT else None
            self._note(gradient, name, *choose_gradient(gradient, doubly_pruned, self.pins, columns))
        return implementation

    def _masked(self, product: Product, masks: Masks, inference: bool) -> str:
        """Of an operator on a dense weight whose mask is N:M."""
        every = products(product.node, compressed_site(product.node, masks, inference))
        pin = self.pins.of("nm_linear")
        if pin.name in (REFERENCE, DENSE):
            holds, why = False, f'pinned by options={{"lower": {{"nm_linear": "{pin.name}"}}}}'
        else:
            for site in every:
                self.first_use.measure(site)
            holds, why = pays(every)
        if holds and any(cpp_kernel(site, OPERATOR) is None for site in every):
            holds, why = pays(every)  # a build failed, which is known now
        for site in every if holds else ():
            self.override(site, OPERATOR)
        implementation = COMPRESSED if holds else REFERENCE
        self._note(product.site, product.name, implementation, f"its mask is {masks.pattern}; {why}")
        return implementation

    def _frozen(self, product: Product) -> tuple[str, str]:
        """Of a dense weight that is N:M."""
        weight, pattern = self.example_inputs[product.weights[0]], product.pattern
        implementation, reason = choose(product.site, self.pins.of(product.site.op))
        if implementation != DENSE and weight.is_inference():
            implementation, reason = DENSE, "it was made in inference mode, where changes cannot be followed"
        bits = pattern.density * (8 * weight.element_size() + pattern.index_bits)
        if implementation != DENSE and not self.room.take(int(weight.numel() * bits / 8), weight.device):
            implementation, reason = DENSE, "there is no memory for a compressed copy"
        return implementation, f"frozen and {pattern}; {reason}"

    def _operator(self, product: Product) -> tuple[str, str]:
        """Of an operator that the graph holds."""
        implementation, reason = choose(product.site, self.pins.of(product.site.op))
        if implementation not in (DENSE, CUSPARSELT):
            return implementation, reason
        values = self.example_inputs[product.weights[0]]
        if self.room.take(2 * values.nbytes, values.device):
            return implementation, reason
        copied = "to expand it once" if implementation == DENSE else "for the library's copy"
        implementation, reason = choose(product.site, Pin(excluded=frozenset({DENSE, CUSPARSELT})))
        return implementation, f"frozen, but there is no memory {copied}; {reason}"

    def _note(self, site: Site, name: str, implementation: str, reason: str) -> None:
        """Notes the choice of an operator that stays in the graph, and tells what fixed rules would not say."""
        self.choices.append(Choice(site.op, name, implementation, reason, site.problem))
        self.override(site, implementation)

    def override(self, site: Site, implementation: str) -> None:
        """Tells what fixed rules would not say of an operator in the lowered graph, and which C++ kernel runs."""
        if site.problem is None:
            return
        key, number = timings.key(site.problem), cpp_kernel(site, implementation)
        if number is not None:
            self.overrides[key] = f"{OPERATOR}:{number}"
        elif runs_below_autograd(site, implementation) or (
            not site.in_memory and deviates(site, implementation, self.pins)
        ):
            self.overrides[key] = implementation
