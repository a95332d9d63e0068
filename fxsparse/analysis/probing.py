"""Finding out what a part of a graph computes by running it: on random inputs, in float32, with stand-ins for the rest.

Only the nodes between some inputs and some outputs run. What they read from elsewhere and does not depend on the inputs
(positions, masks, norm weights) is drawn at random in the right shape; sizes are those of the traced example.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxsparse import graph as fx
from fxsparse.graph import traits


class CannotRun(Exception):
    """A part of a graph does not run on random values: sizes in it may be data, as how many tokens an expert gets."""

    def __init__(self, node: Node, reason: Exception):
        said = str(reason).splitlines()
        what = said[0] if said else type(reason).__name__
        super().__init__(f"{node.name} ({node.target}) does not run on random values: {what}")


def nearest(target: Node, stops: Collection[Node]) -> list[Node]:
    """Those of ``stops`` that a node is computed from without another one in between, in order of execution."""
    found, seen, pending = [], {target}, [target]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source in seen:
                continue
            seen.add(source)
            if source in stops:
                found.append(source)
            else:
                pending.append(source)
    return sorted(found)


def between(sources: Collection[Node], targets: Iterable[Node]) -> list[Node]:
    """The nodes on a way from a source to a target, in order of execution, targets included."""
    depends: dict[Node, bool] = {}
    order: list[Node] = []
    pending = [(target, False) for target in targets]
    while pending:
        node, done = pending.pop()
        if done:
            depends[node] = any(source in sources or depends.get(source, False) for source in node.all_input_nodes)
            if depends[node]:
                order.append(node)
        elif node not in depends and node not in sources:
            depends[node] = False
            pending.append((node, True))
            pending += [(source, False) for source in node.all_input_nodes]
    return sorted(order)


def shape_of(node: Node) -> tuple[int, ...]:
    """The sizes of a tensor in the traced example."""
    return tuple(map(number, fx.value(node).shape))


def evaluate(
    path: Sequence[Node],
    given: Mapping[Node, Tensor],
    stand_ins: dict[Node, Any],
    *,
    arguments: Mapping[Node, Mapping[str, Any]] | None = None,
    make: Callable[[Node], Any] | None = None,
) -> dict[Node, Any]:
    """Runs nodes in order.

    Args:
        path: of :func:`between`.
        given: values of the sources.
        stand_ins: of what else is read; filled in, so that further runs see the same.
        arguments: those of some nodes that differ from the ones they are called with, by name.
        make: makes a stand-in; by default :func:`stand_in` at the traced sizes.

    Raises:
        CannotRun: a node raises.
    """
    values: dict[Node, Any] = dict(given)

    def read(node: Node) -> Any:
        if node in values:
            return values[node]
        if node not in stand_ins:
            stand_ins[node] = (make or stand_in)(node)
        return stand_ins[node]

    for node in path:
        written = arguments.get(node) if arguments is not None else None
        call = (node.args, node.kwargs) if not written else ((), {**fx.arguments(node), **written})
        args, kwargs = torch.fx.map_arg(call, read)
        try:
            values[node] = node.target(*args, **_on_cpu(kwargs))  # type: ignore[operator]
        except Exception as error:
            raise CannotRun(node, error) from error
    return values


def stand_in(node: Node, lengths: Mapping[int, int] | None = None) -> Any:
    """What stands for a node that the nodes to run read from elsewhere.

    Args:
        node: the node.
        lengths: sizes of axes that differ from the traced ones.
    """
    held = held_integers(node)
    if held is not None:
        return held
    example = fx.value(node) if "val" in node.meta else None
    if isinstance(example, Tensor):
        shape = tuple((lengths or {}).get(axis, size) for axis, size in enumerate(map(number, example.shape)))
        if example.is_floating_point():
            return torch.rand(shape) + 0.5
        if example.dtype == torch.bool:
            return torch.ones(shape, dtype=torch.bool)
        return torch.zeros(shape, dtype=example.dtype)
    if isinstance(example, (torch.SymInt, int)) and not isinstance(example, bool):
        return number(example)
    if isinstance(example, (float, torch.SymFloat)):
        return 0.0 if any(map(_is_flag, node.all_input_nodes)) else float(example)
    return False  # a training flag: probing is evaluation


def held_integers(node: Node) -> Tensor | None:
    """The parameter or buffer that a node reads, or copies, if it holds integers: which positions are read is
    structure."""
    example = node.meta.get("val")
    while node.op == "call_function" and traits.of(node.target).copies:
        node = node.all_input_nodes[0]
    if node.op != "get_attr" or node.graph.owning_module is None:
        return None
    held = fx.attribute(node.graph.owning_module, str(node.target))
    if not isinstance(held, Tensor) or held.is_floating_point() or held.is_meta:
        return None
    if isinstance(example, Tensor) and example.dtype != held.dtype:
        return None if example.is_floating_point() else held.detach().cpu().to(example.dtype)
    return held.detach().cpu()


def _is_flag(node: Node) -> bool:
    return node.op == "get_attr" and str(node.target).rpartition(".")[2] == "training"


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: "cpu" if name == "device" and item is not None else item for name, item in kwargs.items()}


def number(size: Any) -> int:
    """A size in the traced example."""
    return int(size) if isinstance(size, int) else int(size.node.hint)
