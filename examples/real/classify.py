"""Fine-tuning of a classifier with early stopping: one loop for plain modules and for rewritten graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fxsparse

from .reviews import Task, accuracy


@dataclass
class Trained:
    """What a fine-tuning gave.

    Attributes:
        dev: accuracy on the development texts after every epoch.
        best: the epoch, from 0, whose weights the model has now.
        flops: of all steps and choices, counted on the operators that ran, forward and backward.
        choices: FLOPs of the choices alone.
        values: of the schedule after every epoch.
    """

    dev: list[float] = field(default_factory=list)
    best: int = -1
    flops: int = 0
    choices: int = 0
    values: list[dict[str, float]] = field(default_factory=list)


def counted(call: Callable[[], object]) -> int:
    """FLOPs of the matrix products that a call runs, backward included, by torch's own counter."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def rate(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the steps, then linear decay."""
    warmup = max(1, steps // 10)
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def fit(
    model: nn.Module,
    task: Task,
    *,
    epochs: float,
    lr: float,
    seed: int,
    batch: int = 32,
    schedule: Callable[[torch.optim.Optimizer, int], fxsparse.Schedule] | None = None,
    before_step: Callable[[int], None] = lambda step: None,
    extra_loss: Callable[[], Any] = lambda: 0,
    stop_early: bool = True,
    members: int = 1,
) -> Trained:
    """Trains a classifier and leaves it with the weights of its best epoch.

    Args:
        model: called with ``input_ids``, ``attention_mask`` and ``labels``.
        task: its texts.
        epochs: passes over the training texts; the last one may be a part.
        lr: peak learning rate of AdamW.
        seed: of the order of the texts and of dropout.
        batch: texts in a step, for each member.
        schedule: makes the schedule of a rewritten graph from the optimizer and the number of steps.
        before_step: told the number of every step, from 0.
        extra_loss: added to the loss.
        stop_early: whether to go back to the best epoch by the development texts, or to keep the last.
        members: texts that share a pass; steps have so many times more of them.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    per_epoch = max(1, len(task.train) // (batch * members))
    steps = max(1, round(epochs * per_epoch))
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    events = schedule(optimizer, steps) if schedule else None
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    result, best = Trained(), None
    trained, step_flops = None, 0
    model.train()
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(task.train), generator=draw)
        at = step % per_epoch * batch * members
        rows = task.train.rows(order[at : at + batch * members])
        before_step(step)
        if events is not None:
            chosen = counted(lambda rows=rows: events.observe(rows))  # type: ignore[misc]
            result.choices += chosen
            result.flops += chosen

        def forward_backward(rows: dict[str, torch.Tensor] = rows) -> None:
            (model(**rows).loss + extra_loss()).backward()

        now = [parameter.requires_grad for parameter in model.parameters()]
        if now != trained:
            trained, step_flops = now, counted(forward_backward)
        else:
            forward_backward()
        result.flops += step_flops
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if events is not None:
            events.step()
        decay.step()
        if (step + 1) % per_epoch == 0 or step + 1 == steps:
            result.dev.append(accuracy(model, task.dev))
            result.values.append(dict(events.values()) if events is not None else {})
            if stop_early and result.dev[-1] == max(result.dev):
                best, result.best = copy.deepcopy(model.state_dict()), len(result.dev) - 1
    if best is not None:
        model.load_state_dict(best)
    if events is not None:
        events.remove()
    return result
