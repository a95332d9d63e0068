"""Where gates go: the heads, channels, sublayers and hidden dimensions of a model, and the parameters they hold.

`find_sites` asks `analysis` for structures and residual streams; `gate_sites` makes a gate for each unit and counts the
parameters that closing it removes, alone and together with the layer or stream it belongs to. `Scorer` gives units a
magnitude or an activation to close them by.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.analysis.activation_norms import activation_norms
from fxsparse.analysis.added import acts_on, why_not_added
from fxsparse.analysis.expert_channels import ExpertMLP, expert_mlps
from fxsparse.analysis.experts import Mixture, mixtures
from fxsparse.analysis.residual_streams import Stream, streams
from fxsparse.analysis.structures import MLP, Attention, structures
from fxsparse.analysis.units import activations, magnitudes, readers
from fxsparse.errors import RewriteError
from fxsparse.graph import Linear, live
from fxsparse.graph.derived_buffers import weights_borrowed
from fxsparse.graph.record import Change
from fxsparse.passes.base import Pass
from fxsparse.passes.pipeline import structure_only
from fxsparse.passes.structured.hard_concrete import EXPERT, EXPERT_CHANNEL, Count, Gated
from fxsparse.passes.structured.nodes import gate_columns, gate_scores, gate_stream, multiply, multiply_input

Unit = Literal["heads", "attention", "intermediate", "ffn", "hidden", "experts"]
UNITS: tuple[Unit, ...] = get_args(Unit)
Score = Literal["magnitude", "activation", "random"]
CLASHES = ("gates", "drop-dims", "nm-masks", "low-rank", "select-neurons", "select-tensors", "distill")
"""The passes that a pass with gates cannot follow."""

Site = Attention | MLP


class Gating(Pass):
    """A pass with gates: which kinds of units, of which sublayers."""

    of_experts: ClassVar[bool] = False
    units: tuple[str, ...]
    layers: tuple[str, ...] | None

    def _find_sites(self, gm: GraphModule, state: str) -> Sites:
        """:func:`find_sites`; a RewriteError in a one-line call."""
        if weights_borrowed(gm):
            raise RewriteError(
                f"{state} are state that a one-line call has nowhere to keep; call fxsparse.rewrite(model, passes, "
                "...) and compile its result",
                pass_name=self.name,
            )
        return find_sites(gm, self.units, self.layers, self.name, self.of_experts)

    def _check_removable(self, gm: GraphModule, multiple: int = 1) -> None:
        """A RewriteError where ``materialize`` could not take out what these gates close."""
        from fxsparse.passes.structured.trial import check_removable  # it runs materialize, which knows these passes

        check_removable(gm, self.name, multiple)


@dataclass(frozen=True)
class Sites:
    """What of a model can get gates.

    Attributes:
        sublayers: attentions and MLPs, in order of execution.
        mixtures: of experts, where those are gated.
        mlps: of experts, where the channels of those are gated.
        named: the paths of those that get gates of their own.
        streams: whose hidden dimensions get gates.
        skipped: what was looked at and is left alone.
    """

    sublayers: tuple[Site, ...]
    mixtures: tuple[Mixture, ...]
    mlps: tuple[ExpertMLP, ...]
    named: frozenset[str]
    streams: tuple[Stream, ...]
    skipped: tuple[Change, ...]

    def stream_of(self, site: Site) -> Stream | None:
        """The gated stream that a sublayer reads and writes."""
        found = [stream for stream in self.streams if any(_touches(stream, linear) for linear in _linears(site))]
        if len(found) > 1:
            raise RewriteError(
                f"reads streams of {' and '.join(str(stream.size) for stream in found)} dimensions, whose gates would "
                "count its parameters twice; leave out hidden",
                site=site.path,
            )
        return found[0] if found else None


def find_sites(
    gm: GraphModule, units: Collection[str], globs: Iterable[str] | None, pass_name: str, of_experts: bool
) -> Sites:
    """The sites that gates on ``units`` concern; with ``of_experts`` the channels of experts too, unless whole experts
    are gated, which have the same parameters.

    Raises:
        RewriteError: there is nothing to gate, or a glob matches none.
    """
    found = structures(gm)
    mixed, whole = mixtures(gm) if "experts" in units else ([], [])
    channels, no_channels = expert_mlps(gm) if "intermediate" in units and of_experts and not mixed else ([], [])
    left = (*whole, *no_channels)
    sublayers: tuple[Site, ...] = (*found.attentions, *found.mlps)
    hidden, unknown = streams(gm) if "hidden" in units else ([], [])
    if not (sublayers or mixed or channels or hidden):
        reasons = "".join(f"; {change}" for change in (*left, *unknown, *found.skipped)[:4])
        raise RewriteError(
            f"found no attention and no MLP to gate{reasons}. What goes of any model: hidden dimensions "
            "(drop-dims{units=[hidden]}) and whole layers (drop-layers)",
            pass_name=pass_name,
        )
    paths = [site.path for site in (*sublayers, *mixed, *channels)]
    named = set(paths)
    if globs is not None:
        for glob in globs:
            if not any(fnmatchcase(path, glob) for path in named):
                known = ", ".join(paths[:4])
                raise RewriteError(f"the glob {glob!r} matches nothing; there are: {known}", pass_name=pass_name)
        named = {path for path in named if any(fnmatchcase(path, glob) for glob in globs)}
    return Sites(
        sublayers, tuple(mixed), tuple(channels), frozenset(named), tuple(hidden), (*left, *unknown, *found.skipped)
    )


def gate_sites(
    gm: GraphModule,
    sites: Sites,
    units: Collection[str],
    register: Callable[[str, str, int], None],
    *,
    straight: bool = False,
) -> Iterator[tuple[Site | Mixture | ExpertMLP | Stream, Gated]]:
    """Puts gates on sites.

    Args:
        units: which kinds.
        register: adds the state of a gate: called with its kind, its name and its count.
        straight: let gradients pass closed gates.

    Sublayers whose result is no term of a sum, as of a router's MLP, get no gate as a whole.

    Yields:
        the sublayers, with what is gated and what they hold.
    """
    gates = {stream: hidden_gate(stream) for stream in sites.streams}
    for site in sites.sublayers:
        unit, layer = ("heads", "attention") if isinstance(site, Attention) else ("intermediate", "ffn")
        own = units if site.path in sites.named else ()
        count = site.heads if isinstance(site, Attention) else site.channels
        stream = sites.stream_of(site)
        output = site.output.linear
        units_name = layer_name = None
        if unit in own:
            units_name = f"{site.path}.{unit}_gate"
            register(unit, units_name, count)
            multiply_input(gm, output, units_name, site.output.index, (unit, site.path, units_name), straight)
        if layer in own and why_not_added(output) is None:
            layer_name = f"{site.path}.{layer}_gate"
            register(layer, layer_name, 1)
            multiply(gm, acts_on(output), layer_name, (1,), (layer, site.path, layer_name), straight)
        if units_name is not None or layer_name is not None or stream is not None:
            yield site, _counted(site, units_name, layer_name, stream)
    for mixture in sites.mixtures:
        if mixture.path in sites.named:
            yield mixture, _gate_experts(gm, mixture, register)
    for mlp in sites.mlps:
        if mlp.path in sites.named:
            yield mlp, _gate_channels(gm, mlp, register)
    for stream, name in gates.items():
        if not any(sites.stream_of(site) is stream for site in sites.sublayers):
            yield from ((stream, item) for item in _alone(gm, stream, name))
        register("hidden", name, stream.size)
        gate_stream(gm, stream, name, ("hidden", stream.path, name), straight=straight)


def _gate_experts(gm: GraphModule, site: Mixture, register: Callable[[str, str, int], None]) -> Gated:
    name = f"{site.path}.experts_gate".lstrip(".")
    register("experts", name, site.experts)
    gate_scores(gm, site.router.node, name, ("experts", site.path, name))
    router = live.Rows(site.router.name, int(site.router.transposed), torch.arange(site.experts)[:, None], EXPERT)
    weights = tuple(live.Rows(str(weight.target), 0, router.index, EXPERT) for weight in site.weights[1:])
    holds = (site.experts, Count(fixed=site.per_expert), Count(), site.experts, Count())
    output = str(site.weights[0].target)
    return Gated(site.path, name, None, None, *holds, output, (router, *weights), router.index, site.chosen)


def _gate_channels(gm: GraphModule, site: ExpertMLP, register: Callable[[str, str, int], None]) -> Gated:
    name = f"{site.path}.intermediate_gate".lstrip(".")
    register("intermediate", name, site.channels)
    gate_columns(gm, site.output.input, name, ("intermediate", site.path, name))
    rows = tuple(live.Rows(str(read.target), dim, index, EXPERT_CHANNEL) for read, dim, index in site.projections)
    holds = (site.channels, Count(fixed=site.per_channel), Count(), site.channels, Count())
    return Gated(site.path, name, None, None, *holds, site.output.name, rows, torch.arange(site.channels)[:, None])


def hidden_gate(stream: Stream) -> str:
    """The name of the gate of a stream's hidden dimensions."""
    return f"{stream.path}.hidden_gate"


def _alone(gm: GraphModule, stream: Stream, gate: str) -> Iterator[Gated]:
    """What the linears of a stream without attentions and MLPs hold (Mamba): each is all that is gated of its layer."""
    found = {linear.name: linear for linear in fx.linears(gm) if _touches(stream, linear)}
    for linear in found.values():
        holds = (1, Count(wide=linear.in_features * linear.out_features), Count(), 1, Count())
        yield Gated(linear.path, None, None, gate, *holds, linear.name, (), torch.zeros(1, 0, dtype=torch.int64))


def _linears(site: Site) -> list[Linear]:
    return [*(rows.linear for rows in site.projections), site.output.linear]


def _touches(stream: Stream, linear: Linear) -> bool:
    return stream.reads(linear) or stream.writes(linear)


def _counted(site: Site, units: str | None, layer: str | None, stream: Stream | None) -> Gated:
    def count(parameters: int, along: bool) -> Count:
        return Count(wide=parameters) if along else Count(fixed=parameters)

    output = site.output
    written = stream is not None and stream.writes(output.linear)
    per_unit = count(output.index.shape[1] * output.linear.out_features, written)
    per_group = Count()
    for rows in site.projections:
        each = count(rows.index.shape[1] * rows.linear.in_features, stream is not None and stream.reads(rows.linear))
        each += Count(fixed=rows.index.shape[1] * (rows.linear.bias is not None))
        if rows.kind in ("key", "value"):
            per_group += each
        else:
            per_unit += each
    rest = count(output.linear.out_features * (output.linear.bias is not None), written)
    is_attention = isinstance(site, Attention)
    heads, groups = (site.heads, site.kv_heads) if is_attention else (site.channels, site.channels)  # type: ignore[union-attr]
    gate = hidden_gate(stream) if stream is not None else None
    projections = tuple(
        live.Rows(rows.linear.name, int(rows.linear.transposed), rows.index, rows.kind) for rows in site.projections
    )
    holds = (heads, per_unit, per_group, groups, rest)
    return Gated(site.path, units, layer, gate, *holds, output.linear.name, projections, output.index)


class Scorer:
    """Scores the units of sites once, by what they weigh, what flows through them, or at random.

    Args:
        gm: the graph, before anything is gated.
        sites: what will be scored.
        score: ``magnitude`` of the weights, ``activation`` (root mean square where linears read it) or ``random``.
        calibration: batches for ``activation``: mappings of keyword arguments, tuples of arguments, or tensors.
        seed: of what is random.

    Raises:
        RewriteError: ``activation`` has no batches.
    """

    def __init__(
        self, gm: GraphModule, sites: Sites, score: str, calibration: Iterable[Any] | None, seed: int, pass_name: str
    ):
        # A graph that is rebuilt around a checkpoint gets its masks from there.
        self.gm, self.score = gm, "magnitude" if score == "activation" and structure_only(gm) else score
        self.generator = torch.Generator().manual_seed(seed)
        self.norms: dict[str, Tensor] = {}
        if self.score == "activation":
            if calibration is None:
                raise RewriteError("scores by activation need calibration=[batch, ...]", pass_name=pass_name)
            if of_experts := [
                *(mixture.path for mixture in sites.mixtures),
                *(mlp.path for mlp in sites.mlps),
            ]:
                raise RewriteError(
                    "experts have no score by activation, which differs by what a router sends them; use magnitude",
                    pass_name=pass_name,
                    site=of_experts[0],
                )
            observed = readers(gm, [*sites.sublayers, *sites.streams])
            self.norms = activation_norms(gm, observed, calibration, pass_name=pass_name)

    def __call__(self, site: Site | Mixture | ExpertMLP | Stream) -> Tensor:
        """Scores ``[units]``, float64, 1 on average but for random ones, which lie in [0, 1)."""
        if self.score == "activation" and not isinstance(site, (Mixture, ExpertMLP)):
            return activations(self.gm, site, self.norms)
        scores = magnitudes(self.gm, site)
        if self.score == "random":
            return torch.rand(scores.shape, generator=self.generator, dtype=torch.double)
        return scores
