"""What Inductor is told: to inline our references, and to keep its caches apart.

One custom graph pass does both. It runs on the forward and on the backward graph, after AOTAutograd has parted them.
Where a reference is inlined before, through ``decompositions=``, what the backward pass computes from weights alone
becomes forward work: W^{R,C} is made dense there and held until the backward pass, with the positions of all kept
values in int64. And its ``uuid`` stands in the keys of torch's compile caches, which hold the graph
and Inductor's configuration but not the Python behind our operators: without it a changed autograd formula, or other
options, would go on running as they were first compiled.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node

from fxsparse.backend.options import BackendOptions
from fxsparse.codegen.cpu import extern, loaded
from fxsparse.codegen.operators import HAS_TRITON
from fxsparse.graph.aten import insert_aten
from fxsparse.lowering.after_partition import call_kernels, runs_reference, use_sparse_tensor_cores
from fxsparse.ops.operator import operator_of

_SLOT = "post_grad_custom_pre_pass"


class InlineReferences(CustomGraphPass):
    """Inlines the references of the operators that were chosen to run so, and lets others run on sparse tensor cores or
    call C++ kernels.

    Args:
        options: of the backend.
        overrides: implementations that fixed rules would not choose, as `CompiledGraph` has them.
        then: the passes that the user gave Inductor for the same place; they run afterwards.
        show: is given every graph first, with the operators still whole; no part of what the pass does to it.
    """

    def __init__(
        self,
        options: BackendOptions,
        overrides: Mapping[str, str],
        then: Sequence[Any] = (),
        show: Callable[[Graph], None] = lambda graph: None,
    ):
        self.options, self.overrides, self.then, self.show = options, dict(overrides), tuple(then), show

    def __call__(self, graph: Graph) -> None:
        self.show(graph)
        pins = self.options.pins
        use_sparse_tensor_cores(graph, self.overrides)
        call_kernels(graph, self.overrides)
        inline_references(graph, lambda call: runs_reference(call, pins, self.overrides))
        for theirs in self.then:
            theirs(graph)

    def uuid(self) -> bytes | None:
        """Of the sources, the options, the overrides and the user's passes; None, and no caching, where one of those
        has none."""
        said = f"{self.options};{sorted(self.overrides.items())};{_cannot_bind()}"
        digest = hashlib.sha256(sources() + said.encode())
        for item in self.then:
            theirs = item.uuid() if isinstance(item, CustomGraphPass) else None
            if theirs is None:
                return None
            digest.update(repr(theirs).encode())
        return digest.digest()


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
                digest.update(str(path.relative_to(root)).encode())
                digest.update(path.read_bytes())
    return digest.digest()


def _cannot_bind() -> bool:
    """Whether C++ kernels are loaded that Inductor can only call through the dispatcher."""
    return bool(loaded.kernels()) and extern.obstacle() is not None


def config_patches(
    options: BackendOptions, overrides: Mapping[str, str], show: Callable[[Graph], None]
) -> dict[str, Any]:
    """Inductor's configuration for a graph with ``options`` and ``overrides``; ``show`` is given what it compiles."""
    from torch._inductor import config

    if loaded.kernels() and extern.obstacle() is None:
        with contextlib.suppress(ImportError):  # of names that this torch's Inductor lacks: operators stay calls
            from fxsparse.backend import extern_kernels

            extern_kernels.register()
    if torch.cuda.is_available() and HAS_TRITON:
        with contextlib.suppress(ImportError):
            from fxsparse.backend import replays

            replays.register()
    theirs = options.inductor.get(_SLOT, getattr(config, _SLOT)) or ()
    return {
        **options.inductor,
        _SLOT: InlineReferences(options, overrides, theirs if isinstance(theirs, (list, tuple)) else [theirs], show),
    }


def inline_references(graph: Graph, wanted: Callable[[Node], bool] = lambda node: True) -> int:
    """Replaces calls of fxsparse operators by the ATen of their references, in place.

    Args:
        graph: an ATen graph of fake tensors, as a ``post_grad_custom_pre_pass`` of Inductor gets it.
        wanted: which calls.

    Returns:
        how many.
    """
    calls = [node for node in graph.nodes if node.op == "call_function" and operator_of(node.target) is not None]
    calls = [node for node in calls if wanted(node)]
    for node in calls:
        _inline(graph, node)
    return len(calls)


def _inline(graph: Graph, call: Node) -> None:
    sources, operator = call.all_input_nodes, operator_of(call.target)
    assert operator is not None
    reference = operator.reference

    def compute(*tensors: Any) -> torch.Tensor:
        tensor_of = dict(zip(sources, tensors, strict=True))
        args, kwargs = torch.fx.map_arg((call.args, call.kwargs), tensor_of.__getitem__)
        return reference(*args, **kwargs)

    call.replace_all_uses_with(insert_aten(graph, compute, sources, before=call))
    graph.erase_node(call)
