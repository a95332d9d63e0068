"""Compiled models that their passes will rewrite when they are first called, and rewriting them before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.fx import GraphModule

from fxsparse.backend.compiled import options_of
from fxsparse.backend.compressed import compress, is_compressed
from fxsparse.backend.whole_model import rewritten, with_dense_weights
from fxsparse.graph.added_state import added_state_of
from fxsparse.graph.record import TRACE_KEY
from fxsparse.graph.wrapped import unwrapped_module, within_data_parallel

if TYPE_CHECKING:
    from fxsparse.passes.pipeline import Pipeline


@dataclass(frozen=True)
class CompiledToRewrite:
    """A compiled model that its passes will rewrite when it is first called.

    Attributes:
        model: the model.
        pipeline: the passes.
        compressed: whether its weights will be replaced by compressed ones.
    """

    model: nn.Module
    pipeline: Pipeline
    compressed: bool

    def rewrite(self, batch: Any) -> None:
        """Rewrites the model now, for the inputs in ``batch``: a mapping, a tuple or a tensor."""
        keywords = dict(batch) if isinstance(batch, Mapping) else {}
        arguments = () if keywords else tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
        if self.compressed:
            compress(self.model, self.pipeline, arguments, keywords, ())
        else:
            rewritten(self.model, with_dense_weights(self.pipeline), arguments, keywords, ())


def compiled_to_rewrite(model: Any) -> CompiledToRewrite | None:
    """``model`` as one whose first call will rewrite it; None if it was rewritten, or was not compiled with passes."""
    inner = unwrapped_module(model)
    state = added_state_of(inner)
    if not isinstance(inner, nn.Module) or (state is not None and state.graph is not None):
        return None
    model = within_data_parallel(model)
    if not isinstance(model, OptimizedModule) and getattr(model, "_compiled_call_impl", None) is None:
        return None
    if isinstance(inner, GraphModule) and TRACE_KEY in inner.meta:
        return None
    options = options_of(model)
    if options is None or options.pipeline is None or is_compressed(inner, options):
        return None
    return CompiledToRewrite(inner, options.pipeline, options.weights == "compressed")
