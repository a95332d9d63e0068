"""What a pass leaves to do while the rewritten model trains."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, ClassVar


class Event:
    """Something that varies with the training step; a ``Schedule`` drives it.

    Steps count optimizer steps from 1. Edits of buffers are in place, so that compiled code sees them.

    Attributes:
        varying: names of the pass's options that may be functions of the step.
        signals: those that are, as the ``Schedule`` was given them.
    """

    varying: ClassVar[tuple[str, ...]] = ()
    signals: Mapping[str, Callable[[int], float]] = {}

    def observe(self, step: int, batch: Any, loss: Callable[[Any], Any] | None) -> None:
        """Called with the batch of optimizer step ``step`` before its forward pass, see ``Schedule.observe``."""

    def before_step(self, step: int) -> None:
        """Called when the gradients of optimizer step ``step`` are final, before the optimizer uses them."""

    def forget(self) -> None:
        """Drops the gradients that the optimizer must not use."""

    def after_step(self, step: int) -> None:
        """Called after optimizer step ``step``."""

    def late_parameters(self) -> Iterable[Any]:
        """Parameters that the optimizers of version 0.1.0 held only at times, or not at all."""
        return ()

    def values(self) -> dict[str, float]:
        """Numbers that tell how far the change has gone, by name, for a log."""
        return {}

    def trained_tensors(self) -> Collection[str] | None:
        """The names of the tensors that are trained now, of an event that chooses them; cheap, for every step."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart beyond the model's own state; the same keys at every step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave."""

    def resume(self, step: int) -> None:
        """Called once the training goes on after optimizer step ``step``, when the state has been restored."""
