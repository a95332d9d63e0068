"""What a model returned, as named tensors, and whether two results are equal within rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def named_tensors(output: Any) -> list[tuple[str, Tensor]]:
    """The tensors in a model's result, and their places in it."""
    plain = dict(output) if isinstance(output, Mapping) else output
    leaves, _ = pytree.tree_flatten_with_path(plain)
    return [(".".join(map(_key, path)) or "the output", leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]


def named_floats(output: Any) -> list[tuple[str, Tensor]]:
    """Those of real numbers."""
    return [(name, tensor) for name, tensor in named_tensors(output) if tensor.is_floating_point()]


def _key(step: Any) -> str:
    return str(getattr(step, "key", getattr(step, "idx", step)))


def tolerance(dtype: torch.dtype) -> float:
    """Relative to the largest output. Sums may run in another order, and half precision rounds in every layer."""
    return 1e-5 if torch.finfo(dtype).bits >= 32 else 4 * torch.finfo(dtype).eps


def largest(tensor: Tensor) -> float:
    """The largest magnitude; 0 of an empty tensor."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0
