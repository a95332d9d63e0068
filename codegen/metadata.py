"""The metadata words of sparse tensor cores, and the compressed transpose of W^{R,C}, in plain torch.

A 2:4 weight ``[N, K]`` has one nibble for four weights, ``first | second << 2``: `ops.nm` packs two to a
byte. Four nibbles of a row are half a word. The word of lane 4g + 2s + h, for 32 rows and 32 columns, holds

    low half    row 16s + g      columns 16h .. 16h + 15
    high half   row 16s + g + 8  the same columns

so that the instruction for the first 16 rows reads lanes 4g, 4g + 1 and the one for the last 16 lanes 4g + 2, 4g + 3
(PTX ISA, sparse matrix storage of ``mma.sp``). Hopper's ``wgmma.sp`` takes 64 rows, 16 for each of four warps, and the
same lanes then tell two instructions along the columns apart: for 64 rows and 64 columns, lane 4g + 2s + h of warp v

    low half    row 16v + g      columns 32s + 16h .. 32s + 16h + 15
    high half   row 16v + g + 8  the same columns
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxsparse.ops.nm import Pattern, kept_columns, nm_mask, pack, unpack

MMA_SP, WGMMA_SP = "mma.sp", "wgmma.sp"
"""The instructions that metadata is packed for."""

_PATTERN = Pattern(2, 4)
_FIRST_TWO = 0x44  # two groups that keep positions 0 and 1, which is what padding may say


def pack_metadata(indices: Tensor) -> Tensor:
    """Metadata words of packed 2:4 indices.

    Args:
        indices: uint8 ``[N, ceil(K / 8)]``; K is a multiple of 16.

    Returns:
        int32 ``[ceil(N / 32), 4 ceil(K / 128), 32]``, as kernels copy it in steps of up to 128 columns; what is beyond
        the weight is valid.
    """
    rows, row_bytes = indices.shape
    padded = torch.nn.functional.pad(indices, (0, -row_bytes % 16, 0, -rows % 32), value=_FIRST_TWO)
    halves = _halves(padded)
    # [rows / 32, which 16, low or high, g, columns / 32, h]
    parts = halves.view(padded.shape[0] // 32, 2, 2, 8, padded.shape[1] // 4, 2)
    words = parts[:, :, 0] | (parts[:, :, 1] << 16)
    return words.permute(0, 3, 2, 1, 4).reshape(words.shape[0], -1, 32).contiguous()


def _halves(packed: Tensor) -> Tensor:
    """Pairs of bytes as numbers; without a view of another dtype, so that a compiler can fuse it with what follows."""
    low, high = packed.unflatten(1, (-1, 2)).to(torch.int32).unbind(-1)
    return low | (high << 8)


def unpack_metadata(metadata: Tensor, rows: int, columns: int) -> Tensor:
    """The indices that :func:`pack_metadata` packed, uint8 ``[rows, columns / 8]``."""
    words = metadata.view(metadata.shape[0], metadata.shape[1], 8, 2, 2).permute(0, 3, 2, 1, 4)
    halves = torch.stack([words & 0xFFFF, (words >> 16) & 0xFFFF], 2)
    packed = halves.reshape(metadata.shape[0] * 32, -1).to(torch.int16).view(torch.uint8)
    return packed[:rows, : columns // 8].contiguous()


def pack_wgmma_metadata(indices: Tensor) -> Tensor:
    """Metadata words of packed 2:4 indices, as ``wgmma.sp`` takes them.

    Args:
        indices: uint8 ``[N, ceil(K / 8)]``; K is a multiple of 16.

    Returns:
        int32 ``[ceil(K / 64), 2 ceil(N / 128), 128]``, the rest of the last words valid.
    """
    rows, row_bytes = indices.shape
    padded = torch.nn.functional.pad(indices, (0, -row_bytes % 8, 0, -rows % 128), value=_FIRST_TWO)
    halves = _halves(padded)
    # [rows / 64, warp, low or high, g, columns / 64, s, h]
    parts = halves.view(padded.shape[0] // 64, 4, 2, 8, padded.shape[1] // 8, 2, 2)
    words = parts[:, :, 0] | (parts[:, :, 1] << 16)
    return words.permute(3, 0, 1, 2, 4, 5).reshape(words.shape[3], words.shape[0], 128).contiguous()


def unpack_wgmma_metadata(metadata: Tensor, rows: int, columns: int) -> Tensor:
    """The indices that :func:`pack_wgmma_metadata` packed, uint8 ``[rows, columns / 8]``."""
    steps, blocks, _ = metadata.shape
    words = metadata.view(steps, blocks, 4, 8, 2, 2).permute(1, 2, 3, 0, 4, 5)
    halves = torch.stack([words & 0xFFFF, (words >> 16) & 0xFFFF], 2)
    packed = halves.reshape(blocks * 64, -1).to(torch.int16).view(torch.uint8)
    return packed[:rows, : columns // 8].contiguous()


def metadata_shape(instruction: str, rows: int, columns: int) -> tuple[int, int, int]:
    """The shape of the metadata of a weight ``[rows, columns]``."""
    if instruction == MMA_SP:
        return -(-rows // 32), -(-columns // 128) * 4, 32
    return -(-columns // 64), -(-rows // 128) * 2, 128


def compressed_transpose(values: Tensor, indices: Tensor, column_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(W^{R,C})^T ``[K, N]``, which is 2:4 along N, of a 2:4 weight whose columns were pruned 2:4 too.

    Args:
        values, indices, column_mask: of W ``[N, K]`` in the form of `fxsparse.ops.nm`; N is a multiple of 4.

    Returns:
        values ``[K, N / 2]`` and packed indices; where a column keeps fewer than two of four, its first are kept zeros.
    """
    survivors = torch.where(kept_columns(column_mask, values.shape[1]), values, 0)
    turned = unpack(survivors, indices, _PATTERN, values.shape[1] * 2).t().contiguous()
    return pack(turned, nm_mask(turned != 0, _PATTERN), _PATTERN)


def columns_are_two_four(indices: Tensor, column_mask: Tensor, columns: int) -> bool:
    """Whether at most two of every four rows of W^{R,C} ``[N, columns]`` survive in a column, so that its transpose is
    2:4; ``indices`` and ``column_mask`` are those of a 2:4 weight."""
    if indices.shape[0] % 4:
        return False
    survives = unpack(kept_columns(column_mask, columns // 2).to(torch.uint8), indices, _PATTERN, columns)
    return bool((survives.unflatten(0, (-1, 4)).sum(1, dtype=torch.uint8) <= 2).all())


PACK: dict[str, Callable[[Tensor], Tensor]] = {MMA_SP: pack_metadata, WGMMA_SP: pack_wgmma_metadata}
"""Packs indices for an instruction."""
