"""The structures that can be taken out of a transformer: attention heads, and channels between two linears.

Found by what the graph computes, never by the names of modules: attention is what `heads` finds, an MLP is linears
whose outputs meet in pointwise operators and feed one linear. Which rows of a projection belong to a head or a channel
is probed (`probing`): separate, fused, interleaved and alternating layouts and gates need no case of their own.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.analysis.blocks import stacks_and_unclear
from fxsparse.analysis.heads import (
    Attention,
    Columns,
    NotSeparable,
    Rows,
    attending,
    attention_sites,
    but_last,
    common_path,
)
from fxsparse.analysis.inventory import softmaxes
from fxsparse.analysis.probing import CannotRun, between, nearest, shape_of
from fxsparse.analysis.products import activation_product
from fxsparse.analysis.reach import reached
from fxsparse.analysis.sections import Section, remembered
from fxsparse.graph import Linear, traits
from fxsparse.graph.record import Change, skipped

_DRAWS = 32
_POSITIONS = 2  # at which every unit is probed in a draw
_ACTIVATIONS = {
    "gelu",
    "relu",
    "silu",
    "sigmoid",
    "tanh",
    "hardswish",
    "leaky_relu",
    "elu",
    "mish",
    "softplus",
    "relu6",
}
_T = TypeVar("_T", bound="Attention | MLP")

__all__ = ["MLP", "Attention", "Columns", "Rows", "Structures", "attentions", "mlps", "structures"]


@dataclass(frozen=True)
class MLP:
    """Channels between linears.

    Attributes:
        path: module path.
        channels: how many.
        projections: the linears that make them.
        output: the linear that reads them.
    """

    path: str
    channels: int
    projections: tuple[Rows, ...]
    output: Columns


@dataclass(frozen=True)
class Structures:
    """What was found in a graph.

    Attributes:
        attentions, mlps: in order of execution.
        skipped: sites that were looked at and are left alone, with the reason.
    """

    attentions: tuple[Attention, ...] = ()
    mlps: tuple[MLP, ...] = ()
    skipped: tuple[Change, ...] = ()


def attentions(gm: GraphModule) -> list[Attention]:
    """The attentions of a training-IR graph whose heads can be told apart, in order of execution."""
    return list(_found(attention_sites(gm))[0])


def mlps(gm: GraphModule) -> list[MLP]:
    """The MLPs of a training-IR graph, in order of execution."""
    return list(_found(_mlp_sites(gm))[0])


def structures(gm: GraphModule) -> Structures:
    """All structures of a training-IR graph, and what was left alone.

    What was probed is kept with the graph and its copies (`sections.remembered`), so that asking again costs little.
    """
    heads, no_heads = _found(attention_sites(gm))
    channels, no_channels = _found(_mlp_sites(gm))
    left = dict.fromkeys((*no_heads, *_not_looked_at(gm), *no_channels))  # a module that runs twice is named once
    return Structures(tuple(heads), tuple(channels), tuple(left))


def _not_looked_at(gm: GraphModule) -> Iterable[Change]:
    """Softmaxes before a product that are no attention's, counted in another way than these are found."""
    known = attending(gm)
    paths = {fx.stack_path(node) or node.name: None for node in softmaxes(gm) if node not in known}
    return [skipped(path, "it has a softmax before a product, and is not told to be an attention") for path in paths]


def _found(sites: Iterable[tuple[str, Callable[[], _T]]]) -> tuple[list[_T], list[Change]]:
    found: list[_T] = []
    left: list[Change] = []
    for path, probe in sites:
        try:
            found.append(probe())
        except (NotSeparable, CannotRun) as reason:
            left.append(skipped(path, str(reason)))
    held = collections.Counter(site.path for site in found)
    # Where one module has several, each goes by the linear that reads it.
    return [replace(site, path=site.output.linear.path) if held[site.path] > 1 else site for site in found], left


# --- MLPs -------------------------------------------------------------------------------------------------------------


def _mlp_sites(gm: GraphModule) -> Iterable[tuple[str, Callable[[], MLP]]]:
    linears = {linear.node: linear for linear in fx.linears(gm)}
    computed = fx.depends_on_inputs(gm)
    blocks = _nodes_of_blocks(gm)
    for linear in linears.values():
        if blocks and linear.node not in blocks:
            continue  # a pooler, a head: not a part of the repeated core
        sources = nearest(linear.input, linears)
        path = between(set(sources), [linear.input]) if sources else []
        if not sources or linear.input in sources:
            continue
        reason = _why_not(linear, sources, path, computed)
        if reason is None:
            yield linear.path, partial(_mlp, gm, linear, sources, linears)
        elif any(map(_is_activation, path)) and not any(_attends(node) or _is_sum(node, computed) for node in path):
            yield linear.path, partial(_refuse, reason)


def _nodes_of_blocks(gm: GraphModule) -> set[Node]:
    found, unclear = stacks_and_unclear(gm)
    return {node for stack in found for block in stack.blocks for node in block.nodes}.union(
        *(item.nodes for item in unclear)
    )


def _why_not(linear: Linear, sources: list[Node], path: list[Node], computed: set[Node]) -> str | None:
    """Why what a linear reads is not the channels of an MLP; None if it may be."""
    if mixing := [node for node in path if not keeps_channels(node)]:
        return f"its channels are not only worked on one by one: {mixing[0].name} ({mixing[0].target}) is between"
    own = {linear.node, *path}
    for node in (*sources, *path):
        if others := [user for user in node.users if user not in own and not _is_size(user)]:
            return f"its channels are also read by {others[0].name}"
    beside = {source for node in path for source in node.all_input_nodes} - {*sources, *path}
    joining = [source for source in beside if source in computed and not _is_size(source)]
    return f"its channels meet {min(joining).name}, which its linears do not make" if joining else None


def _refuse(reason: str) -> MLP:
    raise NotSeparable(reason)


def _is_activation(node: Node) -> bool:
    return str(node.target).removeprefix("aten.").partition(".")[0].rstrip("_") in _ACTIVATIONS


def _is_sum(node: Node, computed: set[Node]) -> bool:
    """Whether a stream goes on here."""
    return (
        str(node.target).startswith("aten.add")
        and sum(source in computed and not _is_size(source) for source in node.all_input_nodes) > 1
    )


def _attends(node: Node) -> bool:
    return activation_product(node) is not None


def keeps_channels(node: Node) -> bool:
    """Whether a node works on each channel alone."""
    return traits.of(node.target).axes in {"pointwise", "reshape", "slices", "select", "item"}


def _is_size(node: Node) -> bool:
    return not isinstance(node.meta.get("val"), (Tensor, tuple, list))


def _mlp(gm: GraphModule, linear: Linear, sources: list[Node], linears: dict[Node, Linear]) -> MLP:
    own = {linear.name, *(linears[source].name for source in sources)}
    for other in linears.values():
        if other.name in own and other.node not in (linear.node, *sources):
            raise NotSeparable(f"{other.name} is used more than once")
    channels = linear.in_features
    section = section_of_channels(sources, linear.input, channels)
    key = ("channels of rows", channels, section.key)
    projections = []
    for source, answer in zip(
        sources, remembered(gm, key, lambda: rows_of_channels(section, linear.input, channels)), strict=True
    ):
        if isinstance(answer, str):
            raise NotSeparable(answer.format(row=linears[source].path))
        projections.append(Rows(linears[source], answer, "channel"))
    path_of = common_path([linear.path, *(projection.linear.path for projection in projections)])
    numbers = torch.arange(channels)[:, None]
    return MLP(path_of or linear.path, channels, tuple(projections), Columns(linear, numbers))


def section_of_channels(sources: Iterable[Node], target: Node, channels: int) -> Section:
    """What lies between the results of products and the channels that are read."""
    return Section({source: but_last(source) for source in sources}, [target], _POSITIONS * 2 * bits_of(channels))


def bits_of(channels: int) -> int:
    """How many bits the number of a channel has."""
    return max(1, (channels - 1).bit_length())


def rows_of_channels(section: Section, target: Node, channels: int) -> list[Tensor | str]:
    """For every source the rows of each channel, int64 ``[channels, rows of each]``, or why there are none.

    The number of a row's channel is read bit by bit: from which of the channels with the bit, and which of those
    without it, depend on the row.
    """
    bits = bits_of(channels)
    has_bit = (torch.arange(channels) >> torch.arange(bits)[:, None] & 1).bool()
    hits = [torch.zeros(2 * bits, shape_of(source)[-1], dtype=torch.bool) for source in section.sources]
    for _ in range(_DRAWS):
        hits = [
            seen | drawn
            for seen, drawn in zip(hits, reached(section, target, -1, torch.cat([~has_bit, has_bit])), strict=True)
        ]
        if all(bool((seen[:bits] | seen[bits:]).all()) for seen in hits):
            break
    return [_rows_of_channels(seen[:bits], seen[bits:], channels) for seen in hits]


def _rows_of_channels(without: Tensor, with_bit: Tensor, channels: int) -> Tensor | str:
    """From bool ``[bits, rows]``: whether channels without a bit, and with it, depend on a row."""
    if bool((without & with_bit).any()):
        return "a row of {row} feeds several channels"
    if not bool((without | with_bit).all()):
        return "some rows of {row} feed no channel"
    number = (with_bit * (1 << torch.arange(len(with_bit)))[:, None]).sum(0)
    counts = torch.bincount(number, minlength=channels)
    if len(counts) != channels or len(counts.unique()) != 1:
        return "channels have different numbers of rows of {row}"
    return number.argsort(stable=True).view(channels, -1)
