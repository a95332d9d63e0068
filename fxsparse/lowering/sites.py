"""The fxsparse operators in a graph, and what each computes: its size, dtype and device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse.graph import arguments
from fxsparse.ops.nm import Pattern
from fxsparse.ops.operator import OPERATORS, Dimension, Problem, operator_name


@dataclass(frozen=True)
class Site:
    """An operator to choose an implementation for.

    Attributes:
        op: the operator's name, such as ``nm_linear``.
        device: device type of its tensors.
        dtype: of the weight or its values.
        shape: ``(out, in)`` of the weight where it is known.
        pattern: of the weight where it is known.
        rows: of the input, as in the example; None if it is not known.
        frozen: whether nothing trains the weight.
        in_memory: whether the dense weight is a parameter of the model, so that dense costs no extra memory.
        inference: whether the graph is not differentiated.
        extra: sizes that only this operator has, as in `Problem`.
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
    extra: tuple[int, ...] = ()

    @property
    def problem(self) -> Problem | None:
        """Its size, as measurements and estimates are kept by; None if a part of it is not known."""
        operator = OPERATORS.get(self.op)
        if operator is None or self.rows is None or len(self.shape) != 2 or (self.pattern is None and operator.is_nm):
            return None
        return Problem(self.op, self.pattern, self.dtype, self.rows, *self.shape, self.extra)


def operators(gm: GraphModule) -> Iterator[tuple[str, Node]]:
    """Names and calls of the fxsparse operators in a graph and in the graphs it calls, such as checkpointed regions."""
    for module in gm.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                name = operator_name(node.target) if node.op == "call_function" else None
                if name:
                    yield name, node


def site_of(op: str, node: Node) -> Site | None:
    """A call of an operator as a site; None if its result is not known."""
    result, operator = fake_of(node), OPERATORS.get(op)
    if not isinstance(result, Tensor):
        return None
    site = Site(op, result.device.type, result.dtype)
    if operator is None or operator.sizes is None:
        return site
    named = arguments(node)
    site = replace(site, pattern=Pattern(named["n"], named["m"]) if operator.is_nm else None)
    fakes = {name: fake_of(arg) if isinstance(arg, Node) else arg for name, arg in named.items()}
    if any(isinstance(arg, Node) and fakes[name] is None for name, arg in named.items()):
        return site
    sizes = operator.sizes(result, **fakes)
    known = _hints([sizes.out_features, sizes.in_features, *sizes.extra])
    return site if known is None else replace(site, shape=known[:2], extra=known[2:], rows=_product(sizes.rows))


def rows_of(tensor: Tensor) -> int | None:
    """The rows of a fake tensor ``[..., features]``, as in the example."""
    return _product(tensor.shape[:-1])


def _product(sizes: Iterable[Dimension]) -> int | None:
    known = _hints(sizes)
    return None if known is None else math.prod(known)


def _hints(sizes: Iterable[Dimension]) -> tuple[int, ...] | None:
    """Sizes as in the example; None if one is not known."""
    hints = [size if isinstance(size, int) else size.node.hint for size in sizes]
    return None if None in hints else tuple(hints)


def is_inference(gm: GraphModule) -> bool:
    """Whether nothing that a graph computes is differentiated or cast on the way."""
    changes = {torch._C._set_grad_enabled, torch.amp.autocast_mode._enter_autocast}
    plain = all(node.target not in changes for node in gm.graph.nodes if node.op == "call_function")
    autocast = any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    return plain and not autocast and not torch.is_grad_enabled()


def fake_of(node: Any) -> Any:
    """The fake value of a node, of Dynamo's graph or of an ATen graph."""
    return node.meta.get("example_value", node.meta.get("val"))
