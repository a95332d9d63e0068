"""Which implementation runs each fxsparse operator, for its shape, dtype and device, and why.

`choose` is the one place that decides. It is asked for frozen N:M weights that the backend found (run them compressed,
or leave the dense weight that is in memory anyway?) and for fxsparse operators a graph already holds.

    dense                 a dense product; the weight of a compressed frozen one is expanded once and followed
    compressed, operator  the operator's own generated kernel, on the compressed weight
    sparse_tensor_cores   the generated kernel on 2:4 tensor cores
    cusparselt            NVIDIA's library through torch, on its own compressed copy
    reference             plain ATen, inlined for the compiler to fuse

What was measured on the device decides (`timings`), else an estimate from bytes and FLOPs where the device is
known (`estimates`), else fixed rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fxsparse.backend.options import BackendOptions
from fxsparse.codegen import kept_transpose as _kept  # noqa: F401  registers nm_linear_grad_input_kept
from fxsparse.codegen.kernels.sparse_tensor_core_linear import unsupported_sparse
from fxsparse.lowering import estimates, timings
from fxsparse.lowering.pins import Pin
from fxsparse.lowering.sites import Site, arguments_of, fake_of, operator_name, site_of
from fxsparse.ops.define import has_kernel
from fxsparse.ops.nm import Pattern

DENSE, COMPRESSED, OPERATOR, REFERENCE = "dense", "compressed", "operator", "reference"
SPARSE_TENSOR_CORES, CUSPARSELT = "sparse_tensor_cores", "cusparselt"
SPARSE_TENSOR_CORES_OP = "sparse_tensor_core_linear"
GRAD_INPUT = "nm_linear_grad_input"
GRADIENTS = {
    "nm_linear": (GRAD_INPUT, "nm_linear_grad_values"),
    "nm_linear_low_rank": (GRAD_INPUT, "nm_linear_grad_values"),
    "gather_linear": ("gather_linear_grad_input", "gather_linear_grad_weight"),
}
"""The operators that give the gradients of another one's first two arguments."""

LAUNCHING = {OPERATOR, COMPRESSED, SPARSE_TENSOR_CORES}
"""Implementations that may launch generated kernels."""

_EXPANDABLE = {"nm_linear", "nm_linear_low_rank"}


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
        said = f'pinned by options={{"lower": {{"{pin.of or site.op}": "{pin.name}"}}}}'
        if every.get(pinned, "it is none of its implementations") is None:
            return pinned, said
        if pin.name == DENSE and not site.in_memory:
            return REFERENCE, f"{said}; {every.get(DENSE, 'a gradient has no dense one')}"
        note = f"not {pin.name} as pinned, because {every.get(pinned)}; "
    possible = [name for name, obstacle in every.items() if obstacle is None and name not in pin.excluded]
    if not possible:
        fallback = DENSE if site.in_memory else REFERENCE
        return fallback, f"{note}every other implementation is excluded or impossible"
    work = site.work
    times = {} if work is None else timings.times(work, site.device)
    ranked = sorted((times[name], name) for name in possible if name in times)
    if ranked and _ALWAYS_RIGHT.intersection(possible) <= times.keys():  # what else is not there has failed
        return ranked[0][1], note + _measured(ranked, times)
    if work is not None and site.device == "cuda" and (device := estimates.device()) is not None:
        every_estimate = [(estimates.microseconds(work, name, device), name) for name in possible]
        ranked_estimates = sorted(
            (time, name) for time, name in every_estimate if time is not None and name in _ESTIMATED
        )
        if ranked_estimates:
            shown = ", ".join(f"{name} {time:.0f} us" for time, name in ranked_estimates[:2])
            return ranked_estimates[0][1], f"{note}estimated from bytes and FLOPs: {shown}; not measured"
    return _by_rule(site, possible, note)


def undecided(site: Site) -> bool:
    """Whether measuring could tell more about a site than is known."""
    possible = {name for name, obstacle in candidates(site).items() if obstacle is None}
    if site.work is None or len(possible) < 2 or not has_kernel(site.op, site.device):
        return False
    return not _ALWAYS_RIGHT.intersection(possible) <= timings.times(site.work, site.device).keys()


# What other implementations have to beat.
_ALWAYS_RIGHT = {DENSE, REFERENCE}

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


def library_algorithm(site: Site) -> tuple[int, ...]:
    """How cuSPARSELt was fastest: its algorithm, into how many parts it splits the depth and how, as
    ``torch._cslt_sparse_mm`` takes them; empty, for its own choice, where it was not measured."""
    found = timings.variant(site.work, site.device, CUSPARSELT) if site.work else None
    return tuple(map(int, found.split("/"))) if found else ()


def _no_two_four(site: Site) -> str | None:
    if site.op != "nm_linear" or site.pattern is None or len(site.shape) != 2:
        return f"they run nm_linear, not {site.op}"
    if not site.inference:
        return "the graph is differentiated"
    return None if site.pattern == Pattern(2, 4) else f"they take 2:4, not {site.pattern}"


def runs_reference(call: Node, options: BackendOptions, decided: Mapping[str, str]) -> bool:
    """Whether the reference of an operator in a lowered graph was chosen, by fixed rules where nothing was decided."""
    name = operator_name(call.target)
    site = site_of(name, call) if name is not None else None
    if name is None or site is None:
        return False
    known = None if site.work is None else decided.get(timings.key(site.work))
    return (known or _without_times(site, options)) == REFERENCE


def deviates(site: Site, implementation: str, options: BackendOptions) -> bool:
    """Whether an operator that stays in the graph runs otherwise than fixed rules say, which
    :func:`runs_reference` then has to be told."""
    return (implementation == REFERENCE) != (_without_times(site, options) == REFERENCE)


def _without_times(site: Site, options: BackendOptions) -> str:
    return choose(replace(site, rows=None), pin_of(site.op, options))[0]


def pin_of(op: str, options: BackendOptions) -> Pin:
    """What was said of an operator, or else of the one it is a gradient of, as far as that holds for gradients."""
    own, forward = options.pin(op), options.pin(op.partition("_grad_")[0])
    if own != Pin():
        return own
    return Pin() if forward.name in (SPARSE_TENSOR_CORES, CUSPARSELT) else forward


def gradients(site: Site) -> list[Site]:
    """The gradients of an operator's first two arguments, as sites."""
    further = site.further if site.pattern is None else ()
    return [
        replace(site, op=name, frozen=False, inference=False, further=further) for name in GRADIENTS.get(site.op, ())
    ]


def gradients_of(site: Site, call: Node) -> list[Site]:
    """Those of the gradients that the backward pass of an operator's call takes."""
    return [
        gradient
        for gradient, arg in zip(gradients(site), call.args, strict=False)
        if isinstance(tensor := fake_of(arg), Tensor) and tensor.requires_grad
    ]


def choose_gradient(site: Site, doubly_pruned: bool, options: BackendOptions) -> tuple[str, str]:
    """The implementation of a gradient, and why. The one of a linear's input runs on sparse tensor cores only where
    they are pinned: they cost memory."""
    pin = pin_of(site.op, options)
    if pin.name == SPARSE_TENSOR_CORES and not doubly_pruned:
        other, why = choose(site, Pin(excluded=frozenset({SPARSE_TENSOR_CORES})))
        reason = "only its rows are 2:4 (double-prune does columns)"
        return other, f"not {SPARSE_TENSOR_CORES} as pinned, because {reason}; {why}"
    return choose(site, pin)


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
            if site is not None and choose_gradient(site, doubly_pruned, options)[0] == SPARSE_TENSOR_CORES:
                args = tuple(given[name] for name in ("dy", "values", "indices", "column_mask"))
                with graph.inserting_before(call):
                    kept = graph.call_function(torch.ops.fxsparse.nm_linear_grad_input_kept.default, args)
                # Not all of its meta: Inductor notes arguments there.
                kept.meta = {key: call.meta[key] for key in ("val", "stack_trace") if key in call.meta}
                call.replace_all_uses_with(kept)
                graph.erase_node(call)
                count += 1
    return count
