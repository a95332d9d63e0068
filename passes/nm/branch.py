"""What other passes must know of a low-rank branch: its parameters are not linears of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import GraphModule

from fxsparse.graph import live, module_path


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

    def renamed(self, name: Callable[[str], str]) -> Branch:
        return Branch(name(self.weight), name(self.down), name(self.up))

    def moved(self, old: str, new: str, rows: int) -> Branch:
        return self

    def without(self, gone: Callable[[str], bool]) -> Branch | None:
        return None if gone(self.down) else self


class Additions:
    """The linears of a graph that passes added: those of low-rank branches and of modules such as the multiplexer."""

    def __init__(self, gm: GraphModule):
        self.branches = {name: branch for branch in live.sites(gm, Branch) for name in (branch.down, branch.up)}
        self.modules = live.sites(gm, live.Added)

    def reason(self, name: str) -> str | None:
        """Why the weight called ``name`` is none of the model's; None if it is."""
        if branch := self.branches.get(name):
            return f"it is of the low-rank branch of {module_path(branch.weight)}"
        whose = [item.whose for item in self.modules if name.startswith(f"{item.path}.")]
        return f"it is of {whose[0]}, which a pass added" if whose else None
