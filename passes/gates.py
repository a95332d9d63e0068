"""Gates on attention heads, MLP channels and whole sublayers (CoFi, arXiv 2204.00408).

    heads          z[h] on the result of attention, before the output projection
    attention      z on what an attention adds to the stream
    intermediate   z[c] on the channels of an MLP, before its last linear
    ffn            z on what an MLP adds to the stream

Gates learn to close until the expected sparsity is the target; or a score closes them once. ``materialize`` then takes
out what is closed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxsparse import gating
from fxsparse import graph as fx
from fxsparse.derived import weights_borrowed
from fxsparse.errors import OptionError, RewriteError
from fxsparse.gating import BETA, GAMMA, META_KEY, ZETA, Gated, mask_name
from fxsparse.passes.base import Pass
from fxsparse.passes.event import Event
from fxsparse.record import Change, rewrote
from fxsparse.structures import MLP, Attention, structures

aten = torch.ops.aten

UNITS = ("heads", "attention", "intermediate", "ffn")
SCORES = ("magnitude", "random")
GATE_MARK = "fxsparse_gate"
"""In the meta of the node that multiplies by a gate: (unit, path, name of the gate)."""


@dataclass(frozen=True)
class GateStructures(Pass):
    """Puts gates on the structures of a model.

    Gates and their multipliers are parameters, ``<path>.heads_gate`` and ``sparsity.lambda_1``, which a ``Schedule``
    trains with two AdamW of its own (without decay, the multipliers by ascent) and takes out of the optimizer it is
    given. Add ``fxsparse.sparsity_loss(gm)`` to the loss. One draw of the gates a step serves the whole batch; in
    evaluation gates are their masks, 0 or 1, chosen so that the sparsity is the target. Heads of grouped queries have
    gates of their own, keys and values stay as long as one of their heads does.

    Attributes:
        units: what gets gates: any of heads, attention, intermediate, ffn.
        target: share of the gated linears' parameters to take away, in [0, 1).
        warmup: share of the training over which the target rises from 0, linearly.
        lr: of the gates.
        reg_lr: of the multipliers.
        every: steps between two choices of the masks; they are chosen at the last step as well.
        score: closes gates once, at insertion, by ``magnitude`` (of the unit's weights) or at ``random``, and none of
            them is trained; none trains them.
        layers: globs over module paths of attentions and MLPs; none takes all.
        seed: of the gates' first values and of random scores.

    Raises:
        OptionError: an option is out of range.
        RewriteError: the model has gates already, has nothing to gate, or a glob matches nothing.
    """

    name: ClassVar[str] = "gates"
    cannot_follow: ClassVar[tuple[str, ...]] = ("gates", "nm-masks", "low-rank", "select-tensors")
    units: tuple[str, ...] = UNITS
    target: float = 0.6
    warmup: float = 0.3
    lr: float = 0.1
    reg_lr: float = 0.1
    every: int = 50
    score: str | None = None
    layers: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("units", "layers"):
            given = getattr(self, field)
            if given is not None:
                object.__setattr__(self, field, (given,) if isinstance(given, str) else tuple(given))
        unknown = [unit for unit in self.units if unit not in UNITS]
        if unknown or not self.units:
            shown = ", ".join(map(str, unknown)) or "nothing"
            raise OptionError(f"units={shown} cannot be gated; there are: {', '.join(UNITS)}", pass_name=self.name)
        if isinstance(self.target, bool) or not 0 <= self.target < 1:
            raise OptionError(f"target={self.target} must lie in [0, 1)", pass_name=self.name)
        if not 0 <= self.warmup <= 1:
            raise OptionError(f"warmup={self.warmup} is a share of the training, in [0, 1]", pass_name=self.name)
        if self.lr <= 0 or self.reg_lr <= 0 or self.every < 1:
            raise OptionError("lr, reg_lr and every must be positive", pass_name=self.name)
        if self.score is not None and self.score not in SCORES:
            raise OptionError(f"score={self.score!r} is none of {', '.join(SCORES)}", pass_name=self.name)

    def rewrite(self, graph: GraphModule) -> Iterable[Change]:
        if weights_borrowed(graph):
            raise RewriteError(
                "gates are state that a one-line call has nowhere to keep; call fxsparse.rewrite(model, passes, ...) "
                "and compile its result",
                pass_name=self.name,
            )
        found = structures(graph)
        sites: list[Attention | MLP] = [*found.attentions, *found.mlps]
        sites = self._named(sites)
        if not sites:
            raise RewriteError("found no attention and no MLP to gate", pass_name=self.name)
        generator = torch.Generator().manual_seed(self.seed)
        sublayers = []
        for site in sites:
            item = self._gate(graph, site, generator)
            if item is not None:
                sublayers.append(item)
                names = [name.rpartition(".")[2].removesuffix("_gate") for name in (item.units, item.layer) if name]
                yield rewrote(site.path, f"gates on {' and '.join(names)}, {item.size:,} parameters")
        if not sublayers:
            raise RewriteError(f"found nothing of {', '.join(self.units)} to gate", pass_name=self.name)
        graph.meta[META_KEY] = tuple(sublayers)
        self._check_reachable(graph)
        yield from found.skipped
        if self.score is None:
            graph.add_module("sparsity", _sparsity(graph))
        else:
            gating.close(graph, self.target, self._scores(graph, sites, generator))

    def _named(self, sites: list[Attention | MLP]) -> list[Attention | MLP]:
        if self.layers is None:
            return sites
        for glob in self.layers:
            if not any(fnmatchcase(site.path, glob) for site in sites):
                known = ", ".join(site.path for site in sites[:4])
                raise RewriteError(f"the glob {glob!r} matches nothing; there are: {known}", pass_name=self.name)
        return [site for site in sites if any(fnmatchcase(site.path, glob) for glob in self.layers)]

    def _gate(self, gm: GraphModule, site: Attention | MLP, generator: torch.Generator) -> Gated | None:
        is_attention = isinstance(site, Attention)
        unit, layer = ("heads", "attention") if is_attention else ("intermediate", "ffn")
        count = site.heads if isinstance(site, Attention) else site.channels
        units_name = layer_name = None
        output = site.output.linear
        if unit in self.units:
            units_name = f"{site.path}.{unit}_gate"
            # Half of the channels are likely to close before training, almost no head and no layer (as CoFi starts).
            self._register(gm, units_name, count, 10.0 if is_attention else 0.0, generator)
            if isinstance(site, Attention):
                _multiply(gm, site.sdpa, units_name, (count, 1, 1), (unit, site.path, units_name))
            else:
                _multiply_input(gm, output.node, output.input, units_name, count, (unit, site.path, units_name))
        if layer in self.units:
            layer_name = f"{site.path}.{layer}_gate"
            self._register(gm, layer_name, 1, 10.0, generator)
            _multiply(gm, output.node, layer_name, (1,), (layer, site.path, layer_name))
        if units_name is None and layer_name is None:
            return None
        return _sizes(site, units_name, layer_name)

    def _register(self, gm: GraphModule, name: str, count: int, mean: float, generator: torch.Generator) -> None:
        device = next(gm.parameters()).device
        if self.score is None:
            start = torch.randn(count, generator=generator) * 0.01 + mean
            fx.set_parameter(gm, name, start.clamp(gating.LOWEST, gating.HIGHEST).to(device))
        fx.set_buffer(gm, mask_name(name), torch.ones(count, device=device))

    def _check_reachable(self, gm: GraphModule) -> None:
        if self.score is not None:
            return
        lowest = torch.tensor(gating.LOWEST, dtype=torch.double)
        most = float(gating.sparsity_at(gm, lambda name: gating.probability(lowest.expand(_length(gm, name)))))
        if self.target > most:
            raise RewriteError(
                f"the target {self.target} is above what trained gates can reach, {math.floor(most * 1000) / 1000}: "
                "ask for less, gate more units, or close gates by a score",
                pass_name=self.name,
            )

    def _scores(
        self, gm: GraphModule, sites: list[Attention | MLP], generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        scores = {}
        by_path = {site.path: site for site in sites}
        for item in gating.gated(gm):
            units = _magnitudes(gm, by_path[item.path])
            if self.score == "random":
                units = torch.rand(units.shape, generator=generator)
            if item.units is not None:
                scores[item.units] = units
            if item.layer is not None:
                scores[item.layer] = units.mean()[None]
        return scores

    def schedule(self, graph: GraphModule, optimizer: torch.optim.Optimizer, total_steps: int) -> Iterable[Event]:
        if self.score is None and META_KEY in graph.meta:
            yield _Sparsify(self, graph, optimizer, total_steps)


def _sizes(site: Attention | MLP, units: str | None, layer: str | None) -> Gated:
    output = site.output
    per_unit = output.index.shape[1] * output.linear.out_features
    per_group = 0
    for rows in site.projections:
        each = rows.index.shape[1] * (rows.linear.in_features + (rows.linear.bias is not None))
        if rows.kind in ("key", "value"):
            per_group += each
        else:
            per_unit += each
    rest = output.linear.out_features if output.linear.bias is not None else 0
    if isinstance(site, Attention):
        return Gated(site.path, units, layer, site.heads, per_unit, per_group, site.kv_heads, rest)
    return Gated(site.path, units, layer, site.channels, per_unit, per_group, site.channels, rest)


def _magnitudes(gm: GraphModule, site: Attention | MLP) -> Tensor:
    """The root mean square of each unit's weights, relative to its sublayer's."""
    total = torch.zeros(len(site.output.index), dtype=torch.double)
    count = 0
    for part in (*site.projections, site.output):
        if getattr(part, "kind", "") in ("key", "value"):
            continue
        weight = gm.get_parameter(part.linear.name).detach().double().cpu()
        weight = weight.t() if part.linear.transposed else weight
        own = weight[part.index] if part is not site.output else weight.t()[part.index]
        total += own.square().flatten(1).sum(1)
        count += own[0].numel()
    scores = (total / count).sqrt()
    return scores / scores.mean().clamp_min(1e-30)


def _length(gm: GraphModule, name: str) -> int:
    return len(gm.get_buffer(mask_name(name)))


# --- nodes ------------------------------------------------------------------------------------------------------------


def _drawn(gm: GraphModule, name: str, dtype: torch.dtype, before: Node) -> Node:
    """The gate ``[units]``: drawn in training, the mask in evaluation."""

    def call(target: Any, *args: Any, **kwargs: Any) -> Node:
        return fx.insert_call(gm, target, args, kwargs, like=before)

    mask = fx.insert_attribute(gm, mask_name(name), before=before)
    gate = mask
    if any(known == name for known, _ in gm.named_parameters()):
        a = fx.insert_attribute(gm, name, before=before)
        u = call(aten.clamp.default, call(aten.rand_like.default, a), 1e-6, 1 - 1e-6)
        noise = call(aten.sub.Tensor, call(aten.log.default, u), call(aten.log1p.default, call(aten.neg.default, u)))
        s = call(aten.sigmoid.default, call(aten.div.Tensor, call(aten.add.Tensor, noise, a), BETA))
        stretched = call(aten.add.Tensor, call(aten.mul.Tensor, s, ZETA - GAMMA), GAMMA)
        z = call(aten.clamp.default, stretched, 0.0, 1.0)
        with gm.graph.inserting_before(before):
            training = gm.graph.create_node("get_attr", "training")
        training.meta["val"] = False
        drawn = call(aten.mul.Tensor, call(aten.sub.Tensor, z, mask), training)
        gate = call(aten.add.Tensor, mask, drawn)
    return gate if fx.value(gate).dtype == dtype else call(aten.to.dtype, gate, dtype)


def _multiply(gm: GraphModule, node: Node, name: str, shape: tuple[int, ...], mark: tuple[str, str, str]) -> None:
    """Multiplies what a node computes by a gate."""
    after = node.next
    gate = _drawn(gm, name, fx.value(node).dtype, after)
    if shape != (fx.value(gate).numel(),):
        gate = fx.insert_call(gm, aten.view.default, (gate, list(shape)), like=after)
    product = fx.insert_call(gm, aten.mul.Tensor, (node, gate), like=after)
    product.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
    product.meta[GATE_MARK] = mark
    node.replace_all_uses_with(product, delete_user_cb=lambda user: user is not product)


def _multiply_input(
    gm: GraphModule, linear: Node, node: Node, name: str, count: int, mark: tuple[str, str, str]
) -> None:
    """Multiplies what a linear reads by a gate."""
    gate = _drawn(gm, name, fx.value(node).dtype, linear)
    product = fx.insert_call(gm, aten.mul.Tensor, (node, gate), like=linear)
    product.meta[GATE_MARK] = mark
    linear.replace_input_with(node, product)


# --- training ---------------------------------------------------------------------------------------------------------


def _sparsity(gm: GraphModule) -> nn.Module:
    """The multipliers and the target of the step."""
    device = next(gm.parameters()).device
    module = nn.Module()
    module.lambda_1 = nn.Parameter(torch.zeros((), device=device))
    module.lambda_2 = nn.Parameter(torch.zeros((), device=device))
    module.register_buffer("target", torch.zeros((), device=device))
    return module


class _Sparsify(Event):
    """Trains gates and multipliers, moves the target, chooses the masks."""

    varying = ("target",)

    def __init__(self, owner: GateStructures, gm: GraphModule, optimizer: torch.optim.Optimizer, total_steps: int):
        self.owner, self.gm, self.total_steps = owner, gm, total_steps
        names = [name for item in gating.gated(gm) for name in (item.units, item.layer) if name is not None]
        self.gates = {name: gm.get_parameter(name) for name in names}
        multipliers = [gm.get_parameter("sparsity.lambda_1"), gm.get_parameter("sparsity.lambda_2")]
        own = {id(parameter) for parameter in (*self.gates.values(), *multipliers)}
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        self.descent = torch.optim.AdamW(self.gates.values(), lr=owner.lr, weight_decay=0.0)
        self.ascent = torch.optim.AdamW(multipliers, lr=owner.reg_lr, weight_decay=0.0, maximize=True)
        self.step = 0
        self._aim()

    def _aim(self) -> None:
        """Sets the target of the next step."""
        step = self.step + 1
        target = self.signals["target"](step) if "target" in self.signals else self.owner.target
        ramp = max(1.0, self.owner.warmup * self.total_steps)
        with torch.no_grad():
            self.gm.get_buffer("sparsity.target").fill_(target * min(1.0, step / ramp))

    def before_step(self, step: int) -> None:
        self.descent.step()
        self.ascent.step()
        for optimizer in (self.descent, self.ascent):
            optimizer.zero_grad()
        with torch.no_grad():
            for gate in self.gates.values():
                gate.clamp_(gating.LOWEST, gating.HIGHEST)

    def after_step(self, step: int) -> None:
        self.step = step
        self._aim()
        if step % self.owner.every == 0 or step >= self.total_steps:
            target = float(self.gm.get_buffer("sparsity.target"))
            gating.close(self.gm, target, self.gates)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "descent": self.descent.state_dict(), "ascent": self.ascent.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.descent.load_state_dict(state["descent"])
        self.ascent.load_state_dict(state["ascent"])
        self._aim()
