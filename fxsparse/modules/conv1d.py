"""Linears in the places of transformers' ``Conv1D``, whose weight is stored ``[in, out]``."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from fxsparse.modules.held import Form
from fxsparse.modules.linears import Compressed, LowRank, Masked, Product


class _Named(Product):
    """Features under the names that readers of a ``Conv1D`` use."""

    def __init__(self, form: Form, tensors: Mapping[str, Tensor | None]):
        super().__init__(form, tensors)
        self.nx, self.nf = form.in_features, form.out_features

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


class CompressedConv1D(_Named, Compressed, Conv1D):  # type: ignore[misc]
    """A compressed N:M weight in the place of a ``Conv1D``."""


class MaskedConv1D(_Named, Masked, Conv1D):
    """A masked N:M weight in the place of a ``Conv1D``."""


class LowRankConv1D(_Named, LowRank, Conv1D):
    """A dense weight with a low-rank branch in the place of a ``Conv1D``."""


CONV1D: dict[str, type[Product]] = {"compressed": CompressedConv1D, "masked": MaskedConv1D, "dense": LowRankConv1D}
"""By the storage of the weight."""
