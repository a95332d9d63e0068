"""The structures that can be taken out of a transformer: attention heads, and channels between two linears.

Found by what the graph computes, never by the names of modules: attention is what surrounds a call of
``scaled_dot_product_attention``, an MLP is linears whose outputs meet in pointwise operators and feed one linear. Which
rows of a projection belong to a head or a channel is probed (`probing`): separate, fused, interleaved and
grouped layouts, norms of queries and keys, rotary positions and gates need no case of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.analysis.blocks import stacks
from fxsparse.analysis.probing import between, nearest, shape_of
from fxsparse.analysis.reach import changed, reached
from fxsparse.analysis.sections import Section, remembered
from fxsparse.graph import Linear, traits
from fxsparse.graph.record import Change, skipped
from fxsparse.ops.operator import operator_name

aten = torch.ops.aten

SDPA = aten.scaled_dot_product_attention.default
_DRAWS = 32
_POSITIONS = 2  # at which every unit is probed in a draw
_T = TypeVar("_T")


@dataclass(frozen=True)
class Rows:
    """The rows of a linear that make the units of a structure.

    Attributes:
        linear: the projection.
        index: int64 ``[units, rows of a unit]``: of its outputs.
        kind: ``query``, ``key``, ``value`` or ``channel``.
    """

    linear: Linear
    index: Tensor
    kind: str


@dataclass(frozen=True)
class Columns:
    """The columns of a linear that read the units of a structure.

    Attributes:
        linear: the one that mixes the units.
        index: int64 ``[units, columns of a unit]``: of its inputs.
    """

    linear: Linear
    index: Tensor


@dataclass(frozen=True)
class Attention:
    """An attention.

    Attributes:
        path: module path.
        sdpa: its call of ``scaled_dot_product_attention``.
        heads: of queries.
        kv_heads: of keys and values; query head h reads ``h // (heads // kv_heads)``.
        projections: of queries, keys and values; one linear may hold several.
        output: the linear that reads all heads.
    """

    path: str
    sdpa: Node
    heads: int
    kv_heads: int
    projections: tuple[Rows, ...]
    output: Columns

    @property
    def operands(self) -> list[Node]:
        """The nodes of queries, keys and values."""
        return [fx.arguments(self.sdpa)[name] for name in ("query", "key", "value")]

    @property
    def mask_of_heads(self) -> Node | None:
        """The mask, where it differs from head to head (T5's positions, ALiBi)."""
        mask = fx.arguments(self.sdpa)["attn_mask"]
        if not isinstance(mask, Node) or len(shape_of(mask)) < 3 or shape_of(mask)[-3] == 1:
            return None
        return mask


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


class _NotSeparable(Exception):
    """Why something has no units that can be taken out."""


def attentions(gm: GraphModule) -> list[Attention]:
    """The attentions of a training-IR graph whose heads can be told apart, in order of execution."""
    return list(_found(_attention_sites(gm))[0])


def mlps(gm: GraphModule) -> list[MLP]:
    """The MLPs of a training-IR graph, in order of execution."""
    return list(_found(_mlp_sites(gm))[0])


def structures(gm: GraphModule) -> Structures:
    """All structures of a training-IR graph, and what was left alone.

    What was probed is kept with the graph and its copies (`sections.remembered`), so that asking again costs little.
    """
    heads, no_heads = _found(_attention_sites(gm))
    channels, no_channels = _found(_mlp_sites(gm))
    return Structures(tuple(heads), tuple(channels), (*no_heads, *no_channels))


def _found(sites: Iterable[tuple[str, Callable[[], _T]]]) -> tuple[list[_T], list[Change]]:
    found: list[_T] = []
    left: list[Change] = []
    for path, probe in sites:
        try:
            found.append(probe())
        except _NotSeparable as reason:
            left.append(skipped(path, str(reason)))
    return found, left


# --- attention --------------------------------------------------------------------------------------------------------


def _attention_sites(gm: GraphModule) -> Iterable[tuple[str, Callable[[], Attention]]]:
    linears = {linear.node: linear for linear in fx.linears(gm)}
    for sdpa in gm.graph.find_nodes(op="call_function", target=SDPA):
        yield fx.stack_path(sdpa) or sdpa.name, partial(_attention, gm, sdpa, linears)


def _attention(gm: GraphModule, sdpa: Node, linears: dict[Node, Linear]) -> Attention:
    operands = dict(zip(("query", "key", "value"), fx.arguments(sdpa).values(), strict=False))
    heads = shape_of(operands["query"])[1]
    rows = {kind: _head_rows(gm, node, linears) for kind, node in operands.items()}
    groups = {kind: of_heads.group() for kind, (_, of_heads) in rows.items()}
    kv_heads = len(groups["key"])
    if len(groups["query"]) != heads:
        raise _NotSeparable("query heads share rows of their projection")
    if len(groups["value"]) != kv_heads or heads % kv_heads:
        raise _NotSeparable(f"{heads} query heads, {kv_heads} key heads, {len(groups['value'])} value heads")
    projections = tuple(Rows(rows[kind][0], _stacked(groups[kind], kind), kind) for kind in groups)
    output = _head_columns(gm, sdpa, heads, linears)
    paths = [projection.linear.path for projection in projections] + [output.linear.path]
    return Attention(_common(paths) or fx.stack_path(sdpa), sdpa, heads, kv_heads, projections, output)


@dataclass(frozen=True)
class _OfHeads:
    """The rows or columns of each head, ascending, as numbers side by side.

    Attributes:
        counts: how many each head has, int64 ``[heads]``.
        numbers: int64 ``[their sum]``.
    """

    counts: Tensor
    numbers: Tensor

    @classmethod
    def of(cls, touched: Tensor) -> _OfHeads:
        """Of ``touched``, bool ``[heads, rows]``."""
        return cls(touched.sum(1), touched.nonzero()[:, 1])

    def each(self) -> list[Tensor]:
        return list(self.numbers.split(self.counts.tolist()))

    def group(self) -> list[Tensor]:
        """The different sets of rows, in order: heads that share one are a group, whose members must be consecutive."""
        each = self.each()
        numbers = [tuple(rows.tolist()) for rows in each]
        firsts = {rows: head for head, rows in reversed(list(enumerate(numbers)))}
        groups = sorted(firsts.values())
        if len({numbers.count(numbers[head]) for head in groups}) != 1:
            raise _NotSeparable("groups of heads that share rows have different numbers of heads")
        size = len(each) // len(groups)
        if any(rows != numbers[groups[head // size]] for head, rows in enumerate(numbers)):
            raise _NotSeparable("heads that share rows are not consecutive")
        return [each[head] for head in groups]


def _head_rows(gm: GraphModule, node: Node, linears: dict[Node, Linear]) -> tuple[Linear, _OfHeads]:
    """The linear that a query, key or value comes from, and the rows that each head reads."""
    sources = nearest(node, linears)
    if len(sources) != 1:
        raise _NotSeparable(f"{node.name} comes from {len(sources)} linears, not one")
    (source,) = sources
    heads = shape_of(node)[1]
    section = Section({source: _but_last(source)}, [node], _POSITIONS * heads)
    _refuse_products(section.nodes)

    def probe() -> _OfHeads:
        touched = torch.zeros(heads, shape_of(source)[-1], dtype=torch.bool)
        for _ in range(_DRAWS):
            (drawn,) = reached(section, node, 1, torch.eye(heads, dtype=torch.bool))
            before, touched = touched, touched | drawn
            if torch.equal(before, touched) and len(touched.sum(1).unique()) == 1:
                break
        return _OfHeads.of(touched)

    return linears[source], remembered(gm, ("rows of heads", heads, section.key), probe)


def _stacked(groups: list[Tensor], kind: str) -> Tensor:
    sizes = {len(group) for group in groups}
    if len(sizes) != 1 or len(torch.cat(groups).unique()) != sum(map(len, groups)):
        raise _NotSeparable(f"{kind} heads overlap or differ in size: one part of the projection serves several heads")
    return torch.stack(groups)


def _head_columns(gm: GraphModule, sdpa: Node, heads: int, linears: dict[Node, Linear]) -> Columns:
    """The linear that reads an attention's result, and the columns that each head feeds."""
    readers = _readers(sdpa, linears)
    if len(readers) != 1:
        raise _NotSeparable(f"its result is read by {len(readers)} linears, not one")
    linear = linears[readers[0]]
    axes = [axis for axis in _but_last(sdpa) if axis != 1]
    section = Section({sdpa: axes}, [linear.input], _POSITIONS * heads)
    _refuse_products(section.nodes)
    index = remembered(
        gm,
        ("columns of heads", heads, section.key),
        lambda: _OfHeads.of(changed(section, sdpa, linear.input, 1, heads)),
    )
    if len(index.counts.unique()) != 1 or len(index.numbers.unique()) != len(index.numbers):
        raise _NotSeparable("heads are mixed before the output linear")
    return Columns(linear, index.numbers.view(heads, -1))


def _but_last(node: Node) -> range:
    return range(len(shape_of(node)) - 1)


def _refuse_products(path: list[Node]) -> None:
    """Refuses a way between heads and a dense linear that leads through a sparse linear: it mixes the heads."""
    for node in path:
        if operator_name(node.target) is not None:
            raise _NotSeparable(f"its heads are read through {fx.stack_path(node) or node.name}, which is not dense")


def _readers(node: Node, linears: dict[Node, Linear]) -> list[Node]:
    """The linears that read a node, through other operators."""
    found, seen, pending = [], {node}, [node]
    while pending:
        for user in pending.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if user in linears:
                found.append(user)
            elif user.op != "output":
                pending.append(user)
    return found


# --- MLPs -------------------------------------------------------------------------------------------------------------


def _mlp_sites(gm: GraphModule) -> Iterable[tuple[str, Callable[[], MLP]]]:
    linears = {linear.node: linear for linear in fx.linears(gm)}
    computed = fx.depends_on_inputs(gm)
    blocks = {node for stack in stacks(gm) for block in stack.blocks for node in block.nodes}
    for linear in linears.values():
        if blocks and linear.node not in blocks:
            continue  # a pooler, a head: not a part of the repeated core
        sources = nearest(linear.input, linears)
        path = between(set(sources), [linear.input]) if sources else []
        if not sources or linear.input in sources or not all(map(_keeps_channels, path)):
            continue
        own = {linear.node, *path}
        if any(user not in own and not _is_size(user) for node in (*sources, *path) for user in node.users):
            continue  # something else reads the channels, so they are a stream, not an MLP's own
        beside = {source for node in path for source in node.all_input_nodes} - {*sources, *path}
        if any(source in computed and not _is_size(source) for source in beside):
            continue  # a stream joins in
        yield linear.path, partial(_mlp, gm, linear, sources, linears)


def _keeps_channels(node: Node) -> bool:
    return traits.of(node.target).axes in {"pointwise", "reshape", "slices", "select", "item"}


def _is_size(node: Node) -> bool:
    return not isinstance(node.meta.get("val"), (Tensor, tuple, list))


def _mlp(gm: GraphModule, linear: Linear, sources: list[Node], linears: dict[Node, Linear]) -> MLP:
    channels = linear.in_features
    bits = max(1, (channels - 1).bit_length())
    section = Section({source: _but_last(source) for source in sources}, [linear.input], _POSITIONS * 2 * bits)
    key = ("channels of rows", channels, section.key)
    projections = []
    for source, answer in zip(
        sources, remembered(gm, key, lambda: _channels(section, linear.input, channels, bits)), strict=True
    ):
        if isinstance(answer, str):
            raise _NotSeparable(answer.format(row=linears[source].path))
        projections.append(Rows(linears[source], answer, "channel"))
    path_of = _common([linear.path, *(projection.linear.path for projection in projections)])
    numbers = torch.arange(channels)[:, None]
    return MLP(path_of or linear.path, channels, tuple(projections), Columns(linear, numbers))


def _channels(section: Section, target: Node, channels: int, bits: int) -> list[Tensor | str]:
    """For every source the rows of each channel, int64 ``[channels, rows of each]``, or why there are none.

    The number of a row's channel is read bit by bit: from which of the channels with the bit, and which of those
    without it, depend on the row.
    """
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


def _common(paths: list[str]) -> str:
    """The innermost module that holds all of some module paths."""
    together = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, together))
