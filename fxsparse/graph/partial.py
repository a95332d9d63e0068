"""The graph without an input that a call leaves out.

A model of transformers that is called without labels returns no loss, and all else as with labels. So does its graph:
everything that depends on the input goes, and the loss of the output object is None. An input on which more than the
loss depends cannot be left out. The graph for a choice of inputs is derived when it is first needed, and anew after an
edit.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree


def input_names(gm: GraphModule) -> list[str]:
    """The names of what ``gm`` takes, in order."""
    info = getattr(gm.graph._codegen, "pytree_info", None)
    return [name for name in getattr(info, "orig_args", ()) if name != "self"]


def input_nodes(graph: Graph) -> dict[str, list[Node]]:
    """The placeholders of each input, by its name; several where the input is nested."""
    info = graph._codegen.pytree_info  # type: ignore[attr-defined]
    positional, named = info.in_spec.children()
    specs = [*positional.children(), *named.children()]
    nodes = iter(graph.find_nodes(op="placeholder"))
    names = [name for name in info.orig_args if name != "self"]
    ordered = [*names[: positional.num_children], *named.context]
    return {name: [next(nodes) for _ in range(spec.num_leaves)] for name, spec in zip(ordered, specs, strict=True)}


def dependent_outputs(graph: Graph, absent: Collection[str]) -> list[str]:
    """The names of the outputs that depend on these inputs, of an output object; a number where it is none."""
    gone = _dependents(graph, absent)
    return [name for name, leaf in _outputs(graph) if leaf in gone]


def can_go(graph: Graph, absent: Collection[str]) -> bool:
    """Whether a graph can do without these inputs: its loss depends on them, and nothing else."""
    nodes = input_nodes(graph)
    plain = all(len(nodes[name]) == 1 for name in absent)
    return plain and dependent_outputs(graph, absent) == ["loss"] and len(_outputs(graph)) > 1


def graph_without(graph: Graph, absent: Collection[str]) -> Graph:
    """A copy of ``graph`` without what depends on these inputs, which it takes and ignores."""
    twin = copy.deepcopy(graph)
    gone = _dependents(twin, absent)
    output = twin.output_node()
    output.args = pytree.tree_map_only(Node, lambda leaf: None if leaf in gone else leaf, output.args)
    for node in reversed(list(twin.nodes)):
        if node in gone and node.op != "placeholder":
            twin.erase_node(node)
    twin.eliminate_dead_code()
    return twin


def _outputs(graph: Graph) -> list[tuple[str, Any]]:
    spec = graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    leaves = pytree.tree_leaves(graph.output_node().args[0], is_leaf=lambda item: item is None)
    keys = (
        spec.context if isinstance(spec.context, list) and len(spec.context) == spec.num_leaves else range(len(leaves))
    )
    return [(str(key), leaf) for key, leaf in zip(keys, leaves, strict=True)]


def _dependents(graph: Graph, absent: Collection[str]) -> set[Node]:
    """The nodes that depend on these inputs, themselves included."""
    nodes = input_nodes(graph)
    gone = {node for name in absent for node in nodes[name]}
    for node in graph.nodes:
        if node.op != "output" and any(source in gone for source in node.all_input_nodes):
            gone.add(node)
    return gone
