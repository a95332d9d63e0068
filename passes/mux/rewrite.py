"""Multiplexing a graph: the core runs on groups of rows, between a mux and a demux.

    rows -> slots -> mux -> core at batch / n -> demux -> rows

A slot is a place in a group. Slots beyond the last row hold the first rows again, and an ensemble gives each row
several slots. `batch_region` converts the core's side inputs that carry the batch; the attention masks of a group's
members are joined. The retrieval loss reads the core's last hidden states; in training the model's loss is a weighted
sum of the two.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from fxsparse import graph as fx
from fxsparse.analysis.blocks import stacks_and_unclear
from fxsparse.analysis.inventory import softmaxes
from fxsparse.errors import RewriteError
from fxsparse.graph import live
from fxsparse.graph.record import Change, rewrote
from fxsparse.passes.mux.batch_region import Region, batch_symbols, refresh, region_between, run_at, symbols
from fxsparse.passes.mux.core import (
    choose,
    is_causal,
    mask_of,
    move_up,
    only_masks_attention,
    positions_read,
    scalar_output,
    token_embedding,
)
from fxsparse.passes.mux.modules import (
    ContextualMux,
    KeyDemux,
    KeyMux,
    Multiplexer,
    OrthogonalMux,
    PrefixMux,
    Repeat,
    Retrieval,
    RetrievalLoss,
    SlotDemux,
)

if TYPE_CHECKING:
    from fxsparse.passes.mux.multiplex import Multiplex

aten = torch.ops.aten

PATH = "multiplex"
"""The module of a multiplexed graph that holds the state of mux, demux and retrieval."""


class Rewrite:
    """One multiplexing of one graph."""

    def __init__(self, owner: Multiplex, gm: GraphModule):
        self.owner, self.gm, self.n = owner, gm, owner.n
        self.stack = choose(*stacks_and_unclear(gm), owner.stack)
        self.source, self.sink = self.stack.blocks[0].stream_in, self.stack.blocks[-1].stream_out
        self.batch = batch_symbols(gm, self.source)
        self.embedding = token_embedding(gm, self.source)
        self.core = region_between(gm, self.source, self.sink)
        self.merged: list[str] = []

    def run(self) -> Iterable[Change]:
        dim = int(fx.value(self.source).shape[-1])
        parts = self._build(dim)
        fx.adopt(self.gm, PATH, parts)
        live.enter(self.gm, live.Added(PATH, "the multiplexer"))
        first = self.core.first
        self.rows, self.total, self.groups = fx.insert_function(self.gm, self._sizes, self.source, before=first)
        self._check_example()
        self.slots = self._slots(first)
        mixed = self._mix(parts.mux, first)
        for node in self.core.nodes:
            node.replace_input_with(self.source, mixed)
        core = Region(mixed, self.core.sinks, self.core.nodes)
        run_at(self.gm, core, self.batch, self.groups, self.rows, self._merge_mask)
        refresh(self.gm, core.nodes, self.batch, self.groups)
        if self.owner.demux == "prefix":
            self._shift_masks()
        told_apart = self._tell_apart(parts)
        if self.owner.ensemble > 1:
            self._average(told_apart)
        shared = f"; members share {', '.join(self.merged)}" if self.merged else ""
        yield rewrote(self.stack.path, f"runs at batch / {self.n}, mixed by {self.owner.mux}{shared}")
        each = f", {self.owner.ensemble} slots for each input" if self.owner.ensemble > 1 else ""
        yield rewrote(PATH, f"tells {self.n} members apart by {self.owner.demux}{each}")

    def _sizes(self, source: Tensor) -> tuple[int, int, int]:
        """Rows, slots that hold them, and groups."""
        rows = source.shape[0]
        total = rows * self.owner.ensemble
        return rows, total, (total + (self.n - 1)) // self.n

    def _build(self, dim: int) -> Multiplexer:
        owner = self.owner
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(owner.seed)
            mux: nn.Module
            if owner.mux == "orthogonal":
                mux = OrthogonalMux(self.n, dim, owner.learned)
            elif owner.mux == "attention":
                attention = self._attention()
                heads = int(fx.value(attention.args[0]).shape[1])  # type: ignore[arg-type]
                mux = ContextualMux(self.n, dim, heads, is_causal(attention), owner.norm, owner.learned)
            else:
                mux = KeyMux(self.n, dim, owner.mux, owner.norm, owner.learned)
            demux: nn.Module = Repeat(self.n)
            if owner.demux == "mlp":
                demux = SlotDemux(self.n, dim)
            elif owner.demux != "repeat":
                demux = KeyDemux(self.n, dim, owner.layers, own_keys=owner.demux == "keys")
            if owner.demux == "prefix":
                self._check_length()
                mux = PrefixMux(mux, self.n, dim)
            retrieval = self._retrieval(dim) if owner.stages else None
            parts = Multiplexer(mux, demux, retrieval)
        device = fx.value(self.source).device
        parts.to(device=device, dtype=fx.value(self.source).dtype)
        if owner.stages:
            parts.register_buffer("step", torch.ones((), dtype=torch.int64, device=device))
            parts.register_buffer("loss_weights", torch.tensor(owner.stages[0][1:], device=device))
        return parts

    def _retrieval(self, dim: int) -> Retrieval:
        if self.embedding is None:
            raise RewriteError(
                "stages need token ids to retrieve, and the model looks none up; leave stages out",
                pass_name=self.owner.name,
                site=self.stack.path,
            )
        table = fx.attribute(self.gm, str(self.embedding.args[0].target))  # type: ignore[union-attr]
        decoder = table if table.shape[1] == dim else torch.randn(table.shape[0], dim) * 0.02
        return Retrieval(self.n, decoder, self.owner.ignore, self.n if self.owner.demux == "prefix" else 0)

    def _check_example(self) -> None:
        rows = fx.value(self.rows).node.hint
        if rows * self.owner.ensemble <= self.n:  # a single group: a size of 1 cannot be told from a broadcast
            raise RewriteError(
                f"the model was traced with {rows} rows, which fill one group of {self.n} only; "
                f"trace with an example of at least {self.n // self.owner.ensemble + 1} rows",
                pass_name=self.owner.name,
                site=self.stack.path,
            )

    def _check_length(self) -> None:
        length = fx.value(self.source).shape[1]
        if isinstance(length, int) and length <= self.n:
            raise RewriteError(
                f"sequences of {length} have no room for a prefix of {self.n}; trace with longer ones",
                pass_name=self.owner.name,
                site=self.stack.path,
            )

    # --- before the core ----------------------------------------------------------------------------------------------

    def _slots(self, before: Node) -> Node | None:
        """The row in each slot, int64 ``[groups * n]``; None if n is 1, when slots are rows."""
        if self.n == 1:
            return None
        device, ensemble = fx.value(self.source).device, self.owner.ensemble

        def slots(groups: int, rows: int) -> Tensor:
            slot = torch.arange(groups * self.n, device=device)
            return (slot // ensemble if ensemble > 1 else slot) % rows

        node: Node = fx.insert_function(self.gm, slots, self.groups, self.rows, before=before)
        return node

    def _members(self, rows: Node, before: Node) -> Node:
        """``[batch, ...]`` as the slots hold it, ``[groups * n, ...]``."""
        if self.slots is None:
            return rows
        return fx.insert_call(self.gm, aten.index_select.default, (rows, 0, self.slots), like=before)

    def _mix(self, mux: nn.Module, before: Node) -> Node:
        inputs = [self._members(self.source, before)]
        mask = mask_of(self._attention()) if self.owner.mux == "attention" else None
        if mask is not None:
            move_up(mask, before)
            varies = symbols(fx.value(mask)) & self.batch
            inputs.append(self._members(mask, before) if varies else mask)
        mixed: Node = fx.insert_module(self.gm, f"{PATH}.mux", mux, *inputs, before=before)
        return mixed

    def _attention(self) -> Node:
        for node in self.core.nodes:
            if node.target is aten.scaled_dot_product_attention.default:
                return node
        raise RewriteError(
            'the core has no scaled_dot_product_attention to take the mask from; use attn_implementation="sdpa" or '
            "mux=gaussian",
            pass_name=self.owner.name,
            site=self.stack.path,
        )

    def _merge_mask(self, mask: Node, before: Node) -> Node:
        """The mask of a group, which shows every position that a member's mask shows."""
        value, site = fx.value(mask), fx.stack_path(mask)
        if not isinstance(value, Tensor) or not all(symbols(size) & self.batch for size in value.shape[:1]):
            self._refuse(mask, "does not have the batch as its first dimension")
        if any(symbols(size) & self.batch for size in value.shape[1:]):
            self._refuse(mask, "has the batch in more than its first dimension")
        if not only_masks_attention(mask, set(self.core.nodes)):
            self._refuse(mask, "is not just an attention mask")
        self.merged.append(f"{mask.name} of {site or 'the model'} (what any of them may see)")

        def seen_by_any(members: Tensor, groups: int) -> Tensor:
            grouped = members.unflatten(0, (groups, self.n))
            return grouped.any(1) if grouped.dtype == torch.bool else grouped.amax(1)

        members = self._members(mask, before)
        merged: Node = fx.insert_function(self.gm, seen_by_any, members, self.groups, before=before)
        return merged

    def _refuse(self, node: Node, why: str) -> None:
        raise RewriteError(
            f"the core reads {node.name} {_sizes(node)}, which depends on each member's input and {why}, so a group "
            "cannot share it; leave out the input it comes from",
            pass_name=self.owner.name,
            site=fx.stack_path(node),
        )

    def _shift_masks(self) -> None:
        """Lets every position see the prefix; the prefix sees the positions that the first position sees."""

        def shifted(mask: Tensor) -> Tensor:
            seen = torch.ones_like if mask.dtype == torch.bool else torch.zeros_like
            mask = torch.cat([seen(mask[..., : self.n]), mask[..., : -self.n]], -1)
            if mask.dim() == 1 or mask.shape[-2] == 1:
                return mask
            prefix = mask[..., :1, :].expand(*[-1] * (mask.dim() - 2), self.n, -1)
            return torch.cat([prefix, mask[..., : -self.n, :]], -2)

        sdpa = aten.scaled_dot_product_attention.default
        for node in softmaxes(self.gm):
            if node in self.core.nodes and node.target is not sdpa:
                raise RewriteError(
                    "its scores are masked before a softmax, and demux=prefix moves the masks of "
                    'scaled_dot_product_attention only; use attn_implementation="sdpa", or demux=keys or mlp',
                    pass_name=self.owner.name,
                    site=fx.stack_path(node),
                )
        masks: dict[Node, Node] = {}
        for node in self.core.nodes:
            mask = mask_of(node) if node.target is aten.scaled_dot_product_attention.default else None
            if mask is None:
                continue
            if mask not in masks:
                masks[mask] = fx.insert_function(self.gm, shifted, mask, before=node)
            node.replace_input_with(mask, masks[mask])

    # --- after the core -----------------------------------------------------------------------------------------------

    def _tell_apart(self, parts: Multiplexer) -> Node:
        """Puts the demultiplexer after the core, as late as it can come; returns the rows it tells apart."""
        chain = positions_read(self.sink)
        stream, keys = self.sink, []
        if self.owner.demux == "prefix":
            readers, after = list(self.sink.users), self.sink.next
            prefix, stream = fx.insert_function(self.gm, self._without_prefix, self.sink, before=after)
            keys = [prefix]
            for reader in readers:
                reader.replace_input_with(self.sink, stream)
        read = chain[-1] if chain else stream
        readers = list(read.users)
        if parts.retrieval is not None:
            self._add_retrieval(parts, stream, keys)
        refresh(self.gm, chain, self.batch, self.groups)
        after = read.next
        inputs: list[Node | None] = [read, None, *keys] if keys else [read]
        apart: Node = fx.insert_module(self.gm, f"{PATH}.demux", parts.demux, *inputs, before=after)
        if self.n > 1:
            apart = fx.insert_function(self.gm, lambda y, total: y[:total], apart, self.total, before=after)
        for reader in readers:
            reader.replace_input_with(read, apart)
        return apart

    def _without_prefix(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        """The keys at the prefix, and the stream with its positions moved to the front and zeros behind them."""
        keys, rest = stream[:, : self.n], stream[:, self.n :]
        return keys, torch.cat([rest, torch.zeros_like(keys)], 1)

    def _add_retrieval(self, parts: Multiplexer, stream: Node, keys: list[Node]) -> None:
        loss = scalar_output(self.gm)
        if loss is None or parts.retrieval is None or self.embedding is None:
            return  # a trace without labels, for serving: the state is there, its loss is not asked for
        after = stream.next
        ids = self._members(self.embedding.args[1], after)  # type: ignore[arg-type]
        module = RetrievalLoss(parts.demux, parts.retrieval)
        inputs = (stream, ids, f"{PATH}.step", *keys)
        retrieval = fx.insert_module(self.gm, PATH, module, *inputs, before=after)

        def mixed(task: Tensor, retrieval: Tensor, weights: Tensor, training: bool) -> Tensor:
            return task + (task * weights[0] + retrieval * weights[1] - task) * training

        fx.transform(self.gm, loss, mixed, retrieval, f"{PATH}.loss_weights", f"{PATH}.training")

    # --- ensembles ----------------------------------------------------------------------------------------------------

    def _average(self, apart: Node) -> None:
        """Runs the head on every slot and averages the model's outputs for each input."""
        outputs = [node for node in tree_leaves(self.gm.graph.output_node().args) if isinstance(node, Node)]
        head = region_between(self.gm, apart, *outputs)
        sinks = [node for node in dict.fromkeys(outputs) if node in {apart, *head.nodes} and self._has_rows(node)]
        if not sinks:
            raise RewriteError(
                "the model returns nothing with one row for each input, so there is nothing to average",
                pass_name=self.owner.name,
            )
        head = region_between(self.gm, apart, *sinks)
        run_at(self.gm, head, self.batch, self.total, self.rows, self._repeat)
        refresh(self.gm, head.nodes, self.batch, self.total)
        inside = set(head.nodes)
        for sink in sinks:
            readers = [user for user in sink.users if user not in inside]
            mean = fx.insert_function(self.gm, self._mean, sink, self.rows, before=sink.next)
            for reader in readers:
                reader.replace_input_with(sink, mean)

    def _mean(self, slots: Tensor, rows: int) -> Tensor:
        return slots.unflatten(0, (rows, self.owner.ensemble)).mean(1)

    def _has_rows(self, node: Node) -> bool:
        value = fx.value(node)
        return (
            isinstance(value, Tensor)
            and value.dim() > 0
            and value.is_floating_point()
            and bool(symbols(value.shape[0]) & self.batch)
        )

    def _repeat(self, side: Node, before: Node) -> Node:
        value = fx.value(side)
        if not isinstance(value, Tensor) or not symbols(value.shape[0]) & self.batch:
            self._refuse(side, "does not have the batch as its first dimension")
        args = (side, self.owner.ensemble, 0)
        return fx.insert_call(self.gm, aten.repeat_interleave.self_int, args, like=before)


def _sizes(node: Node) -> str:
    return f"({', '.join(map(str, getattr(fx.value(node), 'shape', ())))})"
