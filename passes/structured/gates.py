"""Gates on attention heads, MLP channels and whole sublayers (CoFi, arXiv 2204.00408).

    experts        log z[e] added to the score that a router gives an expert, before its softmax
    heads          z[h] on the result of attention, before the output projection
    attention      z on what an attention adds to the stream
    intermediate   z[c] on the channels of an MLP, before its last linear
    ffn            z on what an MLP adds to the stream
    hidden         z[j] on the dimensions of the residual stream, wherever they are written; norms over what is open

Gates learn to close until the expected sparsity is the target; or a score closes them once. ``materialize`` then takes
out what is closed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Interval, MinLen
from torch import Tensor, nn
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.analysis.added import why_not_added
from fxsparse.analysis.residual_streams import Stream
from fxsparse.analysis.structures import MLP, Attention
from fxsparse.errors import RewriteError
from fxsparse.graph import live
from fxsparse.graph.record import Change, rewrote
from fxsparse.graph.sharded import cut_like, leave_to_ranks, whole
from fxsparse.options import Count, Globs, Positive, Seed, Share
from fxsparse.passes.event import Event
from fxsparse.passes.structured import hard_concrete
from fxsparse.passes.structured.hard_concrete import Gated, mask_name
from fxsparse.passes.structured.sites import CLASHES, UNITS, Gating, Score, Scorer, Unit, gate_sites, hidden_gate

Constraint = Literal["multipliers", "projection"]


@dataclass(frozen=True)
class GateStructures(Gating):
    """Puts gates on the structures of a model.

    Gates and their multipliers are parameters, ``<path>.heads_gate`` and ``sparsity.lambda_1``, which a ``Schedule``
    trains with two AdamW of its own (without decay, the multipliers by ascent) and takes out of the optimizer it is
    given. Add ``fxsparse.sparsity_loss(gm)`` to the loss. One draw of the gates a step serves the whole batch; in
    evaluation gates are their masks, 0 or 1, chosen so that the sparsity is the target. Heads of grouped queries have
    gates of their own, keys and values stay as long as one of their heads does.

    Attributes:
        units: what gets gates: any of heads, attention, intermediate, ffn, hidden, experts. Hidden dimensions are
            those of the whole model, so ``layers`` does not choose among them. Of the experts of a router that takes
            the largest scores of one softmax or before one, as many stay as it chooses for a token.
        target: share of the gated linears' parameters to take away, in [0, 1).
        warmup: share of the training over which the target rises from 0, linearly.
        lr: of the gates.
        constraint: what holds the gates to the target. ``multipliers`` are CoFi's, which take some thousand steps to
            settle: before, the gates overshoot by far. ``projection`` takes out of the gates' gradient what would
            change the expected sparsity, and shifts all of them alike until it is the target, in every step. The
            ``sparsity_loss`` is then 0.
        reg_lr: of the multipliers.
        every: steps between two choices of the masks; they are chosen at the last step as well.
        score: closes gates once, at insertion, by ``magnitude`` (of the unit's weights), by ``activation`` or at
            ``random``, and none of them is trained; none trains them.
        layers: globs over module paths of attentions and MLPs; none takes all.
        seed: of the gates' first values and of random scores.
        calibration: batches for ``activation``: mappings of keyword arguments, tuples of arguments, or single tensors.

    Raises:
        OptionError: an option is out of range.
        RewriteError: the model has gates already, has nothing to gate, or a glob matches nothing.
    """

    name: ClassVar[str] = "gates"
    rest: ClassVar[str] = "has no units of its own that were asked for and can be taken apart"
    cannot_follow: ClassVar[tuple[str, ...]] = CLASHES
    training_only: ClassVar[bool] = True
    of_experts: ClassVar[bool] = True
    no_module: ClassVar[str] = "gates are values in the graph and not yet smaller weights; run materialize first"
    units: Annotated[tuple[Unit, ...], MinLen(1)] = UNITS[:4]
    target: Annotated[float, Interval(ge=0, lt=1)] = 0.6
    warmup: Share = 0.3
    lr: Positive = 0.1
    constraint: Constraint = "multipliers"
    reg_lr: Positive = 0.1
    every: Count = 50
    score: Score | None = None
    layers: Globs | None = None
    seed: Seed = 0
    calibration: Iterable[Any] | None = field(default=None, compare=False, repr=False)

    def rewrite(self, graph: GraphModule) -> Iterable[Change]:
        sites = self._find_sites(graph, "gates")
        scorer = Scorer(graph, sites, self.score or "magnitude", self.calibration, self.seed, self.name)
        scores = {hidden_gate(stream): scorer(stream) for stream in sites.streams} if self.score else {}
        sublayers = []
        generator = torch.Generator().manual_seed(self.seed)
        gates = gate_sites(graph, sites, self.units, functools.partial(self._register, graph, generator))
        for site, item in gates:
            sublayers.append(item)
            if item.gates:
                names = [name.rpartition(".")[2].removesuffix("_gate") for name in item.gates]
                more = self._without_layer_gate(site, item)
                yield rewrote(site.path, f"gates on {' and '.join(names)}{more}, {item.size:,} parameters")
            if self.score is not None and not isinstance(site, Stream):
                units = scorer(site)
                scores |= {item.units: units} if item.units is not None else {}
                scores |= {item.layer: units.mean()[None]} if item.layer is not None else {}
        for stream in sites.streams:
            yield rewrote(stream.path, f"gates on {stream.size} hidden dimensions")
        if not sublayers:
            reasons = "".join(f"; {change.site}: {change.detail}" for change in sites.skipped[:4])
            raise RewriteError(f"found nothing of {', '.join(self.units)} to gate{reasons}", pass_name=self.name)
        live.enter(graph, *sublayers)
        self._check_removable(graph)
        self._check_reachable(graph)
        yield from sites.skipped
        if self.score is None:
            graph.add_module("sparsity", _sparsity(graph))
            leave_to_ranks(graph, *hard_concrete.MULTIPLIERS)
        else:
            hard_concrete.close(graph, self.target, scores)

    def _without_layer_gate(self, site: object, item: Gated) -> str:
        """Why a sublayer that was asked for as a whole has no gate of its own, for its report."""
        layer = {Attention: "attention", MLP: "ffn"}.get(type(site))
        if layer not in self.units or item.layer is not None or not isinstance(site, Attention | MLP):
            return ""
        return f", none on {layer} as {why_not_added(site.output.linear)}"

    def _register(self, gm: GraphModule, generator: torch.Generator, unit: str, name: str, count: int) -> None:
        device = next(gm.parameters()).device
        if self.score is None:
            # Half of the channels are likely to close before training, almost nothing else (as CoFi starts).
            start = torch.randn(count, generator=generator) * 0.01 + (0.0 if unit == "intermediate" else 10.0)
            fx.set_parameter(gm, name, start.clamp(hard_concrete.LOWEST, hard_concrete.HIGHEST).to(device))
        fx.set_buffer(gm, mask_name(name), torch.ones(count, device=device))

    def _check_reachable(self, gm: GraphModule) -> None:
        if self.score is not None:
            most = hard_concrete.most(gm)
            if self.target > most:
                raise RewriteError(
                    f"the target {self.target} is above what can go, {math.floor(most * 1000) / 1000}, since a router "
                    "chooses among the experts that are left: ask for less, or gate more units",
                    pass_name=self.name,
                )
            return
        lowest = torch.tensor(hard_concrete.LOWEST, dtype=torch.double)
        most = float(
            hard_concrete.sparsity_at(gm, lambda name: hard_concrete.probability(lowest.expand(_length(gm, name))))
        )
        if self.target > most:
            raise RewriteError(
                f"the target {self.target} is above what trained gates can reach, {math.floor(most * 1000) / 1000}: "
                "ask for less, gate more units, or close gates by a score",
                pass_name=self.name,
            )

    @property
    def needs_schedule(self) -> bool:
        return self.score is None

    def schedule(self, graph: GraphModule, optimizer: torch.optim.Optimizer, total_steps: int) -> Iterable[Event]:
        if self.score is None and live.sites(graph, Gated):
            yield _Sparsify(self, graph, optimizer, total_steps)


def _length(gm: GraphModule, name: str) -> int:
    return len(gm.get_buffer(mask_name(name)))


# --- training ---------------------------------------------------------------------------------------------------------


def _sparsity(gm: GraphModule) -> nn.Module:
    """The multipliers and the target of the step."""
    device = next(gm.parameters()).device
    module = nn.Module()
    for name in hard_concrete.MULTIPLIERS:  # vectors of one, because FSDP shards no scalars
        module.register_parameter(name.removeprefix("sparsity."), nn.Parameter(torch.zeros(1, device=device)))
    module.register_buffer("target", torch.zeros((), device=device))
    return module


class _Sparsify(Event):
    """Trains gates and multipliers, moves the target, chooses the masks."""

    varying = ("target",)

    def __init__(self, owner: GateStructures, gm: GraphModule, optimizer: torch.optim.Optimizer, total_steps: int):
        self.owner, self.gm, self.total_steps = owner, gm, total_steps
        self.gates = {name: gm.get_parameter(name) for name in hard_concrete.gate_names(gm)}
        self.multipliers = {name: gm.get_parameter(name) for name in hard_concrete.MULTIPLIERS}
        self.descent = torch.optim.AdamW(self.gates.values(), lr=owner.lr, weight_decay=0.0)
        self.ascent = torch.optim.AdamW(self.multipliers.values(), lr=owner.reg_lr, weight_decay=0.0, maximize=True)
        for parameter, moments in self._moments().values():  # as AdamW would start them
            moments["step"] = torch.tensor(0.0)
            moments |= {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        self.step = 0
        self._aim()

    def _moments(self) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
        """Every parameter that is trained here and its optimizer's state, by its name."""
        trained = {self.descent: self.gates, self.ascent: self.multipliers}
        return {
            name: (parameter, optimizer.state[parameter])
            for optimizer, parameters in trained.items()
            for name, parameter in parameters.items()
        }

    def _aim(self) -> None:
        """Sets the target of the next step."""
        step = self.step + 1
        target = self.signals["target"](step) if "target" in self.signals else self.owner.target
        ramp = max(1.0, self.owner.warmup * self.total_steps)
        with torch.no_grad():
            self.gm.get_buffer("sparsity.target").fill_(target * min(1.0, step / ramp))

    def before_step(self, step: int) -> None:
        gates, projects = tuple(self.gates.values()), self.owner.constraint == "projection"
        if projects:
            hard_concrete.keep_sparsity(self.gm, gates)
        else:
            self.ascent.step()
        self.descent.step()
        self.forget()
        with torch.no_grad():
            for gate in gates:
                gate.clamp_(hard_concrete.LOWEST, hard_concrete.HIGHEST)
            if projects:
                hard_concrete.shift(self.gm, gates, float(self.gm.get_buffer("sparsity.target")))

    def forget(self) -> None:
        for optimizer in (self.descent, self.ascent):
            optimizer.zero_grad()

    def after_step(self, step: int) -> None:
        self.step = step
        self._aim()
        if step % self.owner.every == 0 or step >= self.total_steps:
            target = float(self.gm.get_buffer("sparsity.target"))
            hard_concrete.close(self.gm, target, {name: whole(gate.detach()) for name, gate in self.gates.items()})

    def late_parameters(self) -> Iterable[Any]:
        return [*self.gates.values(), *self.multipliers.values()]

    @torch.no_grad()
    def values(self) -> dict[str, float]:
        return {
            "target": float(self.gm.get_buffer("sparsity.target")),
            "sparsity": hard_concrete.mask_sparsity(self.gm),
            "expected_sparsity": float(hard_concrete.expected_sparsity(self.gm)),
        }

    def state_dict(self) -> dict[str, Any]:
        moments = {
            name: {key: whole(value).clone() for key, value in moments.items()}
            for name, (_, moments) in self._moments().items()
        }
        return {"step": self.step, "moments": moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        if "moments" not in state:  # of version 0.1.0
            each = {"descent": self.gates, "ascent": self.multipliers}
            saved = {name: state[key]["state"].get(i) for key in each for i, name in enumerate(each[key])}
            state = {"moments": {name: moments for name, moments in saved.items() if moments}}
        with torch.no_grad():
            for name, (_, moments) in self._moments().items():
                for key, value in moments.items():
                    saved = state["moments"].get(name, {key: torch.zeros(value.shape)})
                    value.copy_(cut_like(saved[key].view(value.shape), value))
        self._aim()
