"""Which implementation runs each fxsparse operator, for its shape, dtype and device, and why.

`choose` is the one place that decides. It is asked for frozen N:M weights that the backend found (run them
compressed, or leave the dense weight that is in memory anyway?) and for fxsparse operators a graph already holds
(call the operator's own kernel, or inline its reference as ATen for Inductor to fuse?).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse.compiled import Choice, CompiledGraph
from fxsparse.custom_op import has_kernel
from fxsparse.dynamo_graph import add_placeholder, copy_dynamo_graph, placeholders, static_fake
from fxsparse.frozen import Compress, FrozenLinear, frozen_linears
from fxsparse.options import BackendOptions
from fxsparse.runtime_state import FollowedStates, Slot


@dataclass(frozen=True)
class Site:
    """An operator to choose an implementation for.

    Attributes:
        op: the operator's name, such as ``nm_linear``.
        device: device type of its tensors.
        dtype: of the weight or its values.
        shape: ``(out, in)`` of the weight where it is known.
        frozen: whether the dense weight is a frozen parameter of the model, so that dense costs no extra memory.
    """

    op: str
    device: str
    dtype: torch.dtype
    shape: tuple[int, ...] = ()
    frozen: bool = False


def choose(site: Site, pinned: str = "auto") -> tuple[str, str]:
    """An implementation and the reason for it.

    Returns:
        ``compressed`` or ``dense`` for a frozen weight; ``operator`` (the operator's own kernel) or ``reference``
        (inlined as ATen) for an operator in the graph.
    """
    if site.frozen:
        if pinned != "auto":
            return pinned, f'pinned by options={{"lower": {{"{site.op}": "{pinned}"}}}}'
        if site.device == "cpu":
            return (
                "dense",
                "the dense weight is in memory anyway, and on a CPU decompressing every call costs more than it saves",
            )
        if not has_kernel(site.op, site.device):
            return "dense", f"the dense weight is in memory anyway, and there is no kernel for {site.device}"
        return "compressed", f"it reads fewer bytes on {site.device}"
    if pinned == "dense":
        return "reference", f'pinned by options={{"lower": {{"{site.op}": "dense"}}}}'
    if has_kernel(site.op, site.device):
        return "operator", f"the operator's own kernel on {site.device}"
    return "reference", f"inlined as ATen for the compiler to fuse; there is no kernel for {site.device}"


# --- operators in the graph -------------------------------------------------------------------------------------------


def operators(gm: GraphModule) -> Iterator[tuple[str, Node]]:
    """Names and calls of the fxsparse operators in a graph and in the graphs it calls, such as checkpointed regions."""
    for module in gm.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                name = _operator_name(node.target) if node.op == "call_function" else None
                if name:
                    yield name, node


def _operator_name(target: Any) -> str | None:
    """``nm_linear`` for ``torch.ops.fxsparse.nm_linear`` and its overload; None for anything else."""
    packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return None
    namespace, _, name = str(packet._qualified_op_name).partition("::")
    return name if namespace == "fxsparse" else None


def note_operators(gm: GraphModule, names: dict[int, str], options: BackendOptions, report: CompiledGraph) -> None:
    """Reports how the operators of a graph will run.

    Args:
        gm: Dynamo's graph, or one like it.
        names: full names of those inputs that are parameters or buffers, by position.
    """
    named = {node: names[position] for position, node in enumerate(placeholders(gm)) if position in names}
    for op, node in operators(gm):
        fake = node.meta.get("example_value", node.meta.get("val"))
        if fake is None:
            continue
        implementation, reason = choose(Site(op, fake.device.type, fake.dtype), options.pinned(op))
        site = next((named[source] for source in node.all_input_nodes if source in named), node.name)
        report.choices.append(Choice(op, site, implementation, reason))


def runs_reference(call: Node, options: BackendOptions) -> bool:
    """Whether :func:`choose` wants the reference of an operator in a lowered graph; a gradient follows its operator."""
    name = _operator_name(call.target)
    values = (node.meta.get("val") for node in call.all_input_nodes)
    like = next((value for value in values if isinstance(value, Tensor)), None)
    if name is None or like is None:
        return False
    site = Site(name, like.device.type, like.dtype)
    return choose(site, options.pinned(name.partition("_grad_")[0]))[0] == "reference"


# --- frozen N:M weights -----------------------------------------------------------------------------------------------


def lower_frozen(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    names: dict[int, str],
    options: BackendOptions,
    report: CompiledGraph,
) -> tuple[GraphModule, list[Slot]]:
    """Lets the frozen N:M weights of a graph run from compressed form where that pays.

    Args:
        gm: Dynamo's graph, or one like it; it stays as it is.
        example_inputs: its real inputs.
        names: full names of those that are parameters or buffers, by position.

    Returns:
        a copy with further inputs and where they come from; ``gm`` itself and nothing where no weight runs compressed.
    """
    sites = []
    for linear in frozen_linears(gm, example_inputs, names):
        weight = example_inputs[linear.position]
        site = Site("nm_linear", weight.device.type, weight.dtype, tuple(weight.shape), frozen=True)
        implementation, reason = choose(site, options.pinned("nm_linear"))
        if implementation == "compressed" and weight.is_inference():
            implementation, reason = "dense", "it was made in inference mode, where changes cannot be followed"
        found = f"frozen and {linear.pattern}; {reason}"
        report.choices.append(Choice("nm_linear", names[linear.position], implementation, found))
        if implementation == "compressed":
            sites.append(linear)
    return _compress(gm, example_inputs, names, sites) if sites else (gm, [])


def _compress(
    gm: GraphModule, example_inputs: Sequence[Any], names: dict[int, str], sites: list[FrozenLinear]
) -> tuple[GraphModule, list[Slot]]:
    copy = copy_dynamo_graph(gm)
    twins = dict(zip(gm.graph.nodes, copy.graph.nodes, strict=True))
    slots: dict[tuple[int, Compress], tuple[Slot, list[Node]]] = {}
    after = placeholders(copy)[-1]
    for site in sites:
        rule = Compress(site.pattern, site.transposed)
        key = (site.position, rule)
        if key not in slots:
            name = names[site.position]
            slot = Slot((site.position,), FollowedStates(rule), (f"{name}_values", f"{name}_indices"))
            inputs = []
            for input_name, tensor in zip(slot.names, slot.get(example_inputs) or (), strict=True):
                with copy.graph.inserting_after(after):
                    after = add_placeholder(copy.graph, input_name, static_fake(gm, tensor))
                inputs.append(after)
            slots[key] = (slot, inputs)
        values, indices = slots[key][1]
        node = twins[site.node]
        args = (twins[site.input], values, indices, None, twins.get(site.bias), site.pattern.n, site.pattern.m)
        with copy.graph.inserting_before(node):
            call = copy.graph.call_function(torch.ops.fxsparse.nm_linear.default, args)
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        copy.graph.erase_node(node)
    copy.graph.lint()
    copy.recompile()
    return copy, [slot for slot, _ in slots.values()]
