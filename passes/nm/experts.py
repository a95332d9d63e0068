"""N:M weights of experts: the product of each row with its expert's matrix, on masked or compressed weights.

    y_s = x_s (W_e^R)^T          n of every m consecutive weights along the input dimension of each W_e

A graph's products of experts are brought into one form, rows sorted by expert (`fxsparse.graph.experts`), and run on
the operators of `fxsparse.ops.nm_expert_linear` and `fxsparse.ops.masked_expert_linear`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.graph import ExpertLinear
from fxsparse.ops.nm import Pattern

EXPERTS = "it holds the matrices of experts"


def call_compressed(gm: GraphModule, linear: ExpertLinear, pattern: Pattern) -> None:
    """Multiplies by ``<weight>_values`` and ``<weight>_indices``."""

    def compressed(x: Tensor, offsets: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        return torch.ops.fxsparse.nm_expert_linear(x, values, indices, None, offsets, pattern.n, pattern.m)

    fx.replace_product(gm, linear, compressed, f"{linear.name}_values", f"{linear.name}_indices")


def call_masked(gm: GraphModule, linear: ExpertLinear, straight_through: bool) -> None:
    """Multiplies by the dense weight and ``<weight>_mask``."""

    def masked(x: Tensor, offsets: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        weight = weight.mT if linear.transposed else weight
        return torch.ops.fxsparse.masked_expert_linear(x, weight, mask, None, offsets, straight_through)

    fx.replace_product(gm, linear, masked, linear.weight, f"{linear.name}_mask")
