"""The one-line call that compresses: ``options={"passes": ..., "weights": "compressed"}``.

The first call rewrites the model as `fxsparse.rewrite` does, and puts the compressed weights into the model itself
(`fxsparse.conversion.in_place`), whose dense ones are freed. From then on it is what `fxsparse.to_module` would have
made of it, to everything that is done with it. Dynamo sees other modules and compiles the new forward, in which nothing
is left for the backend but to lower:

    first call    Dynamo's graph of the dense model   -> CompressedModel.__call__ -> the model changes, and runs anew
    later calls   Dynamo's graph of the changed model -> lower, Inductor
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import GraphModule

from fxsparse.backend.options import BackendOptions
from fxsparse.backend.whole_model import ReplacedGraph, traced_and_rewritten
from fxsparse.conversion.in_place import compress_in_place, in_place
from fxsparse.errors import OptionError, RewriteError
from fxsparse.graph.added_state import NAME, added_state_of
from fxsparse.graph.record import record_of
from fxsparse.graph.sharded import is_fully_sharded
from fxsparse.graph.wrapped import module_form_of

if TYPE_CHECKING:
    from fxsparse.backend.whole_model import Call
    from fxsparse.passes.pipeline import Pipeline

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


class CompressedModel(ReplacedGraph):
    """Compresses the model, and runs it.

    Args:
        gm: Dynamo's graph of the dense model.
        pipeline: the passes.
    """

    def __init__(self, gm: GraphModule, pipeline: Pipeline):
        super().__init__(gm)
        self.pipeline = pipeline

    def run(self, call: Call, inputs: Sequence[Any]) -> Any:
        state = added_state_of(call.model)
        if call.model.training and torch.is_grad_enabled() and not (state is not None and state.waiting):
            raise OptionError(
                'weights="compressed" replaces parameters at the first call, and an optimizer that was built before '
                "would go on with those that are gone. Build fxsparse.Schedule(compiled, optimizer, total_steps=...) "
                "first, which tells the optimizer; or call the model once under torch.no_grad(), and build the "
                "optimizer then"
            )
        compress(call.model, self.pipeline, call.arguments, call.keywords, call.among)
        return call.again(*call.arguments, **call.keywords)


def compress(
    model: nn.Module, pipeline: Pipeline, arguments: tuple[Any, ...], keywords: Mapping[str, Any], among: Sequence[Any]
) -> None:
    """Rewrites ``model``, puts the compressed weights into it, and tells the schedules that wait for that.

    Args:
        model: the model; it is changed.
        pipeline: the passes.
        arguments, keywords: the example that the model is traced with.
        among: modules that the call went through.

    Raises:
        TraceError, RewriteError: as of `fxsparse.rewrite` and `fxsparse.to_module`; or the model is wrapped or sharded
            already. The model is as it was.
        OptionError: the model was rewritten with dense weights before.
    """
    state = added_state_of(model)
    if state is not None and state.graph is not None:
        raise _other_passes(state.passes, "dense", "call fxsparse.forget(model) first, and torch.compile anew")
    wrapper = next((type(module).__name__ for module in among if type(module).__name__ in _WRAPPERS), None)
    if wrapper is not None or any(map(is_fully_sharded, model.modules())):
        raise RewriteError(
            f'weights="compressed" replaces parameters that {wrapper or "fully_shard"} already knows; call the '
            "compiled model once, under torch.no_grad(), before it is wrapped or sharded"
        )
    with torch.inference_mode(False):
        compress_in_place(traced_and_rewritten(model, pipeline, arguments, keywords), model, str(pipeline))
    if state is not None:
        del model._modules[NAME]
        for bind in state.waiting:
            bind(model)


def is_compressed(model: Any, options: BackendOptions) -> bool:
    """Whether the passes of a call are in the modules of ``model`` already, so that its graphs are only lowered.

    Raises:
        OptionError: they are not, but others are; or these are, with weights in another form.
    """
    form, noted = module_form_of(model), in_place(model)
    if form is None or (options.weights == "dense" and noted is None):
        return False
    passes = record_of(form).text if noted is None else noted.passes
    if options.weights == "compressed" and passes == str(options.pipeline):
        return True
    if noted is None:
        instead = "leave passes out of the options, for the model holds what fxsparse.to_module gave it"
    else:
        instead = "call fxsparse.forget(model) first, and torch.compile anew"
    raise _other_passes(passes, "compressed", instead)


def _other_passes(passes: str, weights: str, instead: str) -> OptionError:
    return OptionError(f'the model was rewritten with passes={passes!r} and weights="{weights}" before; {instead}')
