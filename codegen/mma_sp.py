"""The instruction of sparse tensor cores, and which thread holds which element of its operands, as Gluon source.

``mma.sp`` (sm_80 and up) multiplies 16 compressed rows of W by 8 rows of x and takes half the time of its dense twin.
Triton has no operation for it; Gluon fixes which thread holds which element, so that inline assembly can call it:

    W     16 rows x 32 columns, 2 of 4 kept:   A  16 x 16 values, as a dense m16n8k16 operand
    x      8 rows x 32 columns:                B  register r of lane 4g + t holds row g, columns 8r + 2t, 8r + 2t + 1
    where  two of the 16-row tiles:            E  one word a lane, read by one instruction in its selector 0 and 1
                                               (``metadata.py`` packs it)

Layouts and the order of the words follow the PTX ISA, section on matrix fragments for ``mma.sp.m16n8k32``. Words are 32
bits: two kept values of W, two elements of x.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxsparse.codegen.spec import Tile

Steps = list[list[int]]

# The step in rows and words that each bit of the lane number makes, in fragments of W and of x.
_LANES: Steps = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]


def instructions(dtype: str) -> str:
    """Two instructions, one for each 16 rows of W that a metadata word serves, as source of a string.

    Operands: 0-7 results, 8-15 W, 16-23 the metadata word (8 times the same), 24-31 x (twice the same four), 32-39 the
    accumulator, tied to the results.
    """
    kind = "bf16" if dtype == "bfloat16" else "f16"
    opcode = f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32"

    def registers(first: int) -> str:
        return "{" + ", ".join(f"${first + i}" for i in range(4)) + "}"

    lines = [
        f"{opcode} {registers(4 * s)}, {registers(8 + 4 * s)}, {registers(24)}, {registers(32 + 4 * s)}, $16, {s};"
        for s in (0, 1)
    ]
    return "\n".join(f'    "{line}\\n"' for line in lines)


@dataclass(frozen=True)
class Layouts:
    """Layouts of a tile that is cut into parts of ``warp_rows`` x ``warp_columns``, one for each warp.

    A linear layout lists, for each bit of the register, lane and warp number, the step that it makes in the tile.
    """

    tile: Tile
    warp_rows: int
    warp_columns: int

    @property
    def row_warps(self) -> int:
        return self.tile.rows // self.warp_rows

    @property
    def column_warps(self) -> int:
        return self.tile.columns // self.warp_columns

    def source(self) -> dict[str, str]:
        """Every layout by its name in the kernel."""
        tile = self.tile
        w_words, x_words, out = tile.depth // 4, tile.depth // 2, min(32, tile.columns // 8)
        domain = [1, 1, 1, self.warp_columns // 32, self.warp_rows // 8, 2, 4]
        return {
            **self._fragments(),
            "DOMAIN": f"gl.BlockedLayout({domain}, [1, 1, 32, 1, 1, 1, 1], "
            f"[{self.row_warps}, {self.column_warps}, 1, 1, 1, 1, 1], [6, 5, 4, 3, 2, 0, 1])",
            "W_COPY": self._copy(w_words),
            "X_COPY": self._copy(x_words),
            "E_COPY": self._copy(tile.depth),
            "W_SHARED": self._shared(w_words),
            "X_SHARED": self._shared(x_words),
            "E_SHARED": "gl.SwizzledSharedLayout(1, 1, 1, [1, 0])",
            "Y_LAYOUT": f"gl.BlockedLayout([8, 1], [{out}, {32 // out}], [1, {tile.warps}], [0, 1])",
        }

    def _fragments(self) -> dict[str, str]:
        """Operands of the instruction. Warps with the same rows hold the same x, those with the same columns the same
        W."""
        tile, row_bits, column_bits = self.tile, _bits(self.row_warps), _bits(self.column_warps)
        rows, columns = self.warp_rows, self.warp_columns
        same_rows, same_columns = [[0, 0] for _ in row_bits], [[0, 0] for _ in column_bits]
        w_warps = same_rows + [[columns * bit, 0] for bit in column_bits]
        x_warps = [[rows * bit, 0] for bit in row_bits] + same_columns
        e_warps = same_rows + [[columns // 32 * bit, 0] for bit in column_bits]
        w_registers = [[8, 0], [0, 4], *([16 * bit, 0] for bit in _bits(columns // 16))]
        x_registers = [[0, 4], [0, 8], *([8 * bit, 0] for bit in _bits(rows // 8))]
        e_registers = [[bit, 0] for bit in _bits(columns // 32)]
        return {
            "W_FRAGMENT": _linear(w_registers, _LANES, w_warps, [tile.columns, 8]),
            "X_FRAGMENT": _linear(x_registers, _LANES, x_warps, [tile.rows, 16]),
            "E_FRAGMENT": _linear(e_registers, [[0, bit] for bit in _bits(32)], e_warps, [tile.columns // 32, 32]),
        }

    def _copy(self, words: int) -> str:
        """Copies from memory, of 16 bytes a thread, of rows of so many words."""
        across = min(32, words // 4)
        return f"gl.BlockedLayout([1, 4], [{32 // across}, {across}], [{self.tile.warps}, 1], [1, 0])"

    def _shared(self, words: int) -> str:
        """Shared memory; rows of fewer than 128 bytes share a line of the 32 banks, and 16-byte chunks are swapped
        among such lines."""
        phase, chunks = max(1, 32 // words), min(8, words // 4)
        return f"gl.SwizzledSharedLayout(4, {phase}, {chunks}, [1, 0])"


def _bits(count: int) -> list[int]:
    """1, 2, 4, ... below a power of two."""
    return [1 << i for i in range((count - 1).bit_length())]


def _linear(registers: Steps, lanes: Steps, warps: Steps, shape: list[int]) -> str:
    return f"gl.DistributedLinearLayout({registers}, {lanes}, {warps}, [], {shape})"
