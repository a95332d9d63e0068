"""Pieces of plain torch that several operators' references and gradients are made of."""

from __future__ import annotations

from torch import Tensor


def outer_product(dy: Tensor, x: Tensor) -> Tensor:
    """``dy^T x`` summed over all leading dimensions, ``[out, in]``."""
    return dy.reshape(-1, dy.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


def bias_gradient(dy: Tensor) -> Tensor:
    """``dy`` summed over all leading dimensions, ``[out]``."""
    return dy.reshape(-1, dy.shape[-1]).sum(0)
