"""What of a model's linears goes with each unit: a head, a channel, a hidden dimension; and what the units weigh."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.analysis.expert_channels import ExpertMLP
from fxsparse.analysis.experts import Mixture
from fxsparse.analysis.residual_streams import Stream
from fxsparse.analysis.structures import MLP, Attention
from fxsparse.graph import Linear


@dataclass(frozen=True)
class Part:
    """The rows or columns of a linear's weight that units own.

    Attributes:
        linear: whose weight.
        axis: 0 for rows, 1 for columns, of the weight as ``[out, in]``.
        index: int64 ``[units, rows or columns of each]``.
    """

    linear: Linear
    axis: int
    index: Tensor

    def sums(self, weight: Tensor) -> Tensor:
        """The sums ``[units]`` over what each unit owns of a tensor of the parameter's shape."""
        axis = 1 - self.axis if self.linear.transposed else self.axis
        return weight.sum(1 - axis)[self.index.to(weight.device)].sum(1)

    @property
    def numel(self) -> int:
        """Elements that each unit owns."""
        return self.index.shape[1] * (self.linear.in_features if self.axis == 0 else self.linear.out_features)


def parts_of(site: Attention | MLP | Stream, gm: GraphModule) -> list[Part]:
    """The parts of the heads, channels or hidden dimensions of a site. Keys and values that heads share are no head's
    own."""
    if isinstance(site, Stream):
        parts: dict[tuple[str, int], Part] = {}
        for linear in fx.linears(gm):
            for axis, is_part in enumerate((site.writes(linear), site.reads(linear))):
                if is_part:
                    size = linear.in_features if axis == 1 else linear.out_features
                    index = torch.arange(size).view(-1, site.size).t()
                    parts.setdefault((linear.name, axis), Part(linear, axis, index))
        return list(parts.values())
    rows = [Part(rows.linear, 0, rows.index) for rows in site.projections if len(rows.index) == len(site.output.index)]
    return [*rows, Part(site.output.linear, 1, site.output.index)]


def magnitudes(gm: GraphModule, site: Attention | MLP | Stream | Mixture | ExpertMLP) -> Tensor:
    """The root mean square of each unit's weights, relative to the mean of its site; float64 ``[units]``. The weights
    of an expert are its matrices, without its row of the router."""
    if isinstance(site, Mixture):
        weights = [gm.get_parameter(str(product.weight.target)).detach().double() for product in site.products]
        squares = torch.stack([weight.square().flatten(1).sum(1).cpu() for weight in weights]).sum(0)
        return _relative((squares / sum(weight[0].numel() for weight in weights)).sqrt())
    if isinstance(site, ExpertMLP):
        return _of_channels(gm, site)
    parts = parts_of(site, gm)
    totals = [part.sums(gm.get_parameter(part.linear.name).detach().double().square()).cpu() for part in parts]
    return _relative((torch.stack(totals).sum(0) / sum(part.numel for part in parts)).sqrt())


def _of_channels(gm: GraphModule, site: ExpertMLP) -> Tensor:
    """The same of the channels of experts, over all of them."""

    def squares(read: Node, dim: int) -> Tensor:
        return gm.get_parameter(str(read.target)).detach().double().square().movedim(dim, 0).flatten(1).sum(1).cpu()

    total = squares(site.output.weight, site.columns)
    for read, dim, index in site.projections:
        total = total + squares(read, dim)[index].sum(1)
    return _relative((total / site.per_channel).sqrt())


def activations(gm: GraphModule, site: Attention | MLP | Stream, norms: Mapping[str, Tensor]) -> Tensor:
    """The root mean square of each unit's activations where linears read them, relative to the mean of its site.

    Args:
        norms: by weight name, what `fxsparse.analysis.activation_norms.activation_norms` measures.

    Returns:
        float64 ``[units]``.
    """
    squares = [
        norms[part.linear.name].double().cpu().square()[part.index].sum(1)
        for part in parts_of(site, gm)
        if part.axis == 1
    ]
    return _relative(torch.stack([square / square.mean().clamp_min(1e-30) for square in squares]).mean(0).sqrt())


def readers(gm: GraphModule, sites: Iterable[Attention | MLP | Stream]) -> list[Linear]:
    """The linears that read units of any of some sites."""
    found = {part.linear.node: part.linear for site in sites for part in parts_of(site, gm) if part.axis == 1}
    return list(found.values())


def _relative(scores: Tensor) -> Tensor:
    return scores / scores.mean().clamp_min(1e-30)
