"""Which implementation runs each fxsparse operator, for its shape, dtype and device, and why.

`choose` is the one place that decides, for frozen N:M weights (run them compressed, or leave the dense weight that is
in memory anyway?) and for the fxsparse operators that a graph holds.

    dense                 a dense product; the weight of a compressed frozen one is expanded once and followed
    compressed, operator  the operator's own generated kernel, on the compressed weight
    sparse_tensor_cores   the generated kernel on 2:4 tensor cores
    cusparselt            NVIDIA's library through torch, on its own compressed copy
    reference             plain ATen, inlined for the compiler to fuse

A user's pin goes first. What was measured on the device decides then (`timings`), else an estimate from bytes and FLOPs
where the device is known (`estimates`), else fixed rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from fxsparse.codegen.kernels.sparse_tensor_core_linear import unsupported_sparse
from fxsparse.codegen.launching import unsupported
from fxsparse.graph import arguments
from fxsparse.lowering import estimates, timings
from fxsparse.lowering.pins import Pin, Pins
from fxsparse.lowering.sites import Site, fake_of
from fxsparse.ops.define import has_kernel
from fxsparse.ops.nm import Pattern
from fxsparse.ops.operator import (
    COMPRESSED,
    CUSPARSELT,
    DENSE,
    OPERATOR,
    OPERATORS,
    REFERENCE,
    SPARSE_TENSOR_CORES,
)

SPARSE_TENSOR_CORES_OP = "sparse_tensor_core_linear"
GRAD_INPUT = "nm_linear_grad_input"

LAUNCHING = {OPERATOR, COMPRESSED, SPARSE_TENSOR_CORES}
"""Implementations that may launch generated kernels."""

BASELINES = {DENSE, REFERENCE}
"""What other implementations have to beat; always right."""

# Not estimated into use: what must be measured to be trusted, and what takes memory the user did not ask for.
_ESTIMATED = {COMPRESSED, OPERATOR, REFERENCE, DENSE}


def obstacles(site: Site) -> dict[str, str | None]:
    """The implementations of a site, each with the reason why it cannot run; None if it can."""
    every: dict[str, str | None]
    if site.in_memory:
        every = {COMPRESSED: None, DENSE: None}  # where there is no kernel, its reference can be pinned
    else:
        operator = OPERATORS.get(site.op)
        every = {OPERATOR: no_kernel(site), REFERENCE: None}
        if operator is not None and DENSE in operator.implementations:
            every[DENSE] = None if site.inference and site.frozen else "its weight is trained or the graph is"
    every[SPARSE_TENSOR_CORES] = no_sparse_tensor_cores(site)
    every[CUSPARSELT] = no_cusparselt(site)
    return every


def no_kernel(site: Site) -> str | None:
    """Why a site has no generated kernel; None if it has one."""
    if not has_kernel(site.op, site.device):
        return f"there is no kernel for {site.device}"
    return unsupported(site.dtype, *(() if site.pattern is None else (site.pattern.n, site.pattern.m)))


def choose(site: Site, pin: Pin | str = "auto") -> tuple[str, str]:
    """An implementation and the reason for it."""
    if isinstance(pin, str):
        pin = Pin.parse(pin)
    every = obstacles(site)
    note = ""
    if pin.name is not None:
        pinned = _pinned(site, pin, every)
        if pinned is not None:
            return pinned
        note = f"not {pin.name} as pinned, because {every.get(_spelled(pin.name, every))}; "
    excluded = pin.excluded | ({COMPRESSED} if no_kernel(site) is not None else set())
    possible = [name for name, obstacle in every.items() if obstacle is None and name not in excluded]
    if not possible:
        fallback = DENSE if site.in_memory else REFERENCE
        return fallback, f"{note}every other implementation is excluded or impossible"
    implementation, reason = _by_times(site, possible) or _by_estimates(site, possible) or _by_rules(site, possible)
    return implementation, note + reason


def undecided(site: Site) -> bool:
    """Whether measuring could tell more about a site than is known."""
    possible = {name for name, obstacle in obstacles(site).items() if obstacle is None}
    if site.problem is None or len(possible) < 2 or no_kernel(site) is not None:
        return False
    return not BASELINES.intersection(possible) <= timings.times(site.problem, site.device).keys()


def _pinned(site: Site, pin: Pin, every: Mapping[str, str | None]) -> tuple[str, str] | None:
    """The choice that a pinned name leads to; None if the others decide."""
    assert pin.name is not None
    pinned = _spelled(pin.name, every)
    said = f'pinned by options={{"lower": {{"{pin.of or site.op}": "{pin.name}"}}}}'
    if every.get(pinned, "it is none of its implementations") is None:
        return pinned, said
    if pin.name == DENSE and not site.in_memory:
        return REFERENCE, f"{said}; {every.get(DENSE, 'a gradient has no dense one')}"
    return None


def _spelled(name: str, every: Mapping[str, str | None]) -> str:
    """What a pinned name stands for at a site: an operator that is in the graph is compressed whatever runs it."""
    if name == COMPRESSED and COMPRESSED not in every:
        return OPERATOR if every.get(OPERATOR, "") is None else REFERENCE
    return name


def _by_times(site: Site, possible: list[str]) -> tuple[str, str] | None:
    times = {} if site.problem is None else timings.times(site.problem, site.device)
    ranked = sorted((times[name], name) for name in possible if name in times)
    if not ranked or not BASELINES.intersection(possible) <= times.keys():  # what else is not there has failed
        return None
    best, name = ranked[0]
    baseline = DENSE if DENSE in times else REFERENCE
    parts = [f"measured {best * 1e3:.0f} us"]
    if baseline in times and name != baseline:
        parts.append(f"{best / times[baseline]:.2f} of {baseline}")
    if len(ranked) > 1:
        parts.append(f"then {ranked[1][1]} at {ranked[1][0] / best:.2f} of it")
    return name, ", ".join(parts)


def _by_estimates(site: Site, possible: list[str]) -> tuple[str, str] | None:
    device = estimates.device() if site.problem is not None and site.device == "cuda" else None
    if site.problem is None or device is None:
        return None
    every = [(estimates.microseconds(site.problem, name, device), name) for name in possible if name in _ESTIMATED]
    ranked = sorted((time, name) for time, name in every if time is not None)
    if not ranked:
        return None
    shown = ", ".join(f"{name} {time:.0f} us" for time, name in ranked[:2])
    return ranked[0][1], f"estimated from bytes and FLOPs: {shown}; not measured"


def _by_rules(site: Site, possible: list[str]) -> tuple[str, str]:
    if site.device == "cpu" and DENSE in possible:
        if site.in_memory:
            why = "the dense weight is in memory anyway, and on a CPU decompressing every call costs more than it saves"
        else:
            why = "frozen: expanded once, because on a CPU decompressing every call costs more than it saves"
        return DENSE, why
    missing = no_kernel(site)
    if site.in_memory and missing is not None:
        return DENSE, f"the dense weight is in memory anyway, and {missing}"
    for name, why in (
        (COMPRESSED, f"it reads fewer bytes on {site.device}"),
        (OPERATOR, f"the operator's own kernel on {site.device}"),
        (REFERENCE, f"inlined as ATen for the compiler to fuse; {missing}"),
    ):
        if name in possible:
            return name, why
    return possible[0], "nothing else is left"


# --- the libraries and units that take some products only -------------------------------------------------------------


def no_sparse_tensor_cores(site: Site) -> str | None:
    """Why a linear cannot run on sparse tensor cores; None if it can."""
    if not has_kernel(SPARSE_TENSOR_CORES_OP, site.device):
        return f"there are none on {site.device}"
    if site.op == GRAD_INPUT and site.pattern == Pattern(2, 4) and not any(size % 16 for size in site.shape):
        return unsupported_sparse(site.dtype, site.shape[0])
    return _no_two_four(site) or unsupported_sparse(site.dtype, site.shape[1])


def no_cusparselt(site: Site) -> str | None:
    """Why a linear cannot run through cuSPARSELt; None if it can."""
    if site.device != "cuda" or not torch.backends.cusparselt.is_available():
        return f"there is no cuSPARSELt for {site.device}"
    if site.dtype not in (torch.bfloat16, torch.float16) or any(size % 16 for size in site.shape):
        return f"cuSPARSELt takes bfloat16 and float16 weights of multiples of 16, not {site.dtype} {list(site.shape)}"
    return _no_two_four(site) or (None if site.frozen else "its copy of the weight would not follow training")


def library_algorithm(site: Site) -> tuple[int, ...]:
    """How cuSPARSELt was fastest: its algorithm, into how many parts it splits the depth and how, as
    ``torch._cslt_sparse_mm`` takes them; empty, for its own choice, if it was not measured."""
    fastest = timings.variant(site.problem, site.device, CUSPARSELT) if site.problem else None
    return tuple(map(int, fastest.split("/"))) if fastest else ()


def _no_two_four(site: Site) -> str | None:
    if site.op != "nm_linear" or site.pattern is None or len(site.shape) != 2:
        return f"they run nm_linear, not {site.op}"
    if not site.inference:
        return "the graph is differentiated"
    return None if site.pattern == Pattern(2, 4) else f"they take 2:4, not {site.pattern}"


# --- gradients --------------------------------------------------------------------------------------------------------


def gradients(site: Site) -> list[Site]:
    """The gradients of an operator's first two arguments, as sites, where there are several implementations of them."""
    operator = OPERATORS.get(site.op)
    names = operator.gradients if operator is not None else ()
    extra = site.extra if site.pattern is None else ()
    return [
        replace(site, op=name, frozen=False, inference=False, extra=extra)
        for name in names
        if OPERATORS[name].sizes is not None
    ]


def gradients_of(site: Site, call: Node) -> list[Site]:
    """Those of the gradients that the backward pass of an operator's call takes."""
    return [
        gradient
        for gradient, arg in zip(gradients(site), arguments(call).values(), strict=False)
        if isinstance(arg, Node) and isinstance(tensor := fake_of(arg), Tensor) and tensor.requires_grad
    ]


def choose_gradient(site: Site, doubly_pruned: bool, pins: Pins) -> tuple[str, str]:
    """The implementation of a gradient, and why. The one of a linear's input runs on sparse tensor cores only where
    they are pinned: they cost memory."""
    pin = pins.of_gradient(site.op)
    if pin.name == SPARSE_TENSOR_CORES and not doubly_pruned:
        other, why = choose(site, Pin(excluded=frozenset({SPARSE_TENSOR_CORES})))
        reason = "only its rows are 2:4 (double-prune does columns)"
        return other, f"not {SPARSE_TENSOR_CORES} as pinned, because {reason}; {why}"
    return choose(site, pin)
