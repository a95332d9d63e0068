"""What a pass leaves to do while the rewritten model trains."""

from __future__ import annotations

from typing import Any


class Event:
    """Something that varies with the training step; a ``Schedule`` drives it.

    Steps count optimizer steps from 1. Edits of buffers are in place, so that compiled code sees them.
    """

    def before_step(self, step: int) -> None:
        """Called when the gradients of optimizer step ``step`` are final, before the optimizer uses them."""

    def after_step(self, step: int) -> None:
        """Called after optimizer step ``step``."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart beyond the model's own state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave."""
