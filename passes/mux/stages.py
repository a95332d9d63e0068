"""The training stages of a multiplexed model, as a schedule drives them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxsparse.passes.event import Event


class Stages(Event):
    """Sets the weights of the two losses, and the step that draws the members to retrieve."""

    def __init__(self, stages: tuple[tuple[float, float, float], ...], multiplexer: nn.Module, total_steps: int):
        self.stages, self.multiplexer, self.total_steps = stages, multiplexer, total_steps
        self._prepare(1)

    def _prepare(self, step: int) -> None:
        self.next = step
        _, *weights = next((s for s in self.stages if step <= s[0] * self.total_steps), self.stages[-1])
        with torch.no_grad():
            self.multiplexer.get_buffer("step").fill_(step)
            self.multiplexer.get_buffer("loss_weights").copy_(torch.tensor(weights))

    def after_step(self, step: int) -> None:
        self._prepare(step + 1)

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._prepare(state["next"])
