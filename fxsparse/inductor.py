"""What Inductor is told: to inline our references, and to keep its caches apart.

One custom graph pass does both. It runs on the forward and on the backward graph, after AOTAutograd has parted them
(``fxsparse.inline`` says why then). And its ``uuid`` stands in the keys of torch's compile caches, which hold the graph
and Inductor's configuration but not the Python behind our operators: without it a changed autograd formula, or other
options, would go on running as they were first compiled.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from fxsparse import lower
from fxsparse.inline import inline_references
from fxsparse.options import BackendOptions

_SLOT = "post_grad_custom_pre_pass"


class InlineReferences(CustomGraphPass):
    """Inlines the references of the operators that were chosen to run so.

    Args:
        options: of the backend.
        decided: implementations that fixed rules would not choose, as `CompiledGraph` has them.
        then: the passes that the user gave Inductor for the same place; they run afterwards.
    """

    def __init__(self, options: BackendOptions, decided: Mapping[str, str], then: Sequence[Any] = ()):
        self.options, self.decided, self.then = options, dict(decided), tuple(then)

    def __call__(self, graph: torch.fx.Graph) -> None:
        lower.keep_transposes(graph, self.options)
        inline_references(graph, lambda call: lower.runs_reference(call, self.options, self.decided))
        for theirs in self.then:
            theirs(graph)

    def uuid(self) -> bytes | None:
        """Of the sources, the options, what was decided and the user's passes; None, and no caching, where one of those
        has none."""
        own = hashlib.sha256(sources() + f"{self.options};{sorted(self.decided.items())}".encode())
        for item in self.then:
            theirs = item.uuid() if isinstance(item, CustomGraphPass) else None
            if theirs is None:
                return None
            own.update(repr(theirs).encode())
        return own.digest()


@functools.cache
def sources() -> bytes:
    """A hash of every source file of the package, passes and code generation included."""
    import fxsparse
    import fxsparse.codegen
    import fxsparse.passes

    digest = hashlib.sha256(torch.__version__.encode())
    for package in (fxsparse, fxsparse.passes, fxsparse.codegen):
        for root in package.__path__:
            for path in sorted(Path(root).rglob("*.py")):
                digest.update(path.name.encode())
                digest.update(path.read_bytes())
    return digest.digest()


def config_patches(options: BackendOptions, decided: Mapping[str, str]) -> dict[str, Any]:
    """Inductor's configuration for ``options`` and what was decided for a graph."""
    from torch._inductor import config

    theirs = options.inductor.get(_SLOT, getattr(config, _SLOT)) or ()
    return {
        **options.inductor,
        _SLOT: InlineReferences(options, decided, theirs if isinstance(theirs, (list, tuple)) else [theirs]),
    }
