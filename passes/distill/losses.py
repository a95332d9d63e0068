"""The losses of distillation, and the layers they compare.

    loss = a task + b T^2 KL(softmax(teacher / T) || softmax(student / T)) + c sum over pairs (s, t) of MSE(P h_s, h_t)

CoFi (arXiv 2204.00408) pairs dynamically: from the last teacher layer down, each takes the student layer with the
least MSE among those that exist and lie below the one taken before. If there is none, it takes that one again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxsparse.errors import RewriteError


@dataclass(frozen=True)
class Losses:
    """The weights of the losses, and how layers are paired.

    Attributes:
        task, logits, hidden: weights of the model's own loss, the KL divergence and the summed MSE.
        temperature: T.
        dynamic: pair layers by CoFi's matching; else student layer i and the i-th of the teacher's states go together.
    """

    task: float
    logits: float
    hidden: float
    temperature: float
    dynamic: bool


class Held:
    """Keeps a module out of the state of its holder; copies of the holder share the module."""

    def __init__(self, module: nn.Module | None):
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> Held:
        return self


class Distillation(nn.Module):
    """The loss of a student; in evaluation mode it is the task's alone, and the teacher does not run.

    The teacher runs in evaluation mode and without gradients. It is in no ``state_dict`` and no ``parameters()``, and
    follows the student to another device or dtype.

    Args:
        losses: their weights.
        teacher: called with its input tensors, returns ``(logits, hidden states of stack 0, ...)``; None for a
            checkpoint that is not restored for training.
        projections: for every stack one for all student layers, or one each, or none.
    """

    def __init__(self, losses: Losses, teacher: nn.Module | None, projections: Sequence[Sequence[nn.Linear]]):
        super().__init__()
        self.losses, self.held = losses, Held(teacher)
        self.projections = nn.ModuleList(nn.ModuleList(linears) for linears in projections)

    def _apply(self, fn: Any, recurse: bool = True) -> Distillation:
        if self.held.module is not None:
            self.held.module._apply(fn)
        return super()._apply(fn, recurse)

    def forward(
        self,
        loss: Tensor,
        logits: Tensor | None,
        stacks: Sequence[Sequence[Tensor]],
        gates: Sequence[Sequence[Sequence[Sequence[Tensor]]]],
        inputs: Sequence[Tensor],
    ) -> Tensor:
        """The loss to train on.

        Args:
            loss: of the task, a scalar.
            logits: ``[..., classes]``.
            stacks: for every stack the stream out of every block, ``[..., dim]``.
            gates: for every stack and block the gates, as `layers_exist` takes them.
            inputs: the input tensors of the teacher.
        """
        if not self.training:
            return loss
        if self.held.module is None:
            raise RewriteError("the teacher is not part of a checkpoint; give it back with attach_teacher(gm, teacher)")
        with torch.no_grad():
            expected, *states = self.held.module(*inputs)
        total = self.losses.task * loss
        if logits is not None:
            total = total + self.losses.logits * divergence(logits, expected, self.losses.temperature)
        for streams, closing, wanted, projections in zip(stacks, gates, states, self.projections, strict=True):
            exists = layers_exist(closing, wanted[0].device) if any(closing) else None
            total = total + self.losses.hidden * self._hidden(streams, wanted, [*projections.children()], exists)
        return total

    def _hidden(
        self, streams: Sequence[Tensor], wanted: Sequence[Tensor], projections: list[Any], exists: Tensor | None
    ) -> Tensor:
        states = list(streams)
        if projections:
            each = projections if len(projections) == len(states) else projections * len(states)
            states = [project(state) for project, state in zip(each, states, strict=True)]
        return layer_loss(states, wanted, exists) if self.losses.dynamic else paired_loss(states, wanted, exists)


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of logits ``[..., classes]``, averaged over all rows (examples, or tokens)."""
    mine = F.log_softmax(student.flatten(0, -2).float() / temperature, -1)
    theirs = F.log_softmax(teacher.flatten(0, -2).float() / temperature, -1)
    return F.kl_div(mine, theirs, reduction="batchmean", log_target=True) * temperature**2


def layers_exist(gates: Sequence[Sequence[Sequence[Tensor]]], device: torch.device) -> Tensor:
    """Which layers do anything, bool ``[layers]``: one exists while any of its sublayers is open.

    Args:
        gates: for every layer, for each of its sublayers, the gates it must pass; a sublayer is open while each of them
            has a value that is not 0. A layer of which not every sublayer is gated has no entries: it exists.
        device: of the result.
    """

    def is_open(sublayer: Sequence[Tensor]) -> Tensor:
        return torch.stack([(gate != 0).any() for gate in sublayer]).all()

    with torch.no_grad():
        always = torch.ones((), dtype=torch.bool, device=device)
        return torch.stack([torch.stack([is_open(s) for s in layer]).any() if layer else always for layer in gates])


def paired_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], exists: Tensor | None = None) -> Tensor:
    """Summed MSE of hidden states that go together; a layer that does not exist counts nothing."""
    errors = torch.stack([F.mse_loss(mine, theirs) for mine, theirs in zip(student, teacher, strict=True)])
    return (errors if exists is None else errors * exists).sum()


def layer_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], exists: Tensor | None = None) -> Tensor:
    """Summed MSE of each teacher state and the student state that `match_layers` gives it; 0 where none exists."""
    with torch.no_grad():
        errors = torch.stack([torch.stack([F.mse_loss(mine, theirs) for mine in student]) for theirs in teacher])
        if exists is None:
            exists = torch.ones(len(student), dtype=torch.bool, device=errors.device)
        chosen = match_layers(errors, exists)
    states = torch.stack(list(student)).index_select(0, chosen)
    # A mean over one teacher state, so the mean over all of them times their number.
    return F.mse_loss(states, torch.stack(list(teacher))) * len(teacher) * exists.any()


def match_layers(errors: Tensor, exists: Tensor) -> Tensor:
    """The student layer for each teacher layer, from the last teacher layer down.

    Args:
        errors: MSE of teacher layer t and student layer s, ``[teacher layers, student layers]``.
        exists: bool ``[student layers]``.

    Returns:
        int64 ``[teacher layers]``, always within range; existing layers if there is one, below each other as long as
        there are enough.
    """
    layers = errors.shape[1]
    place = torch.arange(layers, device=errors.device)
    above = torch.full((), layers, device=errors.device)
    chosen = []
    for row in reversed(errors.unbind()):
        allowed = exists & (place < above)
        nearest = row.masked_fill(~allowed, torch.inf).argmin()
        above = torch.where(allowed.any(), nearest, above)
        chosen.append(above.clamp(max=layers - 1))
    return torch.stack(chosen[::-1])
