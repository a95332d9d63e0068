"""Looking at graphs: after every pass of a rewrite, and as the compiler is given them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.backend.compiled import CompiledGraph, compiled_graphs
from fxsparse.graph.history import kept, text_of
from fxsparse.graph.record import record_of
from fxsparse.reporting import heading

_NOT_KEPT = "not kept: rewrite with Pipeline(passes, keep_graphs=True), or FXSPARSE_KEEP_GRAPHS=1, to see this graph"
_CACHED = (
    "taken from torch's compile caches, where no graph is left to see: "
    'set torch.compiler.config.force_disable_caches, or compile with options={"compiler": "aot_eager"}'
)


@dataclass(frozen=True)
class GraphText:
    """A graph as Python; ``print`` shows it below its title.

    Attributes:
        title: which graph it is: what made it, how long that took and how many sites it rewrote.
        code: a function, with types as comments and the modules that its lines came from as headings. Empty where the
            graph was not kept; the title says what to do.
    """

    title: str
    code: str

    def __str__(self) -> str:
        return f"# {self.title}\n\n{self.code}".rstrip("\n")


def graphs(subject: Any) -> list[GraphText]:
    """The graphs of a rewritten or of a compiled model, as Python that a person can read.

    Args:
        subject: a traced or rewritten graph module, also wrapped by ``DistributedDataParallel``; or what
            ``torch.compile(..., backend="fxsparse")`` returned, after a call.

    Returns:
        of a graph module: the graph as it was traced and after every pass, in order. The last is always there, as it
        is now; the ones before only where `Pipeline` was told to keep them. Of a compiled model: for every graph of
        Dynamo's, the forward and the backward graph that the compiler was given, with fxsparse operators whole. The
        backward graph is there once a backward pass ran.
    """
    if not isinstance(subject, torch._dynamo.OptimizedModule) and isinstance(
        inner := fx.unwrapped(subject), GraphModule
    ):
        return list(_after_passes(inner))
    return [text for graph in compiled_graphs(subject) for text in _compiled(graph)]


def _after_passes(gm: GraphModule) -> Iterator[GraphText]:
    entries = record_of(gm).entries
    titles = ["0. traced", *(heading(position, entry) for position, entry in enumerate(entries, 1))]
    earlier = kept(gm)
    for position, title in enumerate(titles):
        if position == len(entries):
            yield GraphText(title, text_of(gm))
        elif position in earlier:
            yield GraphText(title, earlier[position])
        else:
            yield GraphText(f"{title}\n# {_NOT_KEPT}", "")


def _compiled(graph: CompiledGraph) -> Iterator[GraphText]:
    name = f"graph {graph.name} for {graph.options.compiler}"
    if not graph.sources:
        yield GraphText(f"{name}: {_CACHED}", "")
    for which, code in graph.sources:
        yield GraphText(f"{name}, {which}", code)
