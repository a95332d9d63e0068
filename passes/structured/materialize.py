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
from fxsparse.passes.structured.slicing import drop_experts, remove_result, slice_expert_mlp, slice_mlp
from fxsparse.text import ranges

_RANGE = r"[0-9]{1,9}(-[0-9]{1,9})?"
Ranges = Annotated[str, Written("ranges (such as 0-3,7)", rf"({_RANGE}(,{_RANGE})*)?", also=(int,))]


@dataclass(frozen=True)
class Materialize(Pass):
    """Takes out what gates have closed. A distillation that ran beside them ends; another one may follow.

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
        masks = self._masks(graph)
        if end_distillation(graph):  # it reads the gates, and hidden states of widths that change
            yield rewrote("loss", "the task's own again: distillation ends with the gates")
        acted_on = gated_nodes(graph)
        remove_gates(graph)
        yield from self._narrow(graph, masks, acted_on)
        for item in filter(lambda item: item.gates, sublayers):
            try:
                yield self._take_out(graph, item, masks)
            except CannotRun as error:
                raise RewriteError(str(error), pass_name=self.name, site=item.path) from error
        live.end(graph, Gated, Dimensions)
        if hasattr(graph, "sparsity"):
            del graph.sparsity
        present = {name for name, _ in (*graph.named_parameters(), *graph.named_buffers())}
        fx.eliminate_dead_code(graph)
        fx.delete_state(graph, {n for name in masks for n in (name, mask_name(name))} & present)
        return Materialize({name: ranges(m.nonzero().flatten().tolist()) for name, m in masks.items()})

    def _take_out(self, gm: GraphModule, item: Gated, masks: Mapping[str, Tensor]) -> Change:
        """Takes out what the gates of a sublayer have closed."""
        keep = masks[item.units] if item.units is not None else torch.ones(item.count, dtype=torch.bool)
        is_open = item.layer is None or bool(masks[item.layer].all())
        if item.is_experts:
            return self._drop_experts(gm, item, keep)
        if item.is_in_experts:
            return self._narrow_experts(gm, item, keep)
        linears = {linear.name: linear for linear in fx.linears(gm)}
        if missing := [name for name in item.weights if name not in linears]:
            raise RewriteError(f"{missing[0]} is no dense linear any more", pass_name=self.name, site=item.path)
        output = linears[item.output]
        what = "heads" if item.is_attention else "channels"
        if not is_open or not bool(keep.any() or output.bias is not None):
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

    def _narrow_experts(self, gm: GraphModule, item: Gated, keep: Tensor) -> Change:
        if bool(keep.all()):
            return skipped(item.path, f"all {item.count} channels stay")
        mlp = next((found for found in expert_mlps(gm)[0] if found.path == item.path), None)
        if mlp is None:
            raise RewriteError("its experts are no longer found", pass_name=self.name, site=item.path)
        slice_expert_mlp(gm, mlp, keep)
        return rewrote(item.path, f"{int(keep.sum())} of {item.count} channels of every expert stay")

    def _masks(self, gm: GraphModule) -> dict[str, Tensor]:
        counts = {name: len(gm.get_buffer(mask_name(name))) for name in gate_names(gm)}
        if self.kept is None:
            return {name: gm.get_buffer(mask_name(name)).cpu().bool() for name in counts}
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


def _mask(text: str, count: int) -> Tensor:
    """``0-3,7`` as a mask."""
    mask = torch.zeros(count, dtype=torch.bool)
    for part in filter(None, text.split(",")):
        low, _, high = part.partition("-")
        mask[int(low) : int(high or low) + 1] = True
    return mask
