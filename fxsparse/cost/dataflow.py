"""Reads a graph as values and the operator calls that compute them, for counting costs.

A value is a tensor as far as gradients are concerned, not a node:

| operator | value of its result |
|---|---|
| a view | the value of its base |
| an in-place write | a new value, also for the written tensor and all its views |
| attention, experts | one value for every matrix product inside, such as ``attention:scores`` |
| any other | a new value |

Gradients stop at integers, at ``detach``, at newly created tensors and in regions without gradients. To read this file,
start at `Value` and `Operation`, then follow `_Reader.call`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_unflatten

from fxsparse.cost import formulas
from fxsparse.cost.formulas import Operand, Product
from fxsparse.cost.sizes import Sizes, Symbolic
from fxsparse.errors import OptionError, RewriteError
from fxsparse.graph import attribute, stack_path, traits
from fxsparse.ops.flops import Formula

# Higher-order operators that only run a submodule, with the position of the submodule among their arguments.
_INLINED = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor that gradients may flow through.

    Attributes:
        name: the parameter's full name or the node's name, with the name of the product for one of several
            (``attention:scores``).
        operator: the operator that computes it, or ``parameter``, ``buffer`` or ``input``.
        module: path of the module that computes it.
        sources: the values it depends on. Each has the position of its gradient among the gradients of the product that
            computes this value, or None if that gradient needs no product.
    """

    name: str
    operator: str
    module: str
    sources: tuple[tuple[int, int | None], ...] = ()


@dataclass(frozen=True, eq=False)
class Call:
    """A node with the formula that counts its FLOPs; without one they are measured."""

    node: Node
    formula: Formula | None

    def products(self, sizes: Sizes | Symbolic) -> Sequence[Product]:
        """The matrix products of the operator at these sizes."""
        return self.bind(sizes)[0]

    def bind(self, sizes: Sizes | Symbolic) -> tuple[Sequence[Product], dict[Operand, Node]]:
        """The matrix products of the operator at these sizes, and the node of every operand."""
        operands: dict[Operand, Node] = {}

        def convert(argument: Node) -> Any:
            operand = operand_of(argument, sizes)
            operands.update((item, argument) for item in tree_leaves(operand) if isinstance(item, Operand))
            return operand

        args, kwargs = map_arg((self.node.args, self.node.kwargs), convert)
        if self.formula is not None:
            return self.formula(operand_of(self.node, sizes), *args, **kwargs), operands
        if isinstance(sizes, Symbolic):
            raise OptionError(
                "the FLOPs of this operator were measured and have no closed form", site=str(self.node.target)
            )
        products = formulas.measure(self.node.target, args, kwargs)
        if products is None:
            raise OptionError(
                "the FLOPs of this operator could not be measured at these sizes", site=str(self.node.target)
            )
        return products, operands


@dataclass(frozen=True, eq=False)
class Operation:
    """An operator call.

    Attributes:
        node: the call.
        kind: the kind of operator, see `formulas.kind`; None if its cost is unknown.
        module: path of the module it belongs to.
        values: the indices of the values it computes: one for each of its products, one if it has no product, none for
            a view.
        call: counts its FLOPs; None if it has no product.
    """

    node: Node
    kind: formulas.Kind | None
    module: str
    values: range
    call: Call | None = None


@dataclass
class Dataflow:
    """The values of a graph, and the operations that compute them, in the order of the forward pass.

    Attributes:
        values: every value; its sources stand before it.
        operations: every operator call that reads or writes tensors.
        parameters: the index of the value of each parameter that the graph reads, by name.
        loss: the indices of the values at which the backward pass starts.
    """

    values: list[Value] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)
    loss: list[int] = field(default_factory=list)


def read(gm: GraphModule, names: Mapping[str, str], loss: str | None = None) -> Dataflow:
    """The dataflow of a training-IR graph.

    Args:
        gm: the graph module.
        names: maps every parameter name to the name used here, the same for all names of a tied parameter.
        loss: name of the output at which the backward pass starts. By default the output called ``loss``, else the
            scalar outputs, else all floating-point outputs.

    Raises:
        OptionError: no output is called ``loss``.
    """
    reader = _Reader(gm, names)
    reader.read(gm, enabled=True, module="")
    reader.flow.loss = reader.loss(loss)
    return reader.flow


class _Reader:
    """Walks a graph and its submodules once and collects a `Dataflow`."""

    def __init__(self, gm: GraphModule, names: Mapping[str, str]):
        self.gm, self.names, self.flow = gm, names, Dataflow()
        self.sizes = Sizes(gm)
        # The value of every node: an index, a list for a submodule's outputs, or None for a node without a tensor.
        self.at: dict[Node, Any] = {}
        self.rewritten: dict[int, int] = {}  # the value after an in-place write, by the value before it
        self.prefix = ""  # of names inside a submodule, because node names are unique only within one graph

    def read(self, gm: GraphModule, *, enabled: bool, module: str) -> None:
        for node in gm.graph.nodes:
            where = stack_path(node) or module
            if node.op == "get_attr":
                self.at[node] = self.attribute(gm, str(node.target))
            elif node.op == "placeholder" and node not in self.at:
                self.at[node] = self.add(Value(self.prefix + node.name, "input", where)) if tensors_of(node) else None
            elif node.op == "call_function" and node.target is torch._C._set_grad_enabled:
                enabled = bool(node.args[0])
            elif node.op == "call_function":
                self.call(gm, node, where, enabled)
            elif node.op == "call_module":
                formula = getattr(gm.get_submodule(str(node.target)), "flops", None)
                counted = (None, None) if formula is None else self.with_products(node, Call(node, formula))
                self.compute(node, *counted, where, enabled)
            elif node.op == "call_method":
                self.compute(node, None, None, where, enabled)

    def attribute(self, gm: GraphModule, name: str) -> int | None:
        if not isinstance(attribute(gm, name), Tensor):
            return None
        if name not in self.names:
            return self.add(Value(name, "buffer", ""))
        name = self.names[name]
        if name not in self.flow.parameters:
            self.flow.parameters[name] = self.add(Value(name, "parameter", name.rpartition(".")[0]))
        return self.flow.parameters[name]

    def call(self, gm: GraphModule, node: Node, where: str, enabled: bool) -> None:
        name = getattr(node.target, "__name__", "")
        kind = formulas.kind(node.target)
        if name == "getitem":
            source = self.at.get(node.args[0])  # type: ignore[arg-type]
            self.at[node] = source[node.args[1]] if isinstance(source, list) else source  # type: ignore[index]
        elif name in _INLINED and isinstance(node.target, torch._ops.HigherOrderOperator):
            self.inline(gm, node, name, where, enabled)
        elif kind == "free" or traits.switches_mode(node) or self.is_no_tensor(node):
            self.at[node] = None
        elif kind == "view" and self.is_passed_on(node):
            self.at[node] = self.current(node.all_input_nodes[0])
            self.flow.operations.append(Operation(node, kind, where, range(0)))
        else:
            self.compute(node, *self.counted(node, kind), where, enabled)

    def is_no_tensor(self, node: Node) -> bool:
        """Whether a call neither returns a tensor nor writes to one."""
        schema = getattr(node.target, "_schema", None)
        return "val" in node.meta and not tensors_of(node) and not (schema is not None and schema.is_mutable)

    def is_passed_on(self, node: Node) -> bool:
        """Whether gradients flow through a view to its base."""
        return not _is_detach(node) and _is_floating(node) == _is_floating(node.all_input_nodes[0])

    def inline(self, gm: GraphModule, node: Node, name: str, where: str, enabled: bool) -> None:
        at = _INLINED[name]
        inner = attribute(gm, str(node.args[at].target))  # type: ignore[union-attr]
        placeholders = [inner_node for inner_node in inner.graph.nodes if inner_node.op == "placeholder"]
        for placeholder, argument in zip(placeholders, node.args[at + 1 :], strict=True):
            self.at[placeholder] = self.at.get(argument) if isinstance(argument, Node) else None
        outer, self.prefix = self.prefix, f"{self.prefix}{node.name}."
        self.read(inner, enabled=bool(node.args[0]) if name == "wrap_with_set_grad_enabled" else enabled, module=where)
        self.prefix = outer
        (returned,) = inner.graph.output_node().args
        outputs = [self.at.get(out) if isinstance(out, Node) else None for out in tree_leaves(returned)]
        self.at[node] = outputs if isinstance(returned, (list, tuple)) else outputs[0]

    def counted(self, node: Node, kind: formulas.Kind | None) -> tuple[formulas.Kind | None, Call | None]:
        """The kind of a call, and its FLOPs if it has any: by formula, or measured if there is no formula."""
        if not tensors_of(node):
            return None, None
        if kind not in {"product", None} or not isinstance(node.target, torch._ops.OpOverload):
            return kind, None
        return self.with_products(node, Call(node, formulas.formula_of(node.target)))

    def with_products(self, node: Node, call: Call) -> tuple[formulas.Kind | None, Call | None]:
        """The kind of a call that is counted by its products; no kind where it cannot be."""
        try:
            products = call.products(self.sizes)
        except (OptionError, RewriteError):
            return None, None
        return ("product", call) if call.formula or products[-1].flops else ("elementwise", None)

    def compute(self, node: Node, kind: formulas.Kind | None, call: Call | None, where: str, enabled: bool) -> None:
        """Adds the values that a call computes."""
        start = len(self.flow.values)
        flows = enabled and kind != "create" and not _is_detach(node) and (kind is None or _is_floating(node))
        if call is None:
            sources = [(source, None) for source in map(self.current, traits.values_read(node)) if source is not None]
            if kind == "view":
                sources = sources[:1]
            self.add(Value(self.prefix + node.name, _operator(node), where, tuple(sources) if flows else ()))
        else:
            self.add_products(call, where, flows)
        self.at[node] = len(self.flow.values) - 1
        self.flow.operations.append(Operation(node, kind, where, range(start, len(self.flow.values)), call))
        self.write(node)

    def add_products(self, call: Call, where: str, flows: bool) -> None:
        products, operands = call.bind(self.sizes)
        named = {factor for product in products for factor in product.gradients}
        computed: dict[Product, int] = {}
        for product in products:
            is_last = product is products[-1]
            factors = [*product.gradients, *(operand for operand in operands if is_last and operand not in named)]
            sources = []
            for position, factor in enumerate(factors):
                source = computed[factor] if isinstance(factor, Product) else self.current(operands[factor])
                if flows and source is not None:
                    sources.append((source, position if position < len(product.gradients) else None))
            name = self.prefix + call.node.name + ("" if is_last else f":{product.name}")
            computed[product] = self.add(Value(name, _operator(call.node), where, tuple(sources)))

    def write(self, node: Node) -> None:
        """Gives the tensors that ``node`` writes in place their new value, for all later readers."""
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            return
        for argument, spec in zip(node.args, schema.arguments, strict=False):
            if isinstance(argument, Node) and spec.alias_info is not None and spec.alias_info.is_write:
                written = self.current(argument)
                if written is not None and written != self.at[node]:
                    self.rewritten[written] = self.at[node]

    def current(self, node: Node) -> int | None:
        index = self.at.get(node)
        while index in self.rewritten:
            index = self.rewritten[index]
        return index if isinstance(index, int) else None

    def add(self, value: Value) -> int:
        self.flow.values.append(value)
        return len(self.flow.values) - 1

    def loss(self, name: str | None) -> list[int]:
        (returned,) = self.gm.graph.output_node().args
        outputs = [out for out in tree_leaves(returned) if isinstance(out, Node)]
        fields = _output_fields(self.gm, returned)
        if name is not None and name not in fields:
            raise OptionError(
                f"the model has no such output; it names {', '.join(fields) or 'none of its outputs'}", site=name
            )
        if name is not None or "loss" in fields:
            chosen = [fields[name or "loss"]]
        else:
            floating = [out for out in outputs if _is_floating(out)]
            chosen = [out for out in floating if out.meta["val"].dim() == 0] or floating
        return [index for index in map(self.current, chosen) if index is not None]


def _output_fields(gm: GraphModule, returned: Any) -> dict[str, Node]:
    """The output nodes by name; empty unless the model returns a dictionary or a Hugging Face output."""
    info = getattr(gm.graph._codegen, "pytree_info", None)
    leaves = tree_leaves(returned)
    if info is None or info.out_spec is None or info.out_spec.num_leaves != len(leaves):
        return {}
    outputs = tree_unflatten(leaves, info.out_spec)
    if not isinstance(outputs, Mapping):
        return {}
    return {str(name): out for name, out in outputs.items() if isinstance(out, Node)}


def value_of(node: Node) -> Any:
    """The fake value of a node, or None."""
    return node.meta.get("val", node.meta.get("example_value"))


def tensors_of(node: Node) -> list[Tensor]:
    """The fake tensors that a node returns."""
    return [leaf for leaf in tree_leaves(value_of(node)) if isinstance(leaf, Tensor)]


def operand_of(node: Node, sizes: Sizes | Symbolic) -> Any:
    """The argument that stands for a node in a formula: an operand, a number, or a tuple of them."""
    value = value_of(node)
    if isinstance(value, Tensor):
        return sizes.operand(value)
    if isinstance(value, (list, tuple)):
        return tuple(sizes.operand(item) if isinstance(item, Tensor) else item for item in value)
    return sizes.number(value) if isinstance(value, (int, torch.SymInt)) else value


def _is_floating(node: Node) -> bool:
    return any(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors_of(node))


def _operator(node: Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return str(schema.name if schema is not None else node.target)


def _is_detach(node: Node) -> bool:
    return traits.of(node.target).detaches
