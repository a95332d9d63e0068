"""Running a part of a graph at another batch size.

The part lies between two nodes, a source and a sink. Everything else it reads is a side input. Side inputs that carry
the batch size are replaced:

| side input | replacement |
|---|---|
| a size | its expression, computed from the new batch size |
| a tensor made from sizes and parameters alone | the same tensor, made at the new batch size |
| a tensor that depends on input values | the caller's conversion of it |

Sizes that are read inside follow by themselves. Nothing but the sink may be read from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._pytree import tree_leaves

from fxsparse import graph as fx
from fxsparse.errors import RewriteError
from fxsparse.graph import traits

aten = torch.ops.aten
_PASS = "multiplex"


@dataclass(frozen=True)
class Region:
    """The nodes between ``source`` and ``sinks``, in order: they depend on the source, and a sink depends on them."""

    source: Node
    sinks: tuple[Node, ...]
    nodes: tuple[Node, ...]

    @property
    def first(self) -> Node:
        return self.nodes[0]


def region_between(gm: GraphModule, source: Node, *sinks: Node) -> Region:
    """The region between two places of a graph."""
    after = {source}
    for node in gm.graph.nodes:
        if any(read in after for read in node.all_input_nodes):
            after.add(node)
    before = set(sinks)
    for node in reversed(gm.graph.nodes):
        if any(user in before for user in node.users):
            before.add(node)
    inside = after & before - {source}
    return Region(source, sinks, tuple(node for node in gm.graph.nodes if node in inside))


def symbols(value: Any) -> set[sympy.Symbol]:
    """The symbols in the sizes of a fake value."""
    free: set[sympy.Symbol] = set()
    for leaf in tree_leaves(value):
        sizes = leaf.shape if isinstance(leaf, Tensor) else (leaf,)
        free.update(*(size.node.expr.free_symbols for size in sizes if isinstance(size, SymInt)))
    return free


def batch_symbols(gm: GraphModule, node: Node) -> set[sympy.Symbol]:
    """The symbols that stand for the batch size of ``node``; each input may have one of its own.

    Raises:
        RewriteError: the batch size of ``node`` is a number, or not a size that varies by itself.
    """
    size = fx.value(node).shape[0]
    if not isinstance(size, SymInt) or not isinstance(size.node.expr, sympy.Symbol):
        raise RewriteError(
            f"the batch dimension of {node.name} is {size}, not a symbol; trace with an example of at least two rows "
            "and dynamic_batch=True",
            pass_name=_PASS,
            site=fx.stack_path(node),
        )
    rows_of_inputs = {size.node.expr}
    for placeholder in gm.graph.find_nodes(op="placeholder"):
        value = placeholder.meta.get("val")
        if isinstance(value, Tensor) and value.dim() and isinstance(value.shape[0], SymInt):
            rows = value.shape[0].node
            if isinstance(rows.expr, sympy.Symbol) and rows.hint == size.node.hint:
                rows_of_inputs.add(rows.expr)
    return rows_of_inputs


def run_at(
    gm: GraphModule,
    region: Region,
    batch: set[sympy.Symbol],
    size: Node,
    outside: Node,
    convert: Callable[[Node, Node], Node],
) -> None:
    """Lets a region run at batch ``size``; its source already does.

    Args:
        gm: the graph.
        region: the part of it.
        batch: symbols of the region's batch size so far.
        size: the node of the new batch size, an integer.
        outside: the node of the batch size of the rest of the graph.
        convert: called with a side input that depends on values and the node to insert before; returns the replacement.

    Raises:
        RewriteError: a node in the region other than the sink is read from outside.
    """
    inside = set(region.nodes)
    _check_nothing_else_leaves(region, batch, outside)
    maker = _Maker(gm, batch, size)
    made: dict[Node, Node] = {}
    for node in region.nodes:
        for side in node.all_input_nodes:
            if side in inside or side is region.source:
                continue
            if symbols(side.meta.get("val")) & batch:
                if side not in made:
                    made[side] = convert(side, node) if maker.depends_on_values(side) else maker.make(side, node)
                node.replace_input_with(side, made[side])


def _check_nothing_else_leaves(region: Region, batch: set[sympy.Symbol], outside: Node) -> None:
    inside = set(region.nodes)
    for node in region.nodes:
        readers = [user for user in node.users if user not in inside]
        if node in region.sinks or not readers or not symbols(fx.value(node)) & batch:
            continue
        if isinstance(fx.value(node), SymInt) and isinstance(fx.value(node).node.expr, sympy.Symbol):
            for reader in readers:
                reader.replace_input_with(node, outside)
            continue
        advice = "trace with use_cache=False, output_hidden_states=False and output_attentions=False"
        if readers[0].op == "call_module":  # a loss of distillation
            advice = "distil logits alone with weights=(a, b, 0)"
        raise RewriteError(
            f"{node.name} is computed inside the repeated core and read outside it, by {readers[0].name}; at another "
            f"batch size nothing but the core's last hidden states may leave it: {advice}",
            pass_name=_PASS,
            site=fx.stack_path(node),
        )


class _Maker:
    """Copies nodes that depend on sizes, at another batch size."""

    def __init__(self, gm: GraphModule, batch: set[sympy.Symbol], size: Node):
        self.gm, self.batch, self.size = gm, batch, size
        self.twins: dict[Node, Node] = {}
        self.by_value: dict[Node, bool] = {}

    def depends_on_values(self, node: Node) -> bool:
        """Whether ``node`` depends on the values of an input, not only on its sizes."""
        pending = [node]
        while pending:
            current = pending[-1]
            if current in self.by_value:
                pending.pop()
            elif current.op != "call_function" or _reads_sizes_only(current):
                self.by_value[current] = current.op == "placeholder"
            elif unknown := [read for read in current.all_input_nodes if read not in self.by_value]:
                pending += unknown
            else:
                self.by_value[current] = any(self.by_value[read] for read in current.all_input_nodes)
        return self.by_value[node]

    def make(self, node: Node, before: Node) -> Node:
        """``node`` at the new batch size, inserted before ``before``."""
        if not symbols(node.meta.get("val")) & self.batch:
            return node
        if node not in self.twins:
            if node.target is aten.sym_size.int:
                self.twins[node] = self.size
                return self.size
            lent = set(node.all_input_nodes) - set(traits.values_read(node))  # for its dtype and device: any will do
            with self.gm.graph.inserting_before(before):
                twin = self.gm.graph.node_copy(node, lambda read: read if read in lent else self.make(read, before))
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                raise RewriteError(
                    f"{node.name}, which carries the batch size into the core, runs a region of its own; trace the "
                    "model without autocast",
                    pass_name=_PASS,
                    site=fx.stack_path(node),
                )
            fx.refresh(self.gm, twin)
            self.twins[node] = twin
        return self.twins[node]


def _reads_sizes_only(node: Node) -> bool:
    """Whether a call takes nothing from its tensors but sizes, and has these as numbers."""
    known = traits.of(node.target)
    return node.target is aten.sym_size.int or (known.work == "create" and not known.shaped_like)


def refresh(gm: GraphModule, nodes: Iterable[Node], batch: set[sympy.Symbol], size: Node) -> None:
    """Propagates shapes through nodes that run at a new batch size, and checks that nothing else changed.

    Raises:
        RewriteError: a node cannot run at that size; it names the node.
    """
    number = fx.value(size).node.hint
    known = {symbol: hint for node in gm.graph.find_nodes(op="placeholder") for symbol, hint in _symbol_hints(node)}
    resized = {**known, **dict.fromkeys(batch, number)}
    for node in nodes:
        if node.op != "call_function":
            continue
        old = node.meta.get("val")
        if (reason := _unfit(node, old)) is not None:
            raise RewriteError(reason, pass_name=_PASS, site=fx.stack_path(node))
        try:
            fx.refresh(gm, node)
        except Exception as error:
            raise RewriteError(
                f"{node.name} cannot run at another batch size: {error}", pass_name=_PASS, site=fx.stack_path(node)
            ) from error
        expected, actual = _numbers(old, resized), _numbers(node.meta["val"], known)
        if expected != actual or bool(symbols(old) & batch) != bool(symbols(node.meta["val"]) & batch):
            raise RewriteError(
                f"{node.name} has sizes {actual} at batch {number}, where {expected} follow from its place in the "
                "model; it ties the batch to another size",
                pass_name=_PASS,
                site=fx.stack_path(node),
            )


def _unfit(node: Node, value: Any) -> str | None:
    """Why a node cannot run at a batch size of its own, whatever that is."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return f"{node.name} in the core runs a region of its own; trace the model without autocast"
    if any(free_unbacked_symbols(leaf) for leaf in tree_leaves(value) if isinstance(leaf, (Tensor, SymInt))):
        return (
            f"{node.name} in the core has a size that data decides, as the rows that a router sends to an expert, and "
            "what that is at another batch size no graph says; leave this pass out"
        )
    return None


def _symbol_hints(node: Node) -> Iterable[tuple[sympy.Symbol, int]]:
    value = node.meta.get("val")
    for size in value.shape if isinstance(value, Tensor) else ():
        if isinstance(size, SymInt) and isinstance(size.node.expr, sympy.Symbol):
            yield size.node.expr, size.node.hint


def _numbers(value: Any, known: Mapping[sympy.Symbol, int]) -> list[tuple[int, ...]]:
    """The sizes of a fake value, with numbers for symbols."""

    def number(size: Any) -> int:
        return int(size.node.expr.xreplace(known)) if isinstance(size, SymInt) else int(size)

    return [
        tuple(map(number, leaf.shape)) if isinstance(leaf, Tensor) else (number(leaf),)
        for leaf in tree_leaves(value)
        if isinstance(leaf, (Tensor, SymInt))
    ]
