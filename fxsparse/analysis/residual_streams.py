"""Residual streams: the axis of hidden dimensions that embeddings, sublayers, norms and heads of a model share.

Found by flooding from the streams between blocks: an axis of a node belongs to the stream if an operator ties it to one
that does. Pointwise operators, norms, dropout and views that keep the axis carry it on; a linear cuts it: its weight's
columns read the stream, or its weight's rows and its bias write it. Equal sizes alone never decide. An operator whose
axes are not known ends the search with an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.analysis.blocks import stacks_and_unclear
from fxsparse.analysis.ties import Axis, sizes, ties
from fxsparse.graph import Linear, traits
from fxsparse.graph.record import Change, skipped


@dataclass(frozen=True, eq=False)
class Stream:
    """A residual stream.

    Attributes:
        path: the module path of its first stack of blocks.
        size: hidden dimensions.
        axes: what belongs to it, of calls, of parameters and buffers where they are read, of inputs. An axis may hold
            the stream several times, one after the other.
    """

    path: str
    size: int
    axes: frozenset[Axis]

    @cached_property
    def nodes(self) -> dict[Node, tuple[int, ...]]:
        """Every node of the stream with its axes, in order of execution."""
        found: dict[Node, list[int]] = {}
        for node, axis in sorted(self.axes):
            found.setdefault(node, []).append(axis)
        return {node: tuple(axes) for node, axes in found.items()}

    @property
    def means(self) -> list[Node]:
        """The means over hidden dimensions, as norms that are written out take them."""
        users = dict.fromkeys(
            user for node in self.nodes for user in node.users if traits.of(user.target).reduction == "mean"
        )
        return [user for user in users if any((user.args[0], axis) in self.axes for axis in traits.dims(user))]

    def reads(self, linear: Linear) -> bool:
        """Whether the columns of a linear's weight are hidden dimensions."""
        return (linear.weight, 0 if linear.transposed else 1) in self.axes

    def writes(self, linear: Linear) -> bool:
        """Whether the rows of a linear's weight are hidden dimensions."""
        return (linear.weight, 1 if linear.transposed else 0) in self.axes


class Unknown(Exception):
    """Why a stream could not be followed."""


def streams(gm: GraphModule) -> tuple[list[Stream], list[Change]]:
    """The residual streams of a training-IR graph, and those that could not be followed, with the reason.

    Streams of one width are one: what is taken out of it is taken out everywhere.
    """
    flood = _Flood(gm)
    found: dict[int, Stream] = {}
    known_stacks, unclear = stacks_and_unclear(gm)
    changes = [skipped(item.path, f"hidden dimensions: {item.reason}") for item in unclear]
    for stack in known_stacks:
        seed = stack.blocks[0].stream_in
        try:
            last = len(sizes(seed)) - 1
            size = sizes(seed)[last]
            if not isinstance(size, int):
                raise Unknown(f"the last dimension of {seed.name} is not a fixed number")
            known = found.get(size)
            axes = flood.from_seed((seed, last), size, known.axes if known else frozenset())
            found[size] = Stream(known.path if known else stack.path, size, axes)
        except Unknown as reason:
            changes.append(skipped(stack.path, f"hidden dimensions: {reason}"))
    return list(found.values()), changes


class _Flood:
    """Which axes of a graph are one, operator by operator."""

    def __init__(self, gm: GraphModule):
        self.gm = gm
        self.of_node: dict[Node, list[list[Axis]]] = {}
        self.same_tensor = {node: nodes for nodes in _tensors(gm).values() for node in nodes}

    def from_seed(self, seed: Axis, size: int, known: frozenset[Axis]) -> frozenset[Axis]:
        """All axes that are one with ``seed``, of that size or a multiple of it."""
        seen, pending = {*known, seed}, [seed]
        while pending:
            at = pending.pop()
            for other in self._tied(at):
                if other not in seen:
                    if sizes(other[0])[other[1]] % size:
                        raise Unknown(f"{other[0].name} takes them apart")
                    seen.add(other)
                    pending.append(other)
        return frozenset(seen)

    def _tied(self, at: Axis) -> Iterator[Axis]:
        node, axis = at
        if node.op == "get_attr":
            yield from ((other, axis) for other in self.same_tensor[node])
        else:
            yield from self._within(node, at)
        for user in node.users:
            if user.op != "output" and _has_tensor(user) and node in traits.operands(user):
                yield from self._within(user, at)

    def _within(self, node: Node, at: Axis) -> Iterator[Axis]:
        """What ``node`` ties ``at`` to; an error where its axes are not known."""
        if node.op == "placeholder":
            return
        if node not in self.of_node:
            self.of_node[node] = ties(node)
        groups = [group for group in self.of_node[node] if at in group]
        if not groups:
            raise Unknown(f"{node.name} ({node.target}) does not keep them apart")
        for group in groups:
            yield from group


def _tensors(gm: GraphModule) -> dict[int, list[Node]]:
    """By identity of the tensor, the nodes that read it."""
    found: dict[int, list[Node]] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        value = fx.attribute(gm, str(node.target))
        if isinstance(value, Tensor):
            found.setdefault(id(value), []).append(node)
    return found


def _has_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (Tensor, tuple, list))
