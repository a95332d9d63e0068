"""The parts of a graph that multiplexing works on: the core, the tokens, attention and its masks, the head's inputs.

The core is the stack of layers between the embeddings and the head. Everything here only reads the graph, except
`move_up`, which puts a node and what it needs before another one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from fxsparse import graph as fx
from fxsparse.analysis.blocks import Stack, Unclear
from fxsparse.errors import RewriteError
from fxsparse.graph import traits

aten = torch.ops.aten
_PASS = "multiplex"
_END = torch.iinfo(torch.int64).max


def choose(lists: list[Stack], unclear: list[Unclear], wanted: str | None) -> Stack:
    """The list of blocks that is multiplexed: the one at ``wanted``, or the only one."""
    paths = [stack.path for stack in lists]
    if wanted is not None:
        if wanted not in paths:
            if refused := [item for item in unclear if item.path.rpartition(".")[0] == wanted]:
                raise refused[0].refusal(_PASS)
            raise RewriteError(
                f"there is no list of blocks at stack={wanted}; there are: {', '.join(paths) or 'none'}",
                pass_name=_PASS,
            )
        return lists[paths.index(wanted)]
    if unclear:
        raise unclear[0].refusal(_PASS)
    if not lists:
        raise RewriteError(
            "the model has no repeated core: no list of two or more blocks that pass one stream of hidden states on; "
            "leave this pass out",
            pass_name=_PASS,
        )
    if len(lists) > 1:
        raise RewriteError(
            "the model has several lists of blocks; choose one with " + " or ".join(f"stack={path}" for path in paths),
            pass_name=_PASS,
        )
    return lists[0]


def token_embedding(gm: GraphModule, source: Node) -> Node | None:
    """The lookup of tokens in the largest table among those that feed ``source``; None if the model embeds something
    else, such as images.

    Raises:
        RewriteError: nothing embeds the core's input.
    """
    pending, seen = [source], set()
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending += node.all_input_nodes
    if not any(fx.is_embedding(node) or fx.applies_parameter(gm, node) for node in seen):
        raise RewriteError(
            f"there is no embedding: the core reads {source.name}, which no table, linear or convolution makes; "
            "inputs are mixed after they are embedded",
            pass_name=_PASS,
            site=fx.stack_path(source),
        )
    lookups = [node for node in seen if fx.is_embedding(node) and _is_given(node.args[1])]  # type: ignore[arg-type]
    return max(lookups, key=lambda node: fx.value(node.args[0]).shape[0], default=None)  # type: ignore[arg-type]


def _is_given(node: Node) -> bool:
    """Whether a node is an input of the model, reshaped or converted at most."""
    while _passes_on(node):
        node = node.all_input_nodes[0]
    return node.op == "placeholder"


def _passes_on(node: Node) -> bool:
    """Whether the values of a node are those of its operand, or a part of them, in the same order."""
    known = traits.of(node.target)
    return known.copies is not None or known.axes in {"reshape", "broadcast", "slices"}


def mask_of(attention: Node) -> Node | None:
    """The mask of an attention."""
    mask = attention.args[3] if len(attention.args) > 3 else attention.kwargs.get("attn_mask")
    return mask if isinstance(mask, Node) else None


def is_causal(attention: Node) -> bool:
    """Whether an attention is causal without a mask that says so."""
    flag = attention.args[5] if len(attention.args) > 5 else attention.kwargs.get("is_causal", False)
    return bool(flag)


def only_masks_attention(mask: Node, inside: set[Node]) -> bool:
    """Whether a region uses ``mask`` only to mask attention: as SDPA's mask, or added to scores."""
    for user in mask.users:
        if user not in inside and user.target is not aten.scaled_dot_product_attention.default:
            continue
        if user.target is aten.scaled_dot_product_attention.default and mask_of(user) is mask:
            continue
        if _passes_on(user) and user.args[0] is mask and only_masks_attention(user, inside):
            continue
        if user.target is aten.add.Tensor and all(_is_softmax(reader) for reader in user.users):
            continue
        return False
    return True


def _is_softmax(node: Node) -> bool:
    return traits.of(node.target).axes == "softmax"


def move_up(node: Node, before: Node) -> None:
    """Moves ``node`` and the nodes it depends on before ``before``, on which none of them depends."""
    order = {item: place for place, item in enumerate(node.graph.nodes)}
    needed, pending = set(), [node]
    while pending:
        item = pending.pop()
        if item not in needed and order[item] > order[before]:
            needed.add(item)
            pending += item.all_input_nodes
    for item in sorted(needed, key=order.__getitem__):
        before.prepend(item)


def positions_read(sink: Node) -> list[Node]:
    """The calls that pick positions from ``sink``, one after the other, where nothing else reads it."""
    chain: list[Node] = []
    node = sink
    while len(node.users) == 1:
        (user,) = node.users
        rank = fx.value(node).dim()
        picks = user.target in {aten.select.int, aten.slice.Tensor} and _dim_of(user) % rank != 0
        if not picks and not (user.target is aten.slice.Tensor and _is_whole(user)):
            break
        chain.append(user)
        node = user
    return chain


def _dim_of(node: Node) -> int:
    return int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]


def _is_whole(node: Node) -> bool:
    start, end, step = [*node.args[2:], None, None, None][:3]
    return start in (None, 0) and end in (None, _END) and step in (None, 1)


def scalar_output(gm: GraphModule) -> Node | None:
    """The one scalar that the model returns; None if it returns several, or no scalar."""
    outputs = {node for node in tree_leaves(gm.graph.output_node().args) if isinstance(node, Node)}
    scalars = [node for node in outputs if isinstance(fx.value(node), Tensor) and fx.value(node).dim() == 0]
    return scalars[0] if len(scalars) == 1 else None
