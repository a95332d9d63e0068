"""The held weights of a tree of modules, found by their paths as they are now.

Schedules look them up on every step: wrappers replace parameters (``fully_shard``) and move modules (PEFT).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fxsparse.graph.record import HeldWeight
from fxsparse.modules.held import Form, Held
from fxsparse.ops.nm import Pattern

STARTED = "low_rank_started"
"""Name of the buffer that says which low-rank branches take part, of a graph module as of its module form."""


@dataclass(frozen=True)
class ModuleSite:
    """A weight that a module holds in another form; it answers as a sparse linear of a graph does.

    Attributes:
        path: of the module.
        leaf: the weight's attribute name in it.
        module: the module.
    """

    path: str
    leaf: str
    module: Held

    @property
    def form(self) -> Form:
        return self.module.forms[self.leaf]

    @property
    def name(self) -> str:
        """Full name of the weight; its tensors are called ``<name>_values`` and so on."""
        return f"{self.path}.{self.leaf}".lstrip(".")

    @property
    def held(self) -> HeldWeight:
        form = self.form
        names = (self.name,)
        held = HeldWeight(self.name, form.storage, str(form.pattern), form.transposed, form.in_features, names)
        return replace(held, experts=form.experts)

    @property
    def pattern(self) -> Pattern:
        return self.form.pattern

    @property
    def compressed(self) -> bool:
        return self.form.storage == "compressed"

    @property
    def has_branch(self) -> bool:
        return self.form.started

    @property
    def out_features(self) -> int:
        return self.form.out_features

    @property
    def in_features(self) -> int:
        return self.form.in_features

    @property
    def parameter_name(self) -> str:
        """Full name of the parameter that holds the weight: the values, or the dense weight."""
        return f"{self.name}_values" if self.compressed else self.name

    def __getitem__(self, part: str) -> Any:
        """A tensor or an option of the weight by its name in the operator's schema; None if it has none."""
        if part == "straight_through":
            return self.form.straight_through
        return self.module.part(self.leaf, part)


def module_sites(model: nn.Module) -> Iterator[ModuleSite]:
    """The held weights of a tree of modules, in its order."""
    for path, module in model.named_modules():
        if isinstance(module, Held):
            for leaf in module.forms:
                yield ModuleSite(path, leaf, module)
