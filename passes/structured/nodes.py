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

import operator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.analysis.residual_streams import ALONG, PERMUTES, RESHAPES, Stream, sizes
from fxsparse.passes.structured.hard_concrete import BETA, GAMMA, ZETA, mask_name

aten = torch.ops.aten

GATE_MARK = "fxsparse_gate"
"""In the meta of a node that acts for a gate: (unit, path, name of the gate)."""

Mark = tuple[str, str, str]


def drawn(gm: GraphModule, name: str, dtype: torch.dtype, before: Node) -> Node:
    """The gate ``[units]``: drawn in training where it is a parameter, its mask otherwise."""

    def call(target: Any, *args: Any, **kwargs: Any) -> Node:
        return fx.insert_call(gm, target, args, kwargs, like=before)

    mask = fx.insert_attribute(gm, mask_name(name), before=before)
    gate = mask
    if any(known == name for known, _ in gm.named_parameters()):
        a = fx.insert_attribute(gm, name, before=before)
        u = call(aten.clamp.default, call(aten.rand_like.default, a), 1e-6, 1 - 1e-6)
        noise = call(aten.sub.Tensor, call(aten.log.default, u), call(aten.log1p.default, call(aten.neg.default, u)))
        s = call(aten.sigmoid.default, call(aten.div.Tensor, call(aten.add.Tensor, noise, a), BETA))
        stretched = call(aten.add.Tensor, call(aten.mul.Tensor, s, ZETA - GAMMA), GAMMA)
        z = call(aten.clamp.default, stretched, 0.0, 1.0)
        with gm.graph.inserting_before(before):
            training = gm.graph.create_node("get_attr", "training")
        training.meta["val"] = False
        difference = call(aten.mul.Tensor, call(aten.sub.Tensor, z, mask), training)
        gate = call(aten.add.Tensor, mask, difference)
    return gate if fx.value(gate).dtype == dtype else call(aten.to.dtype, gate, dtype)


def multiply(gm: GraphModule, node: Node, name: str, shape: tuple[int, ...], mark: Mark, straight: bool) -> None:
    """Multiplies what a node computes by a gate, seen as ``shape``."""
    after = node.next
    gate = _viewed(gm, drawn(gm, name, fx.value(node).dtype, after), shape, after)
    _redirect(node, _product(gm, node, gate, after, mark, straight))


def multiply_input(gm: GraphModule, linear: Node, node: Node, name: str, mark: Mark, straight: bool) -> None:
    """Multiplies the last dimension of what a linear reads by a gate."""
    gate = drawn(gm, name, fx.value(node).dtype, linear)
    linear.replace_input_with(node, _product(gm, node, gate, linear, mark, straight))


def remove_gates(gm: GraphModule) -> None:
    """What is marked becomes what it acts on: right where every gate is open, or will be sliced."""
    for node in list(gm.graph.nodes):
        if GATE_MARK in node.meta:
            source = node.args[0]
            assert isinstance(source, Node)
            fx.replace(node, source)
    fx.eliminate_dead_code(gm)


def _viewed(gm: GraphModule, gate: Node, shape: tuple[int, ...], before: Node) -> Node:
    if tuple(fx.value(gate).shape) == shape:
        return gate
    return fx.insert_call(gm, aten.view.default, (gate, list(shape)), like=before)


def _product(gm: GraphModule, node: Node, gate: Node, before: Node, mark: Mark, straight: bool) -> Node:
    """``node * gate``; straight through, the gradient is that of ``node``, so that what is closed still learns."""
    if straight:
        off = fx.insert_call(gm, aten.rsub.Scalar, (gate, 1), like=before)
        closed = fx.insert_call(gm, aten.mul.Tensor, (node, off), like=before)
        constant = fx.insert_call(gm, aten.detach.default, (closed,), like=before)
        product = fx.insert_call(gm, aten.sub.Tensor, (node, constant), like=before)
        for helper in (closed, constant):  # a stream leaves its block by one node
            helper.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
    else:
        product = fx.insert_call(gm, aten.mul.Tensor, (node, gate), like=before)
    return _marked(product, node, mark)


def _redirect(node: Node, product: Node) -> None:
    """Lets all that reads ``node`` read ``product``, but for what ``product`` is made of."""
    other = product.args[1]
    own = {product, *((other.args[0],) if isinstance(other, Node) and other.target is aten.detach.default else ())}
    node.replace_all_uses_with(product, delete_user_cb=lambda user: user not in own)


def _marked(node: Node, source: Node, mark: Mark) -> Node:
    node.meta["nn_module_stack"] = source.meta.get("nn_module_stack")
    node.meta[GATE_MARK] = mark
    return node


# --- hidden dimensions ------------------------------------------------------------------------------------------------

_NORMS = {aten.layer_norm.default, aten.rms_norm.default}
_KEEPS_ZERO = {
    *("abs", "alias", "clone", "contiguous", "detach", "div", "dropout", "erf", "expand", "feature_dropout", "gelu"),
    *("hardswish", "index", "leaky_relu", "lift_fresh_copy", "mish", "neg", "pow", "relu", "relu_", "select", "silu"),
    *("silu_", "sin", "sqrt", "square", "tanh", "to", "_to_copy", "type_as"),
}
_LAYOUTS = RESHAPES | PERMUTES | set(ALONG) | {operator.getitem}


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
    casts: dict[tuple[str, torch.dtype], Node] = field(default_factory=dict)
    zero: set[Node] = field(default_factory=set)  # whose closed dimensions are 0

    def insert(self) -> None:
        means = self.stream.means
        self.axes = {node: axes[-1] for node, axes in self.stream.nodes.items()}
        for node, axes in self.stream.nodes.items():
            if node.op == "placeholder":
                self._gate(node, self.start)
            elif node.op != "call_function" or self._is_constant(node):
                continue
            elif node.target in _NORMS and axes[-1] == len(sizes(node)) - 1:
                self._norm(node)
            elif self._keeps_zero(node):
                self.zero.add(node)
            else:
                self._gate(node, node.next)
        for demux in self.gm.graph.find_nodes(op="call_function", target=torch.ops.fxsparse.demux_linear.default):
            keys: Any = demux.args[1]
            if keys in self.axes and keys not in self.zero:
                demux.replace_input_with(keys, self._gated(keys, demux))
        for mean in means:
            product = self._call(aten.mul.Tensor, mean, self._of("ratio", mean), before=mean.next)
            _redirect(mean, _marked(product, mean, self.mark))

    # Once for the whole graph, before its first call: all places see one draw.

    @cached_property
    def start(self) -> Node:
        return next(node for node in self.gm.graph.nodes if node.op == "call_function")

    @cached_property
    def gate(self) -> Node:
        return drawn(self.gm, self.name, torch.float32, self.start)

    @cached_property
    def open(self) -> Node:
        is_open = self._call(aten.ne.Scalar, self.gate, 0, before=self.start)
        return self._call(aten.to.dtype, is_open, torch.float32, before=self.start)

    @cached_property
    def closed(self) -> Node:
        return self._call(aten.rsub.Scalar, self.open, 1, before=self.start)

    @cached_property
    def ratio(self) -> Node:
        """d / k."""
        count = self._call(aten.sum.default, self.open, before=self.start)
        inverse = self._call(aten.reciprocal.default, count, before=self.start)
        return self._call(aten.mul.Tensor, inverse, self.stream.size, before=self.start)

    @cached_property
    def scale(self) -> Node:
        """sqrt(d / k)."""
        return self._call(aten.sqrt.default, self.ratio, before=self.start)

    def _of(self, what: str, node: Node) -> Node:
        """The gate, or what follows from it, in the dtype of a node."""
        source, dtype = getattr(self, what), fx.value(node).dtype
        if dtype == torch.float32:
            return source
        if (what, dtype) not in self.casts:
            self.casts[what, dtype] = self._call(aten.to.dtype, source, dtype, before=self.start)
        return self.casts[what, dtype]

    def _call(self, target: Any, *args: Any, before: Node) -> Node:
        return fx.insert_call(self.gm, target, args, like=before)

    def _gate(self, node: Node, before: Node) -> None:
        _redirect(node, self._gated(node, before))

    def _gated(self, node: Node, before: Node) -> Node:
        axis = self.axes[node]
        size = sizes(node)[axis]
        gate = self._of("gate", node)
        if size != self.stream.size:
            gate = self._call(aten.repeat.default, gate, [size // self.stream.size], before=before)
        gate = _viewed(self.gm, gate, (size, *(1 for _ in range(len(sizes(node)) - axis - 1))), before)
        product = _product(self.gm, node, gate, before, self.mark, self.straight)
        self.axes[product] = axis
        self.zero.add(product)
        return product

    def _is_constant(self, node: Node) -> bool:
        """Whether a node is a parameter in another layout."""
        while node.target in _LAYOUTS or getattr(node.target, "_opname", "") in ("expand", "detach", "to"):
            node = node.args[0]  # type: ignore[assignment]
        return node.op == "get_attr"

    def _keeps_zero(self, node: Node) -> bool:
        """Whether closed dimensions of what a node computes are 0, once constants that it adds are gated."""
        name = getattr(node.target, "_opname", "")
        ours = [arg for arg in node.all_input_nodes if arg in self.axes]
        if name in ("mul", "mul_", "mux"):
            return any(arg in self.zero for arg in ours)
        if name in ("add", "sub", "add_", "cat"):
            parts: Any = node.args[0] if name == "cat" else node.args[:2]
            if not all(part in self.zero or (part in self.axes and self._is_constant(part)) for part in parts):
                return False
            for part in parts:
                if part not in self.zero:
                    node.replace_input_with(part, self._gated(part, node))
            return True
        if name == "pow" and not (isinstance(node.args[1], (int, float)) and node.args[1] > 0):
            return False
        return (name in _KEEPS_ZERO or node.target in _LAYOUTS) and node.args[0] in self.zero

    def _norm(self, node: Node) -> None:
        """Statistics over the open dimensions, and a result that is 0 in the others."""
        x: Any = node.args[0]
        weight: Any = node.args[2] if len(node.args) > 2 else None
        scale, source = self._of("scale", x), x
        if node.target is aten.layer_norm.default:
            mean = self._call(aten.mean.dim, x, [-1], True, before=node)
            mean = self._call(aten.mul.Tensor, mean, self._of("ratio", x), before=node)
            fill = self._call(aten.mul.Tensor, mean, self._of("closed", x), before=node)
            source = _marked(self._call(aten.add.Tensor, x, fill, before=node), node, self.mark)
        args = [_marked(self._call(aten.mul.Tensor, source, scale, before=node), node, self.mark), *node.args[1:]]
        if weight is not None:
            scale = self._of("scale", weight)
            args[2] = _marked(self._call(aten.div.Tensor, weight, scale, before=node), node, self.mark)
        node.args = tuple(args)
        result = node
        if weight is None:
            result = _marked(self._call(aten.div.Tensor, node, scale, before=node.next), node, self.mark)
            _redirect(node, result)
            self.axes[result] = self.axes[node]
        self._gate(result, result.next)
