"""N:M sparsity: patterns, masks, and the compressed form of a weight.

A weight ``[out, in]`` is cut into groups of m consecutive elements along ``in``; n of each are kept:

    weight   | a . . b | . c d . |     kept = in * n / m values a row
    values     a b       c d           [out, kept], in order
    indices    0 3       1 2           position inside the group, ascending

Indices are packed into bytes, the first in the lowest bits: 2 bits each for m <= 4, 4 bits for m <= 16, else 8. At 2:4
a nibble is ``first | second << 2``, the order of sparse tensor cores. Rows are padded with zeros to whole bytes.

Several matrices in one tensor ``[experts, out, in]`` are cut the same way, each row of each.

The column mask is W^{R,C}: bit k of byte j tells whether kept value 8j + k also survives a pruning along ``out``.

In every mask True (1) means kept, and of equal scores the lower index is kept.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fxsparse.errors import CheckpointError, OptionError, RewriteError
from fxsparse.ops.transposable import transposable_blocks
from fxsparse.options import Written, shown

WITH_KERNELS = ((1, 2), (2, 4), (1, 4), (2, 8), (4, 8))
"""Patterns n:m that kernels are generated for, on GPUs and CPUs. Others run as the reference or a dense weight."""

_POINTWISE = 4  # largest n whose values a compiler puts in their places by comparing
_PAIRWISE = 16  # largest m whose groups are ranked by comparing pairs, which beats sorting short groups


@dataclass(frozen=True)
class Pattern:
    """n of every m consecutive weights are kept.

    Attributes:
        n: kept weights of a group.
        m: weights of a group.

    Raises:
        OptionError: not 1 <= n < m <= 256.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        for name, number in (("n", self.n), ("m", self.m)):
            if isinstance(number, bool) or not isinstance(number, int):
                raise OptionError(f"{name}={number!r} of an N:M pattern must be a whole number")
        if not 1 <= self.n < self.m <= 256:
            hint = f"; did you mean {self.m}:{self.n}?" if 1 <= self.m < self.n <= 256 else ""
            raise OptionError(
                f"pattern {self.n}:{self.m} means nothing: n:m keeps n of every m weights, 1 <= n < m <= 256{hint}"
            )

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """The pattern that ``"2:4"`` spells.

        Raises:
            OptionError: it spells none.
        """
        found = re.fullmatch(r"\s*([0-9]{1,9})\s*:\s*([0-9]{1,9})\s*", text) if isinstance(text, str) else None
        if found is None:
            raise OptionError(f'pattern {shown(text)} is not of the form "n:m", such as "2:4"')
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> float:
        """Share of the weights that is kept."""
        return self.n / self.m

    @property
    def index_bits(self) -> int:
        """Bits of one packed index."""
        return 2 if self.m <= 4 else 4 if self.m <= 16 else 8

    def kept(self, in_features: int) -> int:
        """Kept values of a row of ``in_features`` weights."""
        return in_features // self.m * self.n

    def index_bytes(self, in_features: int) -> int:
        """Bytes of a row of packed indices."""
        return -(-self.kept(in_features) * self.index_bits // 8)


PatternText = Annotated[
    str, Written("n:m (such as 2:4)", canonical=lambda text: str(Pattern.parse(text)), also=(Pattern,))
]
"""The text of a pattern, as an option declares it."""


# --- masks ------------------------------------------------------------------------------------------------------------


def nm_mask(scores: Tensor, pattern: Pattern, dim: int = -1) -> Tensor:
    """Keeps the n highest scores of every m consecutive ones.

    Args:
        scores: any shape and real dtype; a NaN counts as infinity, so it is kept and shows.
        pattern: n:m.
        dim: dimension the groups lie along; its size is a multiple of m.

    Returns:
        bool, the shape of ``scores``, exactly n True a group.

    Raises:
        RewriteError: the dimension is not a multiple of m.
    """
    _check_divisible(scores, pattern, dim)
    if scores.is_meta:
        return torch.empty_like(scores, dtype=torch.bool)
    scores = scores.detach()
    if scores.dtype == torch.bool:
        scores = scores.to(torch.uint8)
    elif scores.is_floating_point():
        scores = torch.where(scores.isnan(), math.inf, scores)
    groups = scores.movedim(dim, -1).unflatten(-1, (-1, pattern.m))
    if pattern.m <= _PAIRWISE:
        mask = _ranks(groups) < pattern.n
    else:
        order = groups.sort(dim=-1, descending=True, stable=True).indices
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, order[..., : pattern.n], True)
    return mask.flatten(-2).movedim(-1, dim).contiguous()


def _ranks(groups: Tensor) -> Tensor:
    """How many scores of its group come before each one, uint8."""
    scores = groups.unbind(-1)
    ranks = [torch.zeros_like(score, dtype=torch.uint8) for score in scores]
    for i, j in itertools.combinations(range(len(scores)), 2):
        first = scores[i] >= scores[j]
        ranks[j] += first
        ranks[i] += ~first
    return torch.stack(ranks, -1)


def double_prune_mask(weight: Tensor, mask: Tensor, pattern: Pattern) -> Tensor:
    """The mask of W^{R,C}: what is kept when W^R is pruned once more along ``out`` (SLoPe, arXiv 2405.16325, eq. 6).

    Args:
        weight: ``[*, out, in]``, or W^R itself.
        mask: bool of the same shape, of W^R.
        pattern: n:m of the second pruning, by magnitude.

    Returns:
        bool of the same shape, a subset of ``mask`` with at most n True in every m consecutive rows of a column.

    Raises:
        RewriteError: the shapes differ, or the rows are not a multiple of m.
    """
    _check_same_shape(weight, mask)
    scores = weight.detach().abs()
    return nm_mask(scores.masked_fill(~mask, -1), pattern, dim=-2) & mask


def transposable_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    """Keeps n of every m along both dimensions at once, so that a weight and its transpose are both N:M.

    In every m x m block each row and each column keeps n, of the highest total score for m <= 4, and of a high one
    that no single exchange betters for larger m (``fxsparse.ops.transposable`` says how).

    Args:
        scores: ``[*, out, in]``, both multiples of m; a NaN counts as the highest score.
        pattern: n:m.

    Returns:
        bool of the same shape.

    Raises:
        RewriteError: ``scores`` is no matrix nor several, or a dimension is not a multiple of m.
    """
    if scores.dim() < 2:
        raise RewriteError(f"a transposable mask needs scores [out, in], these are {list(scores.shape)}")
    _check_divisible(scores, pattern, -2)
    _check_divisible(scores, pattern, -1)
    if not _readable(scores):
        return torch.empty_like(scores, dtype=torch.bool)
    m, (*_, rows, columns) = pattern.m, scores.shape
    leading = math.prod(scores.shape[:-2])
    blocks = scores.detach().reshape(leading, rows // m, m, columns // m, m).transpose(2, 3)
    mask = transposable_blocks(blocks.reshape(-1, m, m), pattern.n)
    return mask.view(blocks.shape).transpose(2, 3).reshape(scores.shape)


def extra_zeros(pattern: Pattern) -> float:
    """Share of all weights that the column pruning of a random W^R makes zero in addition (SLoPe, Lemma 2.1).

        sum over j = n+1 .. m of C(m, j) s^j (1 - s)^(m - j) (j - n) / m,  s = n / m

    This gives 12.5 % for 1:2, 9.375 % for 2:4 and 5.84 % for 2:8. The paper prints 3.39 % for 2:8, which is neither
    what its formula gives nor what random matrices show.
    """
    n, m, s = pattern.n, pattern.m, pattern.density
    return sum(math.comb(m, j) * s**j * (1 - s) ** (m - j) * (j - n) / m for j in range(n + 1, m + 1))


def satisfies(weight: Tensor, pattern: Pattern) -> bool:
    """Whether every m consecutive weights of a row ``[out, in]`` hold at most n that are not zero."""
    if weight.shape[-1] % pattern.m:
        return False
    return bool(((weight != 0).unflatten(-1, (-1, pattern.m)).sum(-1) <= pattern.n).all())


def mask_of(weight: Tensor, pattern: Pattern) -> Tensor:
    """A mask, bool ``[out, in]``, that keeps every weight that is not zero, and zeros where a group has fewer than n.

    Raises:
        RewriteError: a group has more than n.
    """
    _check_divisible(weight, pattern, -1)
    if _readable(weight) and not satisfies(weight, pattern):
        raise RewriteError(
            f"the weight {list(weight.shape)} is not {pattern}: a group of {pattern.m} has more than {pattern.n} that "
            "are not zero; prune it first, or give a mask"
        )
    return nm_mask(weight != 0, pattern)


# --- the compressed form ----------------------------------------------------------------------------------------------


def pack(weight: Tensor, mask: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Compresses a masked weight.

    Args:
        weight: ``[out, in]``, or ``[experts, out, in]``.
        mask: bool of the same shape, exactly n True in every group of m.
        pattern: n:m.

    Returns:
        values ``[..., out, in * n / m]`` of the weight's dtype and packed indices, uint8. A kept zero stays a value.

    Raises:
        RewriteError: the shapes do not fit, or a group does not keep exactly n.
    """
    _check_mask(weight, mask, pattern)
    positions = _kept_positions(mask, pattern)
    values = weight.unflatten(-1, (-1, pattern.m)).gather(-1, positions)
    return values.flatten(-2), _pack_bits(positions.flatten(-2), pattern.index_bits)


def unpack(values: Tensor, indices: Tensor, pattern: Pattern, in_features: int) -> Tensor:
    """The dense weight ``[..., out, in_features]``, zero where pruned, of values and packed indices.

    Differentiable in ``values``, without control flow on data, and any torch device or tracer can run it. Traced over
    fake tensors it compares places, which a compiler makes one pass of that reads each value and writes each weight
    once; it could not fuse a scatter, which is faster where every operator runs on its own.
    """
    if pattern.n <= _POINTWISE and isinstance(values, FakeTensor):
        codes = _unpack_bits(indices, pattern.index_bits, pattern.kept(in_features)).unflatten(-1, (-1, pattern.n))
        kept, place = values.unflatten(-1, (-1, pattern.n)), torch.arange(pattern.m, device=values.device)
        dense = values.new_zeros(())
        for j in range(pattern.n):
            dense = torch.where(codes[..., j, None] == place, kept[..., j, None], dense)
        return dense.flatten(-2)
    positions = _positions(indices, pattern, in_features)
    groups = values.new_zeros(*values.shape[:-1], in_features // pattern.m, pattern.m)
    return groups.scatter(-1, positions, values.unflatten(-1, (-1, pattern.n))).flatten(-2)


def gather_kept(dense: Tensor, indices: Tensor, pattern: Pattern) -> Tensor:
    """The elements of ``dense [..., out, in]`` at the kept positions, ``[..., out, in * n / m]``: what :func:`unpack`
    undoes."""
    positions = _positions(indices, pattern, dense.shape[-1])
    return dense.unflatten(-1, (-1, pattern.m)).gather(-1, positions).flatten(-2)


def unpack_mask(indices: Tensor, pattern: Pattern, in_features: int) -> Tensor:
    """The mask, bool ``[..., out, in_features]``, of packed indices."""
    kept = torch.ones(*indices.shape[:-1], pattern.kept(in_features), dtype=torch.bool, device=indices.device)
    return unpack(kept, indices, pattern, in_features)


def pack_column_mask(column_mask: Tensor, mask: Tensor, pattern: Pattern) -> Tensor:
    """One bit for every kept value: whether it survives the column pruning.

    Args:
        column_mask: bool ``[..., out, in]``; only its entries inside ``mask`` count.
        mask: bool of the same shape, of W^R.
        pattern: n:m of W^R, whatever pattern the columns have.

    Returns:
        uint8 ``[..., out, ceil(in * n / m / 8)]``.

    Raises:
        RewriteError: as for :func:`pack`.
    """
    _check_mask(column_mask, mask, pattern)
    kept = column_mask.unflatten(-1, (-1, pattern.m)).gather(-1, _kept_positions(mask, pattern))
    return _pack_bits(kept.flatten(-2), 1)


def unpack_column_mask(packed: Tensor, mask: Tensor, pattern: Pattern) -> Tensor:
    """The column mask, bool ``[..., out, in]``, of its packed bits and the mask of W^R."""
    kept = kept_columns(packed, pattern.kept(mask.shape[-1])).unflatten(-1, (-1, pattern.n))
    groups = torch.zeros_like(mask).unflatten(-1, (-1, pattern.m))
    return groups.scatter(-1, _kept_positions(mask, pattern), kept).flatten(-2)


def kept_columns(packed: Tensor, kept: int) -> Tensor:
    """The bits of a packed column mask as bool ``[..., out, kept]``."""
    return _unpack_bits(packed, 1, kept).bool()


def validate(
    values: Tensor,
    indices: Tensor,
    pattern: Pattern,
    in_features: int,
    column_mask: Tensor | None = None,
    *,
    name: str = "weight",
) -> None:
    """Checks a compressed weight that comes from outside.

    Args:
        values, indices, column_mask: as the operators take them.
        pattern: n:m.
        in_features: of the dense weight.
        name: of the weight, for the message.

    Raises:
        CheckpointError: a shape or dtype is wrong, an index is out of range or out of order, or padding is not zero.
    """
    if in_features % pattern.m:
        raise CheckpointError(f"{name}: {in_features} columns are not a multiple of {pattern.m}, as {pattern} needs")
    rows = tuple(next((part.shape[:-1] for part in (values, indices) if part.dim() in (2, 3)), (0,)))
    kept = pattern.kept(in_features)
    _check_state(f"{name}_values", values, (*rows, kept))
    if not values.is_floating_point():
        raise CheckpointError(f"{name}_values is {values.dtype}, not a real floating-point type")
    _check_bits(f"{name}_indices", indices, rows, kept, pattern.index_bits)
    if column_mask is not None:
        _check_bits(f"{name}_column_mask", column_mask, rows, kept, 1)
    if not _readable(indices):
        return
    positions = _unpack_bits(indices, pattern.index_bits, kept).unflatten(-1, (-1, pattern.n)).int()
    _complain(f"{name}_indices", positions >= pattern.m, f"holds an index that is not below m = {pattern.m}")
    disorder = positions[..., 1:] <= positions[..., :-1]
    _complain(f"{name}_indices", disorder, "has a group whose indices do not ascend")


# --- bits -------------------------------------------------------------------------------------------------------------


def _kept_positions(mask: Tensor, pattern: Pattern) -> Tensor:
    """Positions inside their group of the kept, ascending, int64 ``[..., out, groups, n]``."""
    groups = mask.unflatten(-1, (-1, pattern.m)).to(torch.uint8)
    return groups.sort(dim=-1, descending=True, stable=True).indices[..., : pattern.n]


def _positions(indices: Tensor, pattern: Pattern, in_features: int) -> Tensor:
    """The same positions from packed indices."""
    return _unpack_bits(indices, pattern.index_bits, pattern.kept(in_features)).unflatten(-1, (-1, pattern.n)).long()


def _pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Integers below 2^bits ``[*, count]`` as uint8 ``[*, ceil(count * bits / 8)]``, the first lowest."""
    a_byte = 8 // bits
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[-1] % a_byte))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (codes.unflatten(-1, (-1, a_byte)) << shifts).sum(-1, dtype=torch.uint8)


def _unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` integers of every row, uint8 ``[*, count]``."""
    if bits == 8:
        return packed[..., :count]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)[..., :count]


# --- checks -----------------------------------------------------------------------------------------------------------


def _readable(tensor: Tensor) -> bool:
    """Whether a tensor has contents, and not only a shape."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def _check_divisible(tensor: Tensor, pattern: Pattern, dim: int) -> None:
    if tensor.dim() == 0 or tensor.shape[dim] % pattern.m:
        raise RewriteError(
            f"dimension {dim} of {list(tensor.shape)} is not a multiple of {pattern.m}, as {pattern} needs"
        )


def _check_same_shape(weight: Tensor, mask: Tensor) -> None:
    if weight.shape != mask.shape or mask.dtype != torch.bool:
        raise RewriteError(
            f"a mask is bool and shaped as its weight {list(weight.shape)}, this one is {mask.dtype} {list(mask.shape)}"
        )


def _check_mask(weight: Tensor, mask: Tensor, pattern: Pattern) -> None:
    if weight.dim() not in (2, 3):
        raise RewriteError(
            f"an N:M weight is a matrix [out, in], or several [experts, out, in], this one is {list(weight.shape)}"
        )
    _check_same_shape(weight, mask)
    _check_divisible(mask, pattern, -1)
    if _readable(mask) and not (mask.unflatten(-1, (-1, pattern.m)).sum(-1) == pattern.n).all():
        raise RewriteError(f"the mask is not {pattern}: a group of {pattern.m} does not keep exactly {pattern.n}")


def _check_state(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{name} is {list(tensor.shape)}, expected {list(shape)}")


def _check_bits(name: str, packed: Tensor, rows: tuple[int, ...], kept: int, bits: int) -> None:
    _check_state(name, packed, (*rows, -(-kept * bits // 8)))
    if packed.dtype != torch.uint8:
        raise CheckpointError(f"{name} is {packed.dtype}, expected torch.uint8")
    used = kept * bits % 8
    if used and _readable(packed):
        _complain(name, (packed[..., -1:] >> used) != 0, "has padding bits that are not zero")


def _complain(name: str, wrong: Tensor, what: str) -> None:
    if wrong.any():
        raise CheckpointError(f"{name} {what}, first in row {int(wrong.nonzero()[0, 0])}")
