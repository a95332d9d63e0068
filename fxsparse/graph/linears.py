"""The linears of a graph: products with a parameter, in whatever form the model wrote them.

A linear is ``aten.linear``, or a matrix product whose right side is a two-dimensional parameter, perhaps transposed:
Hugging Face's ``Conv1D`` is ``aten.addmm`` with a weight ``[in, out]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxsparse.graph.state import attribute, module_path, parameter_names
from fxsparse.graph.values import stack_path, value

aten = torch.ops.aten


_TRANSPOSES = {aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default}


FROZEN = "fxsparse_frozen"  # marks a ``detach`` that keeps a parameter from being trained


_CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.convolution.default,
}


# op -> positions of (input, weight, bias) and whether the weight argument is stored [in, out].
_DENSE_LINEARS: dict[Any, tuple[int, int, int | None, bool]] = {
    aten.linear.default: (0, 1, 2, False),
    aten.addmm.default: (1, 2, 0, True),
    aten.mm.default: (0, 1, None, True),
    aten.matmul.default: (0, 1, None, True),
}


@dataclass(frozen=True)
class Linear:
    """A product with a parameter, ``y = x W^T + b``, in the form the model wrote it.

    Attributes:
        node: the node that computes ``y``.
        weight: the ``get_attr`` node of the parameter.
        transposed: True where the parameter is stored ``[in, out]`` (Hugging Face ``Conv1D``).
        path: path of the module it is, such as ``model.layers.0.fc1``; a tied weight's linear has its own, ``lm_head``.
    """

    node: Node
    weight: Node
    transposed: bool
    path: str

    @property
    def input(self) -> Node:
        """The node of ``x``, ``[..., in_features]``, as the graph is now."""
        return self.node.args[_DENSE_LINEARS[self.node.target][0]]  # type: ignore[return-value]

    @property
    def bias(self) -> Node | None:
        """The node of ``b``, or None."""
        at = _DENSE_LINEARS[self.node.target][2]
        return self.node.args[at] if at is not None and at < len(self.node.args) else None  # type: ignore[return-value]

    @property
    def name(self) -> str:
        """Full name of the weight parameter, such as ``model.layers.0.fc1.weight``."""
        return str(self.weight.target)

    @property
    def out_features(self) -> int:
        return int(value(self.weight).shape[1 if self.transposed else 0])

    @property
    def in_features(self) -> int:
        return int(value(self.weight).shape[0 if self.transposed else 1])


def linears(gm: GraphModule) -> Iterator[Linear]:
    """The dense linears of a graph whose weight is a two-dimensional parameter, in order of execution."""
    names = parameter_names(gm)
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in _DENSE_LINEARS:
            linear = _as_linear(gm, node, names)
            if linear is not None:
                yield linear


def _as_linear(gm: GraphModule, node: Node, names: dict[int, list[str]]) -> Linear | None:
    _, at_weight, _, transposed = _DENSE_LINEARS[node.target]
    if any(factor != 1 for factor in node.kwargs.values()):  # addmm's alpha and beta
        return None
    weight: Any = node.args[at_weight]
    if not isinstance(weight, Node):
        return None
    weight = read_of(weight)
    if weight.op != "get_attr" and is_transpose(weight):
        weight, transposed = read_of(weight.args[0]), not transposed
    parameter = attribute(gm, str(weight.target)) if weight.op == "get_attr" else None
    if not isinstance(parameter, nn.Parameter) or parameter.dim() != 2:
        return None
    paths = [module_path(name) for name in names.get(id(parameter), ())]
    path = stack_path(node) if stack_path(node) in paths else module_path(str(weight.target))
    return Linear(node, weight, transposed, path)


def read_of(node: Node) -> Node:
    """The node behind the ``detach`` that freezes a parameter; ``node`` itself where there is none."""
    return node.args[0] if FROZEN in node.meta else node  # type: ignore[return-value]


def is_transpose(node: Node) -> bool:
    """Whether ``node`` swaps the two dimensions of a matrix."""
    if node.target not in _TRANSPOSES or len(value(node).shape) != 2:
        return False
    dims = tuple(d for arg in node.args[1:] for d in (arg if isinstance(arg, (list, tuple)) else (arg,)))
    return not dims or (dims in {(0, 1), (1, 0), (-1, -2), (-2, -1)} and not _is_identity_permute(node, dims))


def _is_identity_permute(node: Node, dims: tuple[Any, ...]) -> bool:
    return node.target is aten.permute.default and tuple(d % 2 for d in dims) == (0, 1)


def applies_parameter(gm: GraphModule, node: Node) -> bool:
    """Whether ``node`` is a dense product of its input with a weight: a linear or a convolution."""
    if node.op != "call_function":
        return False
    if node.target in _DENSE_LINEARS:
        return _as_linear(gm, node, {}) is not None
    return node.target in _CONVOLUTIONS or str(node.target).startswith("fxsparse.")


def is_embedding(node: Node) -> bool:
    """Whether ``node`` looks rows up in an embedding table."""
    return node.target in {aten.embedding.default, aten.embedding_bag.default}


def first_linears(gm: GraphModule) -> set[Node]:
    """Linears that no other linear or convolution feeds: the first layer after the input (queries, keys and values
    alike)."""
    fed: set[Node] = set()
    first: set[Node] = set()
    for node in gm.graph.nodes:
        if any(source in fed for source in node.all_input_nodes):
            fed.add(node)
        elif applies_parameter(gm, node):
            first.add(node)
        if node in first:
            fed.add(node)
    return first


def head_linears(gm: GraphModule) -> set[Node]:
    """Linears whose result reaches an output without another linear and without joining a residual stream: the
    heads."""
    follows: set[Node] = set()  # nodes after which a linear or a residual sum still comes
    heads: set[Node] = set()
    computed = depends_on_inputs(gm)
    for node in reversed(gm.graph.nodes):
        if any(user in follows or applies_parameter(gm, user) or _joins_stream(user, computed) for user in node.users):
            follows.add(node)
        elif node.users and applies_parameter(gm, node):
            heads.add(node)
    return heads


def depends_on_inputs(gm: GraphModule) -> set[Node]:
    """The inputs of a graph and every node that is computed from one."""
    reached: set[Node] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder" or any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    return reached


def _joins_stream(node: Node, computed: set[Node]) -> bool:
    """Whether ``node`` adds two activations, as a residual connection does; a sum of losses is a scalar."""
    if node.target not in {aten.add.Tensor, aten.add_.Tensor}:
        return False
    terms = [arg for arg in node.args[:2] if isinstance(arg, Node) and arg in computed]
    return len(set(terms)) == 2 and all(isinstance(value(term), Tensor) and value(term).dim() > 1 for term in terms)
