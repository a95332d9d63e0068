"""What a user may say of an operator's implementations: pin one, or exclude some."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fxsparse.ops.operator import CUSPARSELT, OPERATORS, SPARSE_TENSOR_CORES, SPARSE_WGMMA

LOWERINGS: dict[str, tuple[str, ...]] = {
    name: ("auto", *operator.implementations) for name, operator in OPERATORS.items() if operator.implementations
}
"""What ``options={"lower": {op: choice}}`` may pin, or exclude with a minus in front."""


@dataclass(frozen=True)
class Pin:
    """What was said of an operator's implementations.

    Attributes:
        name: the only one wanted; None for any.
        excluded: those not wanted.
        of: the operator it was said of; empty where it is the one at hand.
    """

    name: str | None = None
    excluded: frozenset[str] = frozenset()
    of: str = field(default="", compare=False)

    @classmethod
    def parse(cls, text: str) -> Pin:
        """Reads ``dense``, ``-cusparselt`` or ``-cusparselt,-sparse_tensor_cores``."""
        words = [word.strip() for word in text.split(",")]
        names = [word for word in words if not word.startswith("-") and word != "auto"]
        return cls(names[0] if names else None, frozenset(word[1:] for word in words if word.startswith("-")))


@dataclass(frozen=True)
class Pins:
    """What was said of every operator, as pairs of its name and a text that :meth:`Pin.parse` reads."""

    lower: tuple[tuple[str, str], ...] = ()

    def of(self, op: str) -> Pin:
        """What was said of an operator."""
        return replace(Pin.parse(dict(self.lower).get(op, "auto")), of=op)

    def of_gradient(self, op: str) -> Pin:
        """What was said of an operator, or else of the one it is a gradient of, as far as that holds for gradients."""
        pin, forward = self.of(op), self.of(op.partition("_grad_")[0])
        if pin != Pin():
            return pin
        return Pin() if forward.name in (SPARSE_TENSOR_CORES, SPARSE_WGMMA, CUSPARSELT) else forward
