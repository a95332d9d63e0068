"""Applies implementation choices to a copy of Dynamo's graph, and adds the inputs they need.

The copy is made at the first edit. Each group of products becomes one call: a product alone, a gate with what it
gates, or several products of one input. Weights in another form (compressed, expanded, packed for a library) come in as
extra inputs that follow the weights at run time, see `graph.runtime_state`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from fxsparse.codegen.cpu.operators import direct
from fxsparse.codegen.fused_ops import cusparselt_linear
from fxsparse.graph import arguments
from fxsparse.graph.dynamo import add_placeholder, copy_dynamo_graph, placeholders, static_fake
from fxsparse.graph.runtime_state import FollowedStates, Slot
from fxsparse.lowering.choose import LINEARS, cpp_kernel, library_algorithm, runs_below_autograd
from fxsparse.lowering.find import Product
from fxsparse.lowering.fusion import (
    NM_LINEAR,
    NM_LINEAR_EPILOGUE,
    ON_SPARSE_TENSOR_CORES,
    GatedPair,
    arguments_on_cores,
    following,
    fuse_linears,
    has_own_kernel,
)
from fxsparse.lowering.group import Group
from fxsparse.lowering.masked import COMPRESSED_FORM, Masks
from fxsparse.lowering.pins import Pins
from fxsparse.lowering.sites import fake_of, operators
from fxsparse.lowering.weights import Compress, Expand, Join, PackForLibrary, PackMask, PackMetadata, Rule
from fxsparse.ops.nm_values import nm_values
from fxsparse.ops.operator import COMPRESSED, CUSPARSELT, DENSE, OPERATOR, OPERATORS, REFERENCE, operator_name


class LoweredGraph:
    """A copy of Dynamo's graph, made at the first edit, and the extra inputs it takes.

    Args:
        gm: Dynamo's graph, or one like it; it stays as it is.
        example_inputs: its real inputs.
        names: full names of those that are parameters or buffers, by position.
    """

    def __init__(self, gm: GraphModule, example_inputs: Sequence[Any], names: dict[int, str]):
        self.gm, self.example_inputs, self.names = gm, example_inputs, names
        self.slots: dict[tuple[tuple[int, ...], Rule], tuple[Slot, list[Node]]] = {}

    @property
    def is_edited(self) -> bool:
        return "_copied" in vars(self)

    @property
    def copy(self) -> GraphModule:
        return self._copied[0]

    @property
    def twins(self) -> dict[Any, Node]:
        """What stands in the copy for a node of Dynamo's graph."""
        return self._copied[1]

    @functools.cached_property
    def _copied(self) -> tuple[GraphModule, dict[Any, Node]]:
        copy = copy_dynamo_graph(self.gm)
        return copy, dict(zip(self.gm.graph.nodes, copy.graph.nodes, strict=True))

    def apply(self, group: Group) -> None:
        """Lets products run as they were chosen and grouped to. Those that run as they stand stay, gradients too
        (`fxsparse.lowering.after_partition`)."""
        products, (first, *_), implementation = group.products, group.products, group.implementation
        if implementation == DENSE and not first.site.in_memory:
            self._expand(first)
        elif group.pair is not None:
            self._gate(products, group.pair)
        elif len(products) > 1:
            target, args = self._call(products, implementation, self._joined_bias(products))
            self._split([product.node for product in products], target, args)
        elif first.masks is not None:
            if implementation == COMPRESSED:
                self._compress_masked(first, first.masks)
        elif runs_below_autograd(first.site, implementation):
            return  # `fxsparse.lowering.after_partition`
        elif implementation not in (DENSE, OPERATOR, REFERENCE) and first.site.op in LINEARS:
            target, args = self._call(products, implementation, self.twins.get(first.bias))
            self._replace(first.node, target, *args)

    def fuse(self, pins: Pins) -> None:
        """Lets kernels take over what follows their linears."""
        calls = [node for _, node in operators(self.copy if self.is_edited else self.gm)]
        if any(has_own_kernel(node) and following(node) for node in calls):
            pinned = pins.of("nm_linear").name == REFERENCE
            fuse_linears(self.copy, lambda node: pinned or not has_own_kernel(node))

    def finish(self) -> tuple[GraphModule, tuple[Slot, ...]]:
        """The copy, and where its extra inputs come from; the graph itself if nothing was edited."""
        if not self.is_edited:
            return self.gm, ()
        self.copy.graph.lint()
        self.copy.recompile()
        return self.copy, tuple(slot for slot, _ in self.slots.values())

    # --- one product --------------------------------------------------------------------------------------------------

    def _call(self, products: Sequence[Product], implementation: str, bias: Node | None) -> tuple[Any, tuple[Any, ...]]:
        """What computes products on one input, with their weights below each other."""
        first = products[0]
        x = self.twins[first.x]
        if implementation == CUSPARSELT:
            (packed,) = self._extra_inputs(first.weights, PackForLibrary(first.transposed), ("packed",))
            args = (x, packed, bias, first.out_features, *library_algorithm(first.site))
            return cusparselt_linear._opoverload, args
        named = {} if first.site.in_memory else arguments(first.node)
        target = ON_SPARSE_TENSOR_CORES.get((implementation, "down" in named))
        if target is not None:
            values, metadata = self._for_sparse_tensor_cores(products, operator_name(target) or "")
            twins = {name: self.twins[arg] if isinstance(arg, Node) else arg for name, arg in named.items()}
            return target, arguments_on_cores(twins | {"x": x, "bias": bias}, values, metadata)
        values, indices = self._compressed(products)
        return NM_LINEAR, (x, values, indices, None, bias, first.pattern.n, first.pattern.m)

    def _compressed(self, products: Sequence[Product], *, alternating: bool = False) -> list[Node]:
        """Values and indices of the weights below each other, or with rows that alternate."""
        first = products[0]
        rule = Compress(first.pattern, first.transposed, alternating=alternating) if first.site.in_memory else None
        prefix = "gated_" if alternating else "stacked_" if len(products) > 1 else ""
        kinds = (f"{prefix}values", f"{prefix}indices")
        return self._extra_inputs(_positions(products), rule or Join(alternating), kinds)

    def _for_sparse_tensor_cores(self, products: Sequence[Product], target: str) -> list[Node]:
        """Values and metadata of the weights, as an operator reads them; the values of a compressed weight are read
        where they are."""
        first = products[0]
        if first.site.in_memory:
            rule = Compress(first.pattern, first.transposed, metadata=target)
            return self._extra_inputs(_positions(products), rule, ("values", "metadata"))
        _, indices = first.weights
        (metadata,) = self._extra_inputs((indices,), PackMetadata(target), ("metadata",))
        return [self.twins[arguments(first.node)["values"]], metadata]

    def _expand(self, product: Product) -> None:
        """Lets an operator run as it does on a dense weight, which is expanded once."""
        (weight,) = self._extra_inputs(product.weights, Expand(product.pattern), ("dense",))
        twin, compute = self.twins[product.node], OPERATORS[product.site.op].dense
        assert compute is not None
        tracer, before = GraphAppendingTracer(twin.graph), twin.prev

        def proxy(arg: Any) -> Any:
            return _Shaped(self.twins[arg], tracer) if isinstance(arg, Node) else arg

        with twin.graph.inserting_before(twin):
            named = {name: proxy(arg) for name, arg in arguments(product.node).items()}
            result: Any = compute(Proxy(weight, tracer), **named)
        node = twin.prev
        while node is not before:
            node.meta, node = dict(twin.meta), node.prev
        self._stand_in(product.node, result.node)

    def _compress_masked(self, product: Product, masks: Masks) -> None:
        """Lets an operator on a masked weight run on the kept values, at positions that follow the mask."""
        n, m = masks.pattern.n, masks.pattern.m
        kinds = ("indices", "packed_column_mask")[: len(masks.positions)]
        indices, *column_mask = self._extra_inputs(masks.positions, PackMask(masks.pattern), kinds)
        twin = self.twins[product.node]
        named = {
            name: self.twins[arg] if isinstance(arg, Node) else arg for name, arg in arguments(product.node).items()
        }
        with twin.graph.inserting_before(twin):
            values = twin.graph.call_function(nm_values.overload, (named["weight"], indices, n, m))
        args: tuple[Any, ...] = (named["x"], values, indices, column_mask[0] if column_mask else None)
        if "down" in named:
            args = (*args, named["down"], named["up"], named["bias"], n, m, named["scale"])
        else:
            args = (*args, named["bias"], n, m)
        self._replace(product.node, OPERATORS[COMPRESSED_FORM[product.site.op]].overload, *args)

    # --- several products as one --------------------------------------------------------------------------------------

    def _gate(self, products: Sequence[Product], pair: GatedPair) -> None:
        """Lets a linear and the one that it gates run as one product, on weights whose rows alternate."""
        first, twins, graph, end = products[0], self.twins, self.copy.graph, pair.nodes[-1]
        weights = self._compressed(products, alternating=True)
        with graph.inserting_before(twins[end]):
            bias = None
            if first.bias is not None:
                rows = graph.call_function(torch.stack, ([twins[product.bias] for product in products], 1))
                bias = graph.call_function(torch.flatten, (rows,))
            kernel = cpp_kernel(first.site, OPERATOR, (pair.step,))
            if kernel is not None:
                named = {"x": twins[first.x], "values": weights[0], "indices": weights[1], "bias": bias}
                call = graph.call_function(*direct("nm_linear", named, kernel))
            else:
                args: tuple[Any, ...] = (
                    twins[first.x],
                    *weights,
                    bias,
                    first.pattern.n,
                    first.pattern.m,
                    pair.step,
                    [],
                )
                call = graph.call_function(NM_LINEAR_EPILOGUE, args)
        call.meta = dict(twins[end].meta)
        self._stand_in(end, call)
        for node in (*reversed(pair.nodes[:-1]), pair.gate, pair.up):
            graph.erase_node(twins[node])

    def _joined_bias(self, products: Sequence[Product]) -> Node | None:
        if products[0].bias is None:
            return None
        with self.copy.graph.inserting_before(self.twins[products[0].node]):
            return self.copy.graph.call_function(torch.cat, ([self.twins[product.bias] for product in products],))

    def _split(self, nodes: Sequence[Node], target: Any, args: tuple[Any, ...]) -> None:
        """Replaces linears by parts of one product, which stands before the first of them."""
        graph, twins, sizes = self.copy.graph, self.twins, [int(fake_of(node).shape[-1]) for node in nodes]
        # A later one's bias may stand below the first of them; what they read are inputs of the graph or x.
        with graph.inserting_before(twins[nodes[0]]):
            product = graph.call_function(target, args)
            parts = graph.call_function(torch.split, (product, sizes), {"dim": -1})
        for position, node in enumerate(nodes):
            self._replace(node, operator.getitem, parts, position)

    # --- editing ------------------------------------------------------------------------------------------------------

    def _extra_inputs(self, positions: tuple[int, ...], rule: Rule, kinds: tuple[str, ...]) -> list[Node]:
        """The inputs that hold what a rule makes of the tensors at some positions."""
        key = (positions, rule)
        if key not in self.slots:
            name = self.names.get(positions[0], f"input_{positions[0]}")
            slot = Slot(positions, FollowedStates(rule), tuple(f"{name}_{kind}" for kind in kinds))
            after, inputs = placeholders(self.copy)[-1], []
            for input_name, tensor in zip(slot.names, slot.get(self.example_inputs) or (), strict=True):
                with self.copy.graph.inserting_after(after):
                    after = add_placeholder(self.copy.graph, input_name, static_fake(self.gm, tensor))
                inputs.append(after)
            self.slots[key] = (slot, inputs)
        return self.slots[key][1]

    def _replace(self, node: Node, target: Any, *args: Any) -> None:
        """A call in the place of a node's twin."""
        twin = self.twins[node]
        with twin.graph.inserting_before(twin):
            call = twin.graph.call_function(target, args)
        call.meta = dict(twin.meta)
        self._stand_in(node, call)

    def _stand_in(self, node: Node, new: Node) -> None:
        """Lets a node be the twin of another one from now on."""
        twin = self.twins[node]
        twin.replace_all_uses_with(new)
        twin.graph.erase_node(twin)
        self.twins[node] = new


class _Shaped(Proxy):
    """A proxy whose shape is that of the node's value, so that sizes become numbers and not nodes."""

    @property
    def shape(self) -> torch.Size:
        shape: torch.Size = fake_of(self.node).shape
        return shape


def _positions(products: Sequence[Product]) -> tuple[int, ...]:
    """Of all values and then of all indices, or of all dense weights."""
    parts = zip(*(product.weights for product in products), strict=True)
    return tuple(position for part in parts for position in part)
