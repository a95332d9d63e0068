"""Recomputing parts of a graph in the backward pass instead of keeping what they compute (arXiv 1604.06174).

The plan is a mark on nodes, torch's own: ``meta["recompute"]``, and ``meta["ac_graph_id"]`` with the number of the
region. The graph stays flat, so every pass finds its sites and edits them, and new nodes take the marks of the place
where they are inserted. Only the code that runs in training is another one:

    flat graph        a = norm(x);  b = linear(a, w);  y = x + b        all marked with region 3
    code that runs    y = checkpoint(region_3, x, w)                    region_3 computes a, b and y

Under ``torch.compile`` Dynamo sees ``torch.utils.checkpoint``, and the partitioner of AOTAutograd recomputes.

A region is the marked nodes and those that lie between them. What writes in place is left out and runs once, after the
region; where that is impossible, and where random numbers would be drawn in another order, the region runs plainly and
`plan` says why.
"""

from __future__ import annotations

import copy
import heapq
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from fxsparse.graph import traits
from fxsparse.graph.values import arguments, stack_path

MARK, REGION = "recompute", "ac_graph_id"
"""Torch's names of the marks, which its partitioner reads and fx copies to what is traced from a node."""

_CALLS = {"call_function", "call_module"}


@dataclass(frozen=True)
class Region:
    """A part of a graph that is recomputed.

    Attributes:
        number: of its marks.
        path: the module path that its nodes have in common.
        nodes: in order of execution.
        refusal: why it runs plainly nevertheless; an empty string if it is recomputed.
    """

    number: int
    path: str
    nodes: tuple[Node, ...]
    refusal: str = ""


def mark(graph: Graph, nodes: Iterable[Node]) -> int:
    """Marks the calls among ``nodes`` as one region that is recomputed, and returns its number."""
    number = 1 + max((int(node.meta[REGION]) for node in graph.nodes if REGION in node.meta), default=0)
    for node in nodes:
        if node.op in _CALLS:
            node.meta[MARK], node.meta[REGION] = CheckpointPolicy.PREFER_RECOMPUTE, number
    return number


def is_marked(node: Node) -> bool:
    """Whether the node belongs to a region that is recomputed."""
    wanted = {CheckpointPolicy.PREFER_RECOMPUTE, CheckpointPolicy.MUST_RECOMPUTE}
    return node.op in _CALLS and REGION in node.meta and node.meta.get(MARK) in wanted


def plan(graph: Graph) -> tuple[Region, ...]:
    """The regions of a graph, those that must run plainly with the reason."""
    return _Plan(graph).regions


def recomputing(gm: GraphModule) -> GraphModule | None:
    """A module of the same state whose graph calls its regions through ``torch.utils.checkpoint``.

    It is run in training only. None if no region is recomputed; a region that is marked and cannot be is warned about.
    """
    if not any(is_marked(node) for node in gm.graph.nodes):
        return None
    whole = _Plan(gm.graph)
    for region in whole.regions:
        if region.refusal:
            warnings.warn(f"{region.path} is not recomputed in the backward pass: {region.refusal}", stacklevel=3)
    if all(region.refusal for region in whole.regions):
        return None
    return GraphModule(gm, whole.folded(), class_name="Recomputing")


class _Plan:
    """Which nodes are recomputed together, and in which order regions and the other nodes run."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.order = {node: position for position, node in enumerate(graph.nodes)}
        marked: dict[int, list[Node]] = {}
        for node in graph.nodes:
            if is_marked(node):
                marked.setdefault(int(node.meta[REGION]), []).append(node)
        self.refusals: dict[int, str] = {}
        self.marked = marked
        self.members: dict[int, list[Node]] = {}
        self.member_of: dict[Node, int] = {}
        for number, nodes in marked.items():
            self._gather(number, nodes)
        self.sequence = self._sequence()

    @property
    def regions(self) -> tuple[Region, ...]:
        return tuple(
            Region(number, _common_path(nodes), tuple(self.members.get(number, nodes)), self.refusals.get(number, ""))
            for number, nodes in self.marked.items()
        )

    def _gather(self, number: int, nodes: list[Node]) -> None:
        """The members of a region: marked nodes that compute tensors, and what lies between them."""
        inside = {node for node in nodes if _computes_tensors(node) and not _writes(node)}
        inside |= self._drawn_within(inside)
        inside |= self._between(inside)
        members = sorted(inside, key=self.order.__getitem__)
        if not members:
            self.refusals[number] = "none of its operators computes a tensor"
            return
        obstacles = (self._switch_in(members), *(self._obstacle(node, inside) for node in members))
        if refusal := next(filter(None, obstacles), ""):
            self.refusals[number] = refusal
            return
        self.members[number] = members
        self.member_of.update(dict.fromkeys(members, number))

    def _drawn_within(self, inside: set[Node]) -> set[Node]:
        """The random numbers drawn between those of the members, which keep their order only as members."""
        draws = [self.order[node] for node in inside if _draws(node)]
        if not draws:
            return set()
        span = range(min(draws), max(draws))
        return {node for node, position in self.order.items() if position in span and _draws(node)}

    def _between(self, inside: set[Node]) -> set[Node]:
        """The nodes on a way from a member to a member."""
        if not inside:
            return set()
        first, last = (pick(self.order[node] for node in inside) for pick in (min, max))
        span = [node for node, position in self.order.items() if first <= position <= last]
        depends: set[Node] = set()
        for node in span:
            if any(source in inside or source in depends for source in node.all_input_nodes):
                depends.add(node)
        feeds: set[Node] = set()
        for node in reversed(span):
            if any(user in inside or user in feeds for user in node.users):
                feeds.add(node)
        return (depends & feeds) - inside

    def _switch_in(self, members: list[Node]) -> str:
        """Whether autocast or the recording of gradients is switched between the members."""
        first, last = self.order[members[0]], self.order[members[-1]]
        switches = (node for node in self.graph.nodes if traits.switches_mode(node))
        return next((f"{node.name} lies within" for node in switches if first < self.order[node] < last), "")

    def _obstacle(self, node: Node, inside: set[Node]) -> str:
        """Why a member cannot run a second time."""
        if node in self.member_of:
            return f"{node.name} belongs to {_common_path(self.marked[self.member_of[node]])} too"
        if node.op == "call_module":
            return f"{node.name} is a module of its own"
        if _writes(node):
            return f"{node.name} writes in place and is read by the rest"
        if _has_statistics(node):
            return f"{node.name} would take its batch into the running statistics twice"
        for source in node.all_input_nodes:
            if source.op == "get_attr" and any(_writes(user) and user not in inside for user in source.users):
                return f"{node.name} reads {source.target}, which is written in place"
        return ""

    def _sequence(self) -> list[Node | int]:
        """Nodes and numbers of regions as they run; leaves out the regions that would change the order of draws."""
        while True:
            sequence = self._sorted()
            if sequence is None:
                self._refuse(next(iter(self.members)), "its blocks depend on each other both ways")
                continue
            flat = [node for item in sequence for node in (self.members[item] if isinstance(item, int) else [item])]
            moved = next(filter(None, (self._moved(flat, kind) for kind in (_draws, _writes))), None)
            if moved is None:
                return sequence
            self._refuse(self.member_of[moved], f"{moved.name} would change places with others that draw or write")

    def _moved(self, flat: list[Node], kind: Callable[[Node], bool]) -> Node | None:
        """A member of a region that makes nodes of a kind, whose order matters, run in another order."""
        before = [node for node in self.order if kind(node)]
        after = [node for node in flat if kind(node)]
        places = [place for place, pair in enumerate(zip(before, after, strict=True)) if pair[0] is not pair[1]]
        among = [node for place in places for node in (before[place], after[place])]
        return next((node for node in among if node in self.member_of), None)

    def _refuse(self, number: int, reason: str) -> None:
        self.refusals[number] = reason
        for node in self.members.pop(number):
            del self.member_of[node]

    def _sorted(self) -> list[Node | int] | None:
        """A topological order in which everything stands as near to its old place as it can; None if there is none."""
        item_of: dict[Node, Node | int] = {node: self.member_of.get(node, node) for node in self.order}
        position = {item: self.order[node] for node, item in item_of.items()}  # of a region: its last member's
        waits: dict[Node | int, set[Node | int]] = {item: set() for item in position}
        readers: dict[Node | int, set[Node | int]] = {item: set() for item in position}
        for node, item in item_of.items():
            for source in node.all_input_nodes:
                if item_of[source] != item:
                    waits[item].add(item_of[source])
                    readers[item_of[source]].add(item)
        ready = [(position[item], item) for item, sources in waits.items() if not sources]
        heapq.heapify(ready)
        sequence: list[Node | int] = []
        while ready:
            _, item = heapq.heappop(ready)
            sequence.append(item)
            for reader in readers[item]:
                waits[reader].discard(item)
                if not waits[reader]:
                    heapq.heappush(ready, (position[reader], reader))
        return sequence if len(sequence) == len(position) else None

    def folded(self) -> Graph:
        """The graph with a call in the place of every region."""
        folded, moved = Graph(), dict[Node, Node]()
        for item in self.sequence:
            if isinstance(item, Node):
                moved[item] = folded.node_copy(item, moved.__getitem__)
                continue
            members = self.members[item]
            inside = set(members)
            inputs = list(dict.fromkeys(n for node in members for n in node.all_input_nodes if n not in inside))
            outputs = [node for node in members if any(user not in inside for user in node.users)]
            function = _checkpointed(_function(members, inputs, outputs), _common_path(members))
            call = folded.call_function(function, tuple(moved[node] for node in inputs))
            for index, node in enumerate(outputs):
                moved[node] = folded.call_function(_item, (call, index))
                moved[node].meta = {key: value for key, value in node.meta.items() if key not in {MARK, REGION}}
        folded.set_codegen(copy.deepcopy(self.graph._codegen))
        return folded


def _item(results: tuple[Any, ...], index: int) -> Any:
    return results[index]


def _function(members: list[Node], inputs: list[Node], outputs: list[Node]) -> Callable[..., Any]:
    """The Python function of a region."""
    graph, moved = Graph(), dict[Node, Node]()
    for node in inputs:
        moved[node] = graph.placeholder(node.name)
    for node in members:
        moved[node] = graph.node_copy(node, moved.__getitem__)
    graph.output(tuple(moved[node] for node in outputs))
    forward: Any = type(GraphModule(nn.Module(), graph, class_name="Region")).forward
    return lambda *args: forward(None, *args)  # it reads no state


def _checkpointed(function: Callable[..., Any], path: str) -> Callable[..., Any]:
    def recomputed(*inputs: Any) -> Any:
        return checkpoint(function, *inputs, use_reentrant=False)

    recomputed.__name__ = f"recomputed_{path.replace('.', '_') or 'region'}"
    return recomputed


def _common_path(nodes: Iterable[Node]) -> str:
    """The module path that most of a region's nodes have in common."""
    paths = [path.split(".") for path in map(stack_path, nodes) if path]
    together = takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    return ".".join(names[0] for names in together) or "a part of the graph"


def _computes_tensors(node: Node) -> bool:
    leaves = pytree.tree_leaves(node.meta.get("val", node.meta.get("example_value")))
    return bool(leaves) and all(isinstance(leaf, Tensor) for leaf in leaves)


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _draws(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _has_statistics(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    names = {argument.name for argument in schema.arguments} if schema is not None else set()
    return "running_mean" in names and arguments(node)["running_mean"] is not None
