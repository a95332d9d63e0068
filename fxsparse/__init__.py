"""fxsparse: rewrite PyTorch transformers to sparse, smaller or multiplexed ones, and compile them.

sparse = fxsparse.rewrite(model, [InsertNMMasks("2:4"), DoublePruneBackward()], kwargs=batch)
print(fxsparse.explain(sparse))
fast = torch.compile(sparse, backend="fxsparse")

Importing the package registers the ``fxsparse::`` operators and defines the errors. Every other public name, and every
subpackage, is imported when it is first read, because Dynamo, Inductor and the passes take longer to import than torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fxsparse import ops  # noqa: F401  registers the operators
from fxsparse.errors import (
    CheckpointError,
    FxsparseError,
    InternalError,
    LoweringError,
    OptionError,
    RewriteError,
    TraceError,
)
from fxsparse.version import __version__

if TYPE_CHECKING:
    from fxsparse import autoprumux
    from fxsparse.backend.backend import invalidate
    from fxsparse.backend.compiled import kernels
    from fxsparse.backend.tune import tune
    from fxsparse.backend.whole_model import forget
    from fxsparse.checkpoint import load, save
    from fxsparse.conversion.aten import to_aten
    from fxsparse.conversion.convert import to_module
    from fxsparse.cost.backprop import BackpropGraph
    from fxsparse.cost.flops import count_flops
    from fxsparse.cost.importance import tensor_importance
    from fxsparse.dense_state import dense_state_dict
    from fxsparse.graph.record import Record, record_of
    from fxsparse.history import plot_history
    from fxsparse.inspection import graphs
    from fxsparse.integrations.huggingface import from_pretrained, save_pretrained
    from fxsparse.ops.define import decompositions
    from fxsparse.optimizers import forget_dropped
    from fxsparse.page.write import report
    from fxsparse.passes import Pass, Pipeline
    from fxsparse.passes.structured.hard_concrete import sparsity_loss
    from fxsparse.recipes import recipe
    from fxsparse.reporting import explain
    from fxsparse.rewriting import replay, rewrite
    from fxsparse.schedule import Schedule
    from fxsparse.tracing.trace import trace

__all__ = [
    "BackpropGraph",
    "CheckpointError",
    "FxsparseError",
    "InternalError",
    "LoweringError",
    "OptionError",
    "Pass",
    "Pipeline",
    "Record",
    "RewriteError",
    "Schedule",
    "TraceError",
    "__version__",
    "autoprumux",
    "count_flops",
    "decompositions",
    "dense_state_dict",
    "explain",
    "forget",
    "forget_dropped",
    "from_pretrained",
    "graphs",
    "invalidate",
    "kernels",
    "load",
    "plot_history",
    "recipe",
    "record_of",
    "replay",
    "report",
    "rewrite",
    "save",
    "save_pretrained",
    "sparsity_loss",
    "tensor_importance",
    "to_aten",
    "to_module",
    "trace",
    "tune",
]

# The module that defines each public name which is imported when it is first read; the imports above, at run time.
_DEFINED_IN = {
    "BackpropGraph": "fxsparse.cost.backprop",
    "Pass": "fxsparse.passes",
    "Pipeline": "fxsparse.passes",
    "Record": "fxsparse.graph.record",
    "Schedule": "fxsparse.schedule",
    "count_flops": "fxsparse.cost.flops",
    "decompositions": "fxsparse.ops.define",
    "dense_state_dict": "fxsparse.dense_state",
    "explain": "fxsparse.reporting",
    "forget": "fxsparse.backend.whole_model",
    "forget_dropped": "fxsparse.optimizers",
    "from_pretrained": "fxsparse.integrations.huggingface",
    "graphs": "fxsparse.inspection",
    "invalidate": "fxsparse.backend.backend",
    "kernels": "fxsparse.backend.compiled",
    "load": "fxsparse.checkpoint",
    "plot_history": "fxsparse.history",
    "recipe": "fxsparse.recipes",
    "record_of": "fxsparse.graph.record",
    "replay": "fxsparse.rewriting",
    "report": "fxsparse.page.write",
    "rewrite": "fxsparse.rewriting",
    "save": "fxsparse.checkpoint",
    "save_pretrained": "fxsparse.integrations.huggingface",
    "sparsity_loss": "fxsparse.passes.structured.hard_concrete",
    "tensor_importance": "fxsparse.cost.importance",
    "to_aten": "fxsparse.conversion.aten",
    "to_module": "fxsparse.conversion.convert",
    "trace": "fxsparse.tracing.trace",
    "tune": "fxsparse.backend.tune",
}


def __getattr__(name: str) -> Any:
    """A public name, or a submodule, that was not read before."""
    if name in _DEFINED_IN:
        value = getattr(importlib.import_module(_DEFINED_IN[name]), name)
        globals()[name] = value
        return value
    if not name.startswith("_"):
        module = f"{__name__}.{name}"
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
