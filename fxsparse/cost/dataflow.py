"""Reads a graph as values and the operator calls that compute them, for counting costs: the graph of gradients.

A value is a tensor as far as gradients are concerned, not a node:

| operator | value of its result |
|---|---|
| a view | the value of its base |
| an in-place write | a new value, also for the written tensor and all its views |
| attention, experts | one value for every matrix product inside, such as ``attention:scores`` |
| any other | a new value |

Gradients stop at integers, at ``detach``, at newly created tensors and in regions without gradients. To read this file,
start at `Dataflow` and `Operation`, then follow `_Reader.call`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx
import torch
from networkx import DiGraph
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_unflatten

from fxsparse.cost import formulas, pointwise
from fxsparse.cost.formulas import Operand, Product
from fxsparse.cost.sizes import Sizes, Symbolic
from fxsparse.errors import OptionError, RewriteError
from fxsparse.graph import attribute, stack_path, traits
from fxsparse.ops.flops import Formula

# Higher-order operators that only run a submodule, with the position of the submodule among their arguments.
_INLINED = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}


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
        values: the names of the values it computes: one for each of its products, one if it has no product, none for a
            view.
        call: counts its FLOPs; None if it has no product.
    """

    node: Node
    kind: formulas.Kind | None
    module: str
    values: tuple[str, ...] = ()
    call: Call | None = None


@dataclass
class Dataflow:
    """The values of a graph, and the operations that compute them, in the order of the forward pass.

    Attributes:
        graph: the values by name; an edge runs as the gradient does, from a value to each that it was computed from.

            - A value is called as its parameter, or as its node, with the name of the product for one of several
              (``attention:scores``). It has ``operator``, which is ``parameter``, ``buffer`` or ``input`` for those,
              and ``module``, the path of the module that computes it.
            - An edge has ``gradients``: the positions of its gradients among those of the product that computes the
              value, one for every place at which the other is an operand; none if the gradient needs no product.
        operations: every operator call that reads or writes tensors.
        loss: the values at which the backward pass starts.
    """

    graph: DiGraph = field(default_factory=DiGraph)
    operations: list[Operation] = field(default_factory=list)
    loss: list[str] = field(default_factory=list)


def reached(graph: DiGraph, nodes: Iterable[str]) -> set[str]:
    """Some nodes of a graph and all their descendants."""
    return set(itertools.chain.from_iterable(networkx.bfs_layers(graph, nodes)))


def read(gm: GraphModule, names: Mapping[str, str], loss: str | None = None, *, pointwise: bool = False) -> Dataflow:
    """The dataflow of a training-IR graph.

    Args:
        gm: the graph module.
        names: maps every parameter name to the name used here, the same for all names of a tied parameter.
        loss: name of the output at which the backward pass starts. By default the output called ``loss``, else the
            scalar outputs, else all floating-point outputs.
        pointwise: count what is no matrix product too, see `fxsparse.cost.pointwise`.

    Raises:
        OptionError: no output is called ``loss``.
    """
    reader = _Reader(gm, names, pointwise)
    reader.read(gm, enabled=True, module="")
    reader.flow.loss = reader.loss(loss)
    return reader.flow


class _Reader:
    """Walks a graph and its submodules once and collects a `Dataflow`."""

    def __init__(self, gm: GraphModule, names: Mapping[str, str], counts_pointwise: bool):
        self.counts_pointwise = counts_pointwise
        self.gm, self.names, self.named, self.flow = gm, names, set(names.values()), Dataflow()
        self.sizes = Sizes(gm)
        # The value of every node: its name, a list for a submodule's outputs, or None for a node without a tensor.
        self.at: dict[Node, Any] = {}
        self.rewritten: dict[str, str] = {}  # the value after an in-place write, by the value before it
        self.prefix = ""  # of names inside a submodule, because node names are unique only within one graph

    def read(self, gm: GraphModule, *, enabled: bool, module: str) -> None:
        for node in gm.graph.nodes:
            where = stack_path(node) or module
            if node.op == "get_attr":
                self.at[node] = self.attribute(gm, str(node.target))
            elif node.op == "placeholder" and node not in self.at:
                self.at[node] = self.add(self.prefix + node.name, "input", where) if tensors_of(node) else None
            elif node.op == "call_function" and node.target is torch._C._set_grad_enabled:
                enabled = bool(node.args[0])
            elif node.op == "call_function":
                self.call(gm, node, where, enabled)
            elif node.op == "call_module":
                formula = getattr(gm.get_submodule(str(node.target)), "flops", None)
                counted = (None, None) if formula is None else self.with_products(Call(node, formula), "product")
                self.compute(node, *counted, where, enabled)
            elif node.op == "call_method":
                self.compute(node, None, None, where, enabled)

    def attribute(self, gm: GraphModule, name: str) -> str | None:
        if not isinstance(attribute(gm, name), Tensor):
            return None
        if name not in self.names:
            return self.add(name, "buffer", "")
        name = self.names[name]
        if name not in self.flow.graph:
            self.flow.graph.add_node(name, operator="parameter", module=name.rpartition(".")[0])
        return name

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
            self.flow.operations.append(Operation(node, kind, where))
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
        if not isinstance(node.target, torch._ops.OpOverload):
            return kind, None
        formula = self.formula(node, kind)
        if formula is None and kind is not None:
            return kind, None
        return self.with_products(Call(node, formula), kind)

    def formula(self, node: Node, kind: formulas.Kind | None) -> Formula | None:
        """The formula of a call; None if there is none, or its FLOPs are not to be counted."""
        formula = formulas.formula_of(node.target) if kind == "product" else None
        if not self.counts_pointwise:
            return formula
        if formula is not None:
            return pointwise.beside(formula, node.target)
        return pointwise.formula_of(node.target) if kind and _is_floating(node) else None

    def with_products(self, call: Call, kind: formulas.Kind | None) -> tuple[formulas.Kind | None, Call | None]:
        """The kind of a call that is counted by its products; no kind where it cannot be."""
        try:
            products = call.products(self.sizes)
        except (OptionError, RewriteError):
            return None, None
        return (kind, call) if kind else ("product", call) if products[-1].flops else ("elementwise", None)

    def compute(self, node: Node, kind: formulas.Kind | None, call: Call | None, where: str, enabled: bool) -> None:
        """Adds the values that a call computes."""
        flows = enabled and kind != "create" and not _is_detach(node) and (kind is None or _is_floating(node))
        if call is None:
            read = [source for source in map(self.current, traits.values_read(node)) if source is not None]
            if kind == "view":
                read = read[:1]
            sources = [(source, None) for source in read] if flows else []
            values: tuple[str, ...] = (self.add(self.prefix + node.name, _operator(node), where, sources),)
        else:
            values = self.add_products(call, where, flows)
        self.at[node] = values[-1]
        self.flow.operations.append(Operation(node, kind, where, values, call))
        self.write(node)

    def add_products(self, call: Call, where: str, flows: bool) -> tuple[str, ...]:
        products, operands = call.bind(self.sizes)
        read = set(traits.values_read(call.node))
        named = {factor for product in products for factor in product.gradients}
        computed: dict[Product, str] = {}
        for product in products:
            is_last = product is products[-1]
            factors = [*product.gradients, *(operand for operand in operands if is_last and operand not in named)]
            sources = []
            for position, factor in enumerate(factors):
                if isinstance(factor, Product):
                    source: str | None = computed[factor]
                else:
                    source = self.current(operands[factor]) if operands[factor] in read else None
                if flows and source is not None:
                    sources.append((source, position if position < len(product.gradients) else None))
            name = self.prefix + call.node.name + ("" if is_last else f":{product.name}")
            computed[product] = self.add(name, _operator(call.node), where, sources)
        return tuple(computed.values())

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

    def current(self, node: Node) -> str | None:
        name = self.at.get(node)
        while isinstance(name, str) and name in self.rewritten:
            name = self.rewritten[name]
        return name if isinstance(name, str) else None

    def add(self, name: str, operator: str, module: str, sources: Iterable[tuple[str, int | None]] = ()) -> str:
        """Adds a value that is no parameter, and returns its name: another one if a parameter or a value has it."""
        while name in self.flow.graph or name in self.named:
            name += "'"
        self.flow.graph.add_node(name, operator=operator, module=module)
        for source, position in sources:
            before = self.flow.graph.edges[name, source]["gradients"] if self.flow.graph.has_edge(name, source) else ()
            self.flow.graph.add_edge(name, source, gradients=before if position is None else (*before, position))
        return name

    def loss(self, name: str | None) -> list[str]:
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
        return [value for value in map(self.current, chosen) if value is not None]


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
