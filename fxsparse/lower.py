"""Which implementation runs each fxsparse operator, for its shape, dtype and device, and why.

`choose` is the one place that decides. It is asked for frozen N:M weights that the backend found (run them
compressed, or leave the dense weight that is in memory anyway?) and for fxsparse operators a graph already holds
(call the operator's own kernel, or inline its reference as ATen for Inductor to fuse?).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse.codegen import operators as _kernels  # noqa: F401  puts the kernels behind the operators
from fxsparse.codegen.launch_sparse import unsupported_sparse
from fxsparse.compiled import Choice, CompiledGraph
from fxsparse.custom_op import has_kernel
from fxsparse.dynamo_graph import placeholders
from fxsparse.nm import Pattern
from fxsparse.options import BackendOptions

SPARSE_TENSOR_CORES = "sparse_tensor_cores"
SPARSE_TENSOR_CORES_OP = "sparse_tensor_core_linear"
LAUNCHING = {"operator", "compressed", SPARSE_TENSOR_CORES}
"""Implementations that may launch generated kernels."""


@dataclass(frozen=True)
class Site:
    """An operator to choose an implementation for.

    Attributes:
        op: the operator's name, such as ``nm_linear``.
        device: device type of its tensors.
        dtype: of the weight or its values.
        shape: ``(out, in)`` of the weight where it is known.
        pattern: of the weight where it is known.
        frozen: whether the dense weight is a frozen parameter of the model, so that dense costs no extra memory.
        inference: whether the graph is not differentiated.
    """

    op: str
    device: str
    dtype: torch.dtype
    shape: tuple[int, ...] = ()
    pattern: Pattern | None = None
    frozen: bool = False
    inference: bool = False


def choose(site: Site, pinned: str = "auto") -> tuple[str, str]:
    """An implementation and the reason for it.

    Returns:
        for a frozen weight ``dense``, ``compressed`` or ``sparse_tensor_cores``; for an operator in the graph
        ``operator`` (the operator's own kernel), ``reference`` (inlined as ATen) or ``sparse_tensor_cores``.
    """
    note = ""
    if pinned == SPARSE_TENSOR_CORES:
        obstacle = no_sparse_tensor_cores(site)
        if obstacle is None:
            return pinned, _pinned_by(site, pinned)
        note = f"not on sparse tensor cores as pinned, because {obstacle}; "
    elif pinned != "auto":
        if site.frozen:
            return pinned, _pinned_by(site, pinned)
        if pinned == "dense":
            return "reference", _pinned_by(site, pinned)
    kernel = has_kernel(site.op, site.device)
    if site.frozen:
        in_memory = f"{note}the dense weight is in memory anyway, and "
        if site.device == "cpu":
            return "dense", f"{in_memory}on a CPU decompressing every call costs more than it saves"
        if not kernel:
            return "dense", f"{in_memory}there is no kernel for {site.device}"
        return "compressed", f"{note}it reads fewer bytes on {site.device}"
    if kernel:
        return "operator", f"{note}the operator's own kernel on {site.device}"
    return "reference", f"{note}inlined as ATen for the compiler to fuse; there is no kernel for {site.device}"


def no_sparse_tensor_cores(site: Site) -> str | None:
    """Why a linear cannot run on sparse tensor cores; None where it can."""
    if site.op != "nm_linear" or site.pattern is None or len(site.shape) != 2:
        return f"they run nm_linear, not {site.op}"
    if not has_kernel(SPARSE_TENSOR_CORES_OP, site.device):
        return f"there are none on {site.device}"
    if not site.inference:
        return "the graph is differentiated"
    return unsupported_sparse(site.dtype, site.shape[1], site.pattern.n, site.pattern.m)


def _pinned_by(site: Site, pinned: str) -> str:
    return f'pinned by options={{"lower": {{"{site.op}": "{pinned}"}}}}'


# --- operators in the graph -------------------------------------------------------------------------------------------


def operators(gm: GraphModule) -> Iterator[tuple[str, Node]]:
    """Names and calls of the fxsparse operators in a graph and in the graphs it calls, such as checkpointed regions."""
    for module in gm.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                name = operator_name(node.target) if node.op == "call_function" else None
                if name:
                    yield name, node


def operator_name(target: Any) -> str | None:
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
    inference = is_inference(gm)
    for op, node in operators(gm):
        site = site_of(op, node, inference)
        if site is None:
            continue
        implementation, reason = choose(site, options.pinned(op))
        where = next((named[source] for source in node.all_input_nodes if source in named), node.name)
        report.choices.append(Choice(op, where, implementation, reason))


def site_of(op: str, node: Node, inference: bool) -> Site | None:
    """A call of an operator as a site; None where its result is not known."""
    fake = fake_of(node)
    if fake is None:
        return None
    shape: tuple[int, ...] = ()
    pattern = None
    if op == "nm_linear":
        x, *_, n, m = node.args
        pattern, shape = Pattern(n, m), (int(fake.shape[-1]), int(fake_of(x).shape[-1]))  # type: ignore[arg-type]
    return Site(op, fake.device.type, fake.dtype, shape, pattern, inference=inference)


def is_inference(gm: GraphModule) -> bool:
    """Whether nothing that a graph computes is differentiated or cast on the way."""
    changes = {torch._C._set_grad_enabled, torch.amp.autocast_mode._enter_autocast}
    plain = all(node.target not in changes for node in gm.graph.nodes if node.op == "call_function")
    autocast = any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    return plain and not autocast and not torch.is_grad_enabled()


def fake_of(node: Any) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


def runs_reference(call: Node, options: BackendOptions) -> bool:
    """Whether :func:`choose` wants the reference of an operator in a lowered graph; a gradient follows its operator."""
    name = operator_name(call.target)
    values = (node.meta.get("val") for node in call.all_input_nodes)
    like = next((value for value in values if isinstance(value, Tensor)), None)
    if name is None or like is None:
        return False
    site = Site(name, like.device.type, like.dtype)
    return choose(site, options.pinned(name.partition("_grad_")[0]))[0] == "reference"
