"""Which implementation runs each fxsparse operator, for its shape, dtype and device, and why.

`choose` is the one place that decides. It is asked for frozen N:M weights that the backend found (run them compressed,
or leave the dense weight that is in memory anyway?) and for fxsparse operators a graph already holds.

    dense                 a dense product; the weight of a compressed frozen one is expanded once and followed
    compressed, operator  the operator's own generated kernel, on the compressed weight
    sparse_tensor_cores   the generated kernel on 2:4 tensor cores
    cusparselt            NVIDIA's library through torch, on its own compressed copy
    reference             plain ATen, inlined for the compiler to fuse

What was measured on the device decides (`fxsparse.measured`), else an estimate from bytes and FLOPs where the device is
known (`fxsparse.cost_model`), else fixed rules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fxsparse import cost_model, measured
from fxsparse.codegen import kept_transpose as _kept  # noqa: F401  registers nm_linear_grad_input_kept
from fxsparse.codegen import operators as _kernels  # noqa: F401  puts the kernels behind the operators
from fxsparse.codegen.launch_sparse import unsupported_sparse
from fxsparse.cost_model import Work
from fxsparse.custom_op import has_kernel
from fxsparse.nm import Pattern
from fxsparse.options import BackendOptions, Pin

DENSE, COMPRESSED, OPERATOR, REFERENCE = "dense", "compressed", "operator", "reference"
SPARSE_TENSOR_CORES, CUSPARSELT = "sparse_tensor_cores", "cusparselt"
SPARSE_TENSOR_CORES_OP = "sparse_tensor_core_linear"
GRAD_INPUT = "nm_linear_grad_input"
LAUNCHING = {OPERATOR, COMPRESSED, SPARSE_TENSOR_CORES}
"""Implementations that may launch generated kernels."""

_EXPANDABLE = {"nm_linear", "nm_linear_low_rank"}


@dataclass(frozen=True)
class Site:
    """An operator to choose an implementation for.

    Attributes:
        op: the operator's name, such as ``nm_linear``.
        device: device type of its tensors.
        dtype: of the weight or its values.
        shape: ``(out, in)`` of the weight where it is known.
        pattern: of the weight where it is known.
        rows: of the input, as in the example; None where it is not known.
        frozen: whether nothing trains the weight.
        in_memory: whether the dense weight is a parameter of the model, so that dense costs no extra memory.
        inference: whether the graph is not differentiated.
    """

    op: str
    device: str
    dtype: torch.dtype
    shape: tuple[int, ...] = ()
    pattern: Pattern | None = None
    rows: int | None = None
    frozen: bool = False
    in_memory: bool = False
    inference: bool = False

    @property
    def work(self) -> Work | None:
        """What it computes, as measurements and estimates are kept by; None where something is not known."""
        if self.pattern is None or self.rows is None or len(self.shape) != 2:
            return None
        return Work(self.op, self.pattern, self.dtype, self.rows, *self.shape)


def candidates(site: Site) -> dict[str, str | None]:
    """The implementations of a site, each with the reason it cannot run, None where it can."""
    kernel = has_kernel(site.op, site.device)
    own = COMPRESSED if site.in_memory else OPERATOR
    found: dict[str, str | None] = {own: None if kernel else f"there is no kernel for {site.device}"}
    if site.in_memory:
        found[DENSE] = None
        if not kernel:
            found[COMPRESSED] = None  # its reference, where it is pinned
    else:
        found[REFERENCE] = None
        if site.op in _EXPANDABLE:
            found[DENSE] = None if site.inference and site.frozen else "its weight is trained or the graph is"
    found[SPARSE_TENSOR_CORES] = no_sparse_tensor_cores(site)
    found[CUSPARSELT] = no_cusparselt(site)
    return found


def choose(site: Site, pin: Pin | str = "auto") -> tuple[str, str]:
    """An implementation and the reason for it."""
    if isinstance(pin, str):
        pin = Pin.parse(pin)
    every = candidates(site)
    note = ""
    if pin.name is not None:
        pinned = _spelled(pin.name, every)
        if every.get(pinned, "it is none of its implementations") is None:
            return pinned, f'pinned by options={{"lower": {{"{site.op}": "{pin.name}"}}}}'
        if pin.name == DENSE and not site.in_memory:
            return REFERENCE, f'pinned by options={{"lower": {{"{site.op}": "dense"}}}}; {every.get(DENSE)}'
        note = f"not {pin.name} as pinned, because {every.get(pinned)}; "
    possible = [name for name, obstacle in every.items() if obstacle is None and name not in pin.excluded]
    if not possible:
        fallback = DENSE if site.in_memory else REFERENCE
        return fallback, f"{note}every other implementation is excluded or impossible"
    work = site.work
    if work is not None and (times := measured.times(work, site.device)):
        ranked = sorted((times[name], name) for name in possible if name in times)
        if len(ranked) > 1 or (ranked and ranked[0][1] == possible[0]):
            return ranked[0][1], note + _measured(ranked, times)
    if work is not None and site.device == "cuda" and (device := cost_model.device()) is not None:
        estimates = {name: cost_model.microseconds(work, name, device) for name in possible if name in _ESTIMATED}
        if estimates:
            best = min(estimates, key=lambda name: estimates[name])
            others = sorted((time, name) for name, time in estimates.items() if name != best)
            beside = f", {others[0][1]} {others[0][0]:.0f} us" if others else ""
            return best, f"{note}estimated from bytes and FLOPs at {estimates[best]:.0f} us{beside}; not measured"
    return _by_rule(site, possible, note)


# Not estimated into use: what must be measured to be trusted, and what takes memory the user did not ask for.
_ESTIMATED = {COMPRESSED, OPERATOR, REFERENCE, DENSE}


def _by_rule(site: Site, possible: list[str], note: str) -> tuple[str, str]:
    if site.device == "cpu" and DENSE in possible:
        if site.in_memory:
            why = "the dense weight is in memory anyway, and on a CPU decompressing every call costs more than it saves"
        else:
            why = "frozen: expanded once, because on a CPU decompressing every call costs more than it saves"
        return DENSE, note + why
    if site.in_memory and not has_kernel(site.op, site.device):
        return DENSE, f"{note}the dense weight is in memory anyway, and there is no kernel for {site.device}"
    for name, why in (
        (COMPRESSED, f"it reads fewer bytes on {site.device}"),
        (OPERATOR, f"the operator's own kernel on {site.device}"),
        (REFERENCE, f"inlined as ATen for the compiler to fuse; there is no kernel for {site.device}"),
    ):
        if name in possible:
            return name, note + why
    return possible[0], f"{note}nothing else is left"


def _measured(ranked: list[tuple[float, str]], times: dict[str, float]) -> str:
    best, name = ranked[0]
    baseline = DENSE if DENSE in times else REFERENCE
    parts = [f"measured {best * 1e3:.0f} us"]
    if baseline in times and name != baseline:
        parts.append(f"{best / times[baseline]:.2f} of {baseline}")
    if len(ranked) > 1:
        parts.append(f"then {ranked[1][1]} at {ranked[1][0] / best:.2f} of it")
    return ", ".join(parts)


def _spelled(name: str, every: dict[str, str | None]) -> str:
    """What a pinned name stands for at a site: an operator that is in the graph is compressed whatever runs it."""
    if name == COMPRESSED and COMPRESSED not in every:
        return OPERATOR if every.get(OPERATOR, "") is None else REFERENCE
    return name


def no_sparse_tensor_cores(site: Site) -> str | None:
    """Why a linear cannot run on sparse tensor cores; None where it can."""
    if not has_kernel(SPARSE_TENSOR_CORES_OP, site.device):
        return f"there are none on {site.device}"
    if site.op == GRAD_INPUT and site.pattern == Pattern(2, 4) and not any(size % 16 for size in site.shape):
        return unsupported_sparse(site.dtype, site.shape[0])
    return _no_two_four(site) or unsupported_sparse(site.dtype, site.shape[1])


def no_cusparselt(site: Site) -> str | None:
    """Why a linear cannot run through cuSPARSELt; None where it can."""
    if site.device != "cuda" or not torch.backends.cusparselt.is_available():
        return f"there is no cuSPARSELt for {site.device}"
    if site.dtype not in (torch.bfloat16, torch.float16) or any(size % 16 for size in site.shape):
        return f"cuSPARSELt takes bfloat16 and float16 weights of multiples of 16, not {site.dtype} {list(site.shape)}"
    return _no_two_four(site) or (None if site.frozen else "its copy of the weight would not follow training")


def _no_two_four(site: Site) -> str | None:
    if site.op != "nm_linear" or site.pattern is None or len(site.shape) != 2:
        return f"they run nm_linear, not {site.op}"
    if not site.inference:
        return "the graph is differentiated"
    return None if site.pattern == Pattern(2, 4) else f"they take 2:4, not {site.pattern}"


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


def site_of(op: str, node: Node) -> Site | None:
    """A call of an operator as a site; None where its result is not known."""
    result = fake_of(node)
    first = next((fake_of(arg) for arg in node.args if isinstance(arg, Node)), None)
    if not isinstance(result, Tensor) or not isinstance(first, Tensor):
        return None
    site = Site(op, result.device.type, result.dtype)
    if not op.startswith("nm_linear"):
        return site
    given, rows, width = arguments_of(node), rows_of(first), int(first.shape[-1])
    if op == "nm_linear_grad_values":
        shape = (width, int(fake_of(node.args[1]).shape[-1]))
    elif op == "nm_linear_grad_input":
        shape = (width, int(result.shape[-1]))
    else:
        shape = (int(result.shape[-1]), width)
    return replace(site, shape=shape, pattern=Pattern(given["n"], given["m"]), rows=rows)


def arguments_of(node: Node) -> dict[str, Any]:
    """The arguments of an operator's call by their names."""
    schema = node.target.default if isinstance(node.target, torch._ops.OpOverloadPacket) else node.target
    names = [argument.name for argument in schema._schema.arguments]  # type: ignore[union-attr]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def rows_of(tensor: Tensor) -> int | None:
    """The rows of a fake tensor ``[..., features]``, as in the example."""
    sizes = [size if isinstance(size, int) else size.node.hint for size in tensor.shape[:-1]]
    return None if any(size is None for size in sizes) else math.prod(sizes)


def is_inference(gm: GraphModule) -> bool:
    """Whether nothing that a graph computes is differentiated or cast on the way."""
    changes = {torch._C._set_grad_enabled, torch.amp.autocast_mode._enter_autocast}
    plain = all(node.target not in changes for node in gm.graph.nodes if node.op == "call_function")
    autocast = any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    return plain and not autocast and not torch.is_grad_enabled()


def fake_of(node: Any) -> Any:
    """The fake value of a node, of Dynamo's graph or of an ATen graph."""
    return node.meta.get("example_value", node.meta.get("val"))


def runs_reference(call: Node, options: BackendOptions) -> bool:
    """Whether :func:`choose` wants the reference of an operator in a lowered graph; a pin of an operator is one of its
    gradients."""
    name = operator_name(call.target)
    site = site_of(name, call) if name is not None else None
    if name is None or site is None:
        return False
    return choose(site, _pin_of(name, options))[0] == REFERENCE


def _pin_of(op: str, options: BackendOptions) -> Pin:
    """What was said of an operator, or else of the one it is a gradient of."""
    own = options.pin(op)
    return own if own != Pin() else options.pin(op.partition("_grad_")[0])


def choose_grad_input(site: Site, doubly_pruned: bool, options: BackendOptions) -> tuple[str, str]:
    """The implementation of the gradient of a linear's input, and why. Sparse tensor cores only where they are pinned:
    they cost memory."""
    site = replace(site, op=GRAD_INPUT, inference=False, frozen=False)
    if doubly_pruned or options.pin(GRAD_INPUT).name != SPARSE_TENSOR_CORES:
        return choose(site, _pin_of(GRAD_INPUT, options))
    other, why = choose(site, Pin(excluded=frozenset({SPARSE_TENSOR_CORES})))
    return (
        other,
        f"not {SPARSE_TENSOR_CORES} as pinned, because only its rows are 2:4 (double-prune does columns); {why}",
    )


def keep_transposes(graph: Graph, options: BackendOptions) -> int:
    """Lets gradients of inputs run on sparse tensor cores where that was asked for.

    Args:
        graph: a backward graph in ATen; it is edited.

    Returns:
        how many do.
    """
    count = 0
    if options.pin(GRAD_INPUT).name == SPARSE_TENSOR_CORES:
        for call in graph.find_nodes(op="call_function", target=torch.ops.fxsparse.nm_linear_grad_input.default):
            site, given = site_of(GRAD_INPUT, call), arguments_of(call)
            doubly_pruned = given.get("column_mask") is not None
            if site is not None and choose_grad_input(site, doubly_pruned, options)[0] == SPARSE_TENSOR_CORES:
                args = tuple(given[name] for name in ("dy", "values", "indices", "column_mask"))
                with graph.inserting_before(call):
                    kept = graph.call_function(torch.ops.fxsparse.nm_linear_grad_input_kept.default, args)
                # Not all of its meta: Inductor notes arguments there.
                kept.meta = {key: call.meta[key] for key in ("val", "stack_trace") if key in call.meta}
                call.replace_all_uses_with(kept)
                graph.erase_node(call)
                count += 1
    return count
