"""The side of ``torch.compile(model, backend="fxsparse")``: options, compiled graphs, Inductor."""

from fxsparse.backend.backend import fxsparse, invalidate
from fxsparse.backend.compiled import compiled_graphs

__all__ = ["compiled_graphs", "fxsparse", "invalidate"]
