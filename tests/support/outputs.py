"""What a model gives back, as tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import GraphModule


def outputs(gm: GraphModule, batch: dict[str, Any]) -> list[Tensor]:
    found = gm(**batch)
    values = found if isinstance(found, tuple) else list(found.values())
    return [value for value in values if isinstance(value, Tensor)]
