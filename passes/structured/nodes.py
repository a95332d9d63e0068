"""The nodes of gates: what a graph needs so that closed heads, channels, sublayers and hidden dimensions are zero.

Every product with a gate is marked, and what it multiplies is its first argument: that is how gates are taken out. In
training a gate is a hard concrete draw where it is trained (`hard_concrete`), and its mask elsewhere.

Hidden dimensions are gated where they are written: after embeddings, linears, convolutions and norms, on parameters
that are added, and on the keys of a demultiplexer. Norms take their statistics over what is open, k of d dimensions, so
that a narrower norm computes the same. With the closed ones zero and s = sqrt(d / k),

    mean of the open ones = (d / k) mean(x)              RMSNorm_open(x) = RMSNorm(s x) with the weight w / s
    LayerNorm_open(x) = LayerNorm(s x') with the weight w / s,    x' = x where open, their mean where closed
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.analysis.residual_streams import Stream
from fxsparse.analysis.ties import sizes
from fxsparse.graph import Linear, traits
from fxsparse.passes.structured.hard_concrete import draw, mask_name

aten = torch.ops.aten

GATE_MARK = "fxsparse_gate"
"""In the meta of a node that acts for a gate: (unit, path, name of the gate)."""

Mark = tuple[str, str, str]


def drawn(gm: GraphModule, name: str, before: Node) -> Node:
    """The gate ``[units]``: drawn in training if it is a parameter, else its mask."""

    def gate(mask: Tensor, log_alpha: Tensor, training: bool) -> Tensor:
        return mask + (draw(log_alpha) - mask) * training

    if not any(known == name for known, _ in gm.named_parameters()):
        return fx.insert_attribute(gm, mask_name(name), before=before)
    node: Node = fx.insert_function(gm, gate, mask_name(name), name, "training", before=before)
    return node


def multiply(gm: GraphModule, node: Node, name: str, shape: tuple[int, ...], mark: Mark, straight: bool) -> None:
    """Multiplies what a node computes by a gate, seen as ``shape``, whose first dimension is that of the gate."""
    after = node.next
    product = functools.partial(gated, behind=len(shape) - 1, straight=straight)
    _marked(fx.transform(gm, node, product, drawn(gm, name, after), before=after), node, mark)


def gate_scores(gm: GraphModule, node: Node, name: str, mark: Mark) -> None:
    """Adds the logarithms of gates ``[experts]`` to the scores that a router gives experts.

    Before a softmax that is to multiply by the gates; a closed expert has the lowest score of all and no share.
    """
    after = node.next
    _marked(fx.transform(gm, node, _shifted, drawn(gm, name, after), before=after), node, mark)


def _shifted(scores: Tensor, gate: Tensor) -> Tensor:
    closed = torch.finfo(scores.dtype).min / 2  # finite, so that a draw that closes all of them means no NaN
    return scores + torch.where(gate > 0, gate.clamp_min(1e-6).log(), closed).to(scores.dtype)


def gate_columns(gm: GraphModule, node: Node, name: str, mark: Mark) -> None:
    """Multiplies the last dimension of what a node computes, the channels of experts, by their gates."""
    after = node.next
    product = functools.partial(gated, behind=0, straight=False)
    _marked(fx.transform(gm, node, product, drawn(gm, name, after), before=after), node, mark)


def multiply_input(gm: GraphModule, linear: Linear, name: str, columns: Tensor, mark: Mark, straight: bool) -> None:
    """Multiplies the columns that units have of what a linear reads, ``[units, columns of each]``, by their gates."""
    node, source = linear.node, linear.input
    units, each = columns.shape
    in_order = torch.equal(columns, torch.arange(linear.in_features).view(-1, each)[:units])
    gates = drawn(gm, name, node)
    if each > 1 and in_order and columns.numel() == linear.in_features:
        gates = fx.insert_function(gm, lambda gate: gate.repeat_interleave(each), gates, before=node)
    elif each > 1 or not in_order or columns.numel() != linear.in_features:
        unit = torch.full((linear.in_features,), units).index_put_((columns,), torch.arange(units)[:, None])
        read = fx.insert_buffer(gm, f"{name}_columns", unit, before=node)
        gates = fx.insert_function(gm, _of_columns, gates, read, before=node)
    product = functools.partial(gated, behind=0, straight=straight)
    new = fx.insert_function(gm, product, source, gates, before=node, like=source)
    node.replace_input_with(source, _marked(new, source, mark))


def _of_columns(gate: Tensor, unit: Tensor) -> Tensor:
    """The gate of each column; 1 for those of no unit, which have the number after the last."""
    return torch.cat([gate, gate.new_ones(1)]).index_select(0, unit)


def gated(x: Tensor, gate: Tensor, behind: int, straight: bool) -> Tensor:
    """``x * gate``, where ``x`` has ``behind`` dimensions behind the gated one.

    Straight through, the gradient is that of ``x``, so that closed units still learn.
    """
    gate = _as(gate, x)
    if behind:
        gate = gate.view(-1, *[1] * behind)
    return x - (x * (1 - gate)).detach() if straight else x * gate


def _as(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor if tensor.dtype == like.dtype else tensor.to(like.dtype)


def gated_nodes(gm: GraphModule) -> dict[str, list[Node]]:
    """The nodes that gates act on, by the name of the gate; they are what is left once gates are taken out."""
    acted_on: dict[str, list[Node]] = {}
    for node in gm.graph.nodes:
        if GATE_MARK in node.meta:
            source = node
            while GATE_MARK in source.meta:
                source = source.args[0]
            acted_on.setdefault(node.meta[GATE_MARK][2], []).append(source)
    return acted_on


def remove_gates(gm: GraphModule) -> None:
    """What is marked becomes what it acts on: right where every gate is open, or will be sliced."""
    for node in list(gm.graph.nodes):
        if GATE_MARK in node.meta:
            source = node.args[0]
            assert isinstance(source, Node)
            fx.replace(node, source)
    fx.eliminate_dead_code(gm)


def _marked(node: Node, source: Node, mark: Mark) -> Node:
    node.meta["nn_module_stack"] = source.meta.get("nn_module_stack")
    node.meta[GATE_MARK] = mark
    return node


# --- hidden dimensions ------------------------------------------------------------------------------------------------


def gate_stream(gm: GraphModule, stream: Stream, name: str, mark: Mark, *, straight: bool = False) -> None:
    """Gates the hidden dimensions of a stream.

    Args:
        gm: the graph that ``stream`` was found in.
        name: of the gate, whose mask is registered, and which is a parameter where it is trained.
        straight: let gradients pass closed gates.
    """
    _StreamGate(gm, stream, name, mark, straight).insert()


@dataclass
class _StreamGate:
    gm: GraphModule
    stream: Stream
    name: str
    mark: Mark
    straight: bool
    zero: set[Node] = field(default_factory=set)  # whose closed dimensions are 0

    def insert(self) -> None:
        means = self.stream.means
        self.axes = {node: axes[-1] for node, axes in self.stream.nodes.items()}
        for node, axes in self.stream.nodes.items():
            if node.op == "placeholder":
                self._gate(node, self.start)
            elif node.op != "call_function" or self._is_constant(node):
                continue
            elif traits.of(node.target).axes == "norm" and axes[-1] == len(sizes(node)) - 1:
                self._norm(node)
            elif self._keeps_zero(node):
                self.zero.add(node)
            else:
                self._gate(node, node.next)
        for demux in self.gm.graph.find_nodes(op="call_function", target=torch.ops.fxsparse.demux_linear.default):
            keys: Any = demux.args[1]
            if keys in self.axes and keys not in self.zero:
                demux.replace_input_with(keys, self._gated(keys, demux))
        for linear in fx.linears(self.gm):  # of a table of positions
            if linear.input in self.axes and linear.input not in self.zero and self._is_constant(linear.input):
                linear.node.replace_input_with(linear.input, self._gated(linear.input, linear.node))
        for mean in means:
            _marked(fx.transform(self.gm, mean, _times, self.shares[1]), mean, self.mark)

    # Once for the whole graph, before its first call: all places see one draw.

    @cached_property
    def start(self) -> Node:
        return next(node for node in self.gm.graph.nodes if node.op == "call_function")

    @cached_property
    def gate(self) -> Node:
        return drawn(self.gm, self.name, self.start)

    @cached_property
    def shares(self) -> tuple[Node, Node, Node]:
        """1 in closed dimensions, d / k, sqrt(d / k)."""

        def shares(gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            is_open = (gate != 0).to(torch.float32)
            ratio = self.stream.size / is_open.sum()
            return 1 - is_open, ratio, ratio.sqrt()

        nodes: tuple[Node, Node, Node] = fx.insert_function(self.gm, shares, self.gate, before=self.start)
        return nodes

    def _gate(self, node: Node, before: Node) -> None:
        self._open(node, fx.transform(self.gm, node, self._product(node), self.gate, before=before))

    def _gated(self, node: Node, before: Node) -> Node:
        new = fx.insert_function(self.gm, self._product(node), node, self.gate, before=before, like=node)
        return self._open(node, new)

    def _product(self, node: Node) -> Callable[[Tensor, Tensor], Tensor]:
        axis = self.axes[node]

        def product(x: Tensor, gate: Tensor) -> Tensor:
            times = x.shape[axis] // len(gate)
            return gated(x, gate.repeat(times) if times > 1 else gate, x.dim() - axis - 1, self.straight)

        return product

    def _open(self, node: Node, product: Node) -> Node:
        self.axes[product] = self.axes[node]
        self.zero.add(product)
        return _marked(product, node, self.mark)

    def _is_constant(self, node: Node) -> bool:
        """Whether a node is a parameter in another layout."""
        while _rearranges(node):
            node = node.args[0]  # type: ignore[assignment]
        return node.op == "get_attr"

    def _keeps_zero(self, node: Node) -> bool:
        """Whether closed dimensions of what a node computes are 0, once constants that it adds are gated."""
        keeps = traits.keeps_zero(node)
        if keeps == "any":
            return any(arg in self.zero for arg in node.all_input_nodes if arg in self.axes)
        if keeps == "all":
            parts: Any = node.args[0] if isinstance(node.args[0], (list, tuple)) else node.args[:2]
            if not all(part in self.zero or (part in self.axes and self._is_constant(part)) for part in parts):
                return False
            for part in parts:
                if part not in self.zero:
                    node.replace_input_with(part, self._gated(part, node))
            return True
        return keeps == "first" and node.args[0] in self.zero

    def _norm(self, node: Node) -> None:
        """Statistics over the open dimensions, and a result that is 0 in the others."""
        x: Any = node.args[0]
        weight: Any = node.args[2] if len(node.args) > 2 else None
        is_centred = node.target is aten.layer_norm.default

        def opened(x: Tensor, weight: Tensor | None, closed: Tensor, ratio: Tensor, scale: Tensor) -> list[Any]:
            if is_centred:
                times = x.shape[-1] // len(closed)  # the stream several times, side by side, as Swin merges patches
                closed = closed.repeat(times) if times > 1 else closed
                x = x + x.mean(-1, keepdim=True) * _as(ratio, x) * _as(closed, x)
            return [x, x * _as(scale, x), None if weight is None else weight / _as(scale, weight)]

        filled, scaled, divided = fx.insert_function(self.gm, opened, x, weight, *self.shares, before=node)
        for new in {filled, scaled, divided} - {x, None}:
            _marked(new, node, self.mark)
        args = [scaled, *node.args[1:]]
        if weight is not None:
            args[2] = divided
        node.args = tuple(args)
        result = node
        if weight is None:
            result = _marked(fx.transform(self.gm, node, _over, self.shares[2]), node, self.mark)
            self.axes[result] = self.axes[node]
        self._gate(result, result.next)


def _times(x: Tensor, factor: Tensor) -> Tensor:
    return x * _as(factor, x)


def _over(x: Tensor, divisor: Tensor) -> Tensor:
    return x / _as(divisor, x)


def _rearranges(node: Node) -> bool:
    """Whether the elements of a node are those of its operand, in another layout."""
    known = traits.of(node.target)
    return known.copies is not None or known.axes in {"reshape", "broadcast", "permute", "slices", "along", "item"}
