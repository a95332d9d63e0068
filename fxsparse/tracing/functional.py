"""In-place operators on temporaries become functional ones, so that passes see what a value is made of.

    w /= w.sum()                         w1 = w / w.sum()
    x[..., 2:].copy_(y)        ->        x1 = slice_scatter(x, y, -1, 2, end)
    z = x.view(-1) + w                   z = x1.view(-1) + w1

A write gives its target a new value; where the target is a view, the new value is scattered into its source, down to
the tensor that owns the memory (`views`). Every later read, of the owner or of any view of it, reads the new value.
Writes that outlive the call (into parameters, buffers, inputs and views of them) stay in place and in order, and so do
those that have no functional form (``out=`` arguments, ``resize_``).

Torch's own functionalisation was tried first. ``ExportedProgram.run_decompositions({})`` parts batch norm and dropout
into their pieces, with the training flag baked in, turns writes into buffers into outputs and forgets ``no_grad``;
``torch.func.functionalize`` under ``make_fx(pre_dispatch=True)`` cannot follow symbolic sizes. Both trace anew, below
autograd. Here the graph stays as it was captured, before dispatch, but for the writes and the reads after them.

Under autocast a functional operator may promote where the in-place one keeps the type of its target (``h += residual``
with ``h`` in bfloat16); such results are converted back by ``type_as``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxsparse import graph as fx
from fxsparse.graph import traits
from fxsparse.graph.traits import functional
from fxsparse.tracing.modes import arguments
from fxsparse.tracing.views import Aliases, Call, WriteBack, has_layout, has_sizes, sizes, write_back, writes

aten = torch.ops.aten

_COPIES = {aten.copy_.default, aten.fill_.Tensor}
_FILLS = {aten.zero_.default: aten.zeros_like.default, aten.fill_.Scalar: aten.full_like.default}


def functionalise(gm: GraphModule) -> int:
    """Replaces in-place operators on temporaries by functional ones, in regions (``no_grad``, ``autocast``) as well.

    Args:
        gm: a graph before dispatch with the fake values that capture gave it; edited in place. Call ``recompile`` and
            eliminate dead code after.

    Returns:
        the number of in-place operators replaced.
    """
    count = 0
    for region in gm.children():
        if isinstance(region, GraphModule):
            count += functionalise(region)
            region.recompile()
    _functionalise_views(gm)
    _drop_copies_of_itself(gm)
    if not any(writes(node) for node in gm.graph.nodes):
        return count
    aliases = Aliases(gm)
    changes = _writes_of(gm, aliases)
    _Rewriter(gm, aliases, changes).run()
    return count + len(changes.ways)


def _functionalise_views(gm: GraphModule) -> None:
    """``x.unsqueeze_(0)`` only makes ``x`` another view of its memory, and every later read reads its result."""
    for node in gm.graph.nodes:
        if isinstance(node.target, OpOverload) and torch.Tag.inplace_view in node.target.tags:
            target = functional(node.target)
            (written,) = writes(node)
            if target is not None and written.op not in {"placeholder", "get_attr"}:
                node.target = target
                node._rename(target._schema.name.rpartition("::")[2])


def _drop_copies_of_itself(gm: GraphModule) -> None:
    """Export ends with ``buffer.copy_(buffer.add_(1))``: nothing changes, but autograd refuses what it saved before."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.copy_.default):
        target, source = node.args[:2]
        while isinstance(source, Node) and source is not target and writes(source) == [*source.args[:1]] != []:
            source = source.args[0]
        if source is target:
            fx.replace(node, target)


# --- what can be replaced ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Writes:
    """The writes of a graph.

    Attributes:
        ways: of each write to replace, the way from its target down to the root. Of all the writes into one memory
            either all are replaced or none.
        held: roots of memory that outlives the call, or whose writes stay in place.
    """

    ways: dict[Node, tuple[WriteBack, ...]]
    held: set[Node]


def _writes_of(gm: GraphModule, aliases: Aliases) -> _Writes:
    ways: dict[Node, tuple[WriteBack, ...]] = {}
    held = {root for root in aliases.root.values() if root.op in {"placeholder", "get_attr"}} | aliases.opaque
    grad_enabled: Any = True
    for node in gm.graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            grad_enabled = node.args[0]
        targets = writes(node)
        way = _way(gm, aliases, node, held) if targets and grad_enabled else None
        if way is not None:
            ways[node] = way
        else:
            held |= {aliases.root[target] for target in pytree.tree_leaves(targets) if target in aliases.root}
    ways = {node: way for node, way in ways.items() if aliases.root[node.args[0]] not in held}  # type: ignore[index]
    return _Writes(ways, held)


def _way(gm: GraphModule, aliases: Aliases, node: Node, held: set[Node]) -> tuple[WriteBack, ...] | None:
    """The way from the target of a write down to the root; None where the write cannot be replaced."""
    target, *others = writes(node)
    if others or node.args[:1] != (target,):  # lists of tensors, out= arguments
        return None
    root = aliases.root.get(target)
    if root is None or root in held or not _has_functional_form(node.target):
        return None
    steps = [write_back(gm, view, base) for view, base in aliases.chain(target)]
    return None if None in steps else tuple(step for step in steps if step is not None)


def _has_functional_form(target: Any) -> bool:
    return target in _COPIES or target in _FILLS or functional(target) is not None


# --- replacing --------------------------------------------------------------------------------------------------------

Key = tuple[Any, ...]
"""The operators between a root and a view of it: two nodes with one key are the same view."""


class _Rewriter:
    """Walks a graph in order and keeps the nodes that hold the present values of every memory that is written into."""

    def __init__(self, gm: GraphModule, aliases: Aliases, writes: _Writes):
        self.gm, self.aliases, self.ways, self.held = gm, aliases, writes.ways, writes.held
        roots = {aliases.root[node.args[0]] for node in writes.ways}  # type: ignore[index]
        self.values: dict[Node, dict[Key, Node]] = {root: {} for root in roots}
        self.members: dict[Node, list[Node]] = {root: [] for root in roots}
        self.last_write: dict[Node, Node] = {}
        self.stale: set[Node] = set()
        self.keys: dict[Node, Key] = {}
        self.read: dict[Node, Node] = {}  # the input of each view that it is a view of

    def run(self) -> None:
        for node in list(self.gm.graph.nodes):
            present = {source: self._present(source) for source in node.all_input_nodes if source in self.stale}
            for source, value in present.items():
                node.replace_input_with(source, value)
            root = self.aliases.root.get(node)
            if root not in self.values:
                continue
            parent = self.aliases.parent.get(node)
            if parent is not None:
                self.read[node] = present.get(parent, parent)
            self.keys[node] = self._key(node, parent)
            self.members[root].append(node)
            if node in self.ways:
                self._write(node, root)
            else:
                self.values[root].setdefault(self.keys[node], node)
        for node in reversed(self.ways):
            self.gm.graph.erase_node(node)

    def _key(self, node: Node, parent: Node | None) -> Key:
        if parent is None:
            return ()
        if node in self.ways:  # its target
            return self.keys[parent]
        rest = map_arg((node.args, node.kwargs), lambda source: None if source is self.read[node] else source)
        return (*self.keys[parent], (node.target, str(rest)))

    def _present(self, node: Node) -> Node:
        """The node that holds the present value of ``node``, whose memory may have been written into since."""
        if node in self.ways:
            return self._present(self.aliases.parent[node])
        root, key = self.aliases.root[node], self.keys[node]
        values = self.values[root]
        if key not in values:
            parent = self._present(self.aliases.parent[node])
            with self.gm.graph.inserting_before(self.last_write[root]):
                values[key] = self.gm.graph.node_copy(node, lambda s: parent if s is self.read[node] else s)
            fx.refresh(self.gm, values[key])
        return values[key]

    def _write(self, node: Node, root: Node) -> None:
        call = functools.partial(_insert, self.gm, node)
        target = self.aliases.parent[node]
        present = self._present(target)
        value = self._written(call, node, present)
        if value is present:  # x[0] *= 2 multiplies in place and then copies the result to where it is
            self.stale.add(node)
            return
        values: dict[Key, Node] = {}
        for (view, base), step in zip(self.aliases.chain(target), self.ways[node], strict=True):
            is_copy = node.target in _COPIES and view is target  # may have another type under autocast
            if not is_copy and has_layout(fx.value(value), fx.value(view)):
                values[self.keys[view]] = value
            value = step(call, self._present(base), value)
        values[()] = _with_layout(call, value, fx.value(root))
        self.values[root] = values
        self.stale.update(self.members[root])
        self.last_write[root] = node

    def _written(self, call: Call, node: Node, present: Node) -> Node:
        """The new value of a write's target, whose value is ``present`` before."""
        if node.target in _FILLS:
            return call(_FILLS[node.target], present, *node.args[1:])
        if node.target in _COPIES:
            return self._copied(call, node, present)
        target = functional(node.target)
        assert target is not None
        if traits.of(target).shaped_like:  # which autograd does not know
            present = call(aten.detach.default, present)
        required = sum(not (spec.has_default_value() or spec.kwarg_only) for spec in target._schema.arguments)
        rest = arguments(node)[1 : max(len(node.args), required)]
        value = call(target, present, *rest, **node.kwargs)
        return call(aten.type_as.default, value, present) if _may_promote(value, present) else value

    def _copied(self, call: Call, node: Node, present: Node) -> Node:
        source: Any = node.args[1]
        if source is present:
            return present
        value, new, old = source, fx.value(source), fx.value(present)
        if new.device != old.device:
            value = call(aten.to.device, value, old.device, old.dtype)
        elif new.dtype != old.dtype:
            value = call(aten.to.dtype, value, old.dtype)
        elif not self.ways[node] and old.dtype.is_floating_point:  # no operator on the way that would convert
            value = call(aten.type_as.default, value, present)
        if not has_sizes(new, old):
            value = call(aten.expand.default, value, sizes(call, present))
        # What may be written into later, or is the caller's, must not be taken for the copy.
        return call(aten.clone.default, value) if self.aliases.root.get(source) in self.held else value


def _may_promote(value: Node, present: Node) -> bool:
    """Whether a functional result may have another type than its target; under autocast, operands of one type part."""
    target: Any = value.target
    if fx.value(value).dtype != fx.value(present).dtype:
        return True
    if not fx.value(present).dtype.is_floating_point:
        return False
    others = [fx.value(other) for other in value.all_input_nodes if other is not present]
    mixes = any(isinstance(other, Tensor) and other.dtype.is_floating_point and other.dim() for other in others)
    keys = ("AutocastCUDA", "AutocastCPU")
    has_rule = any(torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), key) for key in keys)
    return has_rule or (mixes and torch.Tag.pointwise in target.tags)


def _with_layout(call: Call, value: Node, like: Tensor) -> Node:
    """``value`` in the memory layout of ``like``, which views of it count on."""
    if has_layout(fx.value(value), like):
        return value
    if like.is_contiguous():
        return call(aten.contiguous.default, value)
    outermost_first = sorted(range(like.dim()), key=lambda dim: -_hint(like.stride()[dim]))
    moved = call(aten.contiguous.default, call(aten.permute.default, value, outermost_first))
    return call(aten.permute.default, moved, [outermost_first.index(dim) for dim in range(like.dim())])


def _hint(stride: int | torch.SymInt) -> int:
    return stride if isinstance(stride, int) else int(stride.node.hint)


def _insert(gm: GraphModule, before: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    return fx.insert_call(gm, target, args, kwargs, like=before)
