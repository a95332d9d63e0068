"""The metadata words of sparse tensor cores, and a compressed transpose of W^{R,C}, in plain torch.

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

from dataclasses import dataclass

import torch
from torch import Tensor

from fxsparse.ops.nm import Pattern, nm_mask, pack, unpack

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
    halves = padded.view(torch.int16).to(torch.int32) & 0xFFFF
    # [rows / 32, which 16, low or high, g, columns / 32, h]
    parts = halves.view(padded.shape[0] // 32, 2, 2, 8, padded.shape[1] // 4, 2)
    words = parts[:, :, 0] | (parts[:, :, 1] << 16)
    return words.permute(0, 3, 2, 1, 4).reshape(words.shape[0], -1, 32).contiguous()


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
    halves = padded.view(torch.int16).to(torch.int32) & 0xFFFF
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


@dataclass(frozen=True)
class SparseTranspose:
    """(W^{R,C})^T ``[K, N]``, which is 2:4 along N, for the gradient of the input on sparse tensor cores.

    It costs the memory of W^R once more. Its pattern holds as long as indices and column mask do; its values follow W's
    by :meth:`refresh`.

    Attributes:
        values: ``[K, N / 2]``.
        metadata: int32, of :func:`pack_metadata`.
        origin: ``[K, N / 2]``, int32 where that reaches, else int64: where each value lies in the flattened values of
            W; those that lie nowhere, where fewer than two of four are kept, point at the end.
    """

    values: Tensor
    metadata: Tensor
    origin: Tensor

    @classmethod
    def of(cls, values: Tensor, indices: Tensor, column_mask: Tensor) -> SparseTranspose:
        """Makes it from a 2:4 weight whose columns were pruned 2:4 too.

        Args:
            values, indices, column_mask: of W ``[N, K]`` in the form of `fxsparse.ops.nm`; N, K multiples of 16.
        """
        kept, columns = values.shape[1], values.shape[1] * 2
        number = torch.arange(1, values.numel() + 1, device=values.device).view_as(values)
        bit = torch.arange(kept, device=values.device)
        survives = (column_mask[:, bit // 8] >> (bit % 8)) & 1
        # 1 + where each weight's value lies, 0 for those not in W^{R,C}
        where = unpack(number * survives, indices, _PATTERN, columns).t().contiguous()
        mask = nm_mask(where != 0, _PATTERN)
        origin, packed = pack(where, mask, _PATTERN)
        number_type = torch.int32 if values.numel() < 2**31 else torch.int64
        origin = torch.where(origin == 0, values.numel(), origin - 1).to(number_type)
        transpose = cls(values.new_empty(origin.shape), pack_metadata(packed), origin)
        transpose.refresh(values)
        return transpose

    def refresh(self, values: Tensor) -> None:
        """Takes over changed values of W, in place."""
        flat = torch.nn.functional.pad(values.detach().reshape(-1), (0, 1))
        torch.index_select(flat, 0, self.origin.view(-1), out=self.values.view(-1))
