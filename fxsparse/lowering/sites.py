"""The fxsparse operators in a graph, and what each computes: its shape, dtype and device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse.lowering.estimates import Work
from fxsparse.ops.nm import Pattern

Size = int | torch.SymInt


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
        further: sizes, as in `Work`.
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
    further: tuple[int, ...] = ()

    @property
    def work(self) -> Work | None:
        """What it computes, as measurements and estimates are kept by; None where something is not known."""
        if self.rows is None or len(self.shape) != 2 or (self.pattern is None and self.op.startswith("nm_")):
            return None
        return Work(self.op, self.pattern, self.dtype, self.rows, *self.shape, self.further)


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
    if not isinstance(result, Tensor):
        return None
    site, given = Site(op, result.device.type, result.dtype), arguments_of(node)
    found = _sizes(op, {name: fake_of(arg) if isinstance(arg, Node) else arg for name, arg in given.items()}, result)
    if found is None:
        return site
    by_row, shape, further = found
    pattern = Pattern(given["n"], given["m"]) if op.startswith("nm_") else None
    sizes = _hints([*shape, *further])
    if sizes is None:
        return replace(site, pattern=pattern)
    return replace(site, shape=sizes[:2], further=sizes[2:], pattern=pattern, rows=rows_of(by_row))


def _sizes(op: str, given: dict[str, Any], result: Tensor) -> tuple[Tensor, tuple[Size, Size], tuple[Size, ...]] | None:
    """A tensor that has the rows of a product, the shape of its weight as far as it takes part, and further sizes;
    None of an operator that has one implementation."""
    first: Tensor = next((arg for arg in given.values() if isinstance(arg, Tensor)), result)
    out, features = result.shape[-1], first.shape[-1]
    if op == "nm_linear":
        return first, (out, features), ()
    if op == "nm_linear_low_rank":
        return first, (out, features), (given["down"].shape[0],)
    if op == "nm_linear_grad_input":
        return first, (features, out), ()
    if op == "nm_linear_grad_values":
        return first, (features, given["x"].shape[-1]), ()
    if op == "gather_linear":
        return first, (out, features), tuple(given["weight"].shape)
    if op == "gather_linear_grad_input":
        return first, (features, out), tuple(given["weight"].shape)
    if op == "gather_linear_grad_weight":
        return first, (features, given["x"].shape[-1]), tuple(result.shape)
    if op == "mux":
        return result, (out, out), (given["n"], *_length(result))
    if op == "demux_linear":
        return first, (out, features), (*given["keys"].shape[-2:], *_length(first))
    return None


def _length(tensor: Tensor) -> tuple[Size, ...]:
    """Positions of one row of a batch, ``[batch, ..., features]``."""
    sizes = _hints(tensor.shape[1:-1])
    return tensor.shape[1:-1] if sizes is None else (math.prod(sizes),)


def _hints(sizes: Iterable[Size]) -> tuple[int, ...] | None:
    """Sizes as in the example; None where one is not known."""
    found = [size if isinstance(size, int) else size.node.hint for size in sizes]
    return None if None in found else tuple(found)


def arguments_of(node: Node) -> dict[str, Any]:
    """The arguments of an operator's call by their names."""
    schema = node.target.default if isinstance(node.target, torch._ops.OpOverloadPacket) else node.target
    names = [argument.name for argument in schema._schema.arguments]  # type: ignore[union-attr]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def rows_of(tensor: Tensor) -> int | None:
    """The rows of a fake tensor ``[..., features]``, as in the example."""
    sizes = _hints(tensor.shape[:-1])
    return None if sizes is None else math.prod(sizes)


def is_inference(gm: GraphModule) -> bool:
    """Whether nothing that a graph computes is differentiated or cast on the way."""
    changes = {torch._C._set_grad_enabled, torch.amp.autocast_mode._enter_autocast}
    plain = all(node.target not in changes for node in gm.graph.nodes if node.op == "call_function")
    autocast = any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    return plain and not autocast and not torch.is_grad_enabled()


def fake_of(node: Any) -> Any:
    """The fake value of a node, of Dynamo's graph or of an ATen graph."""
    return node.meta.get("example_value", node.meta.get("val"))
