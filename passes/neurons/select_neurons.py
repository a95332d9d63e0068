"""Training only the neurons that matter in a step, and all of them in the end (SAT, arXiv 2406.01392).

    attention    q, k, v = x W[rows of S]^T        y = attention(q, k, v) W_o[:, columns of S]^T
    MLP          h = act(x W_1[S]^T)               y = h W_2[:, S]^T

S, the heads and channels that take part, changes from step to step. The others are neither computed nor updated. The
ladder (LORS) trains at a constant omission rate first and then lowers it step by step until the model is dense.

S is data: index buffers that a ``Schedule`` writes in place, so nothing is compiled again until its size changes, which
it does at the ladder's rungs. The graph itself stays dense. That is what is saved, exported and evaluated; what runs in
training is derived from it (`fxsparse.graph.training_form`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Interval, MinLen
from torch import Tensor
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.analysis.structures import MLP, Attention, Structures, structures
from fxsparse.cost.flops import costs
from fxsparse.errors import CheckpointError, OptionError, RewriteError
from fxsparse.graph import live
from fxsparse.graph.derived_buffers import weights_borrowed
from fxsparse.graph.record import META_KEY, Change, record_of, rewrote, skipped
from fxsparse.graph.sharded import in_process_group, leave_to_ranks
from fxsparse.graph.training_form import FORM_KEY, set_form
from fxsparse.options import Count, Index, Seed
from fxsparse.passes.base import Pass
from fxsparse.passes.event import Event
from fxsparse.passes.neurons.choice import (
    Choice,
    Held,
    Score,
    check_optimizer,
    choose,
    kept_units,
    omission_at,
    scores_of,
)
from fxsparse.passes.neurons.gather_units import (
    CannotShrink,
    Part,
    Site,
    batches_name,
    columns_name,
    linears_of,
    magnitudes_name,
    selection,
    shrink,
    site_of,
)
from fxsparse.passes.nm.branch import Branch

Structure = Literal["heads", "channels"]
_Rate = Annotated[float, Interval(ge=0, lt=1)]


@dataclass(frozen=True)
class SelectNeurons(Pass):
    """Computes and updates a choice of heads and channels in every training step.

    The optimizer state of what does not take part (moments, not the step counters, which belong to whole tensors)
    stays as it was in that step, and so do the weights: no momentum, no weight decay. That holds for optimizers that
    work element by element; others are refused. Under grouped queries a key head and its query heads go together.
    One choice serves all micro-batches of an optimizer step, and all ranks where ``torch.distributed`` runs.

    Attributes:
        omission: share of heads and of channels that does not take part, in [0, 1); at 0 the model is dense.
        score: what a unit matters by: the moving mean of its ``magnitude``, that times the norm of the columns that
            read it (``weighted``), or nothing (``uniform``), for comparison. Units that do not take part keep their
            mean.
        choice: the ``top`` ones by their scores, which then seldom change, or ``sampled`` in proportion to them, which
            trains more of them, and a model that evaluation, where all take part, differs from by more.
        structures: ``heads``, ``channels``, or both.
        rungs: equal steps down to 0 at the end of training; none keeps the rate throughout.
        rung_steps: optimizer steps of each; by default all rungs together are the second half of the training.
        multiple: the number of channels is rounded to a multiple of it, at least one.
        head_multiple: the same for heads (under grouped queries: groups).
        block: channels are chosen in blocks of so many consecutive ones, by the mean of their scores; a GPU then loads
            16 bytes at a time where it else loads single columns. An MLP whose width is no multiple of it stays dense,
            because a shorter last block would make the number that takes part, and so the graph, another in each step.
        every: optimizer steps between two choices.
        decay: of the moving mean, in [0, 1): its weight against a step's own.
        rescale: multiply what takes part by the number of all units over its own.
        seed: of the draws.
        now: the omission rate at present; written by the schedule, so that the record gives the model as it is.

    Raises:
        OptionError: an option is out of range, or the ladder is longer than the training.
        RewriteError: the model has no attention or MLP, or the optimizer does not work element by element.
    """

    name: ClassVar[str] = "select-neurons"
    rest: ClassVar[str] = "has no units of its own that were asked for and can be taken apart"
    cannot_follow: ClassVar[tuple[str, ...]] = ("gates", "drop-dims")
    crowded_out_by: ClassVar[tuple[str, ...]] = ("nm-masks",)
    training_only: ClassVar[bool] = True
    no_module: ClassVar[str] = (
        "training computes a part of the units only, chosen as it goes; train the graph form. It "
        "evaluates the whole model: load fxsparse.dense_state_dict(gm) into the original for a module"
    )
    omission: _Rate = 0.3
    score: Score = "magnitude"
    choice: Choice = "top"
    structures: Annotated[tuple[Structure, ...], MinLen(1)] = ("heads", "channels")
    rungs: Index = 0
    rung_steps: Count | None = None
    multiple: Count = 64
    head_multiple: Count = 1
    block: Count = 1
    every: Count = 1
    decay: _Rate = 0.9
    rescale: bool = False
    seed: Seed = 0
    now: _Rate | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rung_steps is not None and not self.rungs:
            raise OptionError("rung_steps needs rungs, the number of steps down", pass_name=self.name)

    @property
    def rate(self) -> float:
        """The omission rate at present."""
        return self.omission if self.now is None else self.now

    def rewrite(self, graph: GraphModule) -> Iterable[Change]:
        if weights_borrowed(graph):
            raise RewriteError(
                "a one-line call sees no optimizer steps to choose neurons for; call fxsparse.rewrite(model, passes, "
                "...) and drive its result with a fxsparse.Schedule",
                pass_name=self.name,
            )
        if FORM_KEY in graph.meta or any(entry.text.startswith(self.name) for entry in record_of(graph).entries):
            raise RewriteError(
                "neurons are selected already; leave one of them out: one pass holds all options", pass_name=self.name
            )
        return self.install(graph)

    def install(self, graph: GraphModule) -> list[Change]:
        """Derives what ``graph`` runs in training at the present rate, with a first choice of units."""
        excluded: dict[str, str] = {}
        while True:
            form = fx.copy_sharing_state(graph)
            form.meta.pop(FORM_KEY, None)
            sites, changes = self._sites(form, excluded)
            try:
                for found, site, kept in sites:
                    if kept < site.units:
                        scores = torch.ones(site.units)
                        units = choose(scores, kept, "sampled", self.seed, 0, site.key, site.block)
                        _register((graph, form), self._buffers(graph, site, units))
                        try:
                            observe = self.score != "uniform"
                            shrink(form, found, site, kept, observe=observe, rescale=self.rescale)
                        except CannotShrink as reason:
                            excluded[site.key] = str(reason)
                            raise
            except CannotShrink:
                continue
            break
        shrunk = [site for _, site, kept in sites if kept < site.units]
        fx.eliminate_dead_code(form)
        form.graph.lint()
        live.end(graph, Site)
        live.enter(graph, *(site for _, site, _ in sites))
        set_form(graph, form if shrunk else None, lambda gm: _renew(self, gm))
        return changes

    def _sites(
        self, gm: GraphModule, excluded: Mapping[str, str]
    ) -> tuple[list[tuple[Attention | MLP, Site, int]], list[Change]]:
        """The structures that can be made smaller, with their units and how many take part."""
        all_found = structures(gm)
        found: list[Attention | MLP] = [
            *(all_found.attentions if "heads" in self.structures else ()),
            *(all_found.mlps if "channels" in self.structures else ()),
        ]
        changes = list(all_found.skipped)
        if not found:
            reasons = "; ".join(map(str, changes[:4]))
            raise RewriteError(
                f"the model has no {' and no '.join(self.structures)} that can be left out one by one"
                + (f" ({reasons})" if reasons else ": no attention or MLP block of dense linears")
                + f"; {self._instead(gm, all_found)}",
                pass_name=self.name,
            )
        uses = _uses(gm)
        branches = {branch.weight for branch in live.sites(gm, Branch)}
        sites: list[tuple[Attention | MLP, Site, int]] = []
        owners: dict[str, str] = {}
        for item in found:
            own = Counter(linear.name for linear in linears_of(gm, item))
            try:
                site = site_of(item, self.block)
            except CannotShrink as reason:
                changes.append(skipped(item.path, str(reason)))
                continue
            shared = [
                part.name for part in site.parts if uses.get(id(fx.attribute(gm, part.name)), 0) != own[part.name]
            ]
            multiple = self.multiple_of(site)
            kept = kept_units(site.units, self.rate, multiple)
            what = f"{kept} of {site.units} {'channels' if site.kind == 'channels' else _head_units(site)}"
            if site.key in excluded:
                changes.append(skipped(site.path, excluded[site.key]))
            elif shared:
                changes.append(skipped(site.path, f"{shared[0]} is used more than once"))
            elif chained := owners.keys() & {part.name for part in site.parts}:
                linear = min(chained)
                changes.append(skipped(site.path, f"{linear} is a part of {owners[linear]} too, chosen on its own"))
            elif beside := branches & {part.name for part in _mixed_by_branches(site)}:
                changes.append(skipped(site.path, f"{min(beside)} has a low-rank branch, which mixes all units"))
            elif site.units < 2:
                changes.append(skipped(site.path, "has a single unit"))
            elif site.units % site.block:
                changes.append(skipped(site.path, _no_blocks(site)))
            else:
                sites.append((item, site, kept))
                owners |= {part.name: site.path for part in site.parts if kept < site.units}
                if kept < site.units:
                    changes.append(rewrote(site.path, f"{what} a step"))
                else:
                    why = "the omission rate is 0" if self.rate == 0 else f"rounded to a multiple of {multiple}"
                    changes.append(skipped(site.path, f"{what} take part: {why}"))
        return sites, changes

    def multiple_of(self, site: Site) -> int:
        """What the number of a site's units is rounded to: whole blocks of channels."""
        return self.head_multiple if site.kind == "heads" else math.lcm(self.multiple, self.block)

    def _instead(self, gm: GraphModule, found: Structures) -> str:
        """What to do where nothing that was asked for can be left out."""
        others = {"heads": found.attentions, "channels": found.mlps}
        for kind in sorted(others.keys() - set(self.structures)):
            if others[kind]:
                return f"choose {kind} with structures=[{kind}]"
        return "keep nm-masks off some of them with exclude=" if record_of(gm).weights else "leave this pass out"

    def _buffers(self, gm: GraphModule, site: Site, units: Tensor) -> dict[str, Tensor]:
        device = fx.attribute(gm, site.output.name).device
        buffers = selection(site, units.to(device))
        if self.score != "uniform":
            leave_to_ranks(gm, magnitudes_name(site), batches_name(site))
            columns = len(site.output.of(units))
            buffers[magnitudes_name(site)] = torch.zeros(columns, device=device)
            buffers[batches_name(site)] = torch.zeros((), device=device)
        return buffers

    @property
    def needs_schedule(self) -> bool:
        return True

    def schedule(self, graph: GraphModule, optimizer: torch.optim.Optimizer, total_steps: int) -> Iterable[Event]:
        yield _Selection(self, graph, optimizer, total_steps)


def _mixed_by_branches(site: Site) -> tuple[Part, ...]:
    """The parts a branch beside which mixes units; one beside a linear that makes channels has rows of its own."""
    return site.parts if site.kind == "heads" else (site.output,)


def _no_blocks(site: Site) -> str:
    fitting = math.gcd(site.units, site.block)
    return f"its {site.units} channels are not a multiple of block={site.block}; choose block={fitting} or 1"


def _head_units(site: Site) -> str:
    return "heads" if site.group == 1 else f"groups of {site.group} heads"


def _uses(gm: GraphModule) -> dict[int, int]:
    """How many linears and other nodes read every parameter."""
    counts: dict[int, int] = {}
    for key, nodes in fx.reads(gm).items():
        counts[key] = sum(len(user.users) if fx.FROZEN in user.meta else 1 for node in nodes for user in node.users)
    return counts


def _register(modules: Iterable[GraphModule], buffers: Mapping[str, Tensor]) -> None:
    """Registers buffers that no state dict has: a checkpoint holds the dense model, a schedule's state the choice."""
    for name, tensor in buffers.items():
        path, _, leaf = name.rpartition(".")
        for module in modules:
            module.get_submodule(path).register_buffer(leaf, tensor, persistent=False)


def _renew(owner: SelectNeurons, gm: GraphModule) -> None:
    """Another pass, or another event, edited the graph: the form follows it, and the choice stays.

    Raises:
        RewriteError: units that are chosen among can no longer be left out.
    """
    before = live.sites(gm, Site)
    chosen = {name: tensor.clone() for name, tensor in gm.named_buffers()}
    try:
        changes = owner.install(gm)
    except RewriteError as error:
        raise _lost(before, str(error)) from error
    after = {site.key for site in live.sites(gm, Site)}
    if lost := [site for site in before if site.key not in after]:
        raise _lost(lost, "; ".join(map(str, changes[:4])))
    for name, buffer in gm.named_buffers():
        if name in chosen and chosen[name].shape == buffer.shape:
            buffer.copy_(chosen[name])
    for site in live.sites(gm, Site):
        columns = chosen.get(columns_name(site))
        if columns is not None and columns_name(site) in dict(gm.named_buffers()):
            units = torch.isin(site.output.index.to(columns.device), columns).all(1).nonzero().flatten()
            if not site.in_blocks(units):
                raise _lost([site], f"its channels are no longer in blocks of {site.block}")
            for name, index in selection(site, units).items():
                fx.attribute(gm, name).copy_(index)


def _lost(sites: Iterable[Site], reason: str) -> RewriteError:
    paths = list(dict.fromkeys(site.path for site in sites))
    shown = ", ".join(paths[:4]) + (", ..." if len(paths) > 4 else "")
    return RewriteError(
        f"it could no longer leave out units of {shown}; keep the later pass off these linears with its exclude= "
        f"or layers=, or choose others with structures= ({reason})",
        pass_name=SelectNeurons.name,
    )


# --- while training ---------------------------------------------------------------------------------------------------


class _Selection(Event):
    """Chooses units for every step, holds the others still, and climbs down the ladder."""

    def __init__(self, owner: SelectNeurons, gm: GraphModule, optimizer: torch.optim.Optimizer, total_steps: int):
        check_optimizer(optimizer, owner.name)
        self.owner, self.gm, self.optimizer, self.total_steps = owner, gm, optimizer, total_steps
        self.rung_steps = owner.rung_steps or (total_steps // (2 * owner.rungs) if owner.rungs else 0)
        if owner.rungs and (self.rung_steps < 1 or owner.rungs * self.rung_steps > total_steps):
            raise OptionError(
                f"a ladder of {owner.rungs} rungs of {max(1, self.rung_steps)} steps is longer than the training of "
                f"{total_steps} steps; lower rungs or rung_steps",
                pass_name=owner.name,
            )
        self.means = {site.key: torch.full((len(site.output.index.flatten()),), torch.nan) for site in self.sites}
        self.kept: dict[str, Tensor] = {}
        self.held: Held | None = None
        self._prepare(1)

    # The index of a column in ``means`` is its position among the output linear's inputs.

    @property
    def sites(self) -> tuple[Site, ...]:
        """The structures, as the graph is now."""
        return live.sites(self.gm, Site)

    def _rate(self, step: int) -> float:
        return omission_at(step, self.owner.omission, self.total_steps, self.owner.rungs, self.rung_steps)

    def _prepare(self, step: int) -> None:
        """Sets the rate of optimizer step ``step`` and chooses its units."""
        self._set_rate(self._rate(step))
        if (step - 1) % self.owner.every == 0 or not self.kept:
            self._choose(step)

    def _set_rate(self, rate: float) -> None:
        if rate == self.owner.rate:
            return
        text, self.owner = str(self.owner), replace(self.owner, now=None if rate == self.owner.omission else rate)
        changes = tuple(self.owner.install(self.gm))
        self.kept = {}
        record = record_of(self.gm)
        entries = tuple(
            replace(entry, text=str(self.owner), changes=changes, after=costs(self.gm)) if entry.text == text else entry
            for entry in record.entries
        )
        self.gm.meta[META_KEY] = replace(record, entries=entries)

    def _active(self) -> list[Site]:
        """The sites some of whose units do not take part."""
        present = dict(self.gm.named_buffers()) if FORM_KEY in self.gm.meta else {}
        return [site for site in self.sites if f"{site.key}_columns" in present and self._count(site) < site.units]

    def _count(self, site: Site) -> int:
        return kept_units(site.units, self.owner.rate, self.owner.multiple_of(site))

    @torch.no_grad()
    def _choose(self, step: int) -> None:
        self.kept = {}
        for site in self._active():
            mean = self.means[site.key].to(fx.attribute(self.gm, site.key).device)
            scores = scores_of(self.gm, site, mean, self.owner.score)
            owner = self.owner
            units = choose(scores, self._count(site), owner.choice, owner.seed, step, site.key, site.block)
            self._write(site, units)

    def _write(self, site: Site, units: Tensor) -> None:
        for name, index in selection(site, units).items():
            fx.attribute(self.gm, name).copy_(index)
        self.kept[site.key] = units

    def before_step(self, step: int) -> None:
        parts = []
        for site in self._active():
            units = self.kept[site.key]
            takes_part = torch.zeros(site.units, dtype=torch.bool, device=units.device).index_fill_(0, units, True)
            omitted = takes_part.to(torch.int8).argsort(stable=True)[: site.units - len(units)]
            parts += [(part, omitted) for part in site.parts]
        self.held = Held(self.gm, self.optimizer, parts, self.owner.name)

    def after_step(self, step: int) -> None:
        if self.held is not None:
            self.held.restore()
            self.held = None
        if self.owner.score != "uniform":
            self._observe()
        self._prepare(step + 1)

    @torch.no_grad()
    def _observe(self) -> None:
        """Takes the magnitudes that the step's forward passes added up into the moving means."""
        sites = self._active()
        if not sites:
            return
        totals = [fx.attribute(self.gm, magnitudes_name(site)) for site in sites]
        counts = [fx.attribute(self.gm, batches_name(site)) for site in sites]
        if in_process_group():
            together = torch.cat([tensor.flatten() for tensor in (*totals, *counts)])
            torch.distributed.all_reduce(together)
            pieces = together.split([tensor.numel() for tensor in (*totals, *counts)])
            for tensor, piece in zip((*totals, *counts), pieces, strict=True):
                tensor.copy_(piece.view(tensor.shape))
        for site, total, count in zip(sites, totals, counts, strict=True):
            columns = fx.attribute(self.gm, f"{site.key}_columns")
            mean = self.means[site.key] = self.means[site.key].to(total.device)
            before = mean[columns]
            observed = torch.where(count > 0, total / count.clamp_min(1), before)
            moved = self.owner.decay * before + (1 - self.owner.decay) * observed
            mean[columns] = torch.where(before.isnan(), observed, moved)
            total.zero_()
            count.zero_()

    def values(self) -> dict[str, float]:
        return {"omission": float(self.owner.rate)}

    def state_dict(self) -> dict[str, Any]:
        return {
            "now": self.owner.now,
            "kept": {site.key: self._takes_part(site) for site in self.sites},
            "means": {key: mean.cpu().clone() for key, mean in self.means.items()},
        }

    def _takes_part(self, site: Site) -> Tensor:
        """Which units take part, bool ``[units]`` on the CPU: of the same size at every rate."""
        units = self.kept.get(site.key)
        mask = torch.full((site.units,), units is None)
        return mask if units is None else mask.index_fill_(0, units.cpu(), True)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._set_rate(self.owner.omission if state["now"] is None else state["now"])
        self.means = {key: mean.clone() for key, mean in state["means"].items()}
        self.kept = {}
        for site in self._active():
            units = state["kept"][site.key]
            units = units.nonzero().flatten() if units.dtype is torch.bool else units  # earlier versions saved indices
            if not site.in_blocks(units):
                raise CheckpointError(
                    f"{self.owner.name}: the saved choice of channels of {site.path} is not in blocks of {site.block}; "
                    "load it beside the model it was saved with"
                )
            self._write(site, units.to(fx.attribute(self.gm, site.key).device))
