"""Linears in the places of ``nn.Linear``: with compressed weights, with masked ones, and dense ones with a branch.

They compute what the rewritten graph does, with its operators, so that a backend finds and lowers these alike. Each is
an ``nn.Linear`` to code that looks for linears (PEFT, quantisers): the features and the bias are where that expects
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fxsparse.modules.dense_view import DenseView
from fxsparse.modules.held import Form, Held, describe, register

ops = torch.ops.fxsparse


class Product(Held):
    """``y = x W^T + b`` of one weight in another form; its subclasses say which.

    Args:
        form: of the weight.
        tensors: what holds the weight, and ``bias``, by name; parameters and buffers.
    """

    weight: Any
    bias: Any

    def __init__(self, form: Form, tensors: Mapping[str, Tensor | None]):
        nn.Module.__init__(self)
        self.forms = {"weight": form}
        self.in_features, self.out_features = form.in_features, form.out_features
        register(self, {"bias": None, **tensors})

    @property
    def form(self) -> Form:
        return self.forms["weight"]

    def extra_repr(self) -> str:
        form = self.form
        words = describe(form, double_pruned=self.part("weight", "column_mask") is not None)
        return (
            f"in_features={form.in_features}, out_features={form.out_features}, bias={self.bias is not None}, {words}"
        )


class Compressed(Product):
    """A product with a compressed N:M weight, whose kept values are the parameter."""

    weight_values: nn.Parameter
    weight_indices: Tensor

    @property
    def weight(self) -> Tensor:
        """The dense weight, zero where pruned, in the original's layout: computed for each reader, and read-only."""
        dense = self.dense("weight")
        return dense if torch.compiler.is_compiling() else DenseView.of(dense, self.form.name)

    def forward(self, x: Tensor) -> Tensor:
        form, part = self.form, self.part
        held = (self.weight_values, self.weight_indices, part("weight", "column_mask"))
        if form.started:
            branch = (part("weight", "down"), part("weight", "up"))
            return ops.nm_linear_low_rank(x, *held, *branch, self.bias, form.n, form.m)
        return ops.nm_linear(x, *held, self.bias, form.n, form.m)


class Masked(Product):
    """A product with a dense weight of which a mask keeps n of every m; ``weight`` is the parameter, not masked."""

    def forward(self, x: Tensor) -> Tensor:
        form, part = self.form, self.part
        rows = self.weight.t() if form.transposed else self.weight
        held = (rows, part("weight", "mask"), part("weight", "column_mask"))
        if form.started:
            branch = (part("weight", "down"), part("weight", "up"))
            return ops.masked_linear_low_rank(x, *held, *branch, self.bias, form.straight_through)
        return ops.masked_linear(x, *held, self.bias, form.straight_through)


class LowRank(Product):
    """A product with a dense weight, ``weight``, and a low-rank branch beside it."""

    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(x, self.weight.t() if self.form.transposed else self.weight, self.bias)
        if not self.form.started:
            return y
        down, up = self.part("weight", "down"), self.part("weight", "up")
        assert down is not None and up is not None
        return y + functional.linear(functional.linear(x, down), up) / down.shape[0]


class CompressedLinear(Compressed, nn.Linear):  # type: ignore[override]
    """A compressed N:M weight in the place of an ``nn.Linear``."""


class MaskedLinear(Masked, nn.Linear):
    """A masked N:M weight in the place of an ``nn.Linear``."""


class LowRankLinear(LowRank, nn.Linear):
    """A dense weight with a low-rank branch in the place of an ``nn.Linear``."""


LINEARS: dict[str, type[Product]] = {"compressed": CompressedLinear, "masked": MaskedLinear, "dense": LowRankLinear}
"""By the storage of the weight."""
