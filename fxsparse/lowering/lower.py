"""Choosing how the operators and the frozen N:M weights of a graph run, and putting that into a copy of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import GraphModule, Node

from fxsparse.backend.compiled import CompiledGraph
from fxsparse.backend.options import BackendOptions
from fxsparse.graph.dynamo import placeholders
from fxsparse.graph.runtime_state import Slot
from fxsparse.lowering import measure, timings
from fxsparse.lowering.choice import Choice
from fxsparse.lowering.choose import (
    COMPRESSED,
    CUSPARSELT,
    DENSE,
    OPERATOR,
    SPARSE_TENSOR_CORES,
    choose,
    choose_gradient,
    deviates,
    gradients_of,
    library_algorithm,
    pin_of,
    undecided,
)
from fxsparse.lowering.frozen import Compress, FrozenLinear, frozen_linears
from fxsparse.lowering.fusion import Gated, following, gated
from fxsparse.lowering.lowered_graph import LoweredGraph, Stack, has_epilogues
from fxsparse.lowering.pins import Pin
from fxsparse.lowering.sites import Site, arguments_of, fake_of, is_inference, operators, rows_of, site_of
from fxsparse.ops.nm import Pattern


def lower_graph(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    names: dict[int, str],
    options: BackendOptions,
    report: CompiledGraph,
) -> tuple[GraphModule, list[Slot]]:
    """Chooses how the fxsparse operators and the frozen N:M weights of a graph run, and edits a copy of it for what
    needs that: compressed or expanded weights come in as further inputs, and in inference kernels take over the
    pointwise operators that follow.

    Args:
        gm: Dynamo's graph, or one like it; it stays as it is.
        example_inputs: its real inputs.
        names: full names of those that are parameters or buffers, by position.

    Returns:
        a copy with further inputs and where they come from; ``gm`` itself and nothing where it stays as it is.
    """
    lowered, first_use = LoweredGraph(gm, example_inputs, names), _FirstUse(options, report)
    inference = is_inference(gm)
    _lower_frozen_linears(lowered, first_use, inference)
    _lower_operators(lowered, first_use, inference)
    if inference:
        lowered.fuse(options)
    return lowered.finish()


def _lower_frozen_linears(lowered: LoweredGraph, first_use: _FirstUse, inference: bool) -> None:
    gm, names, options, report = lowered.gm, lowered.names, first_use.options, first_use.report
    compressed: list[tuple[FrozenLinear, str]] = []
    sites: dict[Node, Site] = {}
    for linear in frozen_linears(gm, lowered.example_inputs, names):
        weight = lowered.example_inputs[linear.position]
        shape = tuple(weight.t().shape if linear.transposed else weight.shape)
        rows = rows_of(fake_of(linear.node))
        site = Site("nm_linear", weight.device.type, weight.dtype, shape, linear.pattern, rows, True, True, inference)
        first_use.measure(site)
        implementation, reason = choose(site, options.pin("nm_linear"))
        if implementation != DENSE and weight.is_inference():
            implementation, reason = DENSE, "it was made in inference mode, where changes cannot be followed"
        bits = linear.pattern.density * (8 * weight.element_size() + linear.pattern.index_bits)
        if implementation != DENSE and not lowered.has_room(int(weight.numel() * bits / 8), weight):
            implementation, reason = DENSE, "there is no memory for a compressed copy"
        found = f"frozen and {linear.pattern}; {reason}"
        report.choices.append(Choice("nm_linear", names[linear.position], implementation, found, site.work))
        if implementation != DENSE:
            compressed.append((linear, implementation))
            sites[linear.node] = site
    own = {linear.node: linear for linear, implementation in compressed if implementation == COMPRESSED and inference}

    def alike(node: Node) -> Any:
        return own[node].input, own[node].pattern, own[node].transposed, own[node].bias is None

    for pair in gates({node: sites[node] for node in own}, alike):
        both = own[pair.gate], own[pair.up]
        faster = first_use.faster_together([sites[linear.node] for linear in both], COMPRESSED)
        if faster.holds:
            rule = Compress(both[0].pattern, both[0].transposed, alternating=True)
            positions = tuple(linear.position for linear in both)
            lowered.gate(pair, both[0].input, positions, rule, [linear.bias for linear in both], both[0].pattern)
            compressed = [item for item in compressed if item[0] not in both]
        report.note(f"{names[both[0].position]} gates {names[both[1].position]} and they run {faster}")
    for together, implementation in side_by_side(compressed):
        if len(together) == 1:
            lowered.compress(together, implementation, library_algorithm(sites[together[0].node]))
            continue
        faster = first_use.faster_together([sites[linear.node] for linear in together], implementation)
        for group in [together] if faster.holds else [[linear] for linear in together]:
            lowered.compress(group, implementation)
        report.note(f"{', '.join(names[linear.position] for linear in together)} read the same input and run {faster}")


def _lower_operators(lowered: LoweredGraph, first_use: _FirstUse, inference: bool) -> None:
    options, report = first_use.options, first_use.report
    joinable: dict[Node, tuple[Site, str]] = {}
    named = {node: lowered.names[at] for at, node in enumerate(placeholders(lowered.gm)) if at in lowered.names}
    for op, node in operators(lowered.gm):
        place = site_of(op, node)
        if place is None:
            continue
        weight = lowered.inputs_of(node)
        frozen = bool(weight) and not any(tensor.requires_grad or tensor.is_inference() for tensor in weight)
        place = replace(place, inference=inference and bool(weight), frozen=frozen)
        first_use.measure(place)
        implementation, reason = choose(place, options.pin(op))
        if implementation in (DENSE, CUSPARSELT) and not lowered.has_room_for(node):
            copied = "to expand it once" if implementation == DENSE else "for the library's copy"
            implementation, reason = choose(place, Pin(excluded=frozenset({DENSE, CUSPARSELT})))
            reason = f"frozen, but there is no memory {copied}; {reason}"
        where = next((named[source] for source in node.all_input_nodes if source in named), node.name)
        report.choices.append(Choice(op, where, implementation, reason, place.work))
        first_use.decide(place, implementation)
        for gradient in [] if inference else gradients_of(place, node):
            first_use.measure(gradient)
            how, why = choose_gradient(gradient, arguments_of(node).get("column_mask") is not None, options)
            report.choices.append(Choice(gradient.op, where, how, why, gradient.work))
            first_use.decide(gradient, how)
        if implementation == SPARSE_TENSOR_CORES:
            lowered.use_sparse_tensor_cores(node)
        elif implementation == CUSPARSELT:
            lowered.use_library(node, library_algorithm(place))
        elif implementation == DENSE:
            lowered.expand(node)
        elif implementation == OPERATOR and place.inference and frozen and op == "nm_linear":
            given = arguments_of(node)
            if given.get("bias") is None or given["bias"] in lowered.positions:
                joinable[node] = place, where

    def alike(node: Node) -> Any:
        given = arguments_of(node)
        return given["x"], given["n"], given["m"], given.get("bias") is None

    for pair in gates({node: place for node, (place, _) in joinable.items()}, alike):
        (first, gate), (second, up) = joinable[pair.gate], joinable[pair.up]
        if lowered.has_room_for(pair.gate, pair.up):
            faster = first_use.faster_together([first, second], OPERATOR)
            if faster.holds:
                both = [arguments_of(node) for node in (pair.gate, pair.up)]
                positions = tuple(lowered.positions[each[name]] for name in ("values", "indices") for each in both)
                biases, pattern = [each.get("bias") for each in both], Pattern(both[0]["n"], both[0]["m"])
                lowered.gate(pair, both[0]["x"], positions, Stack(alternating=True), biases, pattern)
            report.note(f"{gate} gates {up} and they run {faster}")
    stacked: dict[Any, list[Node]] = {}
    for node in joinable:
        if not following(node):  # so none of those above either
            stacked.setdefault(alike(node), []).append(node)
    for nodes in stacked.values():
        if len(nodes) > 1 and lowered.has_room_for(*nodes):
            faster = first_use.faster_together([joinable[node][0] for node in nodes], OPERATOR)
            if faster.holds:
                lowered.stack(nodes)
            report.note(f"{', '.join(joinable[node][1] for node in nodes)} read the same input and run {faster}")


def gates(sites: Mapping[Node, Site], alike: Callable[[Node], Any]) -> list[Gated]:
    """Linears of which one gates the other, both ``alike`` and with a kernel that can do that."""
    able = [
        node
        for node, site in sites.items()
        if site.pattern is not None and has_epilogues(site.device, site.dtype, site.pattern)
    ]
    pairs = [pair for node in able if (pair := gated(node)) is not None]
    return [pair for pair in pairs if pair.up in able and alike(pair.gate) == alike(pair.up)]


def side_by_side(linears: list[tuple[FrozenLinear, str]]) -> list[tuple[list[FrozenLinear], str]]:
    """Linears that one product can serve, together: they read the same input, are compressed alike, and no kernel could
    take over what follows one of them. Few rows leave a GPU waiting for launches, and many read the input once."""
    groups: dict[Any, tuple[list[FrozenLinear], str]] = {}
    for linear, implementation in linears:
        alone = implementation == CUSPARSELT or bool(following(linear.node))
        computed = linear.bias is not None and linear.bias.op != "placeholder"
        key = (linear.input, linear.pattern, linear.transposed, linear.bias is None, implementation)
        groups.setdefault(linear if alone or computed else key, ([], implementation))[0].append(linear)
    return list(groups.values())


@dataclass(frozen=True)
class Together:
    """Whether linears on one input should run as one product, and why."""

    holds: bool
    why: str

    def __str__(self) -> str:
        return f"{'as one product' if self.holds else 'apart'}, {self.why}"


def faster_together(apart: Sequence[Site], joint: Site, implementation: str) -> Together:
    """Judges by times, and for one product where not all were measured: it launches less and reads the input once."""
    found = [timings.times(site.work, site.device).get(implementation) for site in (joint, *apart) if site.work]
    times = [time for time in found if time is not None]
    if len(times) != 1 + len(apart):
        return Together(True, "not measured")
    why = f"measured {times[0] * 1e3:.0f} us together, {sum(times[1:]) * 1e3:.0f} us apart"
    return Together(times[0] <= sum(times[1:]), why)


class _FirstUse:
    """Measures products on their first use where they have a kernel, as long as a graph has time for it, and keeps what
    was decided by it."""

    def __init__(self, options: BackendOptions, report: CompiledGraph):
        self.options, self.report = options, report
        self.until = time.monotonic() + options.tune

    def measure(self, site: Site) -> None:
        work, pinned = site.work, pin_of(site.op, self.options).name is not None
        if work is None or pinned or time.monotonic() >= self.until or not undecided(site):
            return
        found = measure.measure(work, site.device, until=self.until, compile_reference=not site.in_memory)
        if not found.milliseconds:
            self.report.note(str(found))

    def decide(self, site: Site, implementation: str) -> None:
        """Notes what an operator that stays in the graph is to run as."""
        if site.work is not None and deviates(site, implementation, self.options):
            self.report.decided[timings.key(site.work)] = implementation

    def faster_together(self, apart: Sequence[Site], implementation: str) -> Together:
        joint = replace(apart[0], shape=(sum(site.shape[0] for site in apart), apart[0].shape[1]))
        self.measure(joint)
        return faster_together(apart, joint, implementation)
