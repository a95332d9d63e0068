"""Putting what was chosen into a graph: further inputs, sparse tensor cores, kernels that take over what follows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse.codegen.fusion import following, fuse_linears
from fxsparse.codegen.launch import unsupported
from fxsparse.codegen.metadata import pack_metadata
from fxsparse.compiled import Choice, CompiledGraph
from fxsparse.custom_op import has_kernel
from fxsparse.dynamo_graph import add_placeholder, copy_dynamo_graph, placeholders, static_fake
from fxsparse.frozen import Compress, FrozenLinear, frozen_linears
from fxsparse.lower import (
    SPARSE_TENSOR_CORES,
    SPARSE_TENSOR_CORES_OP,
    Site,
    choose,
    fake_of,
    is_inference,
    operator_name,
    operators,
    site_of,
)
from fxsparse.options import BackendOptions
from fxsparse.runtime_state import FollowedStates, Slot

ops = torch.ops.fxsparse


@dataclass(frozen=True)
class PackMetadata:
    """The indices of a 2:4 weight as sparse tensor cores read them."""

    def __call__(self, indices: Tensor) -> tuple[Tensor, ...]:
        return (pack_metadata(indices),)


def lower_graph(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    names: dict[int, str],
    options: BackendOptions,
    report: CompiledGraph,
) -> tuple[GraphModule, list[Slot]]:
    """Lets frozen N:M weights run from compressed form, and linears on sparse tensor cores, where that is chosen; in
    inference their kernels take over the pointwise operators that follow.

    Args:
        gm: Dynamo's graph, or one like it; it stays as it is.
        example_inputs: its real inputs.
        names: full names of those that are parameters or buffers, by position.

    Returns:
        a copy with further inputs and where they come from; ``gm`` itself and nothing where it stays as it is.
    """
    editor = _Editor(gm, example_inputs, names)
    inference = is_inference(gm)
    for linear in frozen_linears(gm, example_inputs, names):
        weight = example_inputs[linear.position]
        shape = tuple(weight.t().shape if linear.transposed else weight.shape)
        site = Site("nm_linear", weight.device.type, weight.dtype, shape, linear.pattern, True, inference)
        implementation, reason = choose(site, options.pinned("nm_linear"))
        if implementation != "dense" and weight.is_inference():
            implementation, reason = "dense", "it was made in inference mode, where changes cannot be followed"
        found = f"frozen and {linear.pattern}; {reason}"
        report.choices.append(Choice("nm_linear", names[linear.position], implementation, found))
        if implementation != "dense":
            editor.compress(linear, sparse_tensor_cores=implementation == SPARSE_TENSOR_CORES)
    for op, node in operators(gm):
        place = site_of(op, node, inference) if node.graph is gm.graph else None
        if place is not None and choose(place, options.pinned(op))[0] == SPARSE_TENSOR_CORES:
            editor.use_sparse_tensor_cores(node)
    if inference:
        editor.fuse(options)
    return editor.finish()


class _Editor:
    """A copy of Dynamo's graph, made at the first edit, and the further inputs it takes."""

    def __init__(self, gm: GraphModule, example_inputs: Sequence[Any], names: dict[int, str]):
        self.gm, self.example_inputs, self.names = gm, example_inputs, names
        self.edited = False
        self.slots: dict[tuple[int, Any], tuple[Slot, list[Node]]] = {}

    @functools.cached_property
    def copy(self) -> GraphModule:
        self.edited = True
        return copy_dynamo_graph(self.gm)

    @functools.cached_property
    def twins(self) -> dict[Any, Node]:
        return dict(zip(self.gm.graph.nodes, self.copy.graph.nodes, strict=True))

    def compress(self, linear: FrozenLinear, *, sparse_tensor_cores: bool) -> None:
        twins = self.twins
        x, bias = twins[linear.input], twins.get(linear.bias)
        rule = Compress(linear.pattern, linear.transposed, sparse_tensor_cores)
        last = "metadata" if sparse_tensor_cores else "indices"
        values, packed = self._inputs(linear.position, rule, ("values", last))
        if sparse_tensor_cores:
            self._replace(twins[linear.node], ops.sparse_tensor_core_linear.default, x, values, packed, bias, "", [])
        else:
            pattern = (linear.pattern.n, linear.pattern.m)
            self._replace(twins[linear.node], ops.nm_linear.default, x, values, packed, None, bias, *pattern)

    def use_sparse_tensor_cores(self, node: Node) -> None:
        x, values, indices, _, bias, _, _ = node.args
        positions = {source: position for position, source in enumerate(placeholders(self.gm))}
        if not isinstance(indices, Node) or indices not in positions:
            return
        twins = self.twins
        (metadata,) = self._inputs(positions[indices], PackMetadata(), ("metadata",))
        target = ops.sparse_tensor_core_linear.default
        self._replace(twins[node], target, twins[x], twins[values], metadata, twins.get(bias), "", [])

    def fuse(self, options: BackendOptions) -> None:
        """Lets kernels take over what follows their linears."""
        calls = [node for _, node in operators(self.copy if self.edited else self.gm)]
        if any(_has_own_kernel(node) and following(node) for node in calls):
            fuse_linears(self.copy, lambda node: not _has_own_kernel(node) or options.pinned("nm_linear") == "dense")

    def finish(self) -> tuple[GraphModule, list[Slot]]:
        if not self.edited:
            return self.gm, []
        self.copy.graph.lint()
        self.copy.recompile()
        return self.copy, [slot for slot, _ in self.slots.values()]

    def _inputs(self, position: int, rule: Any, kinds: tuple[str, ...]) -> list[Node]:
        """The further inputs that follow from the tensor at a position."""
        key = (position, rule)
        if key not in self.slots:
            name = self.names.get(position, f"input_{position}")
            slot = Slot((position,), FollowedStates(rule), tuple(f"{name}_{kind}" for kind in kinds))
            after, inputs = placeholders(self.copy)[-1], []
            for input_name, tensor in zip(slot.names, slot.get(self.example_inputs) or (), strict=True):
                with self.copy.graph.inserting_after(after):
                    after = add_placeholder(self.copy.graph, input_name, static_fake(self.gm, tensor))
                inputs.append(after)
            self.slots[key] = (slot, inputs)
        return self.slots[key][1]

    def _replace(self, node: Node, target: Any, *args: Any) -> None:
        with node.graph.inserting_before(node):
            call = node.graph.call_function(target, args)
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        node.graph.erase_node(node)


def _has_own_kernel(node: Node) -> bool:
    fake, name = fake_of(node), operator_name(node.target)
    if fake is None or name not in ("nm_linear", SPARSE_TENSOR_CORES_OP):
        return False
    kernel = "nm_linear_epilogue" if name == "nm_linear" else name
    return has_kernel(kernel, fake.device.type) and unsupported(fake.dtype, *_pattern(name, node)) is None


def _pattern(name: str, node: Node) -> tuple[Any, ...]:
    return tuple(node.args[5:7]) if name == "nm_linear" else ()
