"""What changes while a rewritten model trains, in one object with one call a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import GraphModule

from fxsparse.errors import CheckpointError, OptionError
from fxsparse.graph.record import record_of
from fxsparse.passes.base import parse_passes
from fxsparse.passes.event import Event


class Schedule:
    """Drives whatever the passes of a rewritten graph left to do during training.

    Build it after the optimizer and call :meth:`step` after every optimizer step::

        optimizer = torch.optim.AdamW(gm.parameters(), lr=1e-3)
        schedule = fxsparse.Schedule(gm, optimizer, total_steps=10_000)
        ...
        optimizer.step()
        schedule.step()

    Changes of buffers are in place; where the graph itself changes (low-rank branches start), it is recompiled and a
    running ``torch.compile`` notices. Under gradient accumulation, step once per optimizer step.

    Args:
        gm: a rewritten graph module.
        optimizer: the optimizer that trains it.
        total_steps: optimizer steps of the whole training.
        signals: options that vary, as functions of the optimizer step (from 1), by pass and option:
            ``{"select-tensors.rho": lambda step: 0.4 if is_noon() else 0.7}``.

    Raises:
        OptionError: ``total_steps`` is not positive, the optimizer trains none of the graph's parameters, or a signal
            is for an option that nothing here reads.
    """

    def __init__(
        self,
        gm: GraphModule,
        optimizer: torch.optim.Optimizer,
        *,
        total_steps: int,
        signals: Mapping[str, Callable[[int], float]] | None = None,
    ):
        if total_steps < 1:
            raise OptionError(f"total_steps={total_steps} must be at least 1")
        own = {id(parameter) for parameter in gm.parameters()}
        if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            raise OptionError(
                "the optimizer holds none of the graph module's parameters; "
                "build it from gm.parameters() after rewriting"
            )
        self.total_steps = total_steps
        self.steps_done = 0
        self.events: dict[str, Event] = {}
        signals = dict(signals or {})
        read: set[str] = set()
        for entry in record_of(gm).entries:
            for item in parse_passes(entry.text):
                for event in item.schedule(gm, optimizer, total_steps):
                    own_signals = {name: f"{item.name}.{name}" for name in event.varying}
                    event.signals = {name: signals[key] for name, key in own_signals.items() if key in signals}
                    read |= set(own_signals.values())
                    self.events[f"{item.name}.{len(self.events)}"] = event
        if unknown := sorted(set(signals) - read):
            raise OptionError(
                f"no signal is called {', '.join(unknown)}; there are: {', '.join(sorted(read)) or 'none'}"
            )
        # The gradients are final, unscaled and clipped, only inside optimizer.step().
        self._hook = optimizer.register_step_pre_hook(self._before_step)

    def observe(self, batch: Any, *, loss: Callable[[Any], torch.Tensor] | None = None) -> None:
        """Shows the schedule the batch of the next step; call it before the forward pass.

        Passes that choose by what a batch shows (``select-tensors{rho=...}``) do so here on the steps they are due, and
        ignore it on others. Under gradient accumulation the step's first batch counts.

        Args:
            batch: what the graph is called with: a mapping of keyword inputs, a tuple of positional ones, or a tensor.
            loss: the scalar loss of what the graph returns; by default its ``loss``, or its one scalar.
        """
        for event in self.events.values():
            event.observe(self.steps_done + 1, batch, loss)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for event in self.events.values():
            event.before_step(self.steps_done + 1)

    def step(self) -> None:
        """Call after each optimizer step."""
        self.steps_done += 1
        for event in self.events.values():
            event.after_step(self.steps_done)

    def remove(self) -> None:
        """Takes the schedule's hook off the optimizer."""
        self._hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """The position in the training, for a checkpoint beside the optimizer's."""
        states = {key: event.state_dict() for key, event in self.events.items()}
        return {
            "steps_done": self.steps_done,
            "total_steps": self.total_steps,
            "events": {key: state for key, state in states.items() if state},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes where :meth:`state_dict` was taken.

        Raises:
            CheckpointError: the state is of a graph with other passes.
        """
        unknown = sorted(set(state["events"]) - set(self.events))
        if unknown:
            raise CheckpointError(
                f"the schedule's state is of {', '.join(unknown)}, which this graph does not have; "
                "load it beside the model it was saved with"
            )
        self.steps_done = state["steps_done"]
        for key, saved in state["events"].items():
            self.events[key].load_state_dict(saved)
