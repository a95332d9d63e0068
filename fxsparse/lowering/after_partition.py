"""Choices in the ATen graphs of the forward and the backward pass, after AOTAutograd parted them.

Choices are made on Dynamo's graph. Here the same operators are met again, and the gradients for the first time; they
run as fixed rules say, except where an override tells of another choice.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node

from fxsparse.codegen.cpu.operators import KINDS, direct
from fxsparse.codegen.fused_ops import INSTRUCTIONS, sparse_transpose
from fxsparse.codegen.metadata import PACK
from fxsparse.graph import arguments
from fxsparse.graph.aten import insert_aten
from fxsparse.lowering import timings
from fxsparse.lowering.choose import GRAD_INPUT, LINEARS, choose
from fxsparse.lowering.fusion import ON_SPARSE_TENSOR_CORES, arguments_on_cores
from fxsparse.lowering.pins import Pins
from fxsparse.lowering.sites import Site, site_of
from fxsparse.ops.nm_values import nm_spread, nm_values
from fxsparse.ops.operator import OPERATOR, REFERENCE, operator_name


def runs_reference(call: Node, pins: Pins, overrides: Mapping[str, str]) -> bool:
    """Whether the reference of an operator in a lowered graph was chosen; fixed rules say it without an override."""
    name = operator_name(call.target)
    site = site_of(name, call) if name is not None else None
    if name is None or site is None:
        return False
    known = None if site.problem is None else overrides.get(timings.key(site.problem))
    return (known or _without_times(site, pins)) == REFERENCE


def kernel_number(override: str | None) -> int | None:
    """The C++ kernel that an override names; None if it says something else."""
    name, _, number = (override or "").partition(":")
    return int(number) if name == OPERATOR and number else None


def call_kernels(graph: Graph, overrides: Mapping[str, str]) -> int:
    """Lets operators on a CPU call their C++ kernels, where those were chosen, without the way through Python.

    Args:
        graph: a forward or backward graph in ATen; it is edited.
        overrides: with the kernels' numbers.

    Returns:
        how many do.
    """
    count = _call_conversions(graph) if any(map(kernel_number, overrides.values())) else 0
    for call in [node for node in graph.nodes if node.op == "call_function"]:
        name = operator_name(call.target)
        site = site_of(name, call) if name in KINDS else None
        problem = None if site is None else site.problem
        number = None if problem is None else kernel_number(overrides.get(timings.key(problem)))
        named = {} if number is None else arguments(call)
        if name is None or number is None or (name == GRAD_INPUT and named["column_mask"] is None):
            continue
        target, args = direct(name, named, number)
        with graph.inserting_before(call):
            _stand_in(graph, call, graph.call_function(target, args))
        count += 1
    return count


def _call_conversions(graph: Graph) -> int:
    """Lets values that follow a dense weight be taken and spread in C++, beside the kernels that read them."""
    count = 0
    for name, conversion in (("values", nm_values), ("spread", nm_spread)):
        for call in graph.find_nodes(op="call_function", target=conversion.overload):
            value = call.meta["val"]
            if value.device.type == "cpu" and value.element_size() in (2, 4):
                with graph.inserting_before(call):
                    target = getattr(torch.ops.fxsparse_cpu, name).default
                    _stand_in(graph, call, graph.call_function(target, tuple(arguments(call).values())))
                count += 1
    return count


def _stand_in(graph: Graph, call: Node, new: Node) -> None:
    # Not all of its meta: Inductor notes arguments there.
    new.meta = {key: call.meta[key] for key in ("val", "stack_trace") if key in call.meta}
    call.replace_all_uses_with(new)
    graph.erase_node(call)


def deviates(site: Site, implementation: str, pins: Pins) -> bool:
    """Whether an operator that stays in the graph runs otherwise than fixed rules say, which
    :func:`runs_reference` then has to be told."""
    return (implementation == REFERENCE) != (_without_times(site, pins) == REFERENCE)


def _without_times(site: Site, pins: Pins) -> str:
    return choose(replace(site, rows=None), pins.of_gradient(site.op))[0]


def use_sparse_tensor_cores(graph: Graph, overrides: Mapping[str, str]) -> int:
    """Lets products of a training step run on sparse tensor cores, where that was chosen. Nothing of the form that they
    read is kept: the metadata of a weight, and the transpose of W^{R,C} for the gradient of an input, are made anew.

    Args:
        graph: a forward or backward graph in ATen; it is edited.
        overrides: with what was chosen.

    Returns:
        how many do.
    """
    count = 0
    for call in [node for node in graph.nodes if node.op == "call_function"]:
        name = operator_name(call.target)
        site = site_of(name, call) if name in (*LINEARS, GRAD_INPUT) else None
        if name is None or site is None or site.problem is None:
            continue
        chosen, named = overrides.get(timings.key(site.problem), ""), arguments(call)
        target = ON_SPARSE_TENSOR_CORES.get((chosen, "down" in named))
        if target is None or (name == GRAD_INPUT and named["column_mask"] is None):
            continue
        instruction = INSTRUCTIONS[operator_name(target) or ""]
        if name == GRAD_INPUT:
            values, metadata = _transposed(graph, call, named, instruction)
            named = {"x": named["dy"], "bias": None}
        else:
            values, metadata = named["values"], insert_aten(graph, PACK[instruction], [named["indices"]], before=call)
        with graph.inserting_before(call):
            _stand_in(graph, call, graph.call_function(target, arguments_on_cores(named, values, metadata)))
        count += 1
    return count


def _transposed(graph: Graph, call: Node, named: Mapping[str, Any], instruction: str) -> tuple[Node, Node]:
    """Values and metadata of the transpose of W^{R,C}."""
    args = (named["values"], named["indices"], named["column_mask"], instruction)
    fakes = [arg.meta["val"] if isinstance(arg, Node) else arg for arg in args]
    with graph.inserting_before(call):
        both = graph.call_function(sparse_transpose._opoverload, args)
        both.meta["val"] = sparse_transpose._opoverload(*fakes)
        parts = tuple(graph.call_function(operator.getitem, (both, number)) for number in (0, 1))
    for part, value in zip(parts, both.meta["val"], strict=True):
        part.meta["val"] = value
    return parts[0], parts[1]
