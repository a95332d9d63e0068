"""Letting an exported graph switch between training and evaluation.

Capture bakes what a model does in its mode into the graph: the flag of every dropout and batch norm, the dropout
probability of attention. So a model is captured twice, in training and in evaluation mode, and the two graphs are
walked side by side: wherever only a constant differs, the training graph reads the ``training`` attribute of the module
that the node came from. ``train()`` and ``eval()`` then work, eagerly and under ``torch.compile``, which guards on the
attribute. What the model hard-codes is the same in both graphs and stays.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from fxsparse import graph as fx
from fxsparse.graph import stack_path, traits

aten = torch.ops.aten


class ModesDiffer(Exception):
    """Training and evaluation run different operators; the first node of each graph where they part."""

    def __init__(self, training: Node, evaluation: Node):
        super().__init__(f"training runs {training.format_node()}, evaluation {evaluation.format_node()}")
        self.training, self.evaluation = training, evaluation

    @property
    def path(self) -> str:
        """Path of the module that decides: the deeper of the two the nodes came from."""
        return max(stack_path(self.training), stack_path(self.evaluation), key=len)

    def is_random(self, path: str) -> bool:
        """Whether the module at ``path`` draws random numbers in training that it does not draw in evaluation."""
        drawn = [_draws(node.graph, path) for node in (self.training, self.evaluation)]
        return bool(drawn[0] - drawn[1])


def _draws(graph: Graph, path: str) -> Counter[Any]:
    inside = (node for node in graph.nodes if f"{stack_path(node)}.".startswith(f"{path}." if path else ""))
    return Counter(node.target for node in inside if is_random(node))


@dataclass(frozen=True)
class _Flag:
    """An argument of ``node`` that depends on the mode, by its position in the operator's schema."""

    gm: GraphModule
    node: Node
    position: int
    value: bool | float


@dataclass(frozen=True)
class _Input:
    """A node and one of its inputs."""

    gm: GraphModule
    node: Node
    leaf: Any


def bind_training_flags(gm: GraphModule, evaluation: GraphModule, held: Collection[str] = ()) -> int:
    """Replaces every constant of ``gm`` that depends on the mode by one computed from ``<module>.training``.

    A flag becomes the attribute itself, a probability that is 0 in evaluation becomes ``probability * training``.
    Regions that run in a graph module of their own (``wrap_with_autocast``) read flags that live in that graph module,
    at the same path, so that ``train()`` and ``eval()`` reach them too.

    Args:
        gm: the model captured in training mode; edited in place.
        evaluation: the same model captured in evaluation mode.
        held: paths of modules that were in evaluation mode in both; their own dropout is given its flag all the same.

    Returns:
        the number of constants replaced.

    Raises:
        ModesDiffer: the graphs differ in more than constants; ``gm`` was not changed.
    """
    differences = list(_differences(gm, evaluation))
    differences += _held_dropouts(gm, held)
    reads: dict[tuple[int, str], Node] = {}
    for difference in differences:
        if isinstance(difference, _Flag):
            _bind(difference, gm, reads)
        else:
            _make_contiguous(difference)
    for region in {id(item.gm): item.gm for item in differences if item.gm is not gm}.values():
        region.recompile()
    return sum(isinstance(difference, _Flag) for difference in differences)


def _differences(gm: GraphModule, evaluation: GraphModule) -> Iterator[_Flag | _Input]:
    counts = {node for node in gm.graph.nodes if _counts_batches(node)}
    yield from (_Flag(gm, node, 1, True) for node in counts)  # evaluation does not count
    ours = [node for node in gm.graph.nodes if _is_step(node) and node not in counts]
    theirs = [node for node in evaluation.graph.nodes if _is_step(node)]
    inputs = gm.graph.find_nodes(op="placeholder")
    twin: dict[Node, Node] = dict(zip(inputs, evaluation.graph.find_nodes(op="placeholder"), strict=True))
    for node, other in zip(ours, theirs, strict=False):
        if node.target != other.target:
            raise ModesDiffer(node, other)
        for position, (argument, other_argument) in enumerate(zip_longest(arguments(node), arguments(other))):
            if _depends_on_mode(argument, other_argument):
                yield _Flag(gm, node, position, argument)
                continue
            leaves, spec = pytree.tree_flatten(argument)
            other_leaves, other_spec = pytree.tree_flatten(other_argument)
            if spec != other_spec:
                raise ModesDiffer(node, other)
            for leaf, other_leaf in zip(leaves, other_leaves, strict=True):
                yield from _compare(_Input(gm, node, leaf), _Input(evaluation, other, other_leaf), twin)
        twin[node] = other
    if len(ours) != len(theirs):
        at = min(len(ours), len(theirs)) - 1
        raise ModesDiffer(ours[at], theirs[at])


def _compare(ours: _Input, theirs: _Input, twin: dict[Node, Node]) -> Iterator[_Flag | _Input]:
    leaf, other = _origin(ours.leaf), _origin(theirs.leaf)
    if not isinstance(leaf, Node) or not isinstance(other, Node):
        same = _equal(leaf, other)
    elif leaf.op == "get_attr":
        held, other_held = _held(ours.gm, leaf), _held(theirs.gm, other)
        same = _equal(held, other_held)
        if isinstance(held, GraphModule) and isinstance(other_held, GraphModule):
            same = True
            yield from _differences(held, other_held)
    elif _is_size(leaf):
        same = str(fx.value(leaf)) == str(fx.value(other))
    else:
        same = twin.get(leaf) is other
    if not same:
        raise ModesDiffer(ours.node, theirs.node)
    if _is_copied(theirs.leaf) and not _is_copied(ours.leaf):
        yield ours  # in training it happened to be contiguous, in evaluation it may not be


def _held_dropouts(gm: GraphModule, held: Collection[str]) -> Iterator[_Flag]:
    for node in gm.graph.nodes if held else ():
        if traits.of(node.target).dropout and stack_path(node) in held:
            probability, training = arguments(node)[1:3]
            if probability and training is False:
                yield _Flag(gm, node, 2, True)


def arguments(node: Node) -> list[Any]:
    """All arguments in the order of the operator's schema, those left out with their defaults."""
    if not hasattr(node.target, "_schema"):
        return [*node.args, *node.kwargs.values()]
    return list(fx.arguments(node).values())


def _depends_on_mode(training: Any, evaluation: Any) -> bool:
    if training is True:
        return evaluation is False
    return isinstance(training, float) and training != 0 and isinstance(evaluation, float) and evaluation == 0


def _equal(item: Any, other: Any) -> bool:
    """Equality of constants and of held tensors: a parameter is only itself, a constant of capture may be a copy."""
    if isinstance(item, Tensor) and isinstance(other, Tensor):
        if item is other or isinstance(item, nn.Parameter):
            return item is other
        if item.is_meta or other.is_meta:
            return item.shape == other.shape and item.dtype == other.dtype
        return torch.equal(item, other)
    return type(item) is type(other) and bool(item == other)


def _is_step(node: Node) -> bool:
    if node.op == "call_function":
        return not _returns_its_input(node) and not _is_size(node) and not _is_unread_draw(node)
    return node.op == "output"


def _is_unread_draw(node: Node) -> bool:
    """Whether ``node`` only moves the random state, as layer drop at a rate of 0 does."""
    return not node.users and is_random(node) and not node.target._schema.is_mutable  # type: ignore[union-attr]


def is_random(node: Node) -> bool:
    """Whether ``node`` draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _is_size(leaf: Any) -> bool:
    """Whether ``leaf`` computes with sizes; capture reads a size once, wherever it is needed first."""
    if not isinstance(leaf, Node) or traits.of(leaf.target).number:
        return False
    return isinstance(leaf.meta.get("val"), (torch.SymInt, torch.SymBool, torch.SymFloat))


def _returns_its_input(node: Node) -> bool:
    """Whether ``node`` is a ``contiguous``, or a ``to`` that converts nothing.

    Either may return its input, and then it matters to a capture which other calls did: the modes may differ in it.
    """
    if traits.of(node.target).copies != "if needed":
        return False
    source, result = fx.value(node.args[0]), fx.value(node)  # type: ignore[arg-type]
    return bool(source.dtype == result.dtype and source.device == result.device)


def _origin(leaf: Any) -> Any:
    while isinstance(leaf, Node) and leaf.op == "call_function" and _returns_its_input(leaf):
        leaf = leaf.args[0]
    return leaf


def _is_copied(leaf: Any) -> bool:
    while isinstance(leaf, Node) and leaf.op == "call_function" and _returns_its_input(leaf):
        if leaf.target is aten.contiguous.default:
            return True
        leaf = leaf.args[0]
    return False


def _make_contiguous(difference: _Input) -> None:
    node, source = difference.node, difference.leaf
    with difference.gm.graph.inserting_before(node):
        copied = difference.gm.graph.call_function(aten.contiguous.default, (source,))
    copied.meta = dict(source.meta)
    node.replace_input_with(source, copied)


def _held(gm: GraphModule, leaf: Any) -> Any:
    return fx.attribute(gm, str(leaf.target)) if isinstance(leaf, Node) and leaf.op == "get_attr" else None


def _counts_batches(node: Node) -> bool:
    """Whether ``node`` is a batch norm's ``num_batches_tracked.add_(1)``."""
    if node.target is not aten.add_.Tensor or node.args[1] != 1:
        return False
    counter = node.args[0]
    return (
        isinstance(counter, Node) and counter.op == "get_attr" and str(counter.target).endswith("num_batches_tracked")
    )


def _bind(flag: _Flag, root: GraphModule, reads: dict[tuple[int, str], Node]) -> None:
    graph, node, path = flag.gm.graph, flag.node, stack_path(flag.node)
    _hold_flag(flag.gm, path, root)
    key = id(flag.gm), path
    with graph.inserting_before(node):
        if key not in reads:
            reads[key] = _like(node, graph.create_node("get_attr", f"{path}.training" if path else "training"), True)
        new = reads[key]
        if not isinstance(flag.value, bool):
            new = _like(node, graph.call_function(operator.mul, (flag.value, new)), flag.value)
    spec = node.target._schema.arguments[flag.position]  # type: ignore[union-attr]
    if spec.kwarg_only or spec.name in node.kwargs:
        node.update_kwarg(spec.name, new)
    else:
        node.args = (*arguments(node)[: flag.position], new, *node.args[flag.position + 1 :])


def _like(node: Node, new: Node, value: Any) -> Node:
    new.meta["val"] = value
    new.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
    return new


def _hold_flag(gm: GraphModule, path: str, root: nn.Module) -> None:
    """A region's own graph module has no tree of the model: it gets bare modules that only hold flags."""
    owner: nn.Module = gm
    original: nn.Module = root
    for part in path.split(".") if path else []:
        original = getattr(original, part)
        if not hasattr(owner, part):
            holder = nn.Module()
            holder.training = original.training
            owner.add_module(part, holder)
        owner = getattr(owner, part)
