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
from fxsparse.analysis.probing import between, evaluate, nearest, shape_of
from fxsparse.graph import Linear, traits
from fxsparse.graph.record import Change, skipped
from fxsparse.ops.operator import operator_name

aten = torch.ops.aten

SDPA = aten.scaled_dot_product_attention.default
_DRAWS = 8
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
    """All structures of a training-IR graph, and what was left alone."""
    heads, no_heads = _found(_attention_sites(gm))
    channels, no_channels = _found(_mlp_sites(gm))
    return Structures(tuple(heads), tuple(channels), (*no_heads, *no_channels))


def _found(sites: Iterable[tuple[str, Callable[[], _T]]]) -> tuple[list[_T], list[Change]]:
    found: list[_T] = []
    left: list[Change] = []
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
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
        yield fx.stack_path(sdpa) or sdpa.name, partial(_attention, sdpa, linears)


def _attention(sdpa: Node, linears: dict[Node, Linear]) -> Attention:
    operands = dict(zip(("query", "key", "value"), fx.arguments(sdpa).values(), strict=False))
    heads = shape_of(operands["query"])[1]
    rows = {kind: _head_rows(node, linears) for kind, node in operands.items()}
    groups = {kind: _groups(index) for kind, (_, index) in rows.items()}
    kv_heads = len(groups["key"])
    if len(groups["query"]) != heads:
        raise _NotSeparable("query heads share rows of their projection")
    if len(groups["value"]) != kv_heads or heads % kv_heads:
        raise _NotSeparable(f"{heads} query heads, {kv_heads} key heads, {len(groups['value'])} value heads")
    projections = tuple(Rows(rows[kind][0], _stacked(groups[kind], kind), kind) for kind in groups)
    output = _head_columns(sdpa, heads, linears)
    paths = [projection.linear.path for projection in projections] + [output.linear.path]
    return Attention(_common(paths) or fx.stack_path(sdpa), sdpa, heads, kv_heads, projections, output)


def _head_rows(node: Node, linears: dict[Node, Linear]) -> tuple[Linear, list[frozenset[int]]]:
    """The linear that a query, key or value comes from, and the rows that each head reads."""
    sources = nearest(node, linears)
    if len(sources) != 1:
        raise _NotSeparable(f"{node.name} comes from {len(sources)} linears, not one")
    (source,) = sources
    path = between({source}, [node])
    _refuse_products(path)
    drawn = torch.randn(shape_of(source), requires_grad=True)
    # In-place operators may write into a copy, not into what gradients are taken of.
    result = evaluate(path, {source: drawn.clone()}, {})[node] if path else drawn
    used: list[frozenset[int]] = []
    for head in range(result.shape[1]):
        part = result[:, head]
        (gradient,) = torch.autograd.grad((part * torch.randn_like(part)).sum(), drawn, retain_graph=True)
        touched = gradient.flatten(0, -2).ne(0).any(0)
        used.append(frozenset(touched.nonzero().flatten().tolist()))
    return linears[source], used


def _groups(rows_of_heads: list[frozenset[int]]) -> list[frozenset[int]]:
    """The different sets of rows, in order: heads that share one are a group, whose members must be consecutive."""
    groups = list(dict.fromkeys(rows_of_heads))
    if len({rows_of_heads.count(group) for group in groups}) != 1:
        raise _NotSeparable("groups of heads that share rows have different numbers of heads")
    size = len(rows_of_heads) // len(groups)
    if any(rows != groups[head // size] for head, rows in enumerate(rows_of_heads)):
        raise _NotSeparable("heads that share rows are not consecutive")
    return groups


def _stacked(groups: list[frozenset[int]], kind: str) -> Tensor:
    sizes = {len(group) for group in groups}
    if len(sizes) != 1 or len(frozenset.union(*groups)) != sum(map(len, groups)):
        raise _NotSeparable(f"{kind} heads overlap or differ in size: one part of the projection serves several heads")
    return torch.tensor([sorted(group) for group in groups])


def _head_columns(sdpa: Node, heads: int, linears: dict[Node, Linear]) -> Columns:
    """The linear that reads an attention's result, and the columns that each head feeds."""
    readers = _readers(sdpa, linears)
    if len(readers) != 1:
        raise _NotSeparable(f"its result is read by {len(readers)} linears, not one")
    linear = linears[readers[0]]
    path, stand_ins = between({sdpa}, [linear.input]), dict[Node, object]()
    _refuse_products(path)

    def columns(drawn: Tensor) -> Tensor:
        return evaluate(path, {sdpa: drawn}, stand_ins)[linear.input] if path else drawn

    with torch.no_grad():
        first = torch.randn(shape_of(sdpa))
        base, index = columns(first), []
        for head in range(heads):
            other = first.clone()
            other[:, head] = torch.randn_like(other[:, head])
            changed = columns(other).ne(base).flatten(0, -2).any(0)
            index.append(changed.nonzero().flatten().tolist())
    if len({len(own) for own in index}) != 1 or sum(map(len, index)) != len({at for own in index for at in own}):
        raise _NotSeparable("heads are mixed before the output linear")
    return Columns(linear, torch.tensor(index))


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
        yield linear.path, partial(_mlp, linear, sources, path, linears)


def _keeps_channels(node: Node) -> bool:
    return traits.of(node.target).axes in {"pointwise", "reshape", "slices", "select", "item"}


def _is_size(node: Node) -> bool:
    return not isinstance(node.meta.get("val"), (Tensor, tuple, list))


def _mlp(linear: Linear, sources: list[Node], path: list[Node], linears: dict[Node, Linear]) -> MLP:
    channels = linear.in_features
    bits = max(1, (channels - 1).bit_length())
    numbers = torch.arange(channels)
    hits: list[Tensor] = [torch.zeros(2, bits, shape_of(source)[-1], dtype=torch.bool) for source in sources]
    for _ in range(_DRAWS):
        given = {source: torch.randn(shape_of(source), requires_grad=True) for source in sources}
        result = evaluate(path, {source: values.clone() for source, values in given.items()}, {})[linear.input]
        weights = torch.randn_like(result)
        for bit in range(bits):
            for one in (0, 1):
                chosen = weights * (numbers >> bit & 1).eq(one)
                gradients = torch.autograd.grad(
                    (result * chosen).sum(), list(given.values()), retain_graph=True, allow_unused=True
                )
                for seen, gradient in zip(hits, gradients, strict=True):
                    if gradient is not None:
                        seen[one, bit] |= gradient.flatten(0, -2).ne(0).any(0)
        if all(bool(seen.any(0).all()) for seen in hits):
            break
    projections = []
    for source, seen in zip(sources, hits, strict=True):
        if bool((seen[0] & seen[1]).any()):
            raise _NotSeparable(f"a row of {linears[source].path} feeds several channels")
        if not bool(seen.any(0).all()):
            raise _NotSeparable(f"some rows of {linears[source].path} feed no channel")
        number = (seen[1] * (1 << torch.arange(bits))[:, None]).sum(0)
        counts = torch.bincount(number, minlength=channels)
        if len(counts) != channels or len(counts.unique()) != 1:
            raise _NotSeparable(f"channels have different numbers of rows of {linears[source].path}")
        projections.append(Rows(linears[source], number.argsort(stable=True).view(channels, -1), "channel"))
    path_of = _common([linear.path, *(projection.linear.path for projection in projections)])
    return MLP(path_of or linear.path, channels, tuple(projections), Columns(linear, numbers[:, None]))


def _common(paths: list[str]) -> str:
    """The innermost module that holds all of some module paths."""
    together = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, together))
