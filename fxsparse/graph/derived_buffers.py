"""Buffers computed from weights, such as masks, with the rule that computes each.

A pass that adds such a buffer notes its rule and its sources. The one-line call (``options={"passes": ...}``) needs
both: the weights belong to the caller and one compiled graph may serve several identical layers. The backend therefore
computes the buffers at run time, for the weights of each call.
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
    """The rule that computes a buffer from other tensors of the graph module.

    Attributes:
        rule: computes the buffer from the tensors named in ``sources``, in their order. It is hashable and equal to
            every rule that computes the same, because the backend keeps one result per rule and weight.
        sources: names of parameters, or of buffers that are derived themselves.
    """

    rule: Callable[..., Tensor]
    sources: tuple[str, ...]


def derive(gm: GraphModule, name: str, derived: Derived) -> None:
    """Notes the rule that computes the buffer ``name``."""
    gm.meta[DERIVED] = {**gm.meta.get(DERIVED, {}), name: derived}


def derived_buffers(gm: GraphModule) -> dict[str, Derived]:
    """The rules of all derived buffers of a graph module, by buffer name."""
    return dict(gm.meta.get(DERIVED, {}))


def weights_borrowed(gm: GraphModule) -> bool:
    """Whether the weights belong to the caller; passes then keep them dense and add masks."""
    return bool(gm.meta.get(BORROWED))
