"""Which implementation was chosen for an operator, and why."""

from __future__ import annotations

from dataclasses import dataclass

from fxsparse.ops.operator import Problem


@dataclass(frozen=True)
class Choice:
    """Which implementation runs an operator.

    Attributes:
        op: the operator, such as ``nm_linear``.
        site: full name of the weight, or the module path.
        implementation: ``compressed``, ``dense``, ``reference`` or ``operator``.
        reason: why.
        problem: its size, where it is known.
    """

    op: str
    site: str
    implementation: str
    reason: str
    problem: Problem | None = None

    def __str__(self) -> str:
        return f"{self.site}: {self.op} runs {self.implementation}, {self.reason}"
