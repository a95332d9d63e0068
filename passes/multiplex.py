"""Data multiplexing: N inputs share one pass through the core of a network (DataMUX, arXiv 2202.09318; MUX-PLM,
arXiv 2302.12441; ensembles of one input in several slots).

    embeddings -> mux: N rows become one -> repeated core at batch / N -> demux: one row becomes N -> head

Rows g N, ..., g N + N - 1 of a batch form group g. The members of a group influence each other: an output depends on
what else is in its group, which costs accuracy, and where groups mix users one user's output can carry traces of
another's input. Form groups of one user's inputs where that matters. Attention in the core sees the union of what the
members' masks let it see, so the padding of a short member is attended to wherever a longer one has tokens.

A batch that N does not divide is filled up with its own rows from the start, and what comes of them is cut off: the
same batch gives the same outputs, whatever was run before.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from fxsparse import graph as fx
from fxsparse.blocks import stacks
from fxsparse.derived import BORROWED
from fxsparse.errors import OptionError, RewriteError
from fxsparse.passes.base import Pass
from fxsparse.passes.batch_region import Region, batch_symbols, refresh, region_between, run_at, symbols
from fxsparse.passes.event import Event
from fxsparse.passes.mux_modules import (
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
from fxsparse.passes.mux_sites import (
    choose,
    is_causal,
    mask_of,
    move_up,
    only_masks_attention,
    positions_read,
    scalar_output,
    token_embedding,
)
from fxsparse.passes.mux_stages import Stages
from fxsparse.passes.splice import adopt, splice
from fxsparse.record import Change, rewrote

aten = torch.ops.aten

PATH = "multiplex"
"""The module of a multiplexed graph that holds the state of mux, demux and retrieval."""

MUXES = ("gaussian", "orthogonal", "binary", "attention", "unit")
DEMUXES = ("keys", "mlp", "prefix", "repeat")
_END = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Multiplex(Pass):
    """Runs the repeated core of a model at batch / n.

    Attributes:
        n: N, members of a group.
        mux: how members are mixed: ``gaussian`` (mean of members times Gaussian keys), ``orthogonal`` (sum of randomly
            rotated members over sqrt(n)), ``binary`` (each member keeps its own n-th of the features), ``attention``
            (MUX-PLM's contextual mixing), ``unit`` (the plain mean).
        demux: how they are told apart: ``keys`` (an MLP of a learned key and the hidden state; RSA), ``mlp`` (an MLP
            for each member), ``prefix`` (as ``keys``, with the outputs at n prefix positions as keys; the last n
            positions of a sequence make room, so pad sequences by n), ``repeat`` (not at all).
        layers: linear layers of ``keys`` and ``prefix``.
        learned: train the mixing keys or rotations; else they stay as drawn.
        norm: length of a Gaussian key; sqrt(d) unless given, DataMUX's code has 1 and 20.
        ensemble: how many slots each input takes; its outputs are averaged. It divides n.
        stages: training stages ``(until, task, retrieval)``: up to that fraction of the steps the ``loss`` that the
            model returns in training is task * its own + retrieval * the retrieval loss. A warm-up and then DataMUX's
            mixture is ``((0.3, 0, 1), (1, 0.9, 0.1))``. A ``Schedule`` drives them; evaluation has the task loss.
        ignore: token ids that the retrieval loss leaves out, such as padding and special tokens.
        stack: path of the list of blocks that is the core; needed where a model has several.
        seed: of keys and initial weights.

    To tune what was pretrained so with another head, ``tuned.load_state_dict(pretrained.state_dict(), strict=False)``:
    mux, demux and retrieval have the same names in both.

    A head that reads one position (``[:, 0]``) is given just that position, told apart. Demultiplexing all positions
    costs as much per token as without multiplexing.

    Raises:
        OptionError: an option is out of range.
        RewriteError: the batch size is not free, there is no embedding or no repeated core, the core's states leave it,
            or it reads something that depends on a member's values and is no attention mask.
    """

    name: ClassVar[str] = "multiplex"
    cannot_follow: ClassVar[tuple[str, ...]] = ("multiplex", "select-tensors")
    n: int = 2
    mux: str = "gaussian"
    demux: str = "keys"
    layers: int = 2
    learned: bool = False
    norm: float | None = None
    ensemble: int = 1
    stages: tuple[tuple[float, float, float], ...] = ()
    ignore: tuple[int, ...] = ()
    stack: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        ignore = (self.ignore,) if isinstance(self.ignore, int) else self.ignore
        object.__setattr__(self, "ignore", tuple(ignore))
        for option in ("n", "layers", "ensemble"):
            number = getattr(self, option)
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise OptionError(f"{option}={number} must be a whole number of at least 1", pass_name=self.name)
        for option, known in (("mux", MUXES), ("demux", DEMUXES)):
            if getattr(self, option) not in known:
                raise OptionError(
                    f"{option}={getattr(self, option)!r} is none of {', '.join(known)}", pass_name=self.name
                )
        if self.n % self.ensemble:
            raise OptionError(f"ensemble={self.ensemble} does not divide n={self.n}", pass_name=self.name)
        if self.mux == "attention" and self.demux == "prefix":
            raise OptionError("mux=attention takes demux=keys or demux=mlp, not a prefix", pass_name=self.name)
        if self.norm is not None and not self.norm > 0:
            raise OptionError(f"norm={self.norm} must be positive", pass_name=self.name)
        object.__setattr__(self, "stages", self._checked_stages())

    def _checked_stages(self) -> tuple[tuple[float, float, float], ...]:
        stages = tuple(tuple(map(float, stage)) for stage in self.stages)
        ends = [stage[0] for stage in stages]
        if any(len(stage) != 3 or min(stage) < 0 for stage in stages) or ends != sorted(set(ends)):
            raise OptionError(
                f"stages={self.stages} are (until, task, retrieval) with growing ends and weights of at least 0",
                pass_name=self.name,
            )
        if stages and ends[-1] != 1:
            raise OptionError(f"the last of stages={self.stages} must end at 1", pass_name=self.name)
        return stages  # type: ignore[return-value]

    def rewrite(self, graph: GraphModule) -> Iterable[Change]:
        if graph.meta.get(BORROWED):
            raise RewriteError(
                "mux and demux have parameters that the optimizer of a one-line call has never seen; call "
                "fxsparse.rewrite(model, passes, ...) and compile its result",
                pass_name=self.name,
            )
        if hasattr(graph, PATH):
            raise RewriteError(f"the model already has a module called {PATH}", pass_name=self.name, site=PATH)
        yield from _Rewrite(self, graph).run()

    def schedule(self, graph: GraphModule, optimizer: torch.optim.Optimizer, total_steps: int) -> Iterable[Event]:
        if self.stages:
            yield Stages(self.stages, graph.get_submodule(PATH), total_steps)


class _Rewrite:
    """One multiplexing of one graph."""

    def __init__(self, owner: Multiplex, gm: GraphModule):
        self.owner, self.gm, self.n = owner, gm, owner.n
        self.stack = choose(stacks(gm), owner.stack)
        self.source, self.sink = self.stack.blocks[0].stream_in, self.stack.blocks[-1].stream_out
        self.batch = batch_symbols(gm, self.source)
        self.embedding = token_embedding(gm, self.source)
        self.core = region_between(gm, self.source, self.sink)
        self.merged: list[str] = []

    def run(self) -> Iterable[Change]:
        dim = int(fx.value(self.source).shape[-1])
        parts = self._build(dim)
        adopt(self.gm, PATH, parts)
        first = self.core.first
        self.rows = fx.insert_call(self.gm, aten.sym_size.int, (self.source, 0), like=first)
        self.total = self._call(operator.mul, self.rows, self.owner.ensemble, like=first)
        filled = self._call(operator.add, self.total, self.n - 1, like=first)
        self.groups = self._call(operator.floordiv, filled, self.n, like=first)
        self._check_example()
        self.slots = self._slots(first)
        mixed = self._mix(parts.mux, first)
        for node in self.core.nodes:
            node.replace_input_with(self.source, mixed)
        core = Region(mixed, self.core.sinks, self.core.nodes)
        run_at(self.gm, core, self.batch, self.groups, self.rows, self._merge_mask)
        if self.owner.demux == "prefix":
            self._shift_masks()
        refresh(self.gm, core.nodes, self.batch, self.groups)
        told_apart = self._tell_apart(parts)
        if self.owner.ensemble > 1:
            self._average(told_apart)
        shared = f"; members share {', '.join(self.merged)}" if self.merged else ""
        yield rewrote(self.stack.path, f"runs at batch / {self.n}, mixed by {self.owner.mux}{shared}")
        each = f", {self.owner.ensemble} slots for each input" if self.owner.ensemble > 1 else ""
        yield rewrote(PATH, f"tells {self.n} members apart by {self.owner.demux}{each}")

    def _call(self, target: Any, *args: Any, like: Node) -> Node:
        return fx.insert_call(self.gm, target, args, like=like)

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
        """Which row stands in each slot, int64 ``[groups * n]``; None where every row has its own and none is left."""
        if self.n == 1:
            return None
        count = self._call(operator.mul, self.groups, self.n, like=before)
        device = fx.value(self.source).device
        slots = fx.insert_call(self.gm, aten.arange.default, (count,), {"device": device}, like=before)
        if self.owner.ensemble > 1:
            slots = fx.insert_call(
                self.gm, aten.div.Scalar_mode, (slots, self.owner.ensemble), {"rounding_mode": "floor"}, like=before
            )
        return self._call(aten.remainder.Scalar, slots, self.rows, like=before)

    def _members(self, rows: Node, before: Node) -> Node:
        """``[batch, ...]`` as the slots hold it, ``[groups * n, ...]``."""
        if self.slots is None:
            return rows
        return self._call(aten.index_select.default, rows, 0, self.slots, like=before)

    def _mix(self, mux: nn.Module, before: Node) -> Node:
        inputs = [self._members(self.source, before)]
        mask = mask_of(self._attention()) if self.owner.mux == "attention" else None
        if mask is not None:
            move_up(mask, before)
            varies = symbols(fx.value(mask)) & self.batch
            inputs.append(self._members(mask, before) if varies else mask)
        return splice(self.gm, f"{PATH}.mux", mux, inputs, before=before)

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
        """What the members' masks let be seen, together."""
        value, site = fx.value(mask), fx.stack_path(mask)
        if not isinstance(value, Tensor) or not all(symbols(size) & self.batch for size in value.shape[:1]):
            self._refuse(mask, "does not have the batch as its first dimension")
        if any(symbols(size) & self.batch for size in value.shape[1:]):
            self._refuse(mask, "has the batch in more than its first dimension")
        if not only_masks_attention(mask, set(self.core.nodes)):
            self._refuse(mask, "is not just an attention mask")
        self.merged.append(f"{mask.name} of {site or 'the model'} (what any of them may see)")
        members = self._members(mask, before)
        grouped = self._call(aten.unflatten.int, members, 0, [self.groups, self.n], like=before)
        merge = aten.any.dim if value.dtype == torch.bool else aten.amax.default
        return self._call(merge, grouped, 1 if value.dtype == torch.bool else [1], like=before)

    def _refuse(self, node: Node, why: str) -> None:
        raise RewriteError(
            f"the core reads {node.name} {_sizes(node)}, which depends on each member's input and {why}, so a group "
            "cannot share it; leave out the input it comes from",
            pass_name=self.owner.name,
            site=fx.stack_path(node),
        )

    def _shift_masks(self) -> None:
        """Lets every position see the prefix; it sees what the first position sees."""
        shifted: dict[Node, Node] = {}
        for node in self.core.nodes:
            mask = mask_of(node) if node.target is aten.scaled_dot_product_attention.default else None
            if mask is None:
                continue
            if mask not in shifted:
                value = fx.value(mask)
                seen = aten.ones_like.default if value.dtype == torch.bool else aten.zeros_like.default
                prefix = self._call(seen, self._call(aten.slice.Tensor, mask, -1, 0, self.n, like=node), like=node)
                kept = self._call(aten.slice.Tensor, mask, -1, 0, -self.n, like=node)
                new = self._call(aten.cat.default, [prefix, kept], -1, like=node)
                if value.dim() > 1 and value.shape[-2] != 1:
                    rows = self._call(aten.slice.Tensor, new, -2, 0, 1, like=node)
                    rows = self._call(aten.expand.default, rows, [*[-1] * (value.dim() - 2), self.n, -1], like=node)
                    others = self._call(aten.slice.Tensor, new, -2, 0, -self.n, like=node)
                    new = self._call(aten.cat.default, [rows, others], -2, like=node)
                shifted[mask] = new
            node.replace_input_with(mask, shifted[mask])

    # --- after the core -----------------------------------------------------------------------------------------------

    def _tell_apart(self, parts: Multiplexer) -> Node:
        """Puts the demultiplexer after the core, as late as it can come; returns the rows it tells apart."""
        chain = positions_read(self.sink)
        stream, keys = self.sink, []
        if self.owner.demux == "prefix":
            readers, after = list(self.sink.users), self.sink.next
            keys = [self._call(aten.slice.Tensor, self.sink, 1, 0, self.n, like=after)]
            rest = self._call(aten.slice.Tensor, self.sink, 1, self.n, _END, like=after)
            lost = self._call(aten.zeros_like.default, keys[0], like=after)
            stream = self._call(aten.cat.default, [rest, lost], 1, like=after)
            for reader in readers:
                reader.replace_input_with(self.sink, stream)
        read = chain[-1] if chain else stream
        readers = list(read.users)
        if parts.retrieval is not None:
            self._add_retrieval(parts, stream, keys)
        refresh(self.gm, chain, self.batch, self.groups)
        after = read.next
        inputs: list[Node | None] = [read, None, *keys] if keys else [read]
        apart = splice(self.gm, f"{PATH}.demux", parts.demux, inputs, before=after)
        if self.n > 1:
            apart = self._call(aten.slice.Tensor, apart, 0, 0, self.total, like=after)
        for reader in readers:
            reader.replace_input_with(read, apart)
        return apart

    def _add_retrieval(self, parts: Multiplexer, stream: Node, keys: list[Node]) -> None:
        loss = scalar_output(self.gm)
        if loss is None or parts.retrieval is None or self.embedding is None:
            return  # a trace without labels, for serving: the state is there, its loss is not asked for
        after = stream.next
        ids = self._members(self.embedding.args[1], after)  # type: ignore[arg-type]
        step = fx.insert_attribute(self.gm, f"{PATH}.step", before=after)
        module = RetrievalLoss(parts.demux, parts.retrieval)
        retrieval = splice(self.gm, PATH, module, [stream, ids, step, *keys], before=after)
        self._mix_losses(loss, retrieval)

    def _mix_losses(self, task: Node, retrieval: Node) -> None:
        """In training the loss becomes the weighted sum; ``task + training * (sum - task)``."""
        readers, after = list(task.users), task.next
        weights = fx.insert_attribute(self.gm, f"{PATH}.loss_weights", before=after)
        shares = [
            self._call(aten.mul.Tensor, loss, self._call(aten.select.int, weights, 0, place, like=after), like=after)
            for place, loss in enumerate((task, retrieval))
        ]
        change = self._call(aten.sub.Tensor, self._call(aten.add.Tensor, *shares, like=after), task, like=after)
        with self.gm.graph.inserting_before(after):
            training = self.gm.graph.create_node("get_attr", f"{PATH}.training")
        training.meta["val"] = self.gm.training
        change = self._call(aten.mul.Scalar, change, training, like=after)
        total = self._call(aten.add.Tensor, task, change, like=after)
        for reader in readers:
            reader.replace_input_with(task, total)

    # --- ensembles ----------------------------------------------------------------------------------------------------

    def _average(self, apart: Node) -> None:
        """Runs the head on every slot and averages what the model returns for each input."""
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
            readers, after = [user for user in sink.users if user not in inside], sink.next
            slots = self._call(aten.unflatten.int, sink, 0, [self.rows, self.owner.ensemble], like=after)
            mean = self._call(aten.mean.dim, slots, [1], like=after)
            for reader in readers:
                reader.replace_input_with(sink, mean)

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
        return self._call(aten.repeat_interleave.self_int, side, self.owner.ensemble, 0, like=before)


def _sizes(node: Node) -> str:
    return f"({', '.join(map(str, getattr(fx.value(node), 'shape', ())))})"
