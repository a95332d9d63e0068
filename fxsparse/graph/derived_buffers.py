"""State that follows from weights: a mask is a function of the weight it belongs to.

A pass that adds such state says how it follows from what there already is. The backend needs this in the one-line call
(``options={"passes": ...}``), where weights belong to the caller and one compiled graph may serve several identical
layers: it computes the state of every weight it meets at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule

BORROWED = "fxsparse_borrowed"
DERIVED = "fxsparse_derived"


@dataclass(frozen=True)
class Derived:
    """How a buffer follows from other tensors of the graph module.

    Attributes:
        rule: computes the buffer from the tensors called ``sources``, in their order. Hashable, and equal to another
            rule that computes the same: the backend keeps one result per rule and weight, not one per graph.
        sources: names of parameters, or of buffers that are themselves derived.
    """

    rule: Callable[..., Tensor]
    sources: tuple[str, ...]


def derive(gm: GraphModule, name: str, derived: Derived) -> None:
    """Notes that the buffer ``name`` follows from other tensors."""
    gm.meta[DERIVED] = {**gm.meta.get(DERIVED, {}), name: derived}


def derived_buffers(gm: GraphModule) -> dict[str, Derived]:
    """The derived buffers of a graph module by their name."""
    return dict(gm.meta.get(DERIVED, {}))


def weights_borrowed(gm: GraphModule) -> bool:
    """Whether the weights belong to the caller: passes then leave them dense and mask them."""
    return bool(gm.meta.get(BORROWED))
