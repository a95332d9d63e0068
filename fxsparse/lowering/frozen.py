"""Frozen weights that already are N:M sparse: checkpoints pruned elsewhere, or ours written back to their model.

A weight counts as frozen where nothing can train it: it does not require a gradient, or the graph was captured with
gradients off. Its compressed copy follows its contents at run time; where these stop being N:M the dense graph runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse.graph.dynamo import placeholders
from fxsparse.ops.nm import Pattern, satisfies

# Sparsest first; of patterns that keep as much, the one with hardware behind it first.
PATTERNS = tuple(Pattern.parse(text) for text in ("1:4", "2:8", "2:4", "1:2", "4:8"))
SMALLEST = 1024  # elements; a smaller weight may be N:M by chance and is not worth an operator
_SAMPLE_ROWS = 64

# function -> positions of (input, weight, bias), and whether the weight is stored [in, out].
_LINEARS: dict[Any, tuple[int, int, int, bool]] = {
    torch.nn.functional.linear: (0, 1, 2, False),
    torch.ops.aten.linear.default: (0, 1, 2, False),
    torch.addmm: (1, 2, 0, True),
    torch.ops.aten.addmm.default: (1, 2, 0, True),
}


@dataclass(frozen=True)
class FrozenLinear:
    """A linear of Dynamo's graph whose weight is frozen and N:M.

    Attributes:
        node: the call.
        x, bias: its other arguments.
        position: where the weight is among the graph's inputs.
        pattern: that the weight satisfies.
        transposed: whether the weight is stored ``[in, out]``.
    """

    node: Node
    x: Node
    bias: Node | None
    position: int
    pattern: Pattern
    transposed: bool


def frozen_linears(gm: GraphModule, example_inputs: Sequence[Any], state: dict[int, str]) -> Iterator[FrozenLinear]:
    """The linears of ``gm`` with a frozen N:M weight.

    Args:
        gm: a graph that takes parameters as inputs.
        example_inputs: the real inputs.
        state: positions of those inputs that are parameters or buffers.
    """
    training = torch.is_grad_enabled()
    patterns: dict[int, Pattern | None] = {}
    positions = {node: position for position, node in enumerate(placeholders(gm)) if position in state}
    for node in gm.graph.nodes:
        linear = _linear(node) if node.op == "call_function" else None
        position = None if linear is None else positions.get(linear[1])
        if linear is None or position is None or (training and example_inputs[position].requires_grad):
            continue
        x, _, bias, transposed = linear
        weight = example_inputs[position]
        if position not in patterns:
            patterns[position] = pattern_of(weight.t() if transposed else weight)
        pattern = patterns[position]
        if pattern is not None and (bias is None or bias.meta["example_value"].dim() == 1):
            yield FrozenLinear(node, x, bias, position, pattern, transposed)


def _linear(node: Node) -> tuple[Node, Any, Node | None, bool] | None:
    """Input, weight and bias of a linear, and whether the weight is stored ``[in, out]``; None for anything else."""
    if node.target not in _LINEARS:
        return None
    at_input, at_weight, at_bias, transposed = _LINEARS[node.target]
    if len(node.args) <= max(at_input, at_weight) or set(node.kwargs) - {"bias"}:
        return None
    bias = node.args[at_bias] if len(node.args) > at_bias else node.kwargs.get("bias")
    if bias is not None and not isinstance(bias, Node):
        return None
    return node.args[at_input], node.args[at_weight], bias, transposed  # type: ignore[return-value]


@torch.no_grad()
def pattern_of(weight: Tensor) -> Pattern | None:
    """The sparsest known pattern that every group of a weight ``[out, in]`` satisfies; None if there is none.

    A weight of zeros only, a tiny one, and one that is not a dense matrix of real floating-point numbers has none.
    """
    if weight.layout != torch.strided or not weight.is_floating_point() or weight.dim() != 2 or weight.is_meta:
        return None
    if weight.numel() < SMALLEST:
        return None
    sample = weight[:_SAMPLE_ROWS]
    if torch.count_nonzero(sample) > sample.numel() // 2 or not torch.count_nonzero(weight):
        return None
    return next((pattern for pattern in PATTERNS if satisfies(weight, pattern)), None)
