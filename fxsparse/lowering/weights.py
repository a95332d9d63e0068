"""The forms of frozen weights that implementations read, as rules: how each follows from weights that a graph takes.

A rule is given to `fxsparse.graph.runtime_state.FollowedStates`, which computes it again after a weight was written to.
A rule that gives None says that the weights' contents no longer allow the form; the dense graph runs then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxsparse.codegen.fused_ops import INSTRUCTIONS
from fxsparse.codegen.metadata import PACK
from fxsparse.ops.nm import Pattern, mask_of, pack, pack_column_mask, satisfies, unpack


@dataclass(frozen=True)
class Compress:
    """Values and indices of dense weights, one below the other; None if one does not satisfy the pattern.

    Attributes:
        pattern: of the weights.
        transposed: whether they are stored ``[in, out]``.
        metadata: the operator on sparse tensor cores that the indices are packed for; empty, as they are.
        alternating: a row of each weight in turn instead.
    """

    pattern: Pattern
    transposed: bool
    metadata: str = ""
    alternating: bool = False

    def __call__(self, *weights: Tensor) -> tuple[Tensor, ...] | None:
        packed = []
        for weight in weights:
            dense = weight.t() if self.transposed else weight
            if not satisfies(dense, self.pattern):
                return None
            packed.append(pack(dense, mask_of(dense, self.pattern), self.pattern))
        values, indices = (_joined(parts, self.alternating) for parts in zip(*packed, strict=True))
        return values, PACK[INSTRUCTIONS[self.metadata]](indices) if self.metadata else indices


@dataclass(frozen=True)
class Join:
    """Values of several compressed weights one below the other, or a row of each in turn, and their indices alike."""

    alternating: bool = False

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        half = len(tensors) // 2
        return _joined(tensors[:half], self.alternating), _joined(tensors[half:], self.alternating)


@dataclass(frozen=True)
class Expand:
    """The dense weight of values and indices."""

    pattern: Pattern

    def __call__(self, values: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        return (unpack(values, indices, self.pattern, values.shape[1] // self.pattern.n * self.pattern.m),)


@dataclass(frozen=True)
class PackMetadata:
    """The indices of a 2:4 weight as an operator on sparse tensor cores reads them."""

    operator: str

    def __call__(self, indices: Tensor) -> tuple[Tensor, ...]:
        return (PACK[INSTRUCTIONS[self.operator]](indices),)


@dataclass(frozen=True)
class PackForLibrary:
    """A dense 2:4 weight, or the one of values and indices, as cuSPARSELt packs it; None if it is not 2:4."""

    transposed: bool = False

    def __call__(self, weight: Tensor, indices: Tensor | None = None) -> tuple[Tensor, ...] | None:
        if indices is not None:
            (weight,) = Expand(Pattern(2, 4))(weight, indices)
        dense = (weight.t() if self.transposed else weight).contiguous()
        return (torch._cslt_compress(dense),) if satisfies(dense, Pattern(2, 4)) else None


@dataclass(frozen=True)
class PackMask:
    """Packed indices of a mask, and the packed column mask if there is one; None if the mask is not N:M."""

    pattern: Pattern

    def __call__(self, mask: Tensor, column_mask: Tensor | None = None) -> tuple[Tensor, ...] | None:
        if not keeps_exactly(mask, self.pattern):
            return None
        _, indices = pack(mask.to(torch.uint8), mask, self.pattern)
        if column_mask is None:
            return (indices,)
        return indices, pack_column_mask(column_mask, mask, self.pattern)


Rule = Compress | Join | Expand | PackMetadata | PackForLibrary | PackMask


def keeps_exactly(mask: Tensor, pattern: Pattern) -> bool:
    """Whether a mask ``[out, in]`` keeps n of every m columns, no more and no less."""
    if mask.shape[1] % pattern.m:
        return False
    counts = mask.unflatten(1, (-1, pattern.m)).sum(-1, dtype=torch.uint8)
    return bool((counts == pattern.n).all())


def _joined(parts: Sequence[Tensor], alternating: bool) -> Tensor:
    """Tensors one below the other, or a row of each in turn."""
    if len(parts) == 1:
        return parts[0]
    return torch.stack(tuple(parts), 1).flatten(0, 1) if alternating else torch.cat(tuple(parts))
