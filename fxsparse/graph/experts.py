"""The products of experts: one weight holds a matrix for each expert, and each row is multiplied by that of its own.

    form       written as                                                    x
    grouped    grouped_mm(x, W, offsets)                                     [rows, in], sorted by expert
    gathered   bmm(W[expert], x[:, :, None])   bmm(x[:, None], W[expert])    [rows, in], expert [rows]
    every      bmm(x, W)                                                     [experts, rows, in]: each takes as many

A weight is stored ``[experts, out, in]`` or ``[experts, in, out]``. `replace_product` puts the grouped form in the
place of any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxsparse.graph import traits
from fxsparse.graph.edit import insert_function, replace
from fxsparse.graph.linears import FROZEN, read_of
from fxsparse.graph.state import attribute, module_path
from fxsparse.graph.values import arguments, value

aten = torch.ops.aten

_GROUPED = {
    "aten::_grouped_mm": ("self", "mat2", "offs"),
    "transformers::grouped_mm_fallback": ("input", "weight", "offs"),
}
"""The operators of the grouped form, and the names of their arguments."""


@dataclass(frozen=True)
class ExpertLinear:
    """A product of rows with the matrices of their experts, in the form the model wrote it.

    Attributes:
        node: the node that computes it.
        weight: the ``get_attr`` node of the parameter.
        transposed: whether the parameter is stored ``[experts, in, out]``.
        form: of the product.
        input: the node of x.
        routing: the node of the offsets, or of each row's expert; None in the form ``every``.
        before: whether, in the form ``gathered``, x is the left factor.
    """

    node: Node
    weight: Node
    transposed: bool
    form: Literal["grouped", "gathered", "every"]
    input: Node
    routing: Node | None
    before: bool = True

    @property
    def name(self) -> str:
        """Full name of the weight parameter, such as ``model.layers.0.mlp.experts.gate_up_proj``."""
        return str(self.weight.target)

    @property
    def path(self) -> str:
        """The site: a module has several weights of experts, so it is the weight's name unless that says nothing."""
        return weight_site(self.name)

    @property
    def result(self) -> Node | None:
        """The node of y ``[..., out_features]``; None if it is not read as that alone."""
        if self.form != "gathered":
            return self.node
        axis = 1 if self.before else 2
        (reader, *others) = self.node.users
        is_row = reader.target is aten.squeeze.dim and reader.args[1] in (axis, axis - 3)
        return reader if is_row and not others else None

    @property
    def experts(self) -> int:
        return int(value(self.weight).shape[0])

    @property
    def out_features(self) -> int:
        return int(value(self.weight).shape[2 if self.transposed else 1])

    @property
    def in_features(self) -> int:
        return int(value(self.weight).shape[1 if self.transposed else 2])


def weight_site(name: str) -> str:
    """The module of a weight; the name itself of one that is not called a weight."""
    return module_path(name) if name.rpartition(".")[2].startswith("weight") else name


def expert_linears(gm: GraphModule) -> Iterator[ExpertLinear]:
    """The products of a graph with the dense weights of experts, in order of execution."""
    for node in gm.graph.nodes:
        found = _grouped(gm, node) or _batched(gm, node)
        if found is not None:
            yield found


def grouped_operands(node: Node) -> tuple[Node, Node, Node | None] | None:
    """x, weight ``[experts, in, out]`` and offsets of a product of the grouped form; None for any other call."""
    names = _GROUPED.get(getattr(getattr(node.target, "_schema", None), "name", ""))
    if names is None:
        return None
    x, weight, offsets = (arguments(node)[name] for name in names)
    return x, weight, offsets


def _grouped(gm: GraphModule, node: Node) -> ExpertLinear | None:
    operands = grouped_operands(node)
    if operands is None:
        return None
    x, weight, offsets = operands
    read = _weight(gm, weight)
    if read is None or not isinstance(offsets, Node) or value(x).dim() != 2:
        return None
    return ExpertLinear(node, read[0], not read[1], "grouped", x, offsets)  # it multiplies by [experts, in, out]


def _batched(gm: GraphModule, node: Node) -> ExpertLinear | None:
    if node.target != aten.bmm.default:
        return None
    left, right = node.args[:2]
    for x, weight, before in ((left, right, True), (right, left, False)):
        assert isinstance(x, Node) and isinstance(weight, Node)
        read = _weight(gm, weight)
        if read is not None and before and _is_one_for_each(x, read[0]):
            return ExpertLinear(node, read[0], not read[1], "every", x, None)
        rows = _row(x, 1 if before else 2)
        if weight.target == aten.index.Tensor and rows is not None:
            read, expert = _weight(gm, weight.args[0]), _only_position(weight)
            if read is not None and expert is not None:
                return ExpertLinear(node, read[0], read[1] != before, "gathered", rows, expert, before)
    return None


def _is_one_for_each(x: Node, weight: Node) -> bool:
    """Whether an operand has a matrix for each expert."""
    size = value(x).shape[0]
    return isinstance(size, int) and size == value(weight).shape[0]


def _only_position(index: Node) -> Node | None:
    """The positions along the first axis that an index takes, if it takes nothing else."""
    positions: Any = index.args[1]
    return positions[0] if len(positions) == 1 and value(positions[0]).dim() == 1 else None


def _row(x: Node, axis: int) -> Node | None:
    """The matrix whose rows an operand has as matrices of one row, or column."""
    if x.target != aten.unsqueeze.default or value(x).dim() != 3:
        return None
    matrix, dim = x.args[:2]
    return matrix if dim in (axis, axis - 3) else None  # type: ignore[return-value]


def _weight(gm: GraphModule, node: Any) -> tuple[Node, bool] | None:
    """The read of a parameter of three dimensions behind a node, and whether its matrices are transposed there."""
    swapped = False
    while isinstance(node, Node) and node.op == "call_function":
        order = traits.permutation(node)
        if order == (0, 2, 1):
            swapped = not swapped
        elif FROZEN not in node.meta:
            return None
        node = read_of(node) if FROZEN in node.meta else node.args[0]
    parameter = attribute(gm, str(node.target)) if isinstance(node, Node) and node.op == "get_attr" else None
    return (node, swapped) if isinstance(parameter, nn.Parameter) and parameter.dim() == 3 else None


Product = Callable[..., Tensor]


def replace_product(gm: GraphModule, linear: ExpertLinear, product: Product, *inputs: Any) -> None:
    """Replaces a product of experts by ``product(x, offsets, *inputs)``.

    Args:
        gm: the graph module.
        linear: the product.
        product: computes the rows ``[rows, out]`` of x ``[rows, in]`` sorted by expert, whose offsets are int32 or
            int64 ``[experts]``.
        inputs: as `insert_function` takes them.
    """
    routing = () if linear.routing is None else (linear.routing,)
    experts, before = linear.experts, linear.before

    def grouped(x: Tensor, offsets: Tensor, *state: Any) -> Tensor:
        return product(x, offsets, *state)

    def gathered(x: Tensor, expert: Tensor, *state: Any) -> Tensor:
        order = expert.argsort(stable=True)
        offsets = torch.searchsorted(expert[order], torch.arange(experts, device=x.device), right=True)
        rows = product(x[order], offsets, *state)[order.argsort()]
        return rows.unsqueeze(1 if before else 2)

    def every(x: Tensor, *state: Any) -> Tensor:
        each = x.shape[1]
        offsets = torch.arange(1, experts + 1, device=x.device) * each
        return product(x.flatten(0, 1), offsets, *state).view(experts, each, -1)

    fn: Callable[..., Tensor] = {"grouped": grouped, "gathered": gathered, "every": every}[linear.form]
    result = insert_function(gm, fn, linear.input, *routing, *inputs, before=linear.node)
    replace(linear.node, result)
