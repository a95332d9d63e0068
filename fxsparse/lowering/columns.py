"""Whether the transposes of a graph's doubly pruned weights are 2:4, as sparse tensor cores take them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from fxsparse.codegen.metadata import columns_are_two_four
from fxsparse.graph import arguments
from fxsparse.graph.dynamo import placeholders
from fxsparse.lowering.choose import GRAD_INPUT, gradients, no_sparse_tensor_cores, no_sparse_wgmma
from fxsparse.lowering.sites import fake_of, operators, site_of


class Columns:
    """The column masks of a graph.

    Args:
        gm: Dynamo's graph, or one like it.
        example_inputs: its real inputs.
    """

    def __init__(self, gm: GraphModule, example_inputs: Sequence[Any]):
        self.gm, self.example_inputs = gm, example_inputs

    @functools.cached_property
    def obstacle(self) -> str | None:
        """Why gradients of inputs cannot run on the transpose; None if they can. A column mask may have another pattern
        than its weight. Choices go by sizes, which several weights may share, so that one weight speaks for all."""
        inputs = placeholders(self.gm)[: len(self.example_inputs)]
        real = dict(zip(inputs, self.example_inputs, strict=False))
        for op, call in operators(self.gm):
            named = arguments(call)
            if named.get("column_mask") is None or not _takes_transposes(op, call):
                continue
            indices, mask = (_contents(real.get(named[name])) for name in ("indices", "column_mask"))
            if indices is None or mask is None:
                return "a column mask is not among the graph's inputs, so its pattern is not known"
            if not columns_are_two_four(indices, mask, fake_of(named["x"]).shape[-1]):
                return "a column mask keeps more than two of four rows"
        return None


def _takes_transposes(op: str, call: Node) -> bool:
    """Whether the gradient of the call's input could run on sparse tensor cores."""
    site = site_of(op, call)
    found = [] if site is None else [gradient for gradient in gradients(site) if gradient.op == GRAD_INPUT]
    return any(no_sparse_tensor_cores(gradient) is None or no_sparse_wgmma(gradient) is None for gradient in found)


def _contents(value: Any) -> Tensor | None:
    """A tensor that has contents, and not only a shape."""
    return value if isinstance(value, Tensor) and not isinstance(value, FakeTensor) and not value.is_meta else None
