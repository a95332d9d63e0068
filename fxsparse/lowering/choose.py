"""Which implementation runs each fxsparse operator, for its shape, dtype and device, and why.

`choose` is the one place that decides, for frozen N:M weights (run them compressed, or leave the dense weight that is
in memory anyway?) and for the fxsparse operators that a graph holds.

    dense                 a dense product; the weight of a compressed frozen one is expanded once and followed
    compressed, operator  the operator's own generated kernel, on the compressed weight
    sparse_tensor_cores   the generated kernel on 2:4 tensor cores; a gradient of an input on the transpose of W^{R,C}
    sparse_wgmma          the generated kernel on Hopper's, the same
    cusparselt            NVIDIA's library through torch, on its own compressed copy
    reference             plain ATen, inlined for the compiler to fuse

A user's pin goes first. What was measured on the device decides then (`timings`), else an estimate where the device is
known (`estimates`), else fixed rules. On a CPU the generated kernel is C++ (`fxsparse.codegen.cpu`): fixed rules never
take it, and choosing it builds it, so that another choice is made where that fails.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from fxsparse.codegen.cpu import operators as cpu
from fxsparse.codegen.cpu.spec import Tile
from fxsparse.codegen.kernels.sparse_tensor_core_linear import unsupported_sparse
from fxsparse.codegen.kernels.sparse_wgmma_linear import CAPABILITY
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
    SPARSE_WGMMA,
)

SPARSE_TENSOR_CORES_OP, SPARSE_WGMMA_OP = "sparse_tensor_core_linear", "sparse_wgmma_linear"
GRAD_INPUT = "nm_linear_grad_input"
LINEARS = "nm_linear", "nm_linear_low_rank"

LAUNCHING = {OPERATOR, COMPRESSED, SPARSE_TENSOR_CORES, SPARSE_WGMMA}
"""Implementations that may launch generated kernels."""

BASELINES = {DENSE, REFERENCE}
"""What other implementations have to beat; always right."""

MARGIN = 1.03
"""What a C++ kernel has to be faster by than a dense product, to be taken: times on a CPU are noisy."""

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
    every[SPARSE_WGMMA] = no_sparse_wgmma(site)
    every[CUSPARSELT] = no_cusparselt(site)
    return every


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
    if is_cpp(site) and implementation in (COMPRESSED, OPERATOR) and _build(site) is not None:
        return choose(site, pin)
    return implementation, note + reason


def is_cpp(site: Site) -> bool:
    """Whether the kernel of a site, if there is one, is C++."""
    return site.device == "cpu" and not has_kernel(site.op, site.device)


def no_kernel(site: Site) -> str | None:
    """Why a site has no generated kernel; None if it has one, which on a CPU may have to be built."""
    if not is_cpp(site):
        if not has_kernel(site.op, site.device):
            return f"there is no kernel for {site.device}"
        return unsupported(site.dtype, *(() if site.pattern is None else (site.pattern.n, site.pattern.m)))
    return cpu.obstacle(site.op, site.dtype, _pattern(site), site.shape)


def baselines(site: Site, possible: Collection[str]) -> set[str]:
    """The implementations whose times others are compared with. On a CPU a dense product stands for the reference too
    where the weight may stay dense, because a reference is that and more."""
    names = BASELINES.intersection(possible)
    return {DENSE} if DENSE in names and is_cpp(site) and no_kernel(site) is None else names


def cpp_kernel(site: Site, implementation: str, steps: Sequence[str] = ()) -> int | None:
    """The number of the C++ kernel that runs a site; None if it runs something else."""
    pattern = _pattern(site)
    if pattern is None or implementation not in (COMPRESSED, OPERATOR) or not is_cpp(site):
        return None
    if no_kernel(site) is not None or cpu.prepare(site.op, site.dtype, pattern, steps) is not None:
        return None
    tile = None if site.problem is None else timings.variant(site.problem, site.device, OPERATOR)
    return cpu.kernel_of(site.op, site.dtype, pattern, Tile.parse(tile) if tile else None, steps)


def _pattern(site: Site) -> tuple[int, int] | None:
    return None if site.pattern is None else (site.pattern.n, site.pattern.m)


def _build(site: Site) -> str | None:
    """Builds the C++ kernel of a site; says why there is none."""
    pattern = _pattern(site)
    return None if pattern is None else cpu.prepare(site.op, site.dtype, pattern)


def undecided(site: Site) -> bool:
    """Whether measuring could tell more about a site than is known."""
    possible = {name for name, obstacle in obstacles(site).items() if obstacle is None}
    if site.problem is None or len(possible) < 2 or no_kernel(site) is not None:
        return False
    return not baselines(site, possible) <= timings.times(site.problem, site.device).keys()


def _pinned(site: Site, pin: Pin, every: Mapping[str, str | None]) -> tuple[str, str] | None:
    """The choice that a pinned name leads to; None if the others decide."""
    assert pin.name is not None
    pinned = _spelled(pin.name, every)
    said = f'pinned by options={{"lower": {{"{pin.of or site.op}": "{pin.name}"}}}}'
    if every.get(pinned, "it is none of its implementations") is None:
        if is_cpp(site) and pinned in (COMPRESSED, OPERATOR):
            missing = no_kernel(site) or _build(site)
            if missing is not None and pinned == OPERATOR:
                return REFERENCE, f"{said}; but {missing}"
            said += "" if missing is None else f"; its reference, for {missing}"
        return pinned, said
    if pin.name == REFERENCE and site.in_memory:
        return DENSE, f"{said}; the dense weight is in memory anyway"
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
    if not baselines(site, possible) <= times.keys():  # what else is not there has failed
        return None
    margin = 1.0
    if is_cpp(site):
        margin = MARGIN
    ranked = sorted((times[name] * (1.0 if name in BASELINES else margin), name) for name in possible if name in times)
    if not ranked:
        return None
    name = ranked[0][1]
    ranked = [(times[other], other) for _, other in ranked]
    best = times[name]
    baseline = DENSE if DENSE in times else REFERENCE
    parts = [f"measured {best * 1e3:.0f} us"]
    if baseline in times and name != baseline:
        parts.append(f"{best / times[baseline]:.2f} of {baseline}")
    if len(ranked) > 1:
        parts.append(f"then {ranked[1][1]} at {ranked[1][0] / best:.2f} of it")
    if is_cpp(site) and times.keys() & LAUNCHING and (missing := no_kernel(site)) is not None:
        parts.append(missing)
    return name, ", ".join(parts)


def _by_estimates(site: Site, possible: list[str]) -> tuple[str, str] | None:
    if is_cpp(site):
        return _by_other_cpus(site, possible)
    device = estimates.device() if site.problem is not None and site.device == "cuda" else None
    if site.problem is None or device is None:
        return None
    every = [(estimates.microseconds(site.problem, name, device), name) for name in possible if name in _ESTIMATED]
    ranked = sorted((time, name) for time, name in every if time is not None)
    if not ranked:
        return None
    shown = f"estimated from bytes and FLOPs: {', '.join(f'{name} {time:.0f} us' for time, name in ranked[:2])}"
    safe, programs = [pair for pair in ranked if pair[1] in BASELINES], estimates.programs(site.problem, device)
    if safe and ranked[0][1] not in BASELINES:
        if programs is not None and programs < device.multiprocessors:
            few = f"but its {programs} programs leave some of {device.multiprocessors} multiprocessors idle"
            return safe[0][1], f"{shown}, {few}; not measured"
        if ranked[0][0] * estimates.GAIN > safe[0][0]:
            return safe[0][1], f"{shown}, too little to gain; not measured"
    return ranked[0][1], f"{shown}; not measured"


def _by_other_cpus(site: Site, possible: list[str]) -> tuple[str, str] | None:
    name = next((name for name in (COMPRESSED, OPERATOR) if name in possible), None)
    ratio = None if site.problem is None or name is None else estimates.ratio_on_cpu(site.problem)
    if ratio is None or name is None:
        return None
    return name, f"dense took {ratio:g} times as long, or more, where this was measured; not measured here"


def _by_rules(site: Site, possible: list[str]) -> tuple[str, str]:
    if is_cpp(site) or (site.device == "cpu" and DENSE in possible):
        why = no_kernel(site) or "no times of its kernel are known here"
        if DENSE not in possible:
            return REFERENCE, f"inlined as ATen for the compiler to fuse; {why}"
        return DENSE, f"the dense weight is in memory anyway; {why}" if site.in_memory else f"expanded once; {why}"
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
    return _no_two_four(site) or unsupported_sparse(site.dtype, _depth(site))


def no_sparse_wgmma(site: Site) -> str | None:
    """Why a linear cannot run on Hopper's sparse tensor cores; None if it can."""
    if not has_kernel(SPARSE_WGMMA_OP, site.device):
        return f"there are none on {site.device}"
    if site.device == "cuda" and (not torch.cuda.is_available() or torch.cuda.get_device_capability() != CAPABILITY):
        return "the device has no wgmma, which takes compute capability {}.{}".format(*CAPABILITY)
    return _no_two_four(site) or unsupported_sparse(site.dtype, _depth(site))


def _depth(site: Site) -> int:
    """Of the product: the gradient of an input sums over the rows of the weight."""
    return site.shape[0] if site.op == GRAD_INPUT else site.shape[1]


def no_cusparselt(site: Site) -> str | None:
    """Why a linear cannot run through cuSPARSELt; None if it can."""
    if site.device != "cuda" or not torch.backends.cusparselt.is_available():
        return f"there is no cuSPARSELt for {site.device}"
    if site.dtype not in (torch.bfloat16, torch.float16) or any(size % 16 for size in site.shape):
        return f"cuSPARSELt takes bfloat16 and float16 weights of multiples of 16, not {site.dtype} {list(site.shape)}"
    if site.op != "nm_linear":
        return f"it runs nm_linear, not {site.op}"
    if not site.inference:
        return "the graph is differentiated"
    return _no_two_four(site) or (None if site.frozen else "its copy of the weight would not follow training")


def library_algorithm(site: Site) -> tuple[int, ...]:
    """How cuSPARSELt was fastest: its algorithm, into how many parts it splits the depth and how, as
    ``torch._cslt_sparse_mm`` takes them; empty, for its own choice, if it was not measured."""
    fastest = timings.variant(site.problem, site.device, CUSPARSELT) if site.problem else None
    return tuple(map(int, fastest.split("/"))) if fastest else ()


def _no_two_four(site: Site) -> str | None:
    if site.op not in (*LINEARS, GRAD_INPUT) or site.pattern is None or len(site.shape) != 2:
        return f"they run nm_linear, not {site.op}"
    if site.in_memory and not site.inference:
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


def choose_gradient(site: Site, doubly_pruned: bool, pins: Pins, columns: str | None = None) -> tuple[str, str]:
    """The implementation of a gradient, and why.

    Args:
        site: of the gradient.
        doubly_pruned: whether the operator has a column mask.
        pins: what the user said.
        columns: why the transpose of the weight is not 2:4 although it has; None if it is.
    """
    pin, cores = pins.of_gradient(site.op), frozenset({SPARSE_TENSOR_CORES, SPARSE_WGMMA})
    if is_cpp(site) and site.op == GRAD_INPUT and not doubly_pruned and pin.name not in {OPERATOR, *cores}:
        other, why = choose(site, replace(pin, excluded=pin.excluded | {OPERATOR}))
        return other, f"{why}; its kernel pays where columns are pruned too (double-prune)"
    reason = columns if doubly_pruned else "only its rows are 2:4 (double-prune does columns)"
    if site.op != GRAD_INPUT or reason is None:
        return choose(site, pin)
    excluded = pin.excluded | cores
    if pin.name not in cores:
        return choose(site, replace(pin, excluded=excluded))
    other, why = choose(site, Pin(excluded=excluded))
    return other, f"not {pin.name} as pinned, because {reason}; {why}"


def runs_below_autograd(site: Site, implementation: str) -> bool:
    """Whether a product on sparse tensor cores takes its operator's place in the graphs of a training step, below the
    gradients that the operator defines; in inference it does so in Dynamo's graph."""
    return implementation in (SPARSE_TENSOR_CORES, SPARSE_WGMMA) and not site.inference
