"""The repeated blocks of a model: lists of layers whose members pass one stream of hidden states on.

A list is what the model's modules call ``<path>.<number>``; what counts as its stream follows from the dataflow alone:

    stream_in of block 0 -> block 0 -> stream -> block 1 -> stream -> ... -> stream_out of the last block

The stream has one symbolic shape and dtype throughout, is read by the next block and by no later one, and every block
holds a product with a weight. Members without one (activations, norms) end a stack.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.errors import RewriteError

# Marks, in a node's meta, of the streams into and out of a block that is alone in its list; it has no neighbour to be
# told by.
_ENTERS, _LEAVES = "fxsparse_enters_block", "fxsparse_leaves_block"
_MEMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


@dataclass(frozen=True)
class Block:
    """A layer of a stack.

    Attributes:
        path: its module path, such as ``model.decoder.layers.3``.
        index: the number its path ends in; blocks that are left keep theirs when others are dropped.
        nodes: the calls that belong to it.
        stream_in: the node outside it whose hidden states it transforms.
        stream_out: its node that the next block, or what follows the stack, reads.
    """

    path: str
    index: int
    nodes: frozenset[Node]
    stream_in: Node
    stream_out: Node


@dataclass(frozen=True)
class Stack:
    """Blocks in order of execution.

    Attributes:
        path: the module path of their list, such as ``model.decoder.layers``.
        blocks: two or more, or the one that is left of them; a model's only block cannot be told from other modules.
    """

    path: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Unclear:
    """Members of a list that are no `Stack`, for they pass more than one stream on.

    Attributes:
        path: of the first that does.
        nodes: the calls that belong to the members.
        reason: what they pass on.
    """

    path: str
    nodes: frozenset[Node]
    reason: str

    def refusal(self, pass_name: str) -> RewriteError:
        return RewriteError(self.reason, pass_name=pass_name, site=self.path)


@dataclass(eq=False)
class _Member:
    """A module of a list, before it is known whether it is a block."""

    path: str
    index: int
    nodes: dict[Node, None] = field(default_factory=dict)

    @cached_property
    def inputs(self) -> dict[Node, None]:
        return {read: None for node in self.nodes for read in node.all_input_nodes if read not in self.nodes}

    @cached_property
    def outputs(self) -> dict[Node, None]:
        return {node: None for node in self.nodes if any(user not in self.nodes for user in node.users)}


def stacks(gm: GraphModule) -> list[Stack]:
    """The stacks of a training-IR graph, in order of execution; lists inside a block of a stack are not looked at."""
    return stacks_and_unclear(gm)[0]


def stacks_and_unclear(gm: GraphModule) -> tuple[list[Stack], list[Unclear]]:
    """The stacks of a training-IR graph, and the lists whose stream is not clear."""
    found: list[Stack] = []
    unclear: list[Unclear] = []
    lists = _lists(gm)
    for path in sorted(lists, key=lambda path: path.count(".") if path else -1):
        inside = any(_is_inside(path, block.path) for stack in found for block in stack.blocks)
        if not inside and not any(_is_inside(path, item.path.rpartition(".")[0]) for item in unclear):
            for item in _stacks_of(gm, path, lists[path]):
                if isinstance(item, Stack):
                    found.append(item)
                else:
                    unclear.append(item)
    order = {node: position for position, node in enumerate(gm.graph.nodes)}
    return sorted(found, key=lambda stack: order[stack.blocks[0].stream_out]), unclear


def only_members(gm: GraphModule) -> list[str]:
    """The paths of the modules that are alone in their list and hold a product with a weight."""
    alone = [members[0] for members in _lists(gm).values() if len(members) == 1]
    return [member.path for member in alone if any(fx.applies_parameter(gm, node) for node in member.nodes)]


def mark_alone(block: Block, stream_in: Node) -> None:
    """Lets `stacks` know ``block``, whose stream in is now ``stream_in``, once its neighbours are gone."""
    stream_in.meta[_ENTERS] = block.stream_out.meta[_LEAVES] = block.path


def _is_inside(path: str, outer: str) -> bool:
    return f"{path}.".startswith(f"{outer}.")


def _lists(gm: GraphModule) -> dict[str, list[_Member]]:
    """The members of every list of modules that the graph calls, by the list's path, in order of execution."""
    members: dict[str, _Member] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function":
            for path in _member_paths(node):
                member = members.setdefault(path, _Member(path, int(path.rpartition(".")[2])))
                member.nodes[node] = None
    lists: dict[str, list[_Member]] = {}
    for path, member in members.items():
        lists.setdefault(path.rpartition(".")[0], []).append(member)
    return lists


def _member_paths(node: Node) -> Iterator[str]:
    """``layers.0`` and ``layers.0.mlp.1`` for a node of ``layers.0.mlp.1.act``."""
    path = fx.stack_path(node)
    for match in _MEMBER.finditer(path):
        yield path[: match.end()]


def _stacks_of(gm: GraphModule, path: str, members: list[_Member]) -> Iterator[Stack | Unclear]:
    if len(members) == 1:
        yield from _alone(path, members[0])
        return
    run: list[_Member] = []
    for member in [*members, None]:
        if member is not None and any(fx.applies_parameter(gm, node) for node in member.nodes):
            if run and not _links(run[-1], member):
                yield from _chain(path, run)
                run = []
            run.append(member)
            continue
        yield from _chain(path, run)
        run = []


def _alone(path: str, member: _Member) -> Iterator[Stack]:
    for stream_out in member.nodes:
        if stream_out.meta.get(_LEAVES) == member.path:
            entering = [node for node in member.inputs if node.meta.get(_ENTERS) == member.path]
            if len(entering) != 1:
                raise RewriteError("what enters the layer was replaced, and its stream is lost", site=member.path)
            block = Block(member.path, member.index, frozenset(member.nodes), entering[0], stream_out)
            yield Stack(path, (block,))


def _links(member: _Member, following: _Member) -> list[Node]:
    """What ``following`` reads of ``member``, as far as it could be a stream."""
    read = following.inputs
    return [node for node in member.outputs if node in read and _signature(node) is not None]


def _chain(path: str, run: list[_Member]) -> Iterator[Stack | Unclear]:
    """The longest stack that a run of members holds, if any: the ends drop out where they change the stream's shape."""
    for length in range(len(run), 1, -1):
        for start in range(len(run) - length + 1):
            members = run[start : start + length]
            streams = _streams(members)
            if isinstance(streams, _Several):
                nodes = frozenset(node for member in members for node in member.nodes)
                yield Unclear(members[streams.position].path, nodes, streams.reason(path))
                return
            if streams:
                ends = zip(members, streams, streams[1:], strict=False)
                yield Stack(path, tuple(Block(m.path, m.index, frozenset(m.nodes), a, b) for m, a, b in ends))
                return


@dataclass(frozen=True)
class _Several:
    """Nodes that could all be the stream, and the member that reads or makes them."""

    position: int
    nodes: tuple[Node, ...]

    def reason(self, path: str) -> str:
        return (
            f"the blocks of {path or 'the model'} pass more than one stream of hidden states on "
            f"({', '.join(node.name for node in self.nodes)}); what a block does to them cannot be undone by leaving "
            "it out"
        )


def _streams(members: list[_Member]) -> list[Node] | _Several:
    """What the members pass on, from what the first reads to what the last yields; empty where there is no stream."""
    last_reader = {node: position for position, member in enumerate(members) for node in member.inputs}
    places = [[node for node in members[0].inputs if last_reader[node] == 0] or list(members[0].inputs)]
    for position, (member, following) in enumerate(pairwise(members), 1):
        places.append([node for node in _links(member, following) if last_reader[node] == position])
    inside = {node for member in members for node in member.nodes}
    places.append([node for node in members[-1].outputs if any(user not in inside for user in node.users)])
    found: list[list[Node]] = []
    for signature in dict.fromkeys(_signature(node) for node in places[1]):
        streams = [[node for node in place if _signature(node) == signature] for place in places]
        if signature is not None and all(streams):
            streams = _alike(members, streams)
            several = next((position for position, nodes in enumerate(streams) if len(nodes) > 1), None)
            if several is not None:
                return _Several(max(0, several - 1), tuple(streams[several]))
            found.append([node for (node,) in streams])
    if len(found) > 1:
        return _Several(0, tuple(streams[1] for streams in found))
    return found[0] if found else []


def _alike(members: list[_Member], streams: list[list[Node]]) -> list[list[Node]]:
    """Where the ends leave a choice, the nodes that the first block reads as the others read their stream, and that the
    last makes as the others make it."""
    first, *_, last = places = list(streams)
    known = [position for position in range(1, len(members)) if len(streams[position]) == 1]
    if known and len(first) > 1:
        wanted = _readers(members[known[0]], *streams[known[0]])
        places[0] = [node for node in first if _readers(members[0], node) == wanted] or first
    if known and len(last) > 1:
        (stream,) = streams[known[-1]]
        maker = _role(members[known[-1] - 1], stream)
        places[-1] = [node for node in last if _role(members[-1], node) == maker] or last
    return places


def _readers(member: _Member, node: Node) -> set[tuple[Any, ...]]:
    """What a member does with a node outside it."""
    users = [user for user in node.users if user in member.nodes]
    return {(*_role(member, user), user.args.index(node) if node in user.args else None) for user in users}


def _role(member: _Member, node: Node) -> tuple[Any, ...]:
    return fx.stack_path(node).removeprefix(member.path), node.target


def _signature(node: Node) -> tuple[Any, ...] | None:
    """Symbolic shape and dtype of floating-point hidden states; None for anything else."""
    value = node.meta.get("val")
    if node.op == "get_attr" or not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
        return None
    return (value.dtype, *(size if isinstance(size, int) else size.node.expr for size in value.shape))
