"""A copy of Dynamo's graph that what was chosen is put into, and the further inputs that needs."""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse.backend.options import BackendOptions
from fxsparse.codegen.launching import unsupported
from fxsparse.codegen.metadata import pack_metadata
from fxsparse.graph.dynamo import add_placeholder, copy_dynamo_graph, placeholders, static_fake
from fxsparse.graph.runtime_state import FollowedStates, Slot
from fxsparse.lowering.choose import (
    CUSPARSELT,
    REFERENCE,
    SPARSE_TENSOR_CORES,
    SPARSE_TENSOR_CORES_OP,
)
from fxsparse.lowering.frozen import Compress, FrozenLinear, joined
from fxsparse.lowering.fusion import Gated, following, fuse_linears
from fxsparse.lowering.sites import arguments_of, fake_of, operator_name, operators
from fxsparse.ops.define import has_kernel
from fxsparse.ops.nm import Pattern, satisfies, unpack

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
    """Values of several weights one below the other, or a row of each in turn, and their indices alike."""

    alternating: bool = False

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        half = len(tensors) // 2
        return joined(tensors[:half], self.alternating), joined(tensors[half:], self.alternating)


@dataclass(frozen=True)
class PackForLibrary:
    """A dense 2:4 weight, or the one of values and indices, as cuSPARSELt packs it; None where it is not 2:4."""

    transposed: bool = False

    def __call__(self, weight: Tensor, indices: Tensor | None = None) -> tuple[Tensor, ...] | None:
        if indices is not None:
            (weight,) = Expand(Pattern(2, 4))(weight, indices)
        dense = (weight.t() if self.transposed else weight).contiguous()
        return (torch._cslt_compress(dense),) if satisfies(dense, Pattern(2, 4)) else None


class LoweredGraph:
    """A copy of Dynamo's graph, made at the first edit, and the further inputs it takes."""

    def __init__(self, gm: GraphModule, example_inputs: Sequence[Any], names: dict[int, str]):
        self.gm, self.example_inputs, self.names = gm, example_inputs, names
        self.edited = False
        self.copied = 0  # bytes
        self.slots: dict[tuple[tuple[int, ...], Any], tuple[Slot, list[Node]]] = {}

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
            (packed,) = self.further_inputs(positions, PackForLibrary(first.transposed), ("packed",))
            target, args = ops.cusparselt_linear.default, (x, packed, bias, sizes[0], *algorithm)
        else:
            on_tensor_cores = implementation == SPARSE_TENSOR_CORES
            kinds = ("values", "metadata" if on_tensor_cores else "indices")
            rule = Compress(first.pattern, first.transposed, on_tensor_cores)
            values, packed = self.further_inputs(positions, rule, kinds)
            if on_tensor_cores:
                target, args = ops.sparse_tensor_core_linear.default, (x, values, packed, bias, "", [])
            else:
                target = ops.nm_linear.default
                args = (x, values, packed, None, bias, first.pattern.n, first.pattern.m)
        if len(linears) == 1:
            self._replace(first.node, target, *args)
        else:
            self._split([linear.node for linear in linears], target, args)

    def gate(
        self,
        pair: Gated,
        x: Node,
        positions: tuple[int, ...],
        rule: Any,
        biases: Sequence[Node | None],
        pattern: Pattern,
    ) -> None:
        """Lets a linear and the one that it gates run as one product, on weights whose rows alternate: those the rule
        makes of the inputs at some positions."""
        twins, graph, end = self.twins, self.copy.graph, pair.nodes[-1]
        weights = self.further_inputs(positions, rule, ("gated_values", "gated_indices"))
        with graph.inserting_before(twins[end]):
            bias = None
            if biases[0] is not None:
                rows = graph.call_function(torch.stack, ([twins[each] for each in biases], 1))
                bias = graph.call_function(torch.flatten, (rows,))
            args: tuple[Any, ...] = (twins[x], *weights, bias, pattern.n, pattern.m, pair.step, [])
            call = graph.call_function(ops.nm_linear_epilogue.default, args)
        call.meta = dict(twins[end].meta)
        twins[end].replace_all_uses_with(call)
        for node in (*reversed(pair.nodes), pair.gate, pair.up):
            graph.erase_node(twins[node])
        twins[end] = call

    def stack(self, nodes: Sequence[Node]) -> None:
        """Lets operators that read the same input run as one, on copies of their weights below each other."""
        given, twins = [arguments_of(node) for node in nodes], self.twins
        positions = tuple(self.positions[each[name]] for name in ("values", "indices") for each in given)
        values, indices = self.further_inputs(positions, Stack(), ("stacked_values", "stacked_indices"))
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
        (metadata,) = self.further_inputs((self.positions[indices],), PackMetadata(), ("metadata",))  # type: ignore[index]
        target = ops.sparse_tensor_core_linear.default
        self._replace(node, target, twins[x], twins[values], metadata, twins.get(bias), "", [])

    def use_library(self, node: Node, algorithm: Sequence[int]) -> None:
        x, values, indices, _, bias, _, _ = node.args
        twins, positions = self.twins, (self.positions[values], self.positions[indices])  # type: ignore[index]
        (packed,) = self.further_inputs(positions, PackForLibrary(), ("packed",))
        target = ops.cusparselt_linear.default
        self._replace(node, target, twins[x], packed, twins.get(bias), int(fake_of(node).shape[-1]), *algorithm)

    def expand(self, node: Node) -> None:
        """Lets a dense product run with a weight that is expanded once."""
        twins = self.twins
        given = arguments_of(node)
        rule = Expand(Pattern(given["n"], given["m"]))
        positions = (self.positions[given["values"]], self.positions[given["indices"]])
        (weight,) = self.further_inputs(positions, rule, ("dense",))
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

    def further_inputs(self, positions: tuple[int, ...], rule: Any, kinds: tuple[str, ...]) -> list[Node]:
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
    if name == "nm_linear":
        return has_epilogues(fake.device.type, fake.dtype, Pattern(*node.args[5:7]))  # type: ignore[arg-type]
    return has_kernel(name, fake.device.type) and unsupported(fake.dtype) is None


def has_epilogues(device: str, dtype: torch.dtype, pattern: Pattern) -> bool:
    """Whether the kernel of a product can take over what follows it."""
    return has_kernel("nm_linear_epilogue", device) and unsupported(dtype, pattern.n, pattern.m) is None


def available_memory(device: torch.device) -> int:
    """Bytes that a process can still take on a device; a guess from free pages where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
