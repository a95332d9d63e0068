"""Parts of a graph that can be run apart, at the smallest sizes at which they still say what they compute.

A section is what lies between some nodes and others: the nodes between a projection and an attention, say. Most treat
examples and tokens alike and apart, so a few of those tell as much as the traced batch at its full length:

    linear [s, 512, 4096] -> view [s, 512, 32, 128] -> transpose [s, 32, 512, 128]     traced
    linear [2,  64, 4096] -> view [2,  64, 32, 128] -> transpose [2, 32,  64, 128]     run

Its *positions* are the axes of examples and tokens, `Section.positions`. They are followed operator by operator
(`ties`), through reshapes that merge or part them as well; where an operator mixes them, or is not known, the section
runs at the traced sizes. Sizes that calls write down are replaced, and a section that then does not run, or gives other
shapes than the traced ones with fewer positions, runs at the traced sizes too.

`Section.key` says all that a section's results depend on. `remembered` keeps answers by it with the graph: layers that
are alike are looked at once, and an edit of the graph gives other keys where it matters.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from fxsparse import graph as fx
from fxsparse.analysis.probing import CannotRun, between, evaluate, held_integers, number, shape_of, stand_in
from fxsparse.analysis.ties import sizes, ties
from fxsparse.graph import traits
from fxsparse.graph.resize import first_axis
from fxsparse.graph.state import SharedByCopies

KEY = "fxsparse_sections"
_T = TypeVar("_T")


class Section:
    """The nodes between some sources and some targets.

    Args:
        sources: where it begins, each with those of its axes that may be positions.
        targets: where it ends.
        count: how many positions are wanted.
    """

    def __init__(self, sources: Mapping[Node, Sequence[int]], targets: Iterable[Node], count: int):
        self.sources = tuple(sources)
        self.targets = tuple(targets)
        self.nodes = between(set(self.sources), self.targets)
        self._count = count
        self._may_be = {node: _axes(node, axes) for node, axes in sources.items()}

    @cached_property
    def positions(self) -> dict[Node, tuple[int, ...]]:
        """The axes of positions of every source and every node with tensors, in the order in which they count; empty
        where the section mixes positions."""
        positions, lengths = self._followed()
        return positions if positions and self._runs(lengths) else {}

    def shape(self, node: Node) -> tuple[int, ...]:
        """The sizes at which a tensor of the section, or one that it reads, takes part."""
        return _with(shape_of(node), self._lengths.get(node, {}) if self.positions else {})

    def draw(self, node: Node, draw: Callable[[Sequence[int]], Tensor]) -> Tensor:
        """Random values of a source, in the memory layout that the traced ones have: capture leaves copies out that
        change nothing there, and what follows may need it.

        Args:
            node: a source.
            draw: makes values of a shape, such as ``torch.randn``.
        """
        shape = self.shape(node)
        strides = [number(stride) for stride in fx.value(node).stride()]
        order = sorted(range(len(shape)), key=lambda axis: (-strides[axis], axis))
        return draw([shape[axis] for axis in order]).permute([order.index(axis) for axis in range(len(shape))])

    def run(self, values: Mapping[Node, Tensor], stand_ins: dict[Node, Any]) -> dict[Node, Any]:
        """Runs the section; see `probing.evaluate`."""
        return self._evaluate(values, stand_ins, self._lengths if self.positions else {})

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """Equal for sections that compute the same: operators, arguments, sizes, and indices they read."""
        named: dict[Node, Any] = {node: ("source", at) for at, node in enumerate(self.sources)}
        named |= {node: ("node", at) for at, node in enumerate(self.nodes)}
        read: list[Any] = []

        def name(node: Node) -> Any:
            if node not in named:
                named[node] = ("stand-in", len(read))
                read.append(_described(node))
            return named[node]

        calls = tuple((node.target, _plain(node.args, name), _plain(node.kwargs, name)) for node in self.nodes)
        begins = tuple((_described(node), self._may_be[node]) for node in self.sources)
        ends = tuple(named.get(node) for node in self.targets)
        return (begins, calls, tuple(read), ends, self._count)

    # --- positions ----------------------------------------------------------------------------------------------------

    def _followed(self) -> tuple[dict[Node, tuple[int, ...]], dict[Node, dict[int, int]]]:
        """The axes of positions, and how long they are to be; empty where they cannot be followed."""
        self._lengths: dict[Node, dict[int, int]] = {}
        positions = dict(self._may_be)
        counted = {tuple(_expression(sizes(node)[axis]) for axis in axes) for node, axes in positions.items()}
        if len(counted) != 1 or not next(iter(counted)):
            return {}, {}
        for node in self.nodes:
            if not _tensors(node):
                continue
            read = [source for source in traits.values_read(node) if source in positions or source in self.nodes]
            reached = {_carried(node, source, positions[source]) for source in read if source in positions}
            if any(_tensors(source) and source not in positions for source in read) or len(reached) != 1:
                return {}, {}
            (axes,) = reached
            if axes is None:
                return {}, {}
            positions[node] = axes
        lengths = _lengths(positions, self._count)
        self._lengths = {} if lengths is None else self._beside(positions, lengths) or {}
        return (positions, self._lengths) if self._lengths else ({}, {})

    def _beside(
        self, positions: Mapping[Node, tuple[int, ...]], lengths: dict[Node, dict[int, int]]
    ) -> dict[Node, dict[int, int]] | None:
        """``lengths`` with those of what the section reads from elsewhere."""
        every = dict(lengths)
        for node in self.nodes:
            for group in ties(node) if node in positions else ():
                shared = {lengths[node][axis] for other, axis in group if other is node and axis in lengths[node]}
                for other, axis in group:
                    if other in positions or not shared:
                        continue
                    known = every.setdefault(other, {})
                    if held_integers(other) is not None or known.setdefault(axis, min(shared)) not in shared:
                        return None
        return every

    def _runs(self, lengths: Mapping[Node, dict[int, int]]) -> bool:
        values = {node: torch.rand(_with(shape_of(node), lengths.get(node, {}))) for node in self.sources}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            try:
                results = self._evaluate(values, {}, lengths)
            except (CannotRun, RuntimeError, TypeError, ValueError, IndexError):
                return False
        return all(
            tuple(result.shape) == _with(tuple(map(number, traced.shape)), lengths.get(node, {}))
            for node in self.nodes
            for result, traced in zip(_leaves(results[node]), _tensors(node), strict=True)
        )

    def _evaluate(
        self, values: Mapping[Node, Tensor], stand_ins: dict[Node, Any], lengths: Mapping[Node, dict[int, int]]
    ) -> dict[Node, Any]:
        written = {node: patch for node in self.nodes if (patch := _written(node, lengths.get(node, {})))}
        return evaluate(
            self.nodes,
            values,
            stand_ins,
            arguments=written,
            make=lambda node: self._stand_in(node, lengths.get(node)),
        )

    def _stand_in(self, node: Node, lengths: Mapping[int, int] | None) -> Any:
        """`probing.stand_in`; a mask lets through what is computed here."""
        made = stand_in(node, lengths)
        if not isinstance(made, Tensor) or made.dtype is not torch.bool:
            return made
        inside = {*self.sources, *self.nodes}
        hides = any(
            user in inside and _is_replaced(user, node, inside) for node in _rearranged(node) for user in node.users
        )
        return torch.full_like(made, not hides) if hides else made


def remembered(gm: GraphModule, key: tuple[Any, ...], answer: Callable[[], _T]) -> _T:
    """What ``answer`` says of a section, or of some, from the answers kept with ``gm`` and its copies if it is there.

    Args:
        key: what the answer depends on, made of `Section.key`.
        answer: called with a random state of its own.
    """
    answers = gm.meta.setdefault(KEY, SharedByCopies())
    if key not in answers:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            answers[key] = answer()
    result: _T = answers[key]
    return result


# --- following positions ----------------------------------------------------------------------------------------------


def _axes(node: Node, axes: Iterable[int]) -> tuple[int, ...]:
    """Axes from the left, without those of size 1."""
    shape = sizes(node)
    return tuple(axis % len(shape) for axis in axes if _expression(shape[axis]) != 1)


def _carried(node: Node, source: Node, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes of a call's result that count the positions of ``axes`` of its operand; None where it mixes them."""
    if traits.of(node.target).axes == "reshape":
        return _reshaped(sizes(source), sizes(node), axes) if source is node.args[0] else None
    tied: dict[int, int] = {}
    for group in ties(node):
        mine = [axis for other, axis in group if other is node]
        for other, axis in group:
            if other is source and mine and _expression(sizes(source)[axis]) == _expression(sizes(node)[mine[0]]):
                tied[axis] = mine[0]
    return tuple(tied[axis] for axis in axes) if all(axis in tied for axis in axes) else None


def _reshaped(old: Sequence[Any], new: Sequence[Any], axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Where a reshape leaves positions: axes that keep their size stay one; those that it merges or parts must all be
    positions and follow one another."""
    result: list[int] = []
    left = list(axes)
    groups = _groups(old, new)
    while left:
        group = next(((before, after) for before, after in groups if left[0] in before), None)
        if group is None or left[: len(group[0])] != group[0]:
            return None
        result += group[1]
        left = left[len(group[0]) :]
    return tuple(result)


def _groups(old: Sequence[Any], new: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """The least groups of axes of two shapes that hold the same elements, those of size 1 left out."""
    shapes = [[_expression(size) for size in shape] for shape in (old, new)]
    ends = [{_product(shape[axis:]): axis for axis in reversed(range(len(shape) + 1))} for shape in shapes]
    cuts = sorted((ends[0][after], ends[1][after]) for after in ends[0].keys() & ends[1].keys())
    groups = []
    for (a, b), (next_a, next_b) in zip([(0, 0), *cuts], [*cuts, (len(old), len(new))], strict=True):
        spans = (_of_size(old, a, next_a), _of_size(new, b, next_b))
        if spans[0] or spans[1]:
            groups.append(spans)
    return groups


def _of_size(shape: Sequence[Any], begin: int, end: int) -> list[int]:
    return [axis for axis in range(begin, end) if _expression(shape[axis]) != 1]


def _lengths(positions: Mapping[Node, tuple[int, ...]], count: int) -> dict[Node, dict[int, int]] | None:
    """How long each axis of positions is to be for ``count`` of them, or a few more; None where nodes part them in
    different ways."""
    parts = {node: [_expression(sizes(node)[axis]) for axis in axes] for node, axes in positions.items()}
    finest = max(parts.values(), key=len)
    new = [2] * (len(finest) - 1) + [max(2, -(-count // 2 ** (len(finest) - 1)))]
    lengths: dict[Node, dict[int, int]] = {}
    for node, traced in parts.items():
        lengths[node], at = {}, 0
        for axis, size in zip(positions[node], traced, strict=True):
            begin = at
            while at == begin or (at < len(finest) and _product(finest[begin:at]) != size):
                at += 1
            if _product(finest[begin:at]) != size:
                return None
            lengths[node][axis] = math.prod(new[begin:at])
        if at != len(finest):
            return None
    return lengths


def _written(node: Node, lengths: Mapping[int, int]) -> dict[str, Any]:
    """The arguments of a call that write down sizes, with those of positions as they are to be."""
    known = traits.of(node.target)
    if not lengths or not known.sizes:
        return {}
    written = fx.arguments(node)
    first = first_axis(node, written)
    return {known.sizes: [lengths.get(first + at, size) for at, size in enumerate(written[known.sizes])]}


def _expression(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.expr


def _product(of: Sequence[Any]) -> Any:
    return sympy.prod(list(of))


def _with(shape: tuple[int, ...], lengths: Mapping[int, int]) -> tuple[int, ...]:
    return tuple(lengths.get(axis, size) for axis, size in enumerate(shape))


def _tensors(node: Node) -> list[Tensor]:
    return _leaves(node.meta.get("val"))


def _leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _rearranged(mask: Node) -> list[Node]:
    """A mask, and it in other layouts, as large as what it hides perhaps."""
    found = [mask]
    for node in found:
        layouts = {"reshape", "broadcast", "permute", "slices"}
        found += [user for user in node.users if traits.of(user.target).axes in layouts and user.args[0] is node]
    return found


def _is_replaced(node: Node, mask: Node, inside: Collection[Node]) -> bool:
    """Whether a call puts something else, where ``mask`` is true, in the place of what is computed inside."""
    written = fx.arguments(node) if traits.of(node.target).axes == "pointwise" else {}
    if written.get("mask") is mask:
        return True
    return written.get("condition") is mask and written["self"] not in inside and written["other"] in inside


# --- keys -------------------------------------------------------------------------------------------------------------


def _plain(argument: Any, name: Callable[[Node], Any]) -> Any:
    """An argument as something hashable that equals another of the same meaning only."""
    if isinstance(argument, Node):
        return name(argument)
    if isinstance(argument, (list, tuple)):
        return tuple(_plain(item, name) for item in argument)
    if isinstance(argument, dict):
        return tuple((key, _plain(item, name)) for key, item in argument.items())
    if isinstance(argument, slice):
        return ("slice", _plain((argument.start, argument.stop, argument.step), name))
    return (type(argument), repr(argument))


def _described(node: Node) -> tuple[Any, ...]:
    """All of a node outside of a section that the section's results depend on, see `probing.stand_in`."""
    held = held_integers(node)
    if held is not None:
        content = hashlib.sha256(held.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        return ("held", held.dtype, tuple(held.shape), content)
    example = node.meta.get("val")
    if isinstance(example, Tensor):
        return (example.dtype, tuple((number(size), _expression(size)) for size in example.shape))
    return (type(example), stand_in(node))
