"""Gates on the structures of a model: what they are worth in parameters, and which to close.

A gate is a number for each unit (an attention head, a channel of an MLP, a hidden dimension) or for a whole sublayer,
drawn in training from a hard concrete distribution (Louizos et al., arXiv 1712.01312) as CoFi does (arXiv 2204.00408):

    u ~ U(0, 1)    s = sigmoid((log u - log(1 - u) + a) / beta)    z = clamp(s (zeta - gamma) + gamma, 0, 1)
    P(z > 0) = sigmoid(a - beta log(-gamma / zeta))                beta = 2/3, gamma = -0.1, zeta = 1.1

In evaluation a gate is 0 or 1: its mask. Sparsity counts the parameters of the gated linears, weights and biases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.errors import RewriteError
from fxsparse.graph import live
from fxsparse.graph.sharded import whole

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
LOWEST, HIGHEST = math.log(0.01), math.log(100)
"""What `a` is kept within, as CoFi does."""
EXPERT, EXPERT_CHANNEL = "expert", "channel of experts"
"""What rows of weights make of a unit that is an expert, or a channel of all experts."""
MULTIPLIERS = ("sparsity.lambda_1", "sparsity.lambda_2")


_Number = TypeVar("_Number", float, Tensor)


@dataclass(frozen=True)
class Count:
    """Parameters, those that go along with hidden dimensions apart.

    Attributes:
        fixed: whatever the width of the stream.
        wide: at the full width; a share of the hidden dimensions leaves that share of them.
    """

    fixed: int = 0
    wide: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.fixed + other.fixed, self.wide + other.wide)

    def at(self, share: _Number) -> _Number:
        return self.fixed + self.wide * share


@dataclass(frozen=True)
class Gated(live.Live):
    """A sublayer with gates, and the parameters its parts hold.

    Attributes:
        path: of the attention or MLP.
        units: name of the gate of its units (``...heads_gate``), None where these are not gated.
        layer: name of the gate of the sublayer, None where it is not gated.
        hidden: name of the gate of the hidden dimensions it reads and writes, None where these are not gated.
        count: of units.
        per_unit: parameters that go with each unit (query rows and output columns, or a channel's).
        per_group: parameters that go when all units of a group are gone (keys and values of an attention).
        groups: how many consecutive groups the units form.
        rest: parameters that go with the sublayer only (the bias of its output).
        output: name of the weight that reads the units.
        projections: rows of the weights that make its units; it ends with any of its weights.
        columns: int64 ``[units, columns of each]``, of that weight as ``[out, in]``.
        least: how many units stay open at least: as many experts as a router chooses.
    """

    path: str
    units: str | None
    layer: str | None
    hidden: str | None
    count: int
    per_unit: Count
    per_group: Count
    groups: int
    rest: Count
    output: str
    projections: tuple[live.Rows, ...] = field(compare=False)
    columns: Tensor = field(compare=False)
    least: int = 1

    def moved(self, old: str, new: str, rows: int) -> Gated:
        projections = tuple(part.moved(old, new, rows) for part in self.projections)
        return replace(self, projections=projections, output=new if self.output == old else self.output)

    def without(self, gone: Callable[[str], bool]) -> Gated | None:
        return None if any(map(gone, self.weights)) else self

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the parameters that hold its weights."""
        return tuple(dict.fromkeys((*(part.name for part in self.projections), self.output)))

    @property
    def is_attention(self) -> bool:
        return any(part.kind == "query" for part in self.projections)

    @property
    def is_experts(self) -> bool:
        return any(part.kind == EXPERT for part in self.projections)

    @property
    def is_in_experts(self) -> bool:
        """Whether its units are channels of experts."""
        return any(part.kind == EXPERT_CHANNEL for part in self.projections)

    @property
    def size(self) -> int:
        """Parameters of the sublayer."""
        return int(self.remaining(float(self.count), float(self.groups), 1.0, 1.0, 1.0))

    @property
    def gates(self) -> tuple[str, ...]:
        """The names of its own gates."""
        return tuple(name for name in (self.units, self.layer) if name is not None)

    def remaining(self, units: _Number, groups: _Number, any_left: _Number, layer: _Number, share: _Number) -> _Number:
        """Parameters that stay of so many units and groups, where ``share`` of the hidden dimensions is left."""
        left = units * self.per_unit.at(share) + groups * self.per_group.at(share) + any_left * self.rest.at(share)
        return layer * left

    def expected(self, units: Tensor, layer: Tensor, share: Tensor) -> Tensor:
        """Parameters that stay, for keep masks or probabilities ``[count]``, ``[]`` and ``[]``: exact for masks,
        expected for independent probabilities."""
        some = 1 - (1 - units.view(self.groups, -1)).prod(1)  # that a group has a unit left
        return self.remaining(units.sum(), some.sum(), 1 - (1 - units).prod(), layer, share)


def gated(gm: GraphModule) -> tuple[Gated, ...]:
    """The gated sublayers of a graph module; RewriteError where there are none."""
    items = live.sites(gm, Gated)
    if not items:
        raise RewriteError("the model has no gates; the pass that adds them is gates", pass_name="gates")
    return items


def gate_names(gm: GraphModule) -> tuple[str, ...]:
    """The names of all gates, each once: of units and sublayers, then of hidden dimensions."""
    items = gated(gm)
    own = [name for item in items for name in item.gates]
    return tuple(dict.fromkeys([*own, *(item.hidden for item in items if item.hidden is not None)]))


def mask_name(gate: str) -> str:
    """Name of the buffer that holds a gate's mask."""
    return f"{gate}_mask"


def probability(log_alpha: Tensor) -> Tensor:
    """P(z > 0)."""
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def draw(log_alpha: Tensor) -> Tensor:
    """z, with u drawn anew."""
    u = torch.rand_like(log_alpha).clamp(1e-6, 1 - 1e-6)
    s = torch.sigmoid((u.log() - torch.log1p(-u) + log_alpha) / BETA)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def expected_sparsity(gm: GraphModule) -> Tensor:
    """The share of the gated sublayers' parameters that is expected to go, differentiable in the gates."""
    return sparsity_at(gm, lambda name: probability(whole(gm.get_parameter(name))))


def mask_sparsity(gm: GraphModule) -> float:
    """The share of the gated sublayers' parameters that the masks take away."""
    return float(sparsity_at(gm, lambda name: gm.get_buffer(mask_name(name)).double()))


def most(gm: GraphModule) -> float:
    """The share of the gated sublayers' parameters that can go where experts stay for their routers to choose among."""
    least = {item.units: item.least for item in gated(gm) if item.is_experts}
    counts = {name: len(gm.get_buffer(mask_name(name))) for name in gate_names(gm)}
    kept = {name: (torch.arange(count) < least.get(name, 0)).double() for name, count in counts.items()}
    return float(sparsity_at(gm, kept.__getitem__))


def sparsity_loss(gm: nn.Module) -> Tensor:
    """CoFi's Lagrangian, to be added to the loss of a training step:

        lambda_1 (s - t) + lambda_2 (s - t)^2

    with the expected sparsity s and the target t of this step, which a ``Schedule`` moves along with the multipliers.

    Raises:
        RewriteError: the model has no trainable gates.
    """
    gm = fx.graph_module_of(gm, "fxsparse.sparsity_loss")
    gated(gm)
    try:
        first, second = (whole(gm.get_parameter(name)).squeeze() for name in MULTIPLIERS)
    except AttributeError:
        raise RewriteError("its gates were set once by a score and are not trained", pass_name="gates") from None
    off = expected_sparsity(gm) - gm.get_buffer("sparsity.target")
    return first * off + second * off.square()


def keep_sparsity(gm: GraphModule, gates: Sequence[Tensor]) -> None:
    """Takes out of the gradients of all gates, in place, what would change the expected sparsity.

    What is left is ``g - (g c / c c) c`` with the sparsity's own gradient c, so that a gate opens where it gives more
    for its parameters than others do.
    """
    with torch.enable_grad():
        own = torch.autograd.grad(expected_sparsity(gm), gates)
    both = [(gate.grad, each) for gate, each in zip(gates, own, strict=True) if gate.grad is not None]
    if both:
        along = sum(whole((grad * each).sum()) for grad, each in both)
        square = sum(whole(each.square().sum()) for _, each in both)
        for grad, each in both:
            grad.sub_(each * (along / square))


@torch.no_grad()
def shift(gm: GraphModule, gates: Sequence[Tensor], target: float) -> None:
    """Lowers or raises all gates alike, within their limits, until the expected sparsity is ``target`` within 0.0001,
    or as near as the limits let it come."""
    start = [gate.clone() for gate in gates]
    low, high = LOWEST - HIGHEST, HIGHEST - LOWEST
    for _ in range(20):
        by = (low + high) / 2
        for gate, value in zip(gates, start, strict=True):
            gate.copy_((value - by).clamp(LOWEST, HIGHEST))
        off = float(expected_sparsity(gm)) - target
        if abs(off) < 1e-4:
            break
        low, high = (by, high) if off < 0 else (low, by)


@torch.no_grad()
def close(gm: GraphModule, target: float, scores: Mapping[str, Tensor]) -> float:
    """Sets the masks: closes the gates of the lowest scores until the sparsity is ``target``, or the next above it.

    A gate that would lead more than 1 % above the target stays open while others can do; where none can, the one that
    leads the least above it closes. A sublayer whose units
    are all closed is closed; where it has no gate of its own, its last unit stays open, as the last hidden dimension
    does.

    Args:
        gm: a gated graph module; its mask buffers are written in place.
        target: share of the gated sublayers' parameters to take away.
        scores: of every gate, by its name, on one scale; ties close in order.

    Returns:
        the sparsity reached.
    """
    ledger = _Ledger(gm)
    wanted = target * ledger.total
    owners = [(name, position) for name, mask in ledger.masks.items() for position in range(len(mask))]
    values = torch.cat([scores[name].detach().double().cpu().flatten() for name in ledger.masks])
    too_large: list[tuple[str, int]] = []
    for at in values.argsort(stable=True).tolist():
        if ledger.gone >= wanted - 1e-6:
            break
        closed = ledger.close(*owners[at])
        if ledger.gone > wanted + 0.01 * ledger.total:
            ledger.reopen(closed)
            too_large.append(owners[at])
    while too_large and ledger.gone < wanted - 1e-6:
        reached = [ledger.gone_with(*gate) for gate in too_large]
        enough = [gone for gone in reached if gone >= wanted - 1e-6]
        # The smallest step above; where no single gate gets there, the one of the lowest score.
        ledger.close(*too_large.pop(reached.index(min(enough)) if enough else 0))
    for name, mask in ledger.masks.items():
        buffer = gm.get_buffer(mask_name(name))
        buffer.copy_(torch.tensor(mask))
    return mask_sparsity(gm)


class _Ledger:
    """What is left while gates close one after the other."""

    def __init__(self, gm: GraphModule):
        self.items = gated(gm)
        names = gate_names(gm)
        self.masks = {name: [True] * len(gm.get_buffer(mask_name(name))) for name in names}
        self.open = {name: len(mask) for name, mask in self.masks.items()}
        self.of_gate: dict[str, list[Gated]] = {name: [] for name in names}
        for item in self.items:
            for name in (*item.gates, item.hidden):
                if name is not None:
                    self.of_gate[name].append(item)
        self.least = {item.units: item.least for item in self.items if item.units is not None}
        self.left_of = {id(item): float(item.size) for item in self.items}  # an attention and an MLP may share a module
        self.left = self.total = sum(self.left_of.values())

    @property
    def gone(self) -> float:
        """Parameters that closed gates take away."""
        return self.total - self.left

    def close(self, name: str, position: int) -> list[tuple[str, int]]:
        """Closes a gate, unless it is the last that must stay open, and with the last of its units a sublayer.

        Returns:
            what it closed.
        """
        if not self.masks[name][position]:
            return []
        closing = [(name, position)]
        if self.open[name] == self.least.get(name, 1) and all(name != item.layer for item in self.of_gate[name]):
            layer = next((item.layer for item in self.of_gate[name] if item.units == name), None)
            if layer is None:
                return []
            if self.masks[layer][0]:
                closing.append((layer, 0))
        self._set(closing, False)
        return closing

    def gone_with(self, name: str, position: int) -> float:
        """Parameters that would be gone if a gate were closed as well."""
        closed = self.close(name, position)
        gone = self.gone
        self.reopen(closed)
        return gone

    def reopen(self, closed: list[tuple[str, int]]) -> None:
        """Takes a closing back."""
        self._set(closed, True)

    def _set(self, gates: list[tuple[str, int]], is_open: bool) -> None:
        for name, position in gates:
            self.masks[name][position] = is_open
            self.open[name] += 1 if is_open else -1
        for item in {id(item): item for name, _ in gates for item in self.of_gate[name]}.values():
            now = self._remaining(item)
            self.left += now - self.left_of[id(item)]
            self.left_of[id(item)] = now

    def _remaining(self, item: Gated) -> float:
        units, groups = float(item.count), float(item.groups)
        if item.units is not None:
            mask, each = self.masks[item.units], item.count // item.groups
            units = float(self.open[item.units])
            groups = units if each == 1 else float(sum(any(mask[at : at + each]) for at in range(0, item.count, each)))
        layer = 1.0 if item.layer is None else float(self.open[item.layer])
        share = 1.0 if item.hidden is None else self.open[item.hidden] / len(self.masks[item.hidden])
        return item.remaining(units, groups, float(units > 0), layer, share)


def sparsity_at(gm: GraphModule, keep: Callable[[str], Tensor]) -> Tensor:
    """The sparsity where every gate, by its name, is kept as said: 0 and 1, or probabilities."""
    kept = {name: keep(name) for name in gate_names(gm)}
    one = next(iter(kept.values())).new_ones(())
    total: list[Tensor] = []
    for item in gated(gm):
        units = kept[item.units] if item.units is not None else one.expand(item.count)
        layer = kept[item.layer].squeeze(0) if item.layer is not None else one
        share = kept[item.hidden].mean() if item.hidden is not None else one
        total.append(item.expected(units, layer, share))
    return 1 - torch.stack(total).sum() / sum(item.size for item in gated(gm))
