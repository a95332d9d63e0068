"""What other passes must know of a low-rank branch: its parameters are not linears of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fxsparse.graph import live


@dataclass(frozen=True)
class Branch(live.Live):
    """A low-rank branch, in use or waiting.

    Attributes:
        weight: full name of the original weight that it stands beside.
        down, up: names of its parameters.
    """

    weight: str
    down: str
    up: str

    def moved(self, old: str, new: str, rows: int) -> Branch:
        return self

    def without(self, gone: Callable[[str], bool]) -> Branch | None:
        return None if gone(self.down) else self
