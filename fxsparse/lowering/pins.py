"""What a user may say of an operator's implementations: pin one, or exclude some."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

# What `options={"lower": {op: choice}}` may pin, or exclude with a minus in front.
LOWERINGS: dict[str, tuple[str, ...]] = {
    "nm_linear": ("auto", "compressed", "sparse_tensor_cores", "cusparselt", "reference", "dense"),
    "nm_linear_grad_input": ("auto", "operator", "sparse_tensor_cores", "reference"),
    "nm_linear_grad_values": ("auto", "operator", "reference"),
    "nm_linear_low_rank": ("auto", "compressed", "reference", "dense"),
    "gather_linear": ("auto", "operator", "reference"),
    "mux": ("auto", "operator", "reference"),
    "demux_linear": ("auto", "operator", "reference"),
}


@dataclass(frozen=True)
class Pin:
    """What was said of an operator's implementations.

    Attributes:
        name: the only one wanted, None for any.
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
