"""Taking heads out of a graph: their rows and columns, and whatever has an axis of heads in between.

Queries may lose more heads than keys do, where several share one, and masks, biases and sinks are not computed from the
projections at all. So what is lost is followed from product to product (`fxsparse.analysis.products`):

    linear -> ... -> factor      probed (`fxsparse.analysis.axes`)
    product                      its factors keep the heads that the one keeps that loses most: others are indexed
    product -> ... -> linear     probed; an operand from elsewhere with an axis of heads is indexed where it is read, or
                                 its parameters lose the heads (`narrow_state`)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.analysis.axes import losses
from fxsparse.analysis.probing import between, nearest, shape_of
from fxsparse.analysis.products import SDPA, activation_product
from fxsparse.analysis.structures import Attention
from fxsparse.analysis.ties import sizes, ties
from fxsparse.errors import RewriteError
from fxsparse.graph import Linear, traits
from fxsparse.graph.resize import Losses
from fxsparse.passes.structured.narrow_state import narrowed_state
from fxsparse.passes.structured.slicing import follow, require_own_weights, take

aten = torch.ops.aten


def slice_attention(gm: GraphModule, attention: Attention, keep: Tensor) -> None:
    """Leaves some heads of an attention; keys and values stay that a kept head reads.

    Args:
        gm: the graph; weights are replaced, never written to.
        attention: of `fxsparse.analysis.structures`, found in ``gm`` as it is.
        keep: bool ``[heads]``, at least one.

    Raises:
        RewriteError: a weight serves something else too, or a constant of the graph does not follow.
    """
    output = attention.output.linear
    applied = applications(gm, attention)
    require_own_weights(gm, [*applied, output], attention.path)
    kept_groups = keep.view(attention.kv_heads, -1).any(1)
    gone: dict[str, list[Tensor]] = {}
    for rows in attention.projections:
        kept = keep if len(rows.index) == len(keep) else kept_groups
        gone.setdefault(rows.linear.name, []).append(rows.index[~kept].flatten())
    rows_gone = {name: torch.cat(parts) for name, parts in gone.items()}
    heads = _Heads(gm, attention.heads, attention.path)
    lost = heads.follow({linear.node: rows_gone[linear.name] for linear in applied}, output) | heads.beside
    changed = take(gm, output, 1, attention.output.index[~keep])
    for linear in {linear.name: linear for linear in applied}.values():
        changed += take(gm, linear, 0, rows_gone[linear.name])
    follow(gm, lost, [*changed, *heads.changed], attention.path)


def applications(gm: GraphModule, attention: Attention) -> list[Linear]:
    """The linears that apply the weights of an attention's projections; one weight may have several."""
    names = {rows.linear.name for rows in attention.projections}
    return [linear for linear in fx.linears(gm) if linear.name in names]


def heads_beside(losses: Losses) -> list[tuple[Node, Node, int, Tensor]]:
    """Operands from elsewhere with an axis of which what they meet loses positions.

    Returns:
        the call that reads it, the operand, its axis, and how many go at each of the positions.
    """
    found: dict[tuple[Node, Node, int], Tensor] = {}
    for node, lost in losses.items():
        for axis, positions in lost[0].items() if lost else ():
            for group in _groups(node):
                others = [(other, at) for other, at in group if (node, axis) in group and other not in losses]
                found |= {(node, other, at): positions for other, at in others}
    return [(*at, positions) for at, positions in found.items()]


def _groups(node: Node) -> list[list[tuple[Node, int]]]:
    """`ties` of a call that multiplies by no weight; of a product of activations, of its labels."""
    product = activation_product(node)
    if product is None:
        return [] if node.op != "call_function" or traits.of(node.target).axes == "product" else ties(node)
    labelled = [(node, product.result), *product.factors, *product.added]
    return [
        [(operand, labels.index(label)) for operand, labels in labelled if label in labels]
        for label in product.result
        if label
    ]


def select(gm: GraphModule, operand: Node, axis: int, index: Node, heads: int, before: Node) -> Node:
    """Some heads of an operand, whose axis holds them once, or once for each example after the other.

    Args:
        index: the node of the heads that stay, int64.
        heads: how many there are.
    """
    if sizes(operand)[axis] == heads:
        return fx.insert_call(gm, aten.index_select.default, (operand, axis, index), like=before)

    def chosen(x: Tensor, kept: Tensor) -> Tensor:
        return x.unflatten(axis, (-1, heads)).index_select(axis + 1, kept).flatten(axis, axis + 1)

    node: Node = fx.insert_function(gm, chosen, operand, index, before=before)
    return node


@dataclass
class _Heads:
    """What the nodes of an attention lose.

    Attributes:
        changed: nodes that were inserted, and reads of buffers that have other values.
        of_keys: buffers that say which keys stay, by what they say.
        beside: what is lost where parameters of something beside lose the heads.
    """

    gm: GraphModule
    heads: int
    path: str
    changed: list[Node] = field(default_factory=list)
    of_keys: dict[tuple[int, ...], str] = field(default_factory=dict)
    beside: dict[Node, Any] = field(default_factory=dict)

    def follow(self, rows: Mapping[Node, Tensor], output: Linear) -> dict[Node, Any]:
        """What is lost between the projections, of which ``rows`` go, and what the output linear reads."""
        axes = dict.fromkeys(rows, -1)
        removed = dict(rows)
        lost: dict[Node, Any] = {}
        for node in between(set(rows), [output.input]):
            product = activation_product(node)
            if product is None:
                continue
            operands = [operand for operand, _ in (*product.factors, *product.added)]
            for operand in operands:
                lost |= self._segment(removed, axes, operand)
            at = self._met(node, lost)
            if at is not None:
                axes[node], removed[node] = at
        lost |= self._segment(removed, axes, output.input)
        for user, operand, axis, positions in heads_beside(lost):
            if activation_product(user) is None:  # those were met
                self._index(user, operand, axis, positions.bool())
        return lost

    def _segment(self, removed: Mapping[Node, Tensor], axes: Mapping[Node, int], target: Node) -> dict[Node, Any]:
        """What is lost on the way to ``target`` from the projections and products before it."""
        if target in removed:
            index = removed[target]
            positions = torch.zeros(shape_of(target)[axes[target]], dtype=torch.int64).index_fill_(0, index, 1)
            return {target: [{axes[target] % len(sizes(target)): positions}]} if len(index) else {}
        near = nearest(target, removed)
        found = dict(losses({source: removed[source] for source in near}, [target], axes))
        for node in found:
            if node.target is aten.index_select.default:
                self._renumber(node, found)
        return found

    def _met(self, node: Node, lost: Mapping[Node, Any]) -> tuple[int, Tensor] | None:
        """Lets the operands of a product keep the same heads; gives the axis and positions that its result loses."""
        product = activation_product(node)
        assert product is not None
        labelled = [*product.factors, *product.added]
        result = None
        for label in dict.fromkeys(label for _, labels in labelled for label in labels if label):
            axes = [(operand, labels.index(label)) for operand, labels in labelled if label in labels]
            each = [_lost(lost, *at) for at in axes]
            most = max(each, key=lambda positions: int(positions.sum()))
            if not bool(most.any()):
                continue
            if label not in product.result or result is not None:
                raise RewriteError(f"{node.name} sums over heads, or has several axes of them", site=self.path)
            for (operand, axis), positions in zip(axes, each, strict=True):
                if not torch.equal(positions, most):
                    self._index(node, operand, axis, most, positions)
            result = (product.result.index(label), most.nonzero().flatten())
            if node.target is SDPA and product.factors[1][1][result[0]] != label:
                self._match_groups(node, result[0], most, lost)
        return result

    def _index(self, user: Node, operand: Node, axis: int, gone: Tensor, already: Tensor | None = None) -> None:
        """Lets ``user`` read an operand without the positions that go; ``already`` are gone from it."""
        already = torch.zeros_like(gone) if already is None else already
        if bool((already & ~gone).any()):
            raise RewriteError(f"{operand.name} loses heads that {user.name} keeps", site=self.path)
        heads = len(gone)
        if not isinstance(sizes(operand)[axis], int):
            heads = self.heads
            if bool(already.any()) or not torch.equal(gone, gone[:heads].repeat(len(gone) // heads)):
                raise RewriteError(f"{operand.name} merges heads of groups with examples", site=self.path)
            gone = gone[:heads]
            already = torch.zeros_like(gone)
        product = activation_product(user)
        is_key = product is not None and operand in dict(product.factors)
        self._choose(user, operand, axis, (~gone[~already]).nonzero().flatten(), heads, is_key)

    def _held(self, user: Node, index: Tensor, *, is_key: bool) -> Node:
        """A buffer with an index; keys and values share one."""
        known = self.of_keys.get(tuple(index.tolist())) if is_key else None
        if known is not None:
            return fx.insert_attribute(self.gm, known, before=user)
        name = f"{self.path.replace('.', '_')}_key_of_head" if is_key else f"{user.name}_mask_heads"
        read = fx.insert_buffer(self.gm, name, index, before=user)
        if is_key:
            self.of_keys[tuple(index.tolist())] = str(read.target)
        return read

    def _choose(self, user: Node, operand: Node, axis: int, kept: Tensor, heads: int, is_key: bool) -> None:
        earlier = _chosen(operand, axis)
        source = operand
        if earlier is not None and len(operand.users) == 1:  # by an earlier slicing: one index for both
            kept = fx.attribute(self.gm, str(earlier.target)).cpu()[kept]
            source = operand.args[0]  # type: ignore[assignment]
        elif not is_key:
            keep = torch.zeros(heads, dtype=torch.bool).index_fill(0, kept, True)
            narrowed = narrowed_state(self.gm, operand, axis, keep, user)
            if narrowed:
                self.beside |= narrowed
                self.changed += [node for node in narrowed if node.op == "get_attr"]
                return
        index = self._held(user, kept, is_key=is_key)
        if isinstance(sizes(source)[axis], int):
            chosen = fx.insert_call(self.gm, aten.index_select.default, (source, axis, index), like=user)
        else:
            chosen = select(self.gm, source, axis, index, heads, user)
        user.replace_input_with(operand, chosen)
        self.changed.append(chosen)

    def _match_groups(self, sdpa: Node, axis: int, gone: Tensor, lost: Mapping[Node, Any]) -> None:
        """Gives query heads the keys and values of their groups, where attention itself repeats these."""
        written: Any = fx.arguments(sdpa)
        size = shape_of(written["key"])[axis]
        if size in (1, len(gone)):
            return
        groups_gone = _lost(lost, written["key"], axis)
        group = (torch.arange(len(gone)) * size // len(gone))[~gone]
        group = (~groups_gone).cumsum(0)[group] - 1
        left = int((~groups_gone).sum())
        if len(group) % left == 0 and torch.equal(group, torch.arange(len(group)) // (len(group) // left)):
            return
        for name in ("key", "value"):
            index = self._held(sdpa, group, is_key=True)
            chosen = fx.insert_call(self.gm, aten.index_select.default, (written[name], axis, index), like=sdpa)
            sdpa.replace_input_with(written[name], chosen)
            self.changed.append(chosen)
        sdpa.kwargs = {name: item for name, item in sdpa.kwargs.items() if name != "enable_gqa"}

    def _renumber(self, node: Node, lost: Mapping[Node, Any]) -> None:
        """Writes the index of an earlier slicing anew whose operand loses positions."""
        source: Any = node.args[0]
        (axis,) = traits.dims(node)
        index = _chosen(node, axis)
        gone = _lost(lost, source, axis)
        if index is None or not bool(gone.any()):
            return
        held: Tensor = fx.attribute(self.gm, str(index.target)).cpu()
        places = (~gone).cumsum(0) - 1
        new = places[held[~gone[held]]]
        read = fx.insert_buffer(self.gm, str(index.target), new, before=node)
        node.replace_input_with(index, read)
        self.changed += [read, node]


def _lost(lost: Mapping[Node, Any], node: Node, axis: int) -> Tensor:
    """Which positions a node loses of an axis, bool."""
    own = lost.get(node)
    positions = own[0].get(axis % len(sizes(node))) if own else None
    return torch.zeros(shape_of(node)[axis], dtype=torch.bool) if positions is None else positions.bool()


def _chosen(node: Node, axis: int) -> Node | None:
    """The buffer by which a node selects positions of its operand along an axis; None for any other node."""
    if node.target is not aten.index_select.default or traits.dims(node) != {axis % len(sizes(node))}:
        return None
    index: Any = node.args[2]
    return index if isinstance(index, Node) and index.op == "get_attr" else None
