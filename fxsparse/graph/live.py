"""What passes know about their sites, kept true while later passes edit the graph.

A pass that goes on acting after it ran (gates that train, dimensions that are scored) enters what it knows of each site
once: which rows of which parameters, which gate. Later edits keep that true, so nothing is looked up again in a graph
that has changed:

    a weight is held under another name    `moved`     rows go with it
    a layer leaves the graph               `settle`    its sites end, or lose the parameters that are gone
    a pass takes its own part out          `end`

The sites are in ``gm.meta``, and copies of a graph module have copies of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor, nn
from torch.fx import GraphModule

from fxsparse.graph.state import meta_of

KEY = "fxsparse_live"


class Live(ABC):
    """What a pass knows about a site: plain data, with parameters by their names."""

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the weights that the pass acts on here."""
        return ()

    @abstractmethod
    def moved(self, old: str, new: str, rows: int) -> Live:
        """The site once the parameter ``old`` is held as ``new``, whose dimension ``rows`` is that of outputs."""

    def renamed(self, name: Callable[[str], str]) -> Live:
        """The site in a graph that was traced from modules made of this one, where parameters have other names."""
        raise NotImplementedError(f"{type(self).__name__} does not become modules")

    @abstractmethod
    def without(self, gone: Callable[[str], bool]) -> Live | None:
        """The site without the parameters that are gone; None where it has ended."""


@dataclass(frozen=True)
class Added(Live):
    """A module that a pass added, whose linears are not the model's.

    Attributes:
        path: where it stands.
        whose: what it is, for messages.
    """

    path: str
    whose: str

    def moved(self, old: str, new: str, rows: int) -> Added:
        return self

    def without(self, gone: Callable[[str], bool]) -> Added:
        return self


_L = TypeVar("_L", bound=Live)


@dataclass(frozen=True)
class Rows:
    """The rows of a weight that units own.

    Attributes:
        name: full name of the parameter that holds the weight now.
        dim: the dimension of outputs in it.
        index: int64 ``[units, rows of each]``.
        kind: what they make of a unit: ``query``, ``key``, ``value``, ``channel``; empty where it does not matter.
    """

    name: str
    dim: int
    index: Tensor
    kind: str = ""

    def sums(self, values: Tensor) -> Tensor:
        """The sums ``[units]`` over the rows of each unit of a tensor of the parameter's shape."""
        return values.sum(1 - self.dim)[self.index.to(values.device)].sum(1)

    def moved(self, old: str, new: str, rows: int) -> Rows:
        """The rows once the parameter ``old`` is held as ``new``."""
        return replace(self, name=new, dim=rows) if self.name == old else self


def enter(gm: nn.Module, *sites: Live) -> None:
    """Adds sites."""
    meta = meta_of(gm)
    meta[KEY] = (*meta.get(KEY, ()), *sites)


def sites(gm: nn.Module, kind: type[_L]) -> tuple[_L, ...]:
    """The sites of one kind, in the order they were entered."""
    return tuple(site for site in meta_of(gm).get(KEY, ()) if isinstance(site, kind))


def end(gm: GraphModule, *kinds: type[Live]) -> None:
    """Ends the sites of some kinds."""
    gm.meta[KEY] = tuple(site for site in gm.meta.get(KEY, ()) if not isinstance(site, kinds))


def moved(gm: GraphModule, names: Collection[str], new: str, *, rows: int = 0) -> None:
    """Tells all sites that a parameter is held under another name.

    Args:
        gm: the graph module.
        names: all names that the parameter had.
        new: the name of the parameter that holds the weight now.
        rows: the dimension of outputs in the new parameter.
    """
    for old in names:
        gm.meta[KEY] = tuple(site.moved(old, new, rows) for site in gm.meta.get(KEY, ()))


def settle(gm: GraphModule) -> None:
    """Ends the sites whose parameters left the graph."""
    present = {name for name, _ in gm.named_parameters(remove_duplicate=False)}
    left = (site.without(lambda name: name not in present) for site in gm.meta.get(KEY, ()))
    gm.meta[KEY] = tuple(site for site in left if site is not None)
