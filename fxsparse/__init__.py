"""fxsparse: rewrite PyTorch transformers to sparse, smaller or multiplexed ones, and compile them.

sparse = fxsparse.rewrite(model, [InsertNMMasks("2:4"), DoublePruneBackward()], kwargs=batch)
print(fxsparse.explain(sparse))
fast = torch.compile(sparse, backend="fxsparse")
"""

from fxsparse import autoprumux
from fxsparse.backend import invalidate
from fxsparse.backprop import BackpropGraph
from fxsparse.checkpoint import load, save
from fxsparse.compiled import kernels
from fxsparse.errors import CheckpointError, FxsparseError, LoweringError, OptionError, RewriteError, TraceError
from fxsparse.flops import count_flops
from fxsparse.gating import sparsity_loss
from fxsparse.importance import tensor_importance
from fxsparse.integrations.huggingface import from_pretrained, save_pretrained
from fxsparse.optimizer_state import forget_dropped
from fxsparse.passes import Pass, Pipeline
from fxsparse.recipes import recipe
from fxsparse.record import Record, record_of
from fxsparse.report import explain
from fxsparse.rewriting import replay, rewrite
from fxsparse.schedule import Schedule
from fxsparse.state import dense_state_dict
from fxsparse.tracing import trace
from fxsparse.tuning import tune
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
