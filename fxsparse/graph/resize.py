"""Letting a graph follow axes that became shorter: the sizes that calls write down, and the fake values after them.

    x [s, 32] loses 8 of its columns    view(x, [s, 4, 8])         ->  view(x, [s, 3, 8])
                                        slice(x, 1, 16, 32)        ->  slice(x, 1, 12, 24)
                                        split(x, [16, 16], 1)      ->  split(x, [12, 12], 1)

Which arguments hold sizes is said in `fxsparse.graph.traits`; which axes lose what, by who asks.
"""

from __future__ import annotations

import functools
import math
import operator
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import sympy
import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_leaves

from fxsparse.graph import traits
from fxsparse.graph.state import attribute
from fxsparse.graph.values import arguments, fake_mode, quiet, set_argument, value

Lost = Mapping[int, Tensor]
"""The axes of a tensor that become shorter: for each, int64 ``[size]``, how many positions go at every position."""

Losses = Mapping[Node, Sequence[Lost]]
"""What each node loses: one `Lost` for each of its results."""

Patches = dict[Node, dict[str, Any]]
"""New arguments of calls, by the names in their schemas."""


@dataclass(frozen=True)
class Share:
    """A size that a graph computes, of which a share is left: ``whole * left // of``."""

    whole: Node
    left: int
    of: int


class CannotResize(Exception):
    """Why the sizes of a graph cannot follow."""


class DoesNotFit(CannotResize):
    """A call does not run on operands of the new sizes."""

    def __init__(self, node: Node, reason: Exception):
        super().__init__(f"{node.name}: {reason}")
        self.node, self.reason = node, reason


def resize(gm: GraphModule, patches: Patches, changed: Iterable[Node], nodes: Iterable[Node] | None = None) -> None:
    """Writes new arguments into calls and computes the fake values anew that depend on them.

    Args:
        gm: the graph module, changed in place.
        patches: of :func:`patches_for`.
        changed: other nodes that have a new value, or were inserted.
        nodes: those that may change, in order; all by default.

    Raises:
        CannotResize: sizes do not fit, or would for some batch sizes only.
    """
    for node, patch in patches.items():
        for name, item in patch.items():
            set_argument(node, name, [_computed(size, node) for size in item] if isinstance(item, list) else item)
    _propagate(gm, {*patches, *changed}, gm.graph.nodes if nodes is None else nodes)


def _computed(size: Any, before: Node) -> Any:
    """A size as an argument of a call; a share of one is computed before the call."""
    if not isinstance(size, Share):
        return size
    with before.graph.inserting_before(before):
        part = before.graph.call_function(operator.mul, (size.whole, size.left))
        left = before.graph.call_function(operator.floordiv, (part, size.of))
    part.meta = {**size.whole.meta, "val": size.whole.meta["val"] * size.left}
    left.meta = {**size.whole.meta, "val": part.meta["val"] // size.of}
    return left


# --- sizes that are written down --------------------------------------------------------------------------------------


def patches_for(losses: Losses) -> Patches:
    """The arguments of calls that write down sizes of axes which become shorter, with the new sizes.

    Raises:
        CannotResize: slices of one size would differ in size.
    """
    found = {node: _patch(node, losses) for node in losses if node.op == "call_function"}
    return {node: patch for node, patch in found.items() if patch}


def _patch(node: Node, losses: Losses) -> dict[str, Any]:
    known = traits.of(node.target)
    if not (known.sizes or known.pieces or known.positions):
        return {}
    written = arguments(node)
    if known.sizes:
        patch = {known.sizes: _shorter(written[known.sizes], losses[node][0], first_axis(node, written))}
    else:
        source = node.args[0]
        lost = losses[source][0] if isinstance(source, Node) and losses.get(source) else {}
        (dim,) = traits.dims(node)
        if dim not in lost:
            return {}
        if known.pieces:
            patch = {known.pieces: _smaller_pieces(node, written[known.pieces], lost[dim])}
        else:
            patch = _moved(node, written, lost[dim])
    return {name: item for name, item in patch.items() if item != written[name]}


def first_axis(node: Node, written: Mapping[str, Any]) -> int:
    """The axis of a call's result whose size comes first among the sizes that its arguments, ``written``, list."""
    known = traits.of(node.target)
    rank, count = value(node).dim(), len(written[known.sizes])
    return int(written[known.dim]) % (rank - count + 1) if known.dim else rank - count


def _shorter(sizes: Sequence[Any], lost: Lost, first: int) -> list[Any]:
    new = list(sizes)
    for axis, count in lost.items():
        at = axis - first
        if not 0 <= at < len(new):
            continue
        if isinstance(new[at], Node):  # heads merged with the batch
            whole = len(count)
            common = math.gcd(whole - int(count.sum()), whole)
            new[at] = Share(new[at], (whole - int(count.sum())) // common, whole // common)
        elif new[at] != -1:
            new[at] -= int(count.sum())
    return new


def _smaller_pieces(node: Node, pieces: Any, lost: Tensor) -> Any:
    """Sizes of the slices that ``lost`` falls into; one number where all are of one size."""
    if not isinstance(pieces, int):
        return [size - int(part.sum()) for size, part in zip(pieces, lost.split(list(pieces)), strict=True)]
    counts = {int(part.sum()) for part in lost.split(pieces)}
    if len(counts) != 1:
        raise CannotResize(f"{node.name} splits units unevenly")
    return pieces - counts.pop()


def _moved(node: Node, written: Mapping[str, Any], lost: Tensor) -> dict[str, Any]:
    """Where slices begin and end once positions before that are gone."""
    known = traits.of(node.target)
    if written.get("step", 1) != 1:
        begin, end = (written[name] for name in known.positions)
        if not (begin is None or 0 <= begin < written["step"]) or not (end is None or end >= len(lost)):
            raise CannotResize(f"{node.name} takes every {written['step']}th position of a part")
        return {}
    moved = {name: _position(written[name], lost) for name in known.positions}
    if known.length:
        (begin,) = (written[name] for name in known.positions)
        moved[known.length] = written[known.length] - int(lost[begin:][: written[known.length]].sum())
    return moved


def _position(at: Any, lost: Tensor) -> Any:
    if not isinstance(at, int) or abs(at) > len(lost):
        return at  # computed, or all to the end
    return at - int(lost[:at].sum()) if at >= 0 else at + int(lost[at:].sum())


# --- fake values ------------------------------------------------------------------------------------------------------


def _propagate(gm: GraphModule, changed: Collection[Node], nodes: Iterable[Node]) -> None:
    environment = fake_mode(gm).shape_env
    guards = _assumed_equalities(environment)
    refused = set() if environment is None else _REFUSED.setdefault(environment, set())
    asked = frozenset((node.name, str(node.args), *_shapes(node.meta.get("val"))) for node in changed)
    if asked in refused:  # what was assumed then is known now
        raise CannotResize(_SOME_BATCHES)
    dirty = set(changed)
    for node in nodes:
        if node.op != "call_function" or not (node in changed or any(read in dirty for read in node.all_input_nodes)):
            continue
        before = node.meta.get("val")
        try:
            # Composite operators see symbolic sizes only through the Python dispatcher, in torch 2.11.
            with quiet(), fake_mode(gm), enable_python_dispatcher(), torch.no_grad():
                after = node.target(*_example(gm, node.args), **_example(gm, node.kwargs))  # type: ignore[operator]
        except Exception as error:
            raise DoesNotFit(node, error) from error
        if node in changed or _shapes(before) != _shapes(after):
            node.meta = {**node.meta, "val": after}
            dirty.add(node)
    if not _assumed_equalities(environment) <= guards:
        refused.add(asked)
        raise CannotResize(_SOME_BATCHES)


_SOME_BATCHES = "smaller sizes would hold for some batch sizes only: a constant was missed"
_REFUSED: WeakKeyDictionary[ShapeEnv, set[frozenset[Any]]] = WeakKeyDictionary()
"""What was refused so, for the symbols of a graph and its copies."""


def _example(gm: GraphModule, arg: Any) -> Any:
    def example(node: Node) -> Any:
        known = node.meta.get("val")
        if known is None and node.op == "get_attr":
            known = attribute(gm, str(node.target))
        return False if known is None else known  # a flag or a probability of training

    return torch.fx.map_arg(arg, example)


def _shapes(example: Any) -> list[tuple[str, ...]]:
    return [tuple(map(str, item.shape)) for item in tree_leaves(example) if isinstance(item, Tensor)]


def _assumed_equalities(environment: ShapeEnv | None) -> set[sympy.Expr]:
    """The equalities of sizes that hold by assumption; that there is more than one group, say, restricts nothing."""
    guards = () if environment is None else environment.guards
    equal = [guard.expr for guard in guards if isinstance(guard.expr, sympy.Eq)]
    return {expression for expression in equal if not _is_identity(expression)}


@functools.cache
def _is_identity(expression: sympy.Expr) -> bool:
    """Whether an equality holds for whatever sizes, as ``(2 s + 2) % (s + 1) = 0`` does, which sympy does not see."""
    draw, symbols = random.Random(0), sorted(expression.free_symbols, key=str)
    for _ in range(8):
        values = {symbol: sympy.Integer(draw.randint(1000, 100_000)) for symbol in symbols}
        if expression.xreplace(values) != sympy.true:
            return False
    return True
