"""Gates become smaller weights: closed heads and channels are sliced away, closed sublayers leave the graph.

The result is a smaller model that computes what the gated one computes with its masks, to rounding. Weights are new
parameters of the graph module: build the optimizer after it (moments of a running one belong to weights that are gone).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.analysis.added import acts_on
from fxsparse.analysis.expert_channels import expert_mlps
from fxsparse.analysis.experts import mixtures
from fxsparse.analysis.probing import CannotRun
from fxsparse.analysis.residual_streams import streams
from fxsparse.analysis.structures import MLP, Attention, Columns, Rows
from fxsparse.errors import RewriteError
from fxsparse.graph import Linear, live
from fxsparse.graph.record import Change, rewrote, skipped
from fxsparse.options import Glob, Written
from fxsparse.passes.base import Pass
from fxsparse.passes.distill.distill import end_distillation
from fxsparse.passes.structured.drop_dims import Dimensions
from fxsparse.passes.structured.hard_concrete import Gated, gate_names, gated, mask_name
from fxsparse.passes.structured.hidden_dims import narrow
from fxsparse.passes.structured.nodes import gated_nodes, remove_gates
from fxsparse.passes.structured.slice_heads import slice_attention
from fxsparse.passes.structured.slicing import (
    drop_experts,
    remove_result,
    silence_channels,
    slice_expert_mlp,
    slice_mlp,
)
from fxsparse.text import ranges

_RANGE = r"[0-9]{1,9}(-[0-9]{1,9})?"
Ranges = Annotated[str, Written("ranges (such as 0-3,7)", rf"({_RANGE}(,{_RANGE})*)?", also=(int,))]


@dataclass(frozen=True)
class Materialize(Pass):
    """Takes out what gates have closed. A distillation that ran beside them ends; another one may follow.

    Of experts whose products are grouped, a number of channels stays that torch's grouped products take; those of them
    that are closed have weight 0.

    Attributes:
        kept: what stays of each gate, as ranges (``0-3,7``) by its name; written into the record, so that a replay
            gives the same shapes. None reads the gates.

    Raises:
        RewriteError: there are no gates, or a part cannot be taken out: a weight is shared, a constant does not follow.
    """

    name: ClassVar[str] = "materialize"
    rest: ClassVar[str] = "has no gates of its own"
    must_follow: ClassVar[tuple[str, ...]] = ("gates", "drop-dims")
    cannot_follow: ClassVar[tuple[str, ...]] = ("nm-masks", "low-rank")
    ends: ClassVar[tuple[str, ...]] = ("gates", "drop-dims", "distill")
    kept: Mapping[Glob, Ranges] | None = None

    def rewrite(self, graph: GraphModule) -> Generator[Change, None, Materialize]:
        sublayers = gated(graph)
        masks = self._masks(graph, sublayers)
        idle = {name: mask & ~_open(graph, name) for name, mask in masks.items()}
        if end_distillation(graph):  # it reads the gates, and hidden states of widths that change
            yield rewrote("loss", "the task's own again: distillation ends with the gates")
        acted_on = gated_nodes(graph)
        remove_gates(graph)
        yield from self._narrow(graph, masks, acted_on)
        for item in filter(lambda item: item.gates, sublayers):
            try:
                yield self._take_out(graph, item, masks, idle)
            except CannotRun as error:
                raise RewriteError(str(error), pass_name=self.name, site=item.path) from error
        live.end(graph, Gated, Dimensions)
        if hasattr(graph, "sparsity"):
            del graph.sparsity
        present = {name for name, _ in (*graph.named_parameters(), *graph.named_buffers())}
        fx.eliminate_dead_code(graph)
        fx.delete_state(graph, {n for name in masks for n in (name, mask_name(name))} & present)
        return Materialize({name: ranges(m.nonzero().flatten().tolist()) for name, m in masks.items()})

    def _take_out(
        self, gm: GraphModule, item: Gated, masks: Mapping[str, Tensor], idle: Mapping[str, Tensor]
    ) -> Change:
        """Takes out what the gates of a sublayer have closed."""
        keep = masks[item.units] if item.units is not None else torch.ones(item.count, dtype=torch.bool)
        is_open = item.layer is None or bool(masks[item.layer].all())
        if item.is_experts:
            return self._drop_experts(gm, item, keep)
        if item.is_in_experts:
            return self._narrow_experts(gm, item, keep, idle[item.units] if item.units is not None else ~keep)
        linears = {linear.name: linear for linear in fx.linears(gm)}
        if missing := [name for name in item.weights if name not in linears]:
            raise RewriteError(f"{missing[0]} is no dense linear any more", pass_name=self.name, site=item.path)
        output = linears[item.output]
        what = "heads" if item.is_attention else "channels"
        adds_zero = output.bias is None and not bool(keep.any()) and acts_on(output) is output.node
        if not is_open or adds_zero:
            remove_result(gm, output, item.path)
            return rewrote(item.path, "taken out")
        if bool(keep.all()):
            return skipped(item.path, f"all {item.count} {what} stay")
        assert item.units is not None
        if bool(keep.any()):
            _slice(gm, item, linears, keep)
            return rewrote(item.path, f"{int(keep.sum())} of {item.count} {what} stay")
        _slice(gm, item, linears, torch.arange(item.count) == 0)
        fx.set_parameter(gm, item.output, torch.zeros_like(gm.get_parameter(item.output)))
        return rewrote(item.path, f"none of {item.count} {what} counts; one stays, of weight 0, for the bias")

    def _drop_experts(self, gm: GraphModule, item: Gated, keep: Tensor) -> Change:
        if bool(keep.all()):
            return skipped(item.path, f"all {item.count} experts stay")
        mixture = next((found for found in mixtures(gm)[0] if found.path == item.path), None)
        if mixture is None:
            raise RewriteError("its router and experts are no longer found", pass_name=self.name, site=item.path)
        drop_experts(gm, mixture, keep)
        return rewrote(item.path, f"{int(keep.sum())} of {item.count} experts stay")

    def _narrow_experts(self, gm: GraphModule, item: Gated, keep: Tensor, idle: Tensor) -> Change:
        """``idle`` are the channels that stay although they are closed."""
        if bool(keep.all() and not idle.any()):
            return skipped(item.path, f"all {item.count} channels stay")
        mlp = next((found for found in expert_mlps(gm)[0] if found.path == item.path), None)
        if mlp is None:
            raise RewriteError("its experts are no longer found", pass_name=self.name, site=item.path)
        silence_channels(gm, mlp, idle)
        slice_expert_mlp(gm, mlp, keep)
        detail = f"{int((keep & ~idle).sum())} of {item.count} channels of every expert stay"
        more = (
            f", and {int(idle.sum())} of weight 0, as grouped products take multiples of {channels_at_a_time(gm, item)}"
        )
        return rewrote(item.path, detail + (more if bool(idle.any()) else ""))

    def _masks(self, gm: GraphModule, sublayers: Iterable[Gated]) -> dict[str, Tensor]:
        counts = {name: len(gm.get_buffer(mask_name(name))) for name in gate_names(gm)}
        if self.kept is None:
            masks = {name: _open(gm, name) for name in counts}
            for item in sublayers:
                if item.is_in_experts and item.units is not None:
                    masks[item.units] = _filled(masks[item.units], channels_at_a_time(gm, item))
            return masks
        kept: dict[str, Any] = dict(self.kept)
        return {name: _mask(str(kept.get(name, "")), count) for name, count in counts.items()}

    def _narrow(
        self, gm: GraphModule, masks: Mapping[str, Tensor], acted_on: Mapping[str, list[Node]]
    ) -> Iterable[Change]:
        """Takes hidden dimensions out, while all sublayers are there to follow the streams through."""
        names = [name for name in masks if name.endswith(".hidden_gate")]
        found = streams(gm)[0] if names else []
        for name in names:
            keep = masks[name]
            stream = next((stream for stream in found if any(node in stream.nodes for node in acted_on[name])), None)
            if stream is None:
                raise RewriteError("the stream of these gates is no longer found", pass_name=self.name, site=name)
            if bool(keep.all()):
                yield skipped(stream.path, f"all {stream.size} hidden dimensions stay")
            else:
                narrow(gm, stream, keep)
                yield rewrote(stream.path, f"{int(keep.sum())} of {stream.size} hidden dimensions stay")


def _slice(gm: GraphModule, item: Gated, linears: Mapping[str, Linear], keep: Tensor) -> None:
    """Leaves some units of a sublayer."""
    projections = tuple(Rows(linears[part.name], part.index, part.kind) for part in item.projections)
    output = Columns(linears[item.output], item.columns)
    if item.is_attention:
        slice_attention(gm, Attention(item.path, item.count, item.groups, projections, output), keep)
    else:
        slice_mlp(gm, MLP(item.path, item.count, projections, output), keep)


def channels_at_a_time(gm: GraphModule, item: Gated) -> int:
    """So many channels of a sublayer go together. Torch's grouped products take matrices whose rows are a multiple of
    16 bytes."""
    product = next((product for product in fx.expert_linears(gm) if product.name == item.output), None)
    if not item.is_in_experts or product is None or product.form != "grouped":
        return 1
    multiple = max(1, 16 // fx.value(product.weight).dtype.itemsize)
    return multiple if item.count % multiple == 0 else 1


def _filled(keep: Tensor, multiple: int) -> Tensor:
    """``keep`` with the first others, until it has a multiple of so many."""
    missing = -int(keep.sum()) % multiple if bool(keep.any()) else multiple
    return keep.index_fill(0, (~keep).nonzero().flatten()[:missing], True)


def _open(gm: GraphModule, name: str) -> Tensor:
    return gm.get_buffer(mask_name(name)).cpu().bool()


def _mask(text: str, count: int) -> Tensor:
    """``0-3,7`` as a mask."""
    mask = torch.zeros(count, dtype=torch.bool)
    for part in filter(None, text.split(",")):
        low, _, high = part.partition("-")
        mask[int(low) : int(high or low) + 1] = True
    return mask
