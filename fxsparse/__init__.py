"""fxsparse: rewrite PyTorch transformers to sparse, smaller or multiplexed ones, and compile them.

sparse = fxsparse.rewrite(model, [InsertNMMasks("2:4"), DoublePruneBackward()], kwargs=batch)
print(fxsparse.explain(sparse))
fast = torch.compile(sparse, backend="fxsparse")
"""

from fxsparse import autoprumux
from fxsparse.backend.backend import invalidate
from fxsparse.backend.compiled import kernels
from fxsparse.backend.tune import tune
from fxsparse.checkpoint import dense_state_dict, load, save
from fxsparse.cost.backprop import BackpropGraph
from fxsparse.cost.flops import count_flops
from fxsparse.cost.importance import tensor_importance
from fxsparse.errors import CheckpointError, FxsparseError, LoweringError, OptionError, RewriteError, TraceError
from fxsparse.graph.record import Record, record_of
from fxsparse.integrations.huggingface import from_pretrained, save_pretrained
from fxsparse.optimizers import forget_dropped
from fxsparse.passes import Pass, Pipeline
from fxsparse.passes.structured.hard_concrete import sparsity_loss
from fxsparse.recipes import recipe
from fxsparse.reporting import explain
from fxsparse.rewriting import replay, rewrite
from fxsparse.schedule import Schedule
from fxsparse.tracing.trace import trace
from fxsparse.version import __version__

__all__ = [
    "BackpropGraph",
    "CheckpointError",
    "FxsparseError",
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
    "dense_state_dict",
    "explain",
    "forget_dropped",
    "from_pretrained",
    "invalidate",
    "kernels",
    "load",
    "recipe",
    "record_of",
    "replay",
    "rewrite",
    "save",
    "save_pretrained",
    "sparsity_loss",
    "tensor_importance",
    "trace",
    "tune",
]
