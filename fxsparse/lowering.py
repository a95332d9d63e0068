"""Putting what was chosen into a graph: further inputs, sparse tensor cores, kernels that take over what follows."""

from __future__ import annotations

import functools
import operator
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse import measured
from fxsparse.codegen.fusion import following, fuse_linears
from fxsparse.codegen.launch import unsupported
from fxsparse.codegen.metadata import pack_metadata
from fxsparse.compiled import Choice, CompiledGraph
from fxsparse.custom_op import has_kernel
from fxsparse.dynamo_graph import add_placeholder, copy_dynamo_graph, placeholders, static_fake
from fxsparse.frozen import Compress, FrozenLinear, frozen_linears
from fxsparse.lower import (
    CUSPARSELT,
    DENSE,
    OPERATOR,
    REFERENCE,
    SPARSE_TENSOR_CORES,
    SPARSE_TENSOR_CORES_OP,
    choose,
    choose_gradient,
    gradients_of,
    library_algorithm,
    pin_of,
    undecided,
)
from fxsparse.memory import available_memory
from fxsparse.nm import Pattern, satisfies, unpack
from fxsparse.options import BackendOptions, Pin
from fxsparse.runtime_state import FollowedStates, Slot
from fxsparse.sites import Site, arguments_of, fake_of, is_inference, operator_name, operators, rows_of, site_of

ops = torch.ops.fxsparse


@dataclass(frozen=True)
class PackMetadata:
    """The indices of a 2:4 weight as sparse tensor cores read them."""

    def __call__(self, indices: Tensor) -> tuple[Tensor, ...]:
        return (pack_metadata(indices),)


@dataclass(frozen=True)
class Expand:
    """The dense weight of values and indices."""

    pattern: Pattern

    def __call__(self, values: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        return (unpack(values, indices, self.pattern, values.shape[1] // self.pattern.n * self.pattern.m),)


@dataclass(frozen=True)
class Stack:
    """Values of several weights one below the other, and their indices alike."""

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        half = len(tensors) // 2
        return torch.cat(tensors[:half]), torch.cat(tensors[half:])


@dataclass(frozen=True)
class PackForLibrary:
    """A dense 2:4 weight, or the one of values and indices, as cuSPARSELt packs it; None where it is not 2:4."""

    transposed: bool = False

    def __call__(self, weight: Tensor, indices: Tensor | None = None) -> tuple[Tensor, ...] | None:
        if indices is not None:
            (weight,) = Expand(Pattern(2, 4))(weight, indices)
        dense = (weight.t() if self.transposed else weight).contiguous()
        return (torch._cslt_compress(dense),) if satisfies(dense, Pattern(2, 4)) else None


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
    editor = _Editor(gm, example_inputs, names, report)
    inference = is_inference(gm)
    compressed: list[tuple[FrozenLinear, str]] = []
    sites: dict[Node, Site] = {}
    for linear in frozen_linears(gm, example_inputs, names):
        weight = example_inputs[linear.position]
        shape = tuple(weight.t().shape if linear.transposed else weight.shape)
        rows = rows_of(fake_of(linear.node))
        site = Site("nm_linear", weight.device.type, weight.dtype, shape, linear.pattern, rows, True, True, inference)
        editor.measure(site, options)
        implementation, reason = choose(site, options.pin("nm_linear"))
        if implementation != DENSE and weight.is_inference():
            implementation, reason = DENSE, "it was made in inference mode, where changes cannot be followed"
        bits = linear.pattern.density * (8 * weight.element_size() + linear.pattern.index_bits)
        if implementation != DENSE and not editor.has_room(int(weight.numel() * bits / 8), weight):
            implementation, reason = DENSE, "there is no memory for a compressed copy"
        found = f"frozen and {linear.pattern}; {reason}"
        report.choices.append(Choice("nm_linear", names[linear.position], implementation, found, site.work))
        if implementation != DENSE:
            compressed.append((linear, implementation))
            sites[linear.node] = site
    for together, implementation in side_by_side(compressed):
        if len(together) == 1:
            editor.compress(together, implementation, library_algorithm(sites[together[0].node]))
            continue
        faster = editor.faster_together([sites[linear.node] for linear in together], implementation, options)
        for group in [together] if faster.holds else [[linear] for linear in together]:
            editor.compress(group, implementation)
        report.note(f"{', '.join(names[linear.position] for linear in together)} read the same input and run {faster}")
    stacked: dict[Any, list[tuple[Node, Site, str]]] = {}
    named = {node: names[position] for position, node in enumerate(placeholders(gm)) if position in names}
    for op, node in operators(gm):
        place = site_of(op, node)
        if place is None:
            continue
        weight = editor.inputs_of(node)
        frozen = bool(weight) and not any(tensor.requires_grad or tensor.is_inference() for tensor in weight)
        place = replace(place, inference=inference and bool(weight), frozen=frozen)
        editor.measure(place, options)
        implementation, reason = choose(place, options.pin(op))
        if implementation in (DENSE, CUSPARSELT) and not editor.has_room_for(node):
            copied = "to expand it once" if implementation == DENSE else "for the library's copy"
            implementation, reason = choose(place, Pin(excluded=frozenset({DENSE, CUSPARSELT})))
            reason = f"frozen, but there is no memory {copied}; {reason}"
        where = next((named[source] for source in node.all_input_nodes if source in named), node.name)
        report.choices.append(Choice(op, where, implementation, reason, place.work))
        for gradient in [] if inference else gradients_of(place, node):
            editor.measure(gradient, options)
            how, why = choose_gradient(gradient, arguments_of(node).get("column_mask") is not None, options)
            report.choices.append(Choice(gradient.op, where, how, why, gradient.work))
        if implementation == SPARSE_TENSOR_CORES:
            editor.use_sparse_tensor_cores(node)
        elif implementation == CUSPARSELT:
            editor.use_library(node, library_algorithm(place))
        elif implementation == DENSE:
            editor.expand(node)
        elif implementation == OPERATOR and place.inference and frozen and op == "nm_linear" and not following(node):
            given = arguments_of(node)
            if given.get("bias") is None or given["bias"] in editor.positions:
                key = (given["x"], place.pattern, given.get("bias") is None)
                stacked.setdefault(key, []).append((node, place, where))
    for operators_together in stacked.values():
        nodes, places, paths = zip(*operators_together, strict=True)
        if len(nodes) == 1 or not editor.has_room_for(*nodes):
            continue
        faster = editor.faster_together(places, OPERATOR, options)
        if faster.holds:
            editor.stack(nodes)
        report.note(f"{', '.join(paths)} read the same input and run {faster}")
    if inference:
        editor.fuse(options)
    return editor.finish()


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
    found = [measured.times(site.work, site.device).get(implementation) for site in (joint, *apart) if site.work]
    times = [time for time in found if time is not None]
    if len(times) != 1 + len(apart):
        return Together(True, "not measured")
    why = f"measured {times[0] * 1e3:.0f} us together, {sum(times[1:]) * 1e3:.0f} us apart"
    return Together(times[0] <= sum(times[1:]), why)


class _Editor:
    """A copy of Dynamo's graph, made at the first edit, and the further inputs it takes."""

    def __init__(self, gm: GraphModule, example_inputs: Sequence[Any], names: dict[int, str], report: CompiledGraph):
        self.gm, self.example_inputs, self.names, self.report = gm, example_inputs, names, report
        self.edited = False
        self.copied = 0  # bytes
        self.until = 0.0
        self.slots: dict[tuple[tuple[int, ...], Any], tuple[Slot, list[Node]]] = {}

    def measure(self, site: Site, options: BackendOptions) -> None:
        """Measures a product on its first use where it has a kernel, while there is time for it."""
        self.until = self.until or time.monotonic() + options.tune
        if time.monotonic() < self.until and site.work and pin_of(site.op, options).name is None and undecided(site):
            from fxsparse.tuning import measure

            try:
                measure(site.work, site.device, until=self.until, compile_reference=not site.in_memory)
            except RuntimeError as error:  # such as no memory for the operands
                self.report.note(f"{measured.key(site.work)} could not be measured: {str(error).partition(chr(10))[0]}")

    def faster_together(self, apart: Sequence[Site], implementation: str, options: BackendOptions) -> Together:
        """:func:`faster_together`, measured where there is time for it."""
        joint = replace(apart[0], shape=(sum(site.shape[0] for site in apart), apart[0].shape[1]), in_memory=False)
        self.measure(joint, options)
        return faster_together(apart, joint, implementation)

    @functools.cached_property
    def copy(self) -> GraphModule:
        self.edited = True
        return copy_dynamo_graph(self.gm)

    @functools.cached_property
    def twins(self) -> dict[Any, Node]:
        return dict(zip(self.gm.graph.nodes, self.copy.graph.nodes, strict=True))

    @functools.cached_property
    def positions(self) -> dict[Node, int]:
        """Where the graph's own inputs are among the real ones; what a pass added comes after those."""
        nodes = placeholders(self.gm)[: len(self.example_inputs)]
        return {node: position for position, node in enumerate(nodes)}

    def compress(self, linears: list[FrozenLinear], implementation: str, algorithm: Sequence[int] = ()) -> None:
        """Lets linears that read the same input run as one product with their compressed weights below each other;
        ``algorithm`` is the library's."""
        twins, first = self.twins, linears[0]
        x, positions = twins[first.input], tuple(linear.position for linear in linears)
        sizes = [int(fake_of(linear.node).shape[-1]) for linear in linears]
        bias = twins.get(first.bias)
        if len(linears) > 1 and bias is not None:
            with self.copy.graph.inserting_before(twins[first.node]):
                bias = self.copy.graph.call_function(torch.cat, ([twins[linear.bias] for linear in linears],))
        target: Any
        args: tuple[Any, ...]
        if implementation == CUSPARSELT:
            (packed,) = self._inputs(positions, PackForLibrary(first.transposed), ("packed",))
            target, args = ops.cusparselt_linear.default, (x, packed, bias, sizes[0], *algorithm)
        else:
            on_tensor_cores = implementation == SPARSE_TENSOR_CORES
            kinds = ("values", "metadata" if on_tensor_cores else "indices")
            rule = Compress(first.pattern, first.transposed, on_tensor_cores)
            values, packed = self._inputs(positions, rule, kinds)
            if on_tensor_cores:
                target, args = ops.sparse_tensor_core_linear.default, (x, values, packed, bias, "", [])
            else:
                target = ops.nm_linear.default
                args = (x, values, packed, None, bias, first.pattern.n, first.pattern.m)
        if len(linears) == 1:
            self._replace(first.node, target, *args)
        else:
            self._split([linear.node for linear in linears], target, args)

    def stack(self, nodes: Sequence[Node]) -> None:
        """Lets operators that read the same input run as one, on copies of their weights below each other."""
        given, twins = [arguments_of(node) for node in nodes], self.twins
        positions = tuple(self.positions[each[name]] for name in ("values", "indices") for each in given)
        values, indices = self._inputs(positions, Stack(), ("stacked_values", "stacked_indices"))
        bias = None
        if given[0].get("bias") is not None:
            with self.copy.graph.inserting_before(twins[nodes[0]]):
                bias = self.copy.graph.call_function(torch.cat, ([twins[each["bias"]] for each in given],))
        args = (twins[given[0]["x"]], values, indices, None, bias, given[0]["n"], given[0]["m"])
        self._split(nodes, ops.nm_linear.default, args)

    def _split(self, nodes: Sequence[Node], target: Any, args: tuple[Any, ...]) -> None:
        """Replaces linears by parts of one product, which stands before the first of them."""
        graph, twins, sizes = self.copy.graph, self.twins, [int(fake_of(node).shape[-1]) for node in nodes]
        # A later one's bias may stand below the first of them; what they read are inputs of the graph or x.
        with graph.inserting_before(twins[nodes[0]]):
            product = graph.call_function(target, args)
            parts = graph.call_function(torch.split, (product, sizes), {"dim": -1})
        for position, node in enumerate(nodes):
            with graph.inserting_before(twins[node]):
                part = graph.call_function(operator.getitem, (parts, position))
            part.meta = dict(twins[node].meta)
            twins[node].replace_all_uses_with(part)
            graph.erase_node(twins[node])
            twins[node] = part

    def inputs_of(self, node: Node) -> list[Tensor]:
        """The values and indices of an operator where both are inputs of the graph, else nothing."""
        if node.graph is not self.gm.graph or len(node.args) < 3:
            return []
        positions = [self.positions.get(arg) for arg in node.args[1:3]]  # type: ignore[arg-type]
        return [self.example_inputs[p] for p in positions if p is not None] if None not in positions else []

    def has_room_for(self, *nodes: Node) -> bool:
        """Whether the dense weights of operators, or copies of compressed ones, fit into half of the memory left."""
        every = [self.example_inputs[self.positions[node.args[1]]] for node in nodes]  # type: ignore[index]
        return self.has_room(sum(2 * values.nbytes for values in every), every[0])

    def has_room(self, size: int, like: Tensor) -> bool:
        """Whether copies of ``size`` bytes, with those made before, fit into half of the memory left on a device."""
        fits = self.copied + size < available_memory(like.device) // 2
        self.copied += size if fits else 0
        return fits

    def use_sparse_tensor_cores(self, node: Node) -> None:
        x, values, indices, _, bias, _, _ = node.args
        twins = self.twins
        (metadata,) = self._inputs((self.positions[indices],), PackMetadata(), ("metadata",))  # type: ignore[index]
        target = ops.sparse_tensor_core_linear.default
        self._replace(node, target, twins[x], twins[values], metadata, twins.get(bias), "", [])

    def use_library(self, node: Node, algorithm: Sequence[int]) -> None:
        x, values, indices, _, bias, _, _ = node.args
        twins, positions = self.twins, (self.positions[values], self.positions[indices])  # type: ignore[index]
        (packed,) = self._inputs(positions, PackForLibrary(), ("packed",))
        target = ops.cusparselt_linear.default
        self._replace(node, target, twins[x], packed, twins.get(bias), int(fake_of(node).shape[-1]), *algorithm)

    def expand(self, node: Node) -> None:
        """Lets a dense product run with a weight that is expanded once."""
        twins = self.twins
        given = arguments_of(node)
        rule = Expand(Pattern(given["n"], given["m"]))
        positions = (self.positions[given["values"]], self.positions[given["indices"]])
        (weight,) = self._inputs(positions, rule, ("dense",))
        x, bias = twins[given["x"]], twins.get(given["bias"])
        call = self._replace(node, torch.nn.functional.linear, x, weight, bias)
        if "down" in given:
            down, up = twins[given["down"]], twins[given["up"]]
            scale = given.get("scale")
            scale = 1 / int(fake_of(given["down"]).shape[0]) if scale is None else scale
            with call.graph.inserting_after(call):
                branch = [call.graph.call_function(torch.nn.functional.linear, (x, down))]
            for target, args in (
                (torch.mul, (branch[0], scale)),
                (torch.nn.functional.linear, (None, up)),
                (torch.add, (call, None)),
            ):
                with call.graph.inserting_after(branch[-1]):
                    filled = tuple(branch[-1] if arg is None else arg for arg in args)
                    branch.append(call.graph.call_function(target, filled))
            for item in branch:
                item.meta = dict(call.meta)
            call.replace_all_uses_with(branch[-1], delete_user_cb=lambda user: user is not branch[-1])
            twins[node] = branch[-1]

    def fuse(self, options: BackendOptions) -> None:
        """Lets kernels take over what follows their linears."""
        calls = [node for _, node in operators(self.copy if self.edited else self.gm)]
        if any(_has_own_kernel(node) and following(node) for node in calls):
            pinned = options.pin("nm_linear").name == REFERENCE
            fuse_linears(self.copy, lambda node: pinned or not _has_own_kernel(node))

    def finish(self) -> tuple[GraphModule, list[Slot]]:
        if not self.edited:
            return self.gm, []
        self.copy.graph.lint()
        self.copy.recompile()
        return self.copy, [slot for slot, _ in self.slots.values()]

    def _inputs(self, positions: tuple[int, ...], rule: Any, kinds: tuple[str, ...]) -> list[Node]:
        """The further inputs that follow from the tensors at some positions."""
        key = (positions, rule)
        if key not in self.slots:
            name = self.names.get(positions[0], f"input_{positions[0]}")
            slot = Slot(positions, FollowedStates(rule), tuple(f"{name}_{kind}" for kind in kinds))
            after, inputs = placeholders(self.copy)[-1], []
            for input_name, tensor in zip(slot.names, slot.get(self.example_inputs) or (), strict=True):
                with self.copy.graph.inserting_after(after):
                    after = add_placeholder(self.copy.graph, input_name, static_fake(self.gm, tensor))
                inputs.append(after)
            self.slots[key] = (slot, inputs)
        return self.slots[key][1]

    def _replace(self, node: Node, target: Any, *args: Any) -> Node:
        """A call in the place of a node's twin, which from then on is the node's twin."""
        twin = self.twins[node]
        with twin.graph.inserting_before(twin):
            call = twin.graph.call_function(target, args)
        call.meta = dict(twin.meta)
        twin.replace_all_uses_with(call)
        twin.graph.erase_node(twin)
        self.twins[node] = call
        return call


def _has_own_kernel(node: Node) -> bool:
    fake, name = fake_of(node), operator_name(node.target)
    if fake is None or name not in ("nm_linear", SPARSE_TENSOR_CORES_OP):
        return False
    kernel = "nm_linear_epilogue" if name == "nm_linear" else name
    return has_kernel(kernel, fake.device.type) and unsupported(fake.dtype, *_pattern(name, node)) is None


def _pattern(name: str, node: Node) -> tuple[Any, ...]:
    return tuple(node.args[5:7]) if name == "nm_linear" else ()
