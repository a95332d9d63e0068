"""Other libraries: Hugging Face checkpoints, and training by the Trainer of transformers.

`FxsparseCallback` and `FxsparseTrainer` need transformers, which is imported when one of them is first read.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxsparse.integrations.training import FxsparseCallback, FxsparseTrainer

__all__ = ["FxsparseCallback", "FxsparseTrainer"]


def __getattr__(name: str) -> Any:
    """A public name that was not read before."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module("fxsparse.integrations.training"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
