"""Which units take part in a training step, and what becomes of the others (SAT, arXiv 2406.01392).

What the method leaves open is chosen here: importance is a moving mean of the magnitude of what the output linear
reads, weighed by the norms of the columns that read it where asked. A unit that did not take part keeps its mean, and
one that never did comes first, so every unit has been seen after a few steps.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.errors import RewriteError
from fxsparse.graph.sharded import local_index, whole
from fxsparse.passes.neurons.gather_units import Part, Site

Score = Literal["magnitude", "weighted", "uniform"]
Choice = Literal["sampled", "top"]


def kept_units(units: int, omission: float, multiple: int) -> int:
    """How many of ``units`` take part: the nearest multiple of ``multiple`` to ``(1 - omission) units``, never 0."""
    if omission == 0:
        return units
    return min(units, max(1, round((1 - omission) * units / multiple)) * multiple)


def omission_at(step: int, omission: float, total_steps: int, rungs: int, rung_steps: int) -> float:
    """The omission rate of optimizer step ``step``, from 1: constant, then ``rungs`` equal steps down to 0 (LORS)."""
    done = step - 1 - (total_steps - rungs * rung_steps)
    if not rungs or done < 0:
        return omission
    return omission * (1 - min(rungs, done // rung_steps + 1) / rungs)


def choose(scores: Tensor, kept: int, choice: str, seed: int, step: int, key: str, block: int = 1) -> Tensor:
    """The units that take part, int64 ``[kept]``, ascending.

    Args:
        scores: ``[units]``, at least 0; NaN where a unit was never seen.
        kept: how many.
        choice: ``top`` takes the largest, ``sampled`` draws without replacement in proportion to the scores (by the
            largest of log score + Gumbel noise).
        seed, step, key: what the draw depends on, the same on every rank.
        block: units that are chosen together, by their mean score; units and ``kept`` are multiples of it.
    """
    if block > 1:
        blocks = choose(scores.view(-1, block).mean(1), kept // block, choice, seed, step, key)
        return (blocks[:, None] * block + torch.arange(block, device=blocks.device)).flatten()
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {step} {key}".encode()))
    drawn = torch.rand(len(scores), generator=generator, dtype=torch.float64).to(scores.device)
    ranked = scores.double()
    if choice == "sampled":
        floor = ranked.nan_to_num(0).amax().clamp_min(1e-30) * 1e-6  # silent units have a chance as well
        ranked = ranked.maximum(floor).log() - (-drawn.clamp_min(1e-300).log()).log()
    unseen = scores.isnan()
    order = torch.where(unseen, drawn, ranked).argsort(descending=True, stable=True)
    order = order[(~unseen[order]).to(torch.int8).argsort(stable=True)]  # the unseen first, at random
    return order[:kept].sort().values


def scores_of(gm: GraphModule, site: Site, mean: Tensor, score: str) -> Tensor:
    """Importance ``[units]`` from the moving mean magnitude of every column ``[columns]``; NaN where unknown."""
    if score == "uniform":
        return torch.ones(site.units, device=mean.device)
    if score == "weighted":
        weight = whole(fx.attribute(gm, site.output.name).detach())
        mean = mean * torch.linalg.vector_norm(weight.float(), dim=1 - site.output.dim)
    return mean[site.output.index.to(mean.device)].mean(1)


# --- what an optimizer would do to units that do not take part --------------------------------------------------------

_NOT_ELEMENTWISE = {
    "Adafactor": "its second moments are shared by whole rows and columns",
    "LBFGS": "its directions mix all elements",
    "Muon": "it orthogonalises whole matrices",
    "SparseAdam": "it takes sparse gradients only",
}


def check_optimizer(optimizer: torch.optim.Optimizer, pass_name: str) -> None:
    """RewriteError where an optimizer cannot leave single rows and columns as they are."""
    for kind in type(optimizer).__mro__:
        if kind.__name__ in _NOT_ELEMENTWISE:
            raise RewriteError(
                f"{type(optimizer).__name__} cannot leave the state of omitted neurons untouched, because "
                f"{_NOT_ELEMENTWISE[kind.__name__]}; use an elementwise optimizer, such as AdamW or SGD",
                pass_name=pass_name,
            )


class Held:
    """Parts of parameters and of their optimizer state, to put back after a step.

    A zero gradient is not enough: momentum and weight decay move what has none. Step counters belong to whole
    parameters and go on.

    Args:
        gm: the graph module.
        optimizer: the one that is about to step.
        parts: of every weight, and the units that do not take part.
        pass_name: for messages.
    """

    def __init__(
        self,
        gm: GraphModule,
        optimizer: torch.optim.Optimizer,
        parts: Iterable[tuple[Part, Tensor]],
        pass_name: str,
    ):
        self.optimizer, self.pass_name = optimizer, pass_name
        self.saved: list[tuple[str, Tensor, int, Tensor, dict[str | None, Tensor]]] = []
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, dim, index in _places(parts):
            parameter = fx.attribute(gm, name)
            if id(parameter) not in held or parameter.grad is None:
                continue
            tensors: dict[str | None, Tensor] = {None: parameter}
            tensors.update(self._state(name, parameter))
            copies = {}
            with torch.no_grad():
                for key, tensor in tensors.items():
                    part, here = local_index(tensor, dim, index)
                    copies[key] = part.index_select(dim, here)
            self.saved.append((name, parameter, dim, index, copies))

    @torch.no_grad()
    def restore(self) -> None:
        """Puts everything back; state that the step created is zero there, as its optimizer had started it."""
        for name, parameter, dim, index, copies in self.saved:
            part, here = local_index(parameter.detach(), dim, index)
            part.index_copy_(dim, here, copies[None])
            for key, tensor in self._state(name, parameter):
                part, here = local_index(tensor, dim, index)
                if key in copies:
                    part.index_copy_(dim, here, copies[key])
                elif not isinstance(self.optimizer, torch.optim.Rprop):  # its step sizes do not start at zero
                    part.index_fill_(dim, here, 0)

    def _state(self, name: str, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
        for key, tensor in self.optimizer.state.get(parameter, {}).items():
            if not isinstance(tensor, Tensor) or (tensor.numel() <= 1 and parameter.numel() > 1):
                continue
            if tensor.shape != parameter.shape:
                raise RewriteError(
                    f"the state {key!r} of {type(self.optimizer).__name__} is {list(tensor.shape)}, not "
                    f"{list(parameter.shape)} as the parameter, so that of omitted neurons cannot be told apart; use "
                    "an optimizer that works element by element, such as AdamW or SGD",
                    pass_name=self.pass_name,
                    site=name,
                )
            yield key, tensor


def _places(parts: Iterable[tuple[Part, Tensor]]) -> Iterator[tuple[str, int, Tensor]]:
    for part, units in parts:
        index = part.index.to(units.device)[units].flatten()
        yield part.name, part.dim, index
        if part.bias is not None:
            yield part.bias, 0, index
