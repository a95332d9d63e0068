"""Dimension drops (DimCHOP, arXiv 2305.14864): the same share of every weight's columns, scored while training goes on.

Columns are coupled through what shares their dimension, so that ``materialize`` can take them out: a hidden dimension
goes from the whole residual stream, a channel from its MLP, a head from its attention. Scores are PLATON's
(arXiv 2206.12562), for which the paper refers to that method; in a window of optimizer steps, for every weight,

    I = mean |w dL/dw|     A <- b1 A + (1 - b1) I     U <- b2 U + (1 - b2) |I - A|     score = A U

summed over the rows that make each dimension. The paper sums the columns that read it, which differ by where the sum is
taken (over both, w dL/dw adds up to x dL/dx); but the columns of a masked dimension get no gradient here, and it could
not come back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Interval, MinLen
from torch import Tensor
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.analysis.residual_streams import Stream
from fxsparse.analysis.structures import MLP, Attention
from fxsparse.analysis.units import parts_of
from fxsparse.errors import OptionError, RewriteError
from fxsparse.graph import live
from fxsparse.graph.record import Change, rewrote, skipped
from fxsparse.graph.sharded import cut_like, whole
from fxsparse.options import Count, Globs, Seed, Share
from fxsparse.passes.event import Event
from fxsparse.passes.structured.hard_concrete import Gated, mask_name, mask_sparsity
from fxsparse.passes.structured.sites import CLASHES, Gating, Score, Scorer, Sites, gate_sites, hidden_gate

Unit = Literal["hidden", "intermediate", "heads"]
_WHAT = {"hidden": "hidden dimensions", "intermediate": "channels", "heads": "heads"}


@dataclass(frozen=True)
class DropDimensions(Gating):
    """Masks a share of the dimensions of a model.

    The mask acts on activations and on the statistics of norms, so the model computes at every step what the smaller
    one would. In training its gradient is let through, so what is masked goes on learning and may return; that costs as
    much as training the whole model. Half of the hidden dimensions are half of every matrix of the blocks.

    Attributes:
        fraction: of each group's dimensions to drop, in (0, 1); a group is the stream, an MLP, an attention. Under
            grouped queries keys stay as long as one of their heads does.
        units: any of hidden, intermediate (channels of MLPs), heads.
        score: ``platon`` chooses while training goes on, driven by a ``Schedule``; ``magnitude``, ``activation`` and
            ``random`` choose once, at insertion.
        ramp: how the share rises to ``fraction``: ``cubic``, f (1 - (1 - x)^3), or ``exponential``, 1 - (1 - f)^x.
        begin, end: shares of the training between which it does; after ``end`` the choice stays.
        every: optimizer steps in a window, after each of which masks are chosen.
        beta1, beta2: of the moving means of importance and of its uncertainty.
        multiple: what is left of hidden dimensions and of channels is a multiple of it.
        layers: globs over module paths of attentions and MLPs; none takes all.
        seed: of random scores.
        calibration: batches for ``activation``: mappings of keyword arguments, tuples of arguments, or single tensors.

    Raises:
        OptionError: an option is out of range.
        RewriteError: the model has gates already, has nothing to drop, or a glob matches nothing.
    """

    name: ClassVar[str] = "drop-dims"
    rest: ClassVar[str] = "has no units of its own that were asked for and can be taken apart"
    cannot_follow: ClassVar[tuple[str, ...]] = CLASHES
    no_module: ClassVar[str] = (
        "dropped dimensions are masks in the graph and not yet smaller weights; run materialize first"
    )
    fraction: Annotated[float, Interval(gt=0, lt=1)] = 0.5
    units: Annotated[tuple[Unit, ...], MinLen(1)] = ("hidden",)
    score: Literal["platon", Score] = "platon"
    ramp: Literal["cubic", "exponential"] = "cubic"
    begin: Share = 0.1
    end: Share = 0.7
    every: Count = 10
    beta1: Annotated[float, Interval(ge=0, lt=1)] = 0.85
    beta2: Annotated[float, Interval(ge=0, lt=1)] = 0.95
    multiple: Count = 1
    layers: Globs | None = None
    seed: Seed = 0
    calibration: Iterable[Any] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.begin > self.end:
            raise OptionError(f"begin={self.begin} must not be above end={self.end}", pass_name=self.name)

    def rewrite(self, graph: GraphModule) -> Iterable[Change]:
        sites = self._find_sites(graph, "masks")
        groups = _groups(graph, sites, self.units)
        if not groups:
            reasons = "".join(f"; {change.site}: {change.detail}" for change in sites.skipped[:4])
            raise RewriteError(f"found nothing of {', '.join(self.units)} to drop{reasons}", pass_name=self.name)
        scores = {}
        if self.score != "platon":
            scorer = Scorer(graph, sites, self.score, self.calibration, self.seed, self.name)
            scores = {group.gate: scorer(site) for group, site in groups}
        device = next(graph.parameters()).device

        def register(unit: str, name: str, count: int) -> None:
            fx.set_buffer(graph, mask_name(name), torch.ones(count, device=device))

        items: list[Gated] = [
            item for _, item in gate_sites(graph, sites, self.units, register, straight=self.score == "platon")
        ]
        live.enter(graph, *items, *(() if scores else (group for group, _ in groups)))
        self._check_removable(graph, self.multiple)
        for group, _ in groups:
            left = self.left(group, self.fraction)
            if scores:
                self.choose(graph, group, scores[group.gate], self.fraction)
            how = "" if scores else ", chosen while training"
            what = f"{group.count - left} of {group.count} {_WHAT[group.unit]} dropped{how}"
            yield (rewrote if left < group.count else skipped)(group.path, what)
        yield from sites.skipped

    def left(self, group: Dimensions, fraction: float) -> int:
        """How many dimensions of a group stay where ``fraction`` is to go."""
        multiple = 1 if group.unit == "heads" else self.multiple
        wanted = round(group.count * (1 - fraction) / multiple) * multiple
        return min(group.count, max(wanted, multiple, 1))

    def choose(self, gm: GraphModule, group: Dimensions, scores: Tensor, fraction: float) -> None:
        """Masks the dimensions of the lowest scores; of equal ones, the later."""
        kept = scores.argsort(descending=True, stable=True)[: self.left(group, fraction)]
        mask = gm.get_buffer(mask_name(group.gate))
        mask.copy_(torch.zeros_like(mask).index_fill_(0, kept.to(mask.device), 1))

    def share(self, step: int, total_steps: int) -> float:
        """The share that is dropped after ``step`` optimizer steps."""
        begin, end = self.begin * total_steps, self.end * total_steps
        x = min(1.0, max(0.0, (step - begin) / max(1.0, end - begin))) if step < end else 1.0
        return self.fraction * (1 - (1 - x) ** 3) if self.ramp == "cubic" else 1 - (1 - self.fraction) ** x

    @property
    def needs_schedule(self) -> bool:
        return self.score == "platon"

    def schedule(self, graph: GraphModule, optimizer: torch.optim.Optimizer, total_steps: int) -> Iterable[Event]:
        if live.sites(graph, Dimensions):
            yield _Chop(self, graph, total_steps)


@dataclass(frozen=True)
class Dimensions(live.Live):
    """Dimensions that compete while training goes on: of the stream, of an MLP, of an attention.

    Attributes:
        unit: hidden, intermediate or heads.
        gate: name of their gate.
        path: module path.
        count: how many.
        rows: of the weights that make them.
    """

    unit: str
    gate: str
    path: str
    count: int
    rows: tuple[live.Rows, ...]

    @property
    def weights(self) -> tuple[str, ...]:
        return tuple(part.name for part in self.rows)

    def moved(self, old: str, new: str, rows: int) -> Dimensions:
        return replace(self, rows=tuple(part.moved(old, new, rows) for part in self.rows))

    def without(self, gone: Callable[[str], bool]) -> Dimensions | None:
        left = tuple(part for part in self.rows if not gone(part.name))
        return replace(self, rows=left) if left else None


def _groups(gm: GraphModule, sites: Sites, units: Iterable[str]) -> list[tuple[Dimensions, Attention | MLP | Stream]]:
    groups: list[tuple[Dimensions, Attention | MLP | Stream]] = []
    for site in sites.sublayers:
        unit, count = ("heads", site.heads) if isinstance(site, Attention) else ("intermediate", site.channels)
        if unit in units and site.path in sites.named:
            group = Dimensions(unit, f"{site.path}.{unit}_gate", site.path, count, _rows(site, gm))
            groups.append((group, site))
    for stream in sites.streams:
        group = Dimensions("hidden", hidden_gate(stream), stream.path, stream.size, _rows(stream, gm))
        groups.append((group, stream))
    return groups


def _rows(site: Attention | MLP | Stream, gm: GraphModule) -> tuple[live.Rows, ...]:
    parts = (part for part in parts_of(site, gm) if part.axis == 0)
    return tuple(live.Rows(part.linear.name, int(part.linear.transposed), part.index) for part in parts)


# --- while training ---------------------------------------------------------------------------------------------------


class _Chop(Event):
    """Scores weights and chooses masks."""

    def __init__(self, owner: DropDimensions, gm: GraphModule, total_steps: int):
        self.owner, self.gm, self.total_steps = owner, gm, total_steps
        self.groups = live.sites(gm, Dimensions)
        self.steps = 0  # in the window
        self.summed: dict[str, Tensor] = {}
        self.importance: dict[str, Tensor] = {}
        self.uncertainty: dict[str, Tensor] = {}
        for name in dict.fromkeys(part.name for group in self.groups for part in group.rows):  # alike on all ranks
            weight = gm.get_parameter(name).detach()
            for state in (self.summed, self.importance, self.uncertainty):
                state[name] = torch.zeros_like(weight, dtype=torch.float32)

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        if self._is_over(step):
            return
        for name, summed in self.summed.items():
            weight = self.gm.get_parameter(name)
            if weight.grad is not None:
                summed += (weight * weight.grad).abs()
        self.steps += 1

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        ends = math.ceil(self.owner.end * self.total_steps) == step
        if self._is_over(step) or not (step % self.owner.every == 0 or ends):
            return
        for name, summed in self.summed.items():
            window = summed / self.steps
            mean = self.importance[name].lerp_(window, 1 - self.owner.beta1)
            self.uncertainty[name].lerp_((window - mean).abs(), 1 - self.owner.beta2)
            summed.zero_()
        self.steps = 0
        share = self.owner.share(step, self.total_steps)
        for group in self.groups:
            self.owner.choose(self.gm, group, self._scores(group), share)

    def _is_over(self, step: int) -> bool:
        return step > math.ceil(self.owner.end * self.total_steps)

    def _scores(self, group: Dimensions) -> Tensor:
        scores = [part.sums(whole(self.importance[part.name] * self.uncertainty[part.name])) for part in group.rows]
        return torch.stack(scores).sum(0)

    def values(self) -> dict[str, float]:
        return {"sparsity": mask_sparsity(self.gm)}

    def state_dict(self) -> dict[str, Any]:
        states = {"summed": self.summed, "importance": self.importance, "uncertainty": self.uncertainty}
        copies = {key: {name: value.clone() for name, value in state.items()} for key, state in states.items()}
        return {"steps": self.steps, **copies}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        for key in ("summed", "importance", "uncertainty"):
            for name, value in getattr(self, key).items():
                value.copy_(cut_like(state[key][name], value))
