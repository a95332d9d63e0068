"""Linears on a dense weight with a mask, run as ones on a compressed weight: the mask says where, the weight follows.

    masked_linear(x, W, mask, column_mask, b)  ->  nm_linear(x, nm_values(W, indices), indices, packed column mask, b)

Indices and packed column mask come in as extra inputs that follow the masks at run time, so they change only when those
do; kept values are taken from the weight on every call, and their gradient is spread over the dense weight's. That
moves about as many bytes as masking the weight and its gradient does. A mask that is no longer N:M runs the graph as it
was. SR-STE's straight-through gradient is that of the dense weight, and so are masks that the graph itself computes:
both stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxsparse.graph import arguments
from fxsparse.lowering import estimates, timings
from fxsparse.lowering.choose import gradients_of, is_cpp, no_kernel
from fxsparse.lowering.frozen import PATTERNS
from fxsparse.lowering.sites import Site, fake_of, rows_of
from fxsparse.lowering.weights import keeps_exactly
from fxsparse.ops.nm import Pattern
from fxsparse.ops.operator import DENSE, OPERATOR

COMPRESSED_FORM = {"masked_linear": "nm_linear", "masked_linear_low_rank": "nm_linear_low_rank"}
"""What a masked operator runs as."""

MARGIN = 0.9
"""Share of the dense products' time that the kernels may take: values are gathered and gradients spread beside them."""


@dataclass(frozen=True)
class Masks:
    """The masks of a linear among the graph's inputs, and the pattern they have.

    Attributes:
        positions: of the mask, and of the column mask if there is one.
        pattern: n:m of the mask.
    """

    positions: tuple[int, ...]
    pattern: Pattern


def masks_of(call: Node, positions: dict[Any, int], example_inputs: Sequence[Any]) -> Masks | None:
    """The masks of a call that could run compressed on a CPU; None if it cannot.

    Args:
        call: of a masked operator.
        positions: of the graph's own inputs.
        example_inputs: the real ones.
    """
    named = arguments(call)
    places = [positions.get(named[name]) for name in ("mask", "column_mask") if named[name] is not None]
    known = tuple(place for place in places if place is not None)
    if len(known) < len(places) or named.get("straight_through") or fake_of(call).device.type != "cpu":
        return None
    pattern = _pattern_of(example_inputs[known[0]])
    return None if pattern is None else Masks(known, pattern)


def compressed_site(call: Node, masks: Masks, inference: bool) -> Site:
    """The product on a compressed weight that a masked one runs as."""
    named, result = arguments(call), fake_of(call)
    extra = (int(fake_of(named["down"]).shape[0]),) if "down" in named else ()
    op = "nm_linear_low_rank" if extra else "nm_linear"
    shape = tuple(map(int, fake_of(named["weight"]).shape))
    rows = rows_of(fake_of(named["x"]))
    return Site(op, "cpu", result.dtype, shape, masks.pattern, rows, inference=inference, extra=extra)


def products(call: Node, site: Site) -> list[Site]:
    """The products that a masked call stands for: its own, and the gradients that are taken."""
    named = arguments(call)
    taken = [] if site.inference else gradients_of(site, call)
    doubly_pruned = named["column_mask"] is not None
    return [site, *(each for each in taken if each.op != "nm_linear_grad_input" or doubly_pruned)]


def pays(every: Sequence[Site]) -> tuple[bool, str]:
    """Whether kernels are faster than dense products, all of a call's together, and why it is thought so."""
    for site in every:
        if (missing := no_kernel(site)) is not None or not is_cpp(site):
            return False, missing or "its kernels are not C++"
    times = [timings.times(site.problem, site.device) for site in every if site.problem is not None]
    if len(times) == len(every) and all({DENSE, OPERATOR} <= each.keys() for each in times):
        ours, dense = (sum(each[name] for each in times) for name in (OPERATOR, DENSE))
        why = f"measured {ours * 1e3:.0f} us on the packed weight, {dense * 1e3:.0f} us on the masked one"
        return ours < MARGIN * dense, why
    ratios = [estimates.ratio_on_cpu(site.problem) if site.problem is not None else None for site in every]
    if all(ratio is not None for ratio in ratios) and (every[0].rows or 0) >= 256:
        return True, "packing it on every call paid where this was measured; not measured here"
    return False, "its kernels were not measured here"


def _pattern_of(mask: Tensor) -> Pattern | None:
    if mask.dim() != 2 or mask.dtype != torch.bool or mask.is_meta or mask.is_inference():
        return None
    return next((pattern for pattern in PATTERNS if keeps_exactly(mask, pattern)), None)
