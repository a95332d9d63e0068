"""How masks follow from weights: plain values that compare equal, so that equal rules can share their results."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from fxsparse.ops.nm import Pattern, double_prune_mask, nm_mask, transposable_mask

Criterion = Literal["magnitude", "random", "wanda", "sparsegpt"]
CRITERIA = get_args(Criterion)


@dataclass(frozen=True)
class NMMask:
    """The mask of W^R: n of every m kept along the input dimension.

    Attributes:
        pattern: ``n:m``.
        criterion: ``magnitude``, ``random`` or ``wanda``.
        transposable: n of m along the output dimension too.
        seed: of ``random``, together with the signs of the weight's first elements: weights get different masks, and a
            weight the same one in every dtype and wherever it is found, by whatever name.
        transposed: whether the weight is stored ``[in, out]``, or ``[experts, in, out]``.
        filters: whether it is that of a convolution, ``[out, in, taps...]``, and each filter is flattened.
    """

    pattern: str
    criterion: str = "magnitude"
    transposable: bool = False
    seed: int = 0
    transposed: bool = False
    filters: bool = False

    def __call__(self, weight: Tensor) -> Tensor:
        """The mask, bool ``[..., out, in]``, of a weight ``[..., out, in]`` (``[..., in, out]`` if transposed)."""
        return self.with_norms(weight, None)

    def with_norms(self, weight: Tensor, norms: Tensor | None) -> Tensor:
        """The mask, with the input norms ``[in]``, or ``[experts, 1, in]``, that ``wanda`` multiplies magnitudes by.
        That of a convolution's weight has its shape, with n of every m kept in each flattened filter."""
        if self.filters:
            return replace(self, filters=False).with_norms(weight.flatten(1), norms).view_as(weight)
        dense = weight.mT if self.transposed else weight
        scores = self._random(dense) if self.criterion == "random" else dense.abs().float()
        if norms is not None:
            scores = scores * norms.to(scores.device)
        search = transposable_mask if self.transposable else nm_mask
        return search(scores, Pattern.parse(self.pattern))

    def _random(self, dense: Tensor) -> Tensor:
        if dense.device.type == "meta":
            return dense.abs()
        salt = dense.flatten()[:4096].signbit().cpu().numpy().tobytes()
        generator = torch.Generator().manual_seed(zlib.crc32(salt, self.seed))
        return torch.rand(dense.shape, generator=generator).to(dense.device)


@dataclass(frozen=True)
class ColumnMask:
    """The mask of W^{R,C}: W^R pruned again along the output dimension, n of every m by magnitude.

    Attributes:
        pattern: ``n:m``.
        transposed: whether the weight is stored ``[in, out]``.
        permutations: orders of the rows to try (Bi-Mask, arXiv 2302.06058); the m rows of a group are consecutive in
            the best one. 0 leaves the rows in their order.
        seed: of the orders, the same on every rank.
    """

    pattern: str
    transposed: bool = False
    permutations: int = 0
    seed: int = 0

    def __call__(self, weight: Tensor, mask: Tensor) -> Tensor:
        """The mask, bool ``[out, in]``, of a weight and the mask ``[out, in]`` of its W^R."""
        return self.in_order(weight, mask, self.order(weight, mask))

    def in_order(self, weight: Tensor, mask: Tensor, order: Tensor | None) -> Tensor:
        """The mask for an order of the rows, int64 ``[out]``, as `order` gives it."""
        dense, pattern = weight.mT if self.transposed else weight, Pattern.parse(self.pattern)
        if order is None:
            return double_prune_mask(dense, mask, pattern)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return double_prune_mask(dense[order], mask[order], pattern)[back]

    def order(self, weight: Tensor, mask: Tensor) -> Tensor | None:
        """The random order of which most weights of W^R survive, the first of several; None without orders to try.

        As Bi-Mask's code does, which counts survivors and tries no order but random ones.
        """
        if not self.permutations or mask.is_meta:
            return None
        generator = torch.Generator().manual_seed(self.seed)
        best, most = None, -1
        for _ in range(self.permutations):
            order = torch.randperm(len(mask), generator=generator).to(mask.device)
            survivors = int(self.in_order(weight, mask, order).sum())
            if survivors > most:
                best, most = order, survivors
        return best
