"""Which pointwise operators after a linear its kernel can take over, and letting it.

Read from ATen or torch functions: gelu (both forms), relu, silu, tanh, and multiplication by or addition of a tensor
of the result's own shape and dtype. The chain ends at the first node that is something else, or whose input something
else reads too.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxsparse.codegen.epilogue import GATED, Epilogue
from fxsparse.codegen.fused_ops import (
    INSTRUCTIONS,
    nm_linear_epilogue,
    sparse_tensor_core_linear,
    sparse_tensor_core_linear_low_rank,
    sparse_wgmma_linear,
    sparse_wgmma_linear_low_rank,
)
from fxsparse.codegen.launching import unsupported
from fxsparse.graph import arguments
from fxsparse.lowering.sites import fake_of
from fxsparse.ops.define import has_kernel
from fxsparse.ops.nm import Pattern
from fxsparse.ops.nm_linear import nm_linear
from fxsparse.ops.operator import SPARSE_TENSOR_CORES, SPARSE_WGMMA, operator_name

aten = torch.ops.aten

NM_LINEAR, NM_LINEAR_EPILOGUE = nm_linear.overload, nm_linear_epilogue._opoverload
ON_SPARSE_TENSOR_CORES = {
    (SPARSE_TENSOR_CORES, False): sparse_tensor_core_linear._opoverload,
    (SPARSE_WGMMA, False): sparse_wgmma_linear._opoverload,
    (SPARSE_TENSOR_CORES, True): sparse_tensor_core_linear_low_rank._opoverload,
    (SPARSE_WGMMA, True): sparse_wgmma_linear_low_rank._opoverload,
}
"""What an implementation calls, without and with a low-rank branch."""


def arguments_on_cores(named: Mapping[str, Any], values: Any, metadata: Any) -> tuple[Any, ...]:
    """Arguments of an operator on sparse tensor cores, from those of the operator that it stands for, by name."""
    if named.get("down") is None:
        return named["x"], values, metadata, named["bias"], "", []
    return named["x"], values, metadata, named["down"], named["up"], named["bias"], named["scale"], "", []


_UNARY: dict[Any, str] = {
    aten.relu.default: "relu",
    aten.silu.default: "silu",
    aten.tanh.default: "tanh",
    torch.relu: "relu",
    torch.tanh: "tanh",
    torch.nn.functional.relu: "relu",
    torch.nn.functional.silu: "silu",
}
_BINARY: dict[Any, str] = {
    aten.mul.Tensor: "mul",
    aten.add.Tensor: "add",
    operator.mul: "mul",
    operator.add: "add",
    torch.mul: "mul",
    torch.add: "add",
}
_GELU = (aten.gelu.default, torch.nn.functional.gelu)


@dataclass(frozen=True)
class Fusion:
    """What a kernel can take over after a linear.

    Attributes:
        steps: of :class:`Epilogue`.
        operands: the extra tensors these take, in order.
        nodes: the nodes taken over, in order; the last one's value is the kernel's result.
    """

    steps: tuple[str, ...] = ()
    operands: tuple[Node, ...] = ()
    nodes: tuple[Node, ...] = ()

    def __len__(self) -> int:
        """How many nodes were understood."""
        return len(self.nodes)

    def epilogue(self, bias: bool) -> Epilogue:
        return Epilogue(bias, self.steps)


def following(linear: Node) -> Fusion:
    """The longest chain after a linear that its kernel can take over; empty where there is none."""
    steps: list[str] = []
    operands: list[Node] = []
    nodes: list[Node] = []
    last = linear
    while len(last.users) == 1:
        node = next(iter(last.users))
        step, operand = _step(node, last)
        if step is None:
            break
        steps.append(step)
        operands += [] if operand is None else [operand]
        nodes.append(node)
        last = node
    return Fusion(tuple(steps), tuple(operands), tuple(nodes))


@dataclass(frozen=True)
class GatedPair:
    """Two linears of which one gates the other: ``act(gate) * up``.

    Attributes:
        gate, up: the linears.
        step: of :class:`Epilogue`, for a weight whose rows alternate between the two.
        nodes: the activation and the multiplication.
    """

    gate: Node
    up: Node
    step: str
    nodes: tuple[Node, Node]


def gated_pair(gate: Node) -> GatedPair | None:
    """What a linear gates, if that is one value that nothing else reads, perhaps another linear's."""
    chain = following(gate)
    if len(chain) < 2 or chain.steps[0] in _BINARY.values() or chain.steps[1] != "mul":
        return None
    if len(chain.operands[0].users) != 1:
        return None
    return GatedPair(gate, chain.operands[0], GATED + chain.steps[0], chain.nodes[:2])  # type: ignore[arg-type]


def fuse(gm: GraphModule, replace: Callable[[GraphModule, Node, Fusion], Node | None]) -> int:
    """Takes chains over throughout a graph.

    Args:
        gm: changed in place.
        replace: is called with each node that something follows, with the insertion point after the chain; it returns
            the node that computes the whole chain, or None to leave this one.

    Returns:
        nodes taken over.
    """
    count = 0
    for node in list(gm.graph.nodes):
        fusion = following(node) if node.op == "call_function" else Fusion()
        if not fusion:
            continue
        end = fusion.nodes[-1]
        with gm.graph.inserting_after(end):
            fused = replace(gm, node, fusion)
        if fused is None:
            continue
        fused.meta = {**end.meta, **fused.meta}
        end.replace_all_uses_with(fused, delete_user_cb=functools.partial(operator.is_not, fused))
        for old in reversed([node, *fusion.nodes]):
            gm.graph.erase_node(old)
        count += len(fusion)
    if count:
        gm.graph.lint()
        gm.recompile()
    return count


def fuse_linears(gm: GraphModule, unwanted: Callable[[Node], bool] = lambda node: False) -> int:
    """Lets the kernel of every sparse linear in an inference graph take over what follows it.

    Args:
        gm: a graph that calls ``fxsparse::nm_linear`` or operators on sparse tensor cores and is not differentiated,
            with ATen or torch functions in between; changed in place.
        unwanted: linears to leave alone.

    Returns:
        nodes taken over.
    """

    def replace(gm: GraphModule, node: Node, fusion: Fusion) -> Node | None:
        if node.target not in (NM_LINEAR, *ON_SPARSE_TENSOR_CORES.values()) or unwanted(node):
            return None
        steps, operands = " ".join(fusion.steps), list(fusion.operands)
        named = arguments(node)
        if node.target is NM_LINEAR:
            args = tuple(named[name] for name in ("x", "values", "indices", "bias", "n", "m"))
            return gm.graph.call_function(NM_LINEAR_EPILOGUE, (*args, steps, operands))
        if named["steps"]:
            return None
        return gm.graph.call_function(node.target, tuple((named | {"steps": steps, "operands": operands}).values()))

    return fuse(gm, replace)


def has_own_kernel(node: Node) -> bool:
    """Whether a call is a sparse linear whose kernel can take over what follows it."""
    fake, name = fake_of(node), operator_name(node.target)
    if fake is None or name not in ("nm_linear", *INSTRUCTIONS):
        return False
    if name == "nm_linear":
        named = arguments(node)
        return has_epilogues(fake.device.type, fake.dtype, Pattern(named["n"], named["m"]))
    return has_kernel(name, fake.device.type) and unsupported(fake.dtype) is None


def has_epilogues(device: str, dtype: torch.dtype, pattern: Pattern) -> bool:
    """Whether the kernel of a product can take over what follows it."""
    return has_kernel("nm_linear_epilogue", device) and unsupported(dtype, pattern.n, pattern.m) is None


def _step(node: Node, value: Node) -> tuple[str | None, Node | None]:
    """The epilogue step that a node is when ``value`` is the running result, and the tensor it takes."""
    nothing = (None, None)
    if node.op != "call_function":
        return nothing
    if node.target in _GELU:
        form = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
        step = {"none": "gelu", "tanh": "gelu_tanh"}.get(str(form))
        return (step, None) if node.args[:1] == (value,) else nothing
    if node.target in _UNARY:
        inplace = node.kwargs.get("inplace", len(node.args) > 1 and node.args[1])
        return (_UNARY[node.target], None) if node.args[:1] == (value,) and not inplace else nothing
    if node.target not in _BINARY or len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1 or "out" in node.kwargs:
        return nothing
    left, right = node.args
    other = right if left is value else left
    if not isinstance(other, Node) or other is value or not _alike(other, value) or not _alike(node, value):
        return nothing
    return _BINARY[node.target], other


def _alike(left: Node, right: Node) -> bool:
    """Whether two nodes hold tensors of one shape, dtype and device."""
    a, b = fake_of(left), fake_of(right)
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
