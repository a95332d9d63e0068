"""Attention, found by what a graph computes: linears whose results meet in two products, one after the other, before
a linear reads what comes out.

    q, k, v = linear(x), ...     scores = product(q, k)     ...     y = product(softmax(scores), v)     linear(y)
    q, k, v = linear(x), ...                  y = scaled_dot_product_attention(q, k, v)                 linear(y)

What lies between (scales, masks, relative positions, caps, sinks) is run and not matched. A head is the columns of the
last linear that the same rows of the query projection reach; the rows of its keys and values follow. Separate, fused,
interleaved and grouped layouts, heads merged with the batch, norms of heads and rotary positions need no case of
their own. Where the two products are one call whose heads have an axis, few positions tell as much (`sections`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.analysis.axes import Mixed, losses_of_unit
from fxsparse.analysis.probing import between, nearest, shape_of
from fxsparse.analysis.products import SDPA, activation_products
from fxsparse.analysis.reach import Runs, changed, reached
from fxsparse.analysis.sections import Section, remembered
from fxsparse.graph import Linear

_DRAWS = 32
_POSITIONS = 2  # at which every unit is probed in a draw
_MOST_HEADS = 512
_SHARED = "query heads share rows of their projection, as where a norm spans all heads"
_KINDS = ("query", "key", "value")

_Touched = dict[tuple[Node, str], Tensor]
"""Of a linear, by kind, the rows that each head reads, bool ``[heads, rows]``."""
_Factors = Mapping[Node, tuple[str, tuple[Node, ...]]]
"""The operands of products that linears make: their kind, and the linears."""


@dataclass(frozen=True)
class Rows:
    """The rows of a linear that make the units of a structure.

    Attributes:
        linear: the projection; the first, where an attention applies one weight several times.
        index: int64 ``[units, rows of a unit]``: of its outputs.
        kind: ``query``, ``key``, ``value``, ``gate`` or ``channel``.
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
        heads: of queries; where those of a group can go together only, groups.
        kv_heads: of keys and values; query head h reads ``h // (heads // kv_heads)``.
        projections: of queries, keys and values, and of what the results of heads meet one by one; one linear may
            hold several.
        output: the linear that reads all heads.
    """

    path: str
    heads: int
    kv_heads: int
    projections: tuple[Rows, ...]
    output: Columns


class NotSeparable(Exception):
    """Why something has no units that can be taken out."""


def common_path(paths: Sequence[str]) -> str:
    """The innermost module that holds all of some module paths."""
    together = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, together))


def but_last(node: Node) -> range:
    """The axes of a node's value but for the last."""
    return range(len(shape_of(node)) - 1)


def attention_sites(gm: GraphModule) -> Iterable[tuple[str, Callable[[], Attention]]]:
    """The attentions of a graph: module paths, and what says of each which rows and columns its heads have.

    It raises NotSeparable where heads cannot be told apart.
    """
    graph = _Graph(gm)
    for readers, ends in graph.sites().items():
        yield fx.stack_path(ends[0]) or ends[0].name, partial(graph.attention, ends, readers)


def attending(gm: GraphModule) -> set[Node]:
    """The nodes of a graph that lie between the products of an attention, and these products."""
    graph = _Graph(gm)
    found: set[Node] = set()
    for ends in graph.sites().values():
        chain = graph.chain(ends)
        for end in ends:
            found |= {*chain, *between(chain - {end}, [end])}
    return found


class _Graph:
    """The products of a graph."""

    def __init__(self, gm: GraphModule):
        self.gm = gm
        self.linears = {linear.node: linear for linear in fx.linears(gm)}
        self.products = activation_products(gm)
        self.weighted = {*self.linears, *(node for node in gm.graph.nodes if fx.applies_parameter(gm, node))}
        self.stops = {*self.weighted, *self.products}

    def sites(self) -> dict[tuple[Node, ...], list[Node]]:
        """The last products of every attention, by the linears that read them."""
        fed = {product: self._sources(product) & self.products.keys() for product in self.products}
        mixing = [product for product in self.products if product.target is SDPA or fed[product]]
        inner = {source for product in mixing for source in fed[product]}
        found: dict[tuple[Node, ...], list[Node]] = {}
        for product in mixing:
            if product not in inner:
                readers = tuple(self._readers(product))
                found.setdefault(readers or (product,), []).append(product)
        return found

    def _sources(self, node: Node) -> set[Node]:
        return set(nearest(node, self.stops))

    def _readers(self, node: Node) -> list[Node]:
        """The products with weights that read a node, through other operators."""
        found, seen, pending = [], {node}, [node]
        while pending:
            for user in pending.pop().users:
                if user in seen:
                    continue
                seen.add(user)
                if user in self.weighted:
                    found.append(user)
                elif user.op != "output":
                    pending.append(user)
        return found

    def attention(self, ends: list[Node], readers: tuple[Node, ...]) -> Attention:
        count = 0 if readers == tuple(ends) else len(readers)
        if count != 1:
            raise NotSeparable(f"its result is read by {count} linears, not one")
        if readers[0] not in self.linears:
            raise NotSeparable(f"its result is read by {_name(readers[0])}, which is no dense linear")
        factors = self._factors(ends)
        output = self.linears[readers[0]]
        self._check_uses({output.node})
        if len(ends) == 1 and ends[0].target is SDPA and len(shape_of(ends[0])) == 4:
            rows, index = _by_axis(self.gm, ends[0], factors, output)
        else:
            rows, index = _by_columns(self.gm, factors, output)
            if len(index) == 1:
                self._check_single(factors, rows)
        heads, kv_heads, projections = _projections(rows, len(index), self.linears)
        if heads > kv_heads > 1 and not self._go_alone(factors, projections):
            heads, index = kv_heads, index.reshape(kv_heads, -1)
            projections = tuple(replace(part, index=part.index.reshape(kv_heads, -1)) for part in projections)
        projections += self._gates(projections, output, index)
        path = common_path([*(part.linear.path for part in projections), output.path])
        return Attention(path or fx.stack_path(ends[0]), heads, kv_heads, projections, Columns(output, index))

    def chain(self, ends: Iterable[Node]) -> set[Node]:
        """The products that make some, without a weight in between, and these."""
        inside: set[Node] = set()
        pending = list(ends)
        while pending:
            product = pending.pop()
            if product not in inside:
                inside.add(product)
                pending += self._sources(product) & self.products.keys()
        return inside

    def _factors(self, ends: Iterable[Node]) -> dict[Node, tuple[str, tuple[Node, ...]]]:
        """The operands of an attention's products that linears make: their kind, and the linears."""
        found: dict[Node, tuple[str, tuple[Node, ...]]] = {}
        for node in sorted(self.chain(ends)):
            factors = [factor for factor, _ in self.products[node].factors]
            sources = [[factor] if factor in self.stops else nearest(factor, self.stops) for factor in factors]
            computed = [bool(self.products.keys() & set(each)) for each in sources]
            kinds = ["value", "value"] if any(computed) else ["query", "key", "value"]
            for factor, kind, each, is_computed in zip(factors, kinds, sources, computed, strict=False):
                if not is_computed:
                    self._check_linears(kind, factor, each)
                    found.setdefault(factor, (kind, tuple(each)))
        self._check_uses({source for _, each in found.values() for source in each})
        return found

    def _check_linears(self, kind: str, factor: Node, sources: Iterable[Node]) -> None:
        if not sources:
            raise NotSeparable(f"its {kind}, {factor.name}, comes from no linear")
        for source in sources:
            if source not in self.linears:
                raise NotSeparable(f"its {kind} comes from {_name(source)}, which is no dense linear")

    def _go_alone(self, factors: _Factors, projections: Iterable[Rows]) -> bool:
        """Whether a single query head of a group can go: one view may hold groups and their heads as two axes."""
        rows = {part.linear.name: part.index[0] for part in projections if part.kind == "query"}
        for factor, (kind, sources) in factors.items():
            removed = {source: rows[self.linears[source].name] for source in sources if kind == "query"}
            if not removed:
                continue
            section = Section({source: but_last(source) for source in removed}, [factor], _POSITIONS)
            key = ("one head", tuple(tuple(index.tolist()) for index in removed.values()), section.key)
            if not remembered(self.gm, key, partial(_is_apart, removed, factor)):
                return False
        return True

    def _gates(self, projections: Iterable[Rows], output: Linear, index: Tensor) -> tuple[Rows, ...]:
        """Rows of linears that meet the result of one head each, before the output linear reads it: all of a linear, or
        those that are no queries (Qwen3-Next)."""
        known: dict[str, Tensor] = {}
        for part in projections:
            rows = known.setdefault(part.linear.name, torch.zeros(part.linear.out_features, dtype=torch.bool))
            rows[part.index.flatten()] = True
        gates = []
        for source in nearest(output.input, self.stops):
            linear = self.linears.get(source)
            if linear is None or not self._serves_only(linear, output):
                continue
            others = ~known.get(linear.name, torch.zeros(linear.out_features, dtype=torch.bool))
            if not bool(others.any()):
                continue
            section = Section({source: but_last(source)}, [output.input], _POSITIONS * len(index))
            asked = torch.zeros(len(index), output.in_features, dtype=torch.bool).scatter_(1, index, True)
            key = ("rows of gates", tuple(map(tuple, index.tolist())), section.key)
            touched = others & remembered(self.gm, key, partial(_rows_reached, section, output.input, -1, asked))
            counts = touched.sum(1)
            if bool(counts[0]) and len(counts.unique()) == 1 and not bool((touched.sum(0) > 1).any()):
                gates.append(Rows(linear, touched.nonzero()[:, 1].view(len(index), -1), "gate"))
        return tuple(gates)

    def _serves_only(self, linear: Linear, output: Linear) -> bool:
        """Whether all that a linear makes goes to one other, and its weight is applied once."""
        if any(other.name == linear.name and other.node is not linear.node for other in self.linears.values()):
            return False
        inside = {linear.node, output.node, *between({linear.node}, [output.input])}
        return all(
            user in inside or not isinstance(user.meta.get("val"), Tensor)
            for node in inside - {output.node}
            for user in node.users
        )

    def _check_single(self, factors: _Factors, rows: _Touched) -> None:
        """Refuses a single head that more rows make than its scores are sums over: it is several."""
        queries = {factor for factor, (kind, _) in factors.items() if kind == "query"}
        depths = [
            product.depth(factor)
            for product in self.products.values()
            for factor, _ in product.factors
            if factor in queries
        ]
        if any(int(touched.sum()) > max(depths) for (_, kind), touched in rows.items() if kind == "query"):
            raise NotSeparable(_SHARED)

    def _check_uses(self, sources: set[Node]) -> None:
        """Refuses weights that something else applies as well."""
        names = {self.linears[source].name for source in sources}
        for linear in self.linears.values():
            if linear.name in names and linear.node not in sources:
                raise NotSeparable(f"{linear.name} is used more than once")


def _is_apart(rows: Mapping[Node, Tensor], factor: Node) -> bool:
    try:
        losses_of_unit(rows, [factor], 1)
    except Mixed:
        return False
    return True


def _name(node: Node) -> str:
    return fx.stack_path(node) or node.name


# --- which rows and columns a head has --------------------------------------------------------------------------------


def _by_axis(gm: GraphModule, sdpa: Node, factors: _Factors, output: Linear) -> tuple[_Touched, Tensor]:
    """Heads that have an axis, 1, of a call's operands and of its result."""
    touched = {}
    for factor, (kind, sources) in factors.items():
        if len(sources) != 1:
            raise NotSeparable(f"{factor.name} comes from {len(sources)} linears, not one")
        touched[sources[0], kind] = _rows_of_axis(gm, factor, sources[0])
    heads = shape_of(sdpa)[1]
    section = Section({sdpa: [0, 2]}, [output.input], _POSITIONS * heads)
    _refuse_linears(gm, section.nodes)
    key = ("columns of heads", heads, section.key)
    columns = remembered(gm, key, lambda: changed(section, sdpa, output.input, 1, heads))
    return touched, _index(columns, "heads are mixed before the output linear")


def _rows_of_axis(gm: GraphModule, node: Node, source: Node) -> Tensor:
    heads = shape_of(node)[1]
    section = Section({source: but_last(source)}, [node], _POSITIONS * heads)
    _refuse_linears(gm, section.nodes)

    each = torch.eye(heads, dtype=torch.bool)
    return remembered(gm, ("rows of heads", heads, section.key), partial(_rows_reached, section, node, 1, each))


def _rows_reached(section: Section, target: Node, axis: int, heads: Tensor) -> Tensor:
    """Which rows of a section's source reach each head of a target, bool ``[heads, rows]``; drawn until all are."""
    (source,) = section.sources
    touched = torch.zeros(len(heads), shape_of(source)[-1], dtype=torch.bool)
    for _ in range(_DRAWS):
        (drawn,) = reached(section, target, axis, heads)
        before, touched = touched, touched | drawn
        if torch.equal(before, touched) and len(touched.sum(1).unique()) == 1:
            break
    return touched


def _by_columns(gm: GraphModule, factors: _Factors, output: Linear) -> tuple[_Touched, Tensor]:
    """Heads told by which columns of the output linear the same query rows reach."""
    sources = list(dict.fromkeys(source for _, each in factors.values() for source in each))
    section = _whole(sources, output.input)
    _refuse_linears(gm, section.nodes)
    parts = [(kind, _whole([source], factor)) for factor, (kind, each) in factors.items() for source in each]
    key = ("heads by columns", tuple((kind, part.key) for kind, part in parts), section.key)
    answer: Any = remembered(gm, key, lambda: _found_heads(section, output.input, sources, parts))
    if isinstance(answer, str):
        raise NotSeparable(answer)
    columns, touched = answer
    return {(sources[at], kind): rows for (at, kind), rows in touched.items()}, _index(columns, "heads differ in size")


def _whole(sources: Sequence[Node], target: Node) -> Section:
    """A section that runs at the traced sizes: its tokens attend to one another."""
    return Section(dict.fromkeys(sources, ()), [target], 0)


def _found_heads(
    section: Section, target: Node, sources: Sequence[Node], parts: Sequence[tuple[str, Section]]
) -> tuple[Tensor, dict[tuple[int, str], Tensor]] | str:
    """The columns of each head, bool ``[heads, columns]``, and by source and kind its rows; or why there are none."""
    kinds = _rows_of_kinds(sources, parts)
    runs = [Runs(section, target) for _ in range(2)]
    left = torch.ones(shape_of(target)[-1], dtype=torch.bool)
    heads: list[Tensor] = []
    while bool(left.any()):
        column = torch.zeros_like(left).index_fill_(0, left.nonzero()[0], True)
        left &= ~column
        queries = {
            sources[at]: rows for (at, kind), rows in _rows(runs, column, sources, kinds).items() if kind == "query"
        }
        if not any(bool(rows.any()) for rows in queries.values()):
            continue  # of no head: what else the output linear reads
        reads = torch.stack([run.columns(queries) for run in runs]).any(0)
        if bool((reads & ~(left | column)).any()):
            return "heads are mixed before the output linear"
        left &= ~reads
        heads.append(reads | column)
        if len(heads) > _MOST_HEADS:
            return f"it has more than {_MOST_HEADS} heads"
    if not heads:
        return "no row of its query projection reaches the output linear"
    each = [_rows(runs, columns, sources, kinds) for columns in heads]
    return torch.stack(heads), {at: torch.stack([rows[at] for rows in each]) for at in kinds}


def _rows_of_kinds(sources: Sequence[Node], parts: Sequence[tuple[str, Section]]) -> dict[tuple[int, str], Tensor]:
    """By source and kind, the rows of a projection, each of the first kind that reads it."""
    kinds: dict[tuple[int, str], Tensor] = {}
    taken = {source: torch.zeros(shape_of(source)[-1], dtype=torch.bool) for source in sources}
    for kind, part in parts:
        (source,), (factor,) = part.sources, part.targets
        reads = Runs(part, factor).rows(torch.ones(shape_of(factor)[-1], dtype=torch.bool))[source]
        own, at = reads & ~taken[source], (sources.index(source), kind)
        kinds[at] = kinds[at] | own if at in kinds else own
        taken[source] |= reads
    return kinds


def _rows(
    runs: Sequence[Runs], columns: Tensor, sources: Sequence[Node], kinds: Mapping[tuple[int, str], Tensor]
) -> dict[tuple[int, str], Tensor]:
    """By source and kind, the rows that reach some columns."""
    reached_by = [run.rows(columns) for run in runs]
    return {
        (at, kind): torch.stack([rows[sources[at]] for rows in reached_by]).any(0) & own
        for (at, kind), own in kinds.items()
    }


def _refuse_linears(gm: GraphModule, path: Iterable[Node]) -> None:
    """Refuses a way between heads and a dense linear that leads through another product with a weight: it mixes the
    heads."""
    for node in path:
        if fx.applies_parameter(gm, node):
            raise NotSeparable(f"its heads are read through {_name(node)}, which mixes them")


def _index(touched: Tensor, reason: str) -> Tensor:
    """From bool ``[units, positions]`` the positions of each, ``[units, n]``."""
    counts = touched.sum(1)
    if len(counts.unique()) != 1 or bool((touched.sum(0) > 1).any()):
        raise NotSeparable(reason)
    return touched.nonzero()[:, 1].view(len(touched), -1)


# --- projections ------------------------------------------------------------------------------------------------------


def _projections(touched: _Touched, heads: int, linears: Mapping[Node, Linear]) -> tuple[int, int, tuple[Rows, ...]]:
    """The number of heads, of those of keys and values, and the rows of each, from the rows that each head touches."""
    of_weights: dict[tuple[str, str], tuple[Linear, Tensor]] = {}
    for (source, kind), rows in touched.items():
        linear = linears[source]
        own = rows
        for (name, of), (_, known) in of_weights.items():
            if name == linear.name and of != kind:
                own = own & ~known.any(0)  # queries that are keys elsewhere count once
        first, known = of_weights.get((linear.name, kind), (linear, torch.zeros_like(rows)))
        of_weights[linear.name, kind] = (first, known | own)
    groups = {at: _groups(rows) for at, (_, rows) in of_weights.items() if bool(rows.any())}
    counts = {kind: max((len(each) for (_, of), each in groups.items() if of == kind), default=0) for kind in _KINDS}
    if counts["query"] != heads:
        raise NotSeparable(_SHARED)
    if not counts["key"] or counts["value"] != counts["key"] or heads % counts["key"]:
        raise NotSeparable(f"{heads} query heads, {counts['key']} key heads, {counts['value']} value heads")
    projections = []
    for (name, kind), each in groups.items():
        if len(each) == counts[kind]:  # the others are shared by all heads, and stay
            projections.append(Rows(of_weights[name, kind][0], _stacked(each, kind), kind))
        elif len(each) != 1:
            raise NotSeparable(f"{counts[kind]} {kind} heads, of which {name} makes {len(each)}")
    return heads, counts["key"], tuple(projections)


def _groups(touched: Tensor) -> list[Tensor]:
    """The different sets of rows, from bool ``[heads, rows]``, in order: heads that share one are a group, whose
    members must be consecutive."""
    each = [rows.nonzero().flatten() for rows in touched]
    numbers = [tuple(rows.tolist()) for rows in each]
    firsts = {rows: head for head, rows in reversed(list(enumerate(numbers)))}
    groups = sorted(firsts.values())
    if len({numbers.count(numbers[head]) for head in groups}) != 1:
        raise NotSeparable("groups of heads that share rows have different numbers of heads")
    size = len(each) // len(groups)
    if any(rows != numbers[groups[head // size]] for head, rows in enumerate(numbers)):
        raise NotSeparable("heads that share rows are not consecutive")
    return [each[head] for head in groups]


def _stacked(groups: list[Tensor], kind: str) -> Tensor:
    sizes = {len(group) for group in groups}
    if len(sizes) != 1 or len(torch.cat(groups).unique()) != sum(map(len, groups)):
        raise NotSeparable(f"{kind} heads overlap or differ in size: one part of the projection serves several heads")
    return torch.stack(groups)
