"""The transpose of a 2:4 weight that is pruned along its rows too, compressed along them for sparse tensor cores.

    W^{R,C} [N, K], 2 of 4 along K and at most 2 of 4 along N   ->   (W^{R,C})^T [K, N], 2 of 4 along N

The gradient of a linear's input, dy W^{R,C}, is a product with that transpose (SLoPe, arXiv 2405.16325, eq. 6). It is
made anew in every step, from the values that the optimizer has just changed, so that nothing of it is stored: weights
and transpose pass through the device's memory once, 2.3 bytes a weight. No operator stands before this kernel; those on
sparse tensor cores call it (`fxsparse.codegen.fused_ops`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxsparse.codegen.launching import device_of, dtype_of
from fxsparse.codegen.loaded import kernel
from fxsparse.codegen.metadata import MMA_SP, WGMMA_SP, metadata_shape
from fxsparse.codegen.spec import Argument, NMSpec, Tile
from fxsparse.codegen.template import fill, module, planes, weight_tile
from fxsparse.codegen.tiles import LARGE, SHIPPED
from fxsparse.errors import OptionError

SHIPPED["nm_transpose"] = {LARGE: Tile(128, 128, 1, warps=8, stages=1)}


@dataclass(frozen=True)
class NMTranspose(NMSpec):
    """The kernel; its tile's rows are along N and its columns along K.

    Attributes:
        instruction: that the metadata is for, `MMA_SP` or `WGMMA_SP`.
    """

    instruction: str = MMA_SP

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.n, self.m) != (2, 4) or self.dtype == "float32":
            raise OptionError(f"sparse tensor cores take 2:4 and 16 bits, not {self.n}:{self.m} and {self.dtype}")
        if self.instruction not in _PLACES:
            raise OptionError(f"instruction={self.instruction!r} is none of {', '.join(_PLACES)}")

    @property
    def name(self) -> str:
        return f"nm_transpose_{self.short_dtype}"

    @property
    def arguments(self) -> tuple[Argument, ...]:
        return (
            *(Argument("values", self.pointer), Argument("indices", "*u8"), Argument("column_mask", "*u8")),
            *(Argument("turned", self.pointer), Argument("metadata", "*i16")),
            *(Argument(name, "i32") for name in ("N", "K")),
            *(Argument(f"{name}_stride", "i32") for name in ("values", "indices", "column_mask", "turned")),
        )

    def render(self) -> str:
        return module(
            self,
            title=f"The transpose of W^{{R,C}}, compressed for {self.instruction}, {self.dtype}.",
            text=fill(_TEXT, instruction=self.instruction),
            constants={"N_TILE": self.tile.rows, "K_TILE": self.tile.columns, "GROUPS": self.tile.columns // 4},
            functions=[weight_tile(self, column_mask=True, rows_end=True, groups_end=True)],
            body=fill(
                _BODY,
                dtype=self.dtype,
                weights=planes("turned_tile", 4, "d", "K_TILE, N_TILE // 4"),
                nibbles=planes("nibble", 4, "b", "K_TILE, N_TILE // 16"),
                place=_PLACES[self.instruction],
            ),
        )


_TEXT = """
values [N, K / 2], indices [N, bytes] with a nibble for four weights, column_mask [N, bytes] with a bit for each value.
turned [K, N / 2], and metadata as halves of its words, in the order that $instruction reads; N is a multiple of 16.
Each program turns one tile. What is left of four weights of a column are those that are not zero; of a column with
fewer than two, the first ones.
"""

_BODY = """
rows = tl.program_id(0) * N_TILE + tl.arange(0, N_TILE)
columns = tl.program_id(1) * K_TILE + tl.arange(0, K_TILE)
tile = weight_tile(
    values,
    indices,
    column_mask,
    column_mask_stride,
    tl.minimum(rows, N - 1).to(tl.int64),
    rows < N,
    tl.program_id(1) * GROUPS,
    K // 4,
    values_stride,
    indices_stride,
)
turned_tile = tl.trans(tile.to(tl.uint16, bitcast=True))
$weights
# of the weights that are not zero the last, and the first before it
last = tl.where((d3 & 0x7FFF) != 0, 3, tl.where((d2 & 0x7FFF) != 0, 2, 1))
first = tl.where(((d2 & 0x7FFF) != 0) & (last > 2), 2, 0)
first = tl.where(((d1 & 0x7FFF) != 0) & (last > 1), 1, first)
first = tl.where((d0 & 0x7FFF) != 0, 0, first)
v0 = tl.where(first == 0, d0, tl.where(first == 1, d1, d2))
v1 = tl.where(last == 1, d1, tl.where(last == 2, d2, d3))
kept = tl.reshape(tl.join(v0, v1), (K_TILE, N_TILE // 2)).to(tl.$dtype, bitcast=True)
column = tl.program_id(0) * (N_TILE // 2) + tl.arange(0, N_TILE // 2)
exists = (columns < K)[:, None] & (column < N // 2)[None, :]
tl.store(turned + columns.to(tl.int64)[:, None] * turned_stride + column[None, :], kept, mask=exists)
nibble = first | (last << 2)
$nibbles
half = b0 | (b1 << 4) | (b2 << 8) | (b3 << 12)
row = columns[:, None]
sixteen = tl.program_id(0) * (N_TILE // 16) + tl.arange(0, N_TILE // 16)[None, :]
$place
place = word.to(tl.int64) * 2 + row // 8 % 2
tl.store(metadata + place, half.to(tl.int16), mask=(row < rows_end) & (sixteen < sixteens))
"""

# Which word holds 16 columns of a row, and how many rows and times 16 columns there are with padding (`metadata`).
_PLACES = {
    MMA_SP: """
rows_end = (K + 31) // 32 * 32
sixteens = (N + 127) // 128 * 8
word = (row // 32 * (sixteens // 2) + sixteen // 2) * 32 + row % 8 * 4 + row // 16 % 2 * 2 + sixteen % 2
""",
    WGMMA_SP: """
rows_end = (K + 127) // 128 * 128
sixteens = (N + 63) // 64 * 4
word = (sixteen // 4 * (rows_end // 64) + row // 64) * 128 + row // 16 % 4 * 32 + row % 8 * 4 + sixteen % 4
""",
}


def nm_transpose(
    values: Tensor, indices: Tensor, column_mask: Tensor, instruction: str, *, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """The transpose of W^{R,C}.

    Args:
        values, indices, column_mask: of W ``[out, in]``, 2:4, bfloat16 or float16, in the form of ``fxsparse.ops.nm``;
            ``out`` is a multiple of 16, and at most two of every four rows survive in a column.
        instruction: `MMA_SP` or `WGMMA_SP`.
        tile: instead of the default one.

    Returns:
        values ``[in, out / 2]``, and metadata, int32, as :func:`~fxsparse.codegen.metadata.pack_metadata` or
        :func:`~fxsparse.codegen.metadata.pack_wgmma_metadata` pack it.
    """
    rows, columns = values.shape[0], values.shape[1] * 2
    if rows % 16:
        raise OptionError(f"{rows} rows are not a multiple of 16, as the transpose for sparse tensor cores needs")
    turned = values.new_empty(columns, rows // 2)
    metadata = torch.empty(metadata_shape(instruction, columns, rows), dtype=torch.int32, device=values.device)
    tile = tile or SHIPPED["nm_transpose"][LARGE]
    spec = NMTranspose(dtype_of(values), tile, 2, 4, instruction)
    sources = (values.contiguous(), indices.contiguous(), column_mask.contiguous())
    if values.numel():
        padded = metadata_shape(instruction, columns, rows)
        wide, tall = (padded[0] * 32, padded[1] * 32) if instruction == MMA_SP else (padded[1] * 64, padded[0] * 64)
        with device_of(values):
            kernel(spec).launch(
                (-(-tall // tile.rows), -(-wide // tile.columns)),
                *(*sources, turned, metadata.view(torch.int16), rows, columns),
                *(*(source.stride(0) for source in sources), turned.stride(0)),
            )
    return turned, metadata
