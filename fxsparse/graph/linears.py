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

from fxsparse.graph import traits
from fxsparse.graph.state import attribute, module_path, parameter_names
from fxsparse.graph.traits import Product
from fxsparse.graph.values import arguments, stack_path, value

aten = torch.ops.aten

FROZEN = "fxsparse_frozen"  # marks a ``detach`` that keeps a parameter from being trained


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
        return arguments(self.node)[_product(self.node).input]

    @property
    def bias(self) -> Node | None:
        """The node of ``b``, or None."""
        name = _product(self.node).bias
        return None if name is None else arguments(self.node)[name]

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
        linear = _as_linear(gm, node, names)
        if linear is not None:
            yield linear


def _product(node: Node) -> Product:
    product = traits.of(node.target).product
    assert product is not None
    return product


def _as_linear(gm: GraphModule, node: Node, names: dict[int, list[str]]) -> Linear | None:
    product = traits.of(node.target).product
    if product is None:
        return None
    written = arguments(node)
    if any(written.get(factor, 1) != 1 for factor in ("alpha", "beta")):  # of addmm
        return None
    weight: Any = written[product.weight]
    if not isinstance(weight, Node):
        return None
    weight, transposed = read_of(weight), product.transposed
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
    return traits.permutation(node) == (1, 0)


def applies_parameter(gm: GraphModule, node: Node) -> bool:
    """Whether ``node`` is a product of its input with a weight: a linear, dense or sparse, or a convolution."""
    axes = traits.of(node.target).axes
    if axes == "product":
        return _as_linear(gm, node, {}) is not None
    namespace, _, operator = str(node.target).partition(".")
    return axes == "convolution" or (namespace == "fxsparse" and "linear" in operator)


def is_embedding(node: Node) -> bool:
    """Whether ``node`` looks rows up in an embedding table."""
    return traits.of(node.target).axes in ("embedding", "bag")


def input_embeddings(gm: GraphModule) -> list[Node]:
    """Lookups of what the caller gives: of tokens and token types, also shifted or with some replaced, not of
    positions."""
    return [
        node
        for node in gm.graph.nodes
        if is_embedding(node) and any(_holds_an_input(source) for source in node.all_input_nodes)
    ]


def _holds_an_input(node: Node) -> bool:
    """Whether integers are values of an input, elsewhere perhaps or with others among them."""
    if node.op == "placeholder":
        return not value(node).is_floating_point()
    facts, name = traits.of(node.target), getattr(getattr(node.target, "_schema", None), "name", "")
    if node.op != "call_function" or not (facts.work == "view" or facts.copies or name in _REPLACING):
        return False
    tensors = [source for source in node.all_input_nodes if isinstance(value(source), torch.Tensor)]
    return any(_holds_an_input(source) for source in tensors if value(source).dtype is not torch.bool)


_REPLACING = {f"aten::{name}" for name in ("masked_fill", "where", "slice_scatter", "select_scatter", "copy", "cat")}


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
