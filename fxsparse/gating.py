"""Gates on the structures of a model: what they are worth in parameters, and which to close.

A gate is a number for each unit (an attention head, a channel of an MLP) or for a whole sublayer, drawn in training
from a hard concrete distribution (Louizos et al., arXiv 1712.01312) as CoFi does (arXiv 2204.00408):

    u ~ U(0, 1)    s = sigmoid((log u - log(1 - u) + a) / beta)    z = clamp(s (zeta - gamma) + gamma, 0, 1)
    P(z > 0) = sigmoid(a - beta log(-gamma / zeta))                beta = 2/3, gamma = -0.1, zeta = 1.1

In evaluation a gate is 0 or 1: its mask. Sparsity counts the parameters of the gated linears, weights and biases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxsparse.errors import RewriteError

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
META_KEY = "fxsparse_gates"
LOWEST, HIGHEST = math.log(0.01), math.log(100)
"""What `a` is kept within, as CoFi does."""


@dataclass(frozen=True)
class Gated:
    """A sublayer with gates, and the parameters its parts hold.

    Attributes:
        path: of the attention or MLP.
        units: name of the gate of its units (``...heads_gate``), None where these are not gated.
        layer: name of the gate of the sublayer, None where it is not gated.
        count: of units.
        per_unit: parameters that go with each unit (query rows and output columns, or a channel's).
        per_group: parameters that go when all units of a group are gone (keys and values of an attention).
        groups: how many consecutive groups the units form.
        rest: parameters that go with the sublayer only (the bias of its output).
    """

    path: str
    units: str | None
    layer: str | None
    count: int
    per_unit: int
    per_group: int
    groups: int
    rest: int

    @property
    def size(self) -> int:
        """Parameters of the sublayer."""
        return self.count * self.per_unit + self.groups * self.per_group + self.rest

    def remaining(self, units: Tensor, layer: Tensor) -> Tensor:
        """Parameters that stay, for keep masks or probabilities ``[count]`` and ``[]``: exact for masks, expected for
        independent probabilities."""
        some = 1 - (1 - units.view(self.groups, -1)).prod(1)  # that a group has a unit left
        any_left = 1 - (1 - units).prod()
        return layer * (units.sum() * self.per_unit + some.sum() * self.per_group + any_left * self.rest)


def gated(gm: GraphModule) -> tuple[Gated, ...]:
    """The gated sublayers of a graph module; RewriteError where there are none."""
    found: tuple[Gated, ...] = gm.meta.get(META_KEY, ())
    if not found:
        raise RewriteError("the model has no gates; the pass that adds them is gates", pass_name="gates")
    return found


def mask_name(gate: str) -> str:
    """Name of the buffer that holds a gate's mask."""
    return f"{gate}_mask"


def probability(log_alpha: Tensor) -> Tensor:
    """P(z > 0)."""
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def expected_sparsity(gm: GraphModule) -> Tensor:
    """The share of the gated sublayers' parameters that is expected to go, differentiable in the gates."""
    return sparsity_at(gm, lambda name: probability(gm.get_parameter(name)))


def mask_sparsity(gm: GraphModule) -> float:
    """The share of the gated sublayers' parameters that the masks take away."""
    return float(sparsity_at(gm, lambda name: gm.get_buffer(mask_name(name)).double()))


def sparsity_loss(gm: GraphModule) -> Tensor:
    """CoFi's Lagrangian, to be added to the loss of a training step:

        lambda_1 (s - t) + lambda_2 (s - t)^2

    with the expected sparsity s and the target t of this step, which a ``Schedule`` moves along with the multipliers.

    Raises:
        RewriteError: the model has no trainable gates.
    """
    gated(gm)
    try:
        first, second = gm.get_parameter("sparsity.lambda_1"), gm.get_parameter("sparsity.lambda_2")
    except AttributeError:
        raise RewriteError("its gates were set once by a score and are not trained", pass_name="gates") from None
    off = expected_sparsity(gm) - gm.get_buffer("sparsity.target")
    return first * off + second * off.square()


@torch.no_grad()
def close(gm: GraphModule, target: float, scores: Mapping[str, Tensor]) -> float:
    """Sets the masks: closes the gates of the lowest scores until the sparsity is ``target``, or the next above it.

    A sublayer whose units are all closed is closed; where it has no gate of its own, its last unit stays open.

    Args:
        gm: a gated graph module; its mask buffers are written in place.
        target: share of the gated sublayers' parameters to take away.
        scores: of every gate, by its name, on one scale; ties close in order.

    Returns:
        the sparsity reached.
    """
    sublayers = gated(gm)
    owners: list[tuple[Gated, str, int]] = []
    values: list[Tensor] = []
    for item in sublayers:
        for name in (item.units, item.layer):
            if name is not None:
                values.append(scores[name].detach().double().cpu().flatten())
                owners += [(item, name, position) for position in range(len(values[-1]))]
    masks: dict[str, Tensor] = {}
    for item in sublayers:
        for name, count in ((item.units, item.count), (item.layer, 1)):
            if name is not None:
                masks[name] = torch.ones(count, dtype=torch.double)
    wanted = target * _total(gm)
    gone, left = 0.0, {item.path: float(item.size) for item in sublayers}
    for at in torch.cat(values).argsort(stable=True).tolist():
        if gone >= wanted - 1e-6:
            break
        item, name, position = owners[at]
        if name == item.units and int(masks[name].sum()) == 1 and masks[name][position]:
            if item.layer is None:
                continue
            masks[item.layer][0] = 0
        masks[name][position] = 0
        units = masks[item.units] if item.units is not None else torch.ones(item.count, dtype=torch.double)
        layer = masks[item.layer][0] if item.layer is not None else torch.ones((), dtype=torch.double)
        now = float(item.remaining(units, layer))
        gone, left[item.path] = gone + left[item.path] - now, now
    for name, mask in masks.items():
        buffer = gm.get_buffer(mask_name(name))
        buffer.copy_(mask.to(buffer))
    return mask_sparsity(gm)


def sparsity_at(gm: GraphModule, keep: Callable[[str], Tensor]) -> Tensor:
    """The sparsity where every gate, by its name, is kept as said: 0 and 1, or probabilities."""
    total: list[Tensor] = []
    for item in gated(gm):
        one = keep(item.units or item.layer or "").new_ones(())
        units = keep(item.units) if item.units is not None else one.expand(item.count)
        layer = keep(item.layer).squeeze(0) if item.layer is not None else one
        total.append(item.remaining(units, layer))
    return 1 - torch.stack(total).sum() / _total(gm)


def _total(gm: GraphModule) -> int:
    return sum(item.size for item in gated(gm))
