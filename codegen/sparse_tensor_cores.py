"""2:4 products on sparse tensor cores: y = x W^T with W never expanded.

The ``mma.sp`` instruction (sm_80 and up) multiplies 16 compressed rows of W by 8 rows of x and takes half the time of
its dense twin. Triton has no operation for it, so the kernel is written in Gluon, which fixes which thread holds which
element, and calls the instruction as inline assembly:

    W     16 rows x 32 columns, 2 of 4 kept:   A  16 x 16 values, as a dense m16n8k16 operand
    x      8 rows x 32 columns:                B  register r of lane 4g + t holds row g, columns 8r + 2t, 8r + 2t + 1
    where  two of the 16-row tiles:            E  one word a lane, read by one instruction in its selector 0 and 1
                                               (``metadata.py`` packs it)

Layouts and the order of the words follow the PTX ISA, section on matrix fragments for ``mma.sp.m16n8k32``.

The gradient of the input, dy W^{R,C}, is the same product with the transpose of W^{R,C}, which is 2:4 along ``out``;
``metadata.SparseTranspose`` keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from fxsparse.codegen.epilogue import Epilogue
from fxsparse.codegen.spec import Argument, Spec
from fxsparse.codegen.template import fill, parameters
from fxsparse.errors import OptionError

_KEEP_FIRST_TWO = 0x44444444
"""Metadata that the instruction accepts for values that are all zero."""


@dataclass(frozen=True)
class SparseTensorCoreLinear(Spec):
    """The kernel; its tile's rows are along M, its columns along N, its depth along K.

    Attributes:
        warp_rows, warp_columns: of the part of the tile that one warp computes; multiples of 8 and of 32.
        epilogue: what follows the product.
    """

    gluon: ClassVar[bool] = True

    warp_rows: int = 64
    warp_columns: int = 64
    epilogue: Epilogue = field(default_factory=Epilogue)

    def __post_init__(self) -> None:
        super().__post_init__()
        tile = self.tile
        if self.dtype == "float32":
            raise OptionError("sparse tensor cores take bfloat16 and float16, not float32")
        fits = tile.rows % self.warp_rows == tile.columns % self.warp_columns == 0
        if not fits or self.warp_rows % 8 or self.warp_columns % 32 or tile.depth % 32:
            raise OptionError(f"tile {tile} cannot be cut into warps of {self.warp_rows}x{self.warp_columns}")
        if self._row_warps * self._column_warps != tile.warps or tile.stages < 2:
            raise OptionError(f"tile {tile} needs {self._row_warps * self._column_warps} warps and 2 stages or more")

    @property
    def _row_warps(self) -> int:
        return self.tile.rows // self.warp_rows

    @property
    def _column_warps(self) -> int:
        return self.tile.columns // self.warp_columns

    @property
    def name(self) -> str:
        return f"sparse_tensor_core_linear_{self.short_dtype}"

    @property
    def arguments(self) -> tuple[Argument, ...]:
        return (
            *(Argument(name, "*i32") for name in ("x", "values", "metadata")),
            Argument("y", self.pointer),
            *self.epilogue.arguments(self.pointer),
            *(Argument(name, "i32") for name in ("M", "N", "K", "y_stride")),
        )

    def render(self) -> str:
        tile = self.tile
        sizes = {
            "M_TILE": tile.rows,
            "N_TILE": tile.columns,
            "K_TILE": tile.depth,
            "STAGES": tile.stages,
            "ROW_WARPS": self._row_warps,
            "COLUMN_WARPS": self._column_warps,
            "PAIRS": self.warp_columns // 32,
            "EIGHTS": self.warp_rows // 8,
        }
        steps = self.epilogue.lines(
            lang="gl",
            column="columns[:, None]",
            offset="y_rows[None, :]",
            mask="exists",
            column_mask="(columns < N)[:, None]",
        )
        source = fill(
            _SOURCE,
            title=self.epilogue.formula("x W^T"),
            dtype=self.dtype,
            spec=self.describe(),
            sizes="\n".join(f"{name} = gl.constexpr({size})" for name, size in sizes.items()),
            layouts="\n".join(f"{name} = gl.constexpr({text})" for name, text in self._layouts().items()),
            instructions=self._instructions(),
            group=str(tile.group),
            name=self.name,
            parameters=parameters(self.arguments),
            valid=hex(_KEEP_FIRST_TWO),
            epilogue=steps,
        )
        return source + "\n"

    def _instructions(self) -> str:
        """Two instructions, one for each 16 rows of W that a metadata word serves.

        Operands: 0-7 results, 8-15 W, 16-23 the metadata word (8 times the same), 24-31 x (twice the same four),
        32-39 what is added to, tied to the results.
        """
        kind = "bf16" if self.dtype == "bfloat16" else "f16"
        opcode = f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32"

        def registers(first: int) -> str:
            return "{" + ", ".join(f"${first + i}" for i in range(4)) + "}"

        lines = [
            f"{opcode} {registers(4 * s)}, {registers(8 + 4 * s)}, {registers(24)}, {registers(32 + 4 * s)}, $16, {s};"
            for s in (0, 1)
        ]
        return "\n".join(f'    "{line}\\n"' for line in lines)

    def _layouts(self) -> dict[str, str]:
        """Which thread holds what, as source.

        A linear layout lists, for each bit of the register, lane and warp number, the step it makes in the tile. Words
        are 32 bits: two kept values of W, two elements of x.
        """
        tile, warps = self.tile, self.tile.warps
        row_bits = [1 << i for i in range((self._row_warps - 1).bit_length())]
        column_bits = [1 << i for i in range((self._column_warps - 1).bit_length())]
        row_steps = [8 << i for i in range((self.warp_rows // 8 - 1).bit_length())]
        column_steps = [16 << i for i in range((self.warp_columns // 16 - 1).bit_length())]
        pair_steps = [1 << i for i in range((self.warp_columns // 32 - 1).bit_length())]
        lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
        zeros = [[0, 0] for _ in row_bits], [[0, 0] for _ in column_bits]
        w_warps = zeros[0] + [[self.warp_columns * bit, 0] for bit in column_bits]
        x_warps = [[self.warp_rows * bit, 0] for bit in row_bits] + zeros[1]
        e_warps = zeros[0] + [[self.warp_columns // 32 * bit, 0] for bit in column_bits]

        def linear(registers: list[list[int]], lanes: list[list[int]], warps: list[list[int]], shape: list[int]) -> str:
            return f"gl.DistributedLinearLayout({registers}, {lanes}, {warps}, [], {shape})"

        def copy(words: int) -> str:
            across = min(32, words // 4)
            return f"gl.BlockedLayout([1, 4], [{32 // across}, {across}], [{warps}, 1], [1, 0])"

        def shared(words: int) -> str:
            # rows of fewer than 128 bytes share a line of the 32 banks; 16-byte chunks are swapped among such lines
            phase, chunks = max(1, 32 // words), min(8, words // 4)
            return f"gl.SwizzledSharedLayout(4, {phase}, {chunks}, [1, 0])"

        w_words, x_words, out = tile.depth // 4, tile.depth // 2, min(32, tile.columns // 8)
        domain = [1, 1, 1, self.warp_columns // 32, self.warp_rows // 8, 2, 4]
        return {
            "W_FRAGMENT": linear(
                [[8, 0], [0, 4], *([step, 0] for step in column_steps)], lanes, w_warps, [tile.columns, 8]
            ),
            "X_FRAGMENT": linear([[0, 4], [0, 8], *([step, 0] for step in row_steps)], lanes, x_warps, [tile.rows, 16]),
            "E_FRAGMENT": linear(
                [[step, 0] for step in pair_steps], [[0, 1 << i] for i in range(5)], e_warps, [tile.columns // 32, 32]
            ),
            "DOMAIN": f"gl.BlockedLayout({domain}, [1, 1, 32, 1, 1, 1, 1], "
            f"[{self._row_warps}, {self._column_warps}, 1, 1, 1, 1, 1], [6, 5, 4, 3, 2, 0, 1])",
            "W_COPY": copy(w_words),
            "X_COPY": copy(x_words),
            "W_SHARED": shared(w_words),
            "X_SHARED": shared(x_words),
            "Y_LAYOUT": f"gl.BlockedLayout([8, 1], [{out}, {32 // out}], [1, {warps}], [0, 1])",
        }


_SOURCE = '''
"""y = $title, W 2:4 on sparse tensor cores, $dtype.

x [M, K] and values [N, K / 2] as words of two elements; metadata [N / 32, K / 32, 32] words, sizes rounded up;
y [M, N]. K is a multiple of 16.
Each program computes one tile of y. Copies from memory run STAGES - 1 steps ahead of the products.

Made by fxsparse.codegen from
$spec
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

$sizes

# Which thread holds what: steps of register, lane and warp bits.
$layouts

MMA_SP = gl.constexpr(
$instructions
)
CONSTRAINTS = gl.constexpr(",".join(["=&f"] * 8 + ["r"] * 24 + [str(i) for i in range(8)]))


@gluon.jit
def program_tile(rows, columns):
    # $group tiles of rows at a time, so that what a wave of programs reads stays in the L2 cache
    program = gl.program_id(0)
    row_tiles = gl.cdiv(rows, M_TILE)
    column_tiles = gl.cdiv(columns, N_TILE)
    group = program // ($group * column_tiles)
    height = gl.minimum(row_tiles - group * $group, $group)
    inside = program % ($group * column_tiles)
    return group * $group + inside % height, inside // height


@gluon.jit
def multiply(w, x, e, product):
    """product += w x^T for 32 columns of K; each operand is only renamed to the axes
    (row warp, column warp, lane, pair of 16 rows of W, 8 rows of x, which of the pair, register)."""
    w = gl.reshape(w, [COLUMN_WARPS, PAIRS, 2, 2, 8, 2, 4])
    w = gl.permute(w, [0, 4, 6, 1, 2, 5, 3])
    w = gl.convert_layout(gl.reshape(w, [1, COLUMN_WARPS, 32, PAIRS, 1, 2, 4]), DOMAIN, assert_trivial=True)
    x = gl.reshape(x, [ROW_WARPS, EIGHTS, 8, 4, 4])
    x = gl.permute(x, [0, 2, 4, 1, 3])
    x = gl.convert_layout(gl.reshape(x, [ROW_WARPS, 1, 32, 1, EIGHTS, 1, 4]), DOMAIN, assert_trivial=True)
    e = gl.permute(gl.reshape(e, [COLUMN_WARPS, PAIRS, 32]), [0, 2, 1])
    e = gl.convert_layout(gl.reshape(e, [1, COLUMN_WARPS, 32, PAIRS, 1, 1, 1]), DOMAIN, assert_trivial=True)
    return gl.inline_asm_elementwise(
        MMA_SP, CONSTRAINTS, [w, e, x, product], dtype=gl.float32, is_pure=True, pack=8
    )


@gluon.jit
def $name(
    $parameters
):
    row_tile, column_tile = program_tile(M, N)
    w_stage = gl.allocate_shared_memory(gl.int32, [STAGES, N_TILE, K_TILE // 4], W_SHARED)
    x_stage = gl.allocate_shared_memory(gl.int32, [STAGES, M_TILE, K_TILE // 2], X_SHARED)

    # Rows beyond the end repeat the last one; they are not stored.
    w_rows = column_tile * N_TILE + gl.arange(0, N_TILE, gl.SliceLayout(1, W_COPY))
    w_words = gl.arange(0, K_TILE // 4, gl.SliceLayout(0, W_COPY))
    w_from = values + gl.minimum(w_rows, N - 1).to(gl.int64)[:, None] * (K // 4) + w_words[None, :]
    x_rows = row_tile * M_TILE + gl.arange(0, M_TILE, gl.SliceLayout(1, X_COPY))
    x_words = gl.arange(0, K_TILE // 2, gl.SliceLayout(0, X_COPY))
    x_from = x + gl.minimum(x_rows, M - 1).to(gl.int64)[:, None] * (K // 2) + x_words[None, :]
    e_rows = column_tile * (N_TILE // 32) + gl.arange(0, N_TILE // 32, gl.SliceLayout(1, E_FRAGMENT))
    e_words = gl.arange(0, 32, gl.SliceLayout(0, E_FRAGMENT))
    e_steps = (K + 31) // 32
    e_from = metadata + e_rows.to(gl.int64)[:, None] * (e_steps * 32) + e_words[None, :]
    e_exists = (e_rows < (N + 31) // 32)[:, None]

    steps = gl.cdiv(K, K_TILE)
    for s in gl.static_range(STAGES - 1):
        w_mask = (w_words + s * (K_TILE // 4) < K // 4)[None, :]
        x_mask = (x_words + s * (K_TILE // 2) < K // 2)[None, :]
        copy_to_shared(w_stage.index(s), w_from + s * (K_TILE // 4), mask=w_mask)
        copy_to_shared(x_stage.index(s), x_from + s * (K_TILE // 2), mask=x_mask)
        async_copy.commit_group()
    product = gl.full([ROW_WARPS, COLUMN_WARPS, 32, PAIRS, EIGHTS, 2, 4], 0.0, gl.float32, DOMAIN)
    for k in range(0, steps):
        async_copy.wait_group(STAGES - 2)
        stage = k % STAGES
        ahead = k + STAGES - 1
        for j in gl.static_range(K_TILE // 32):
            w = w_stage.index(stage).slice(j * 8, 8, dim=1).load(W_FRAGMENT)
            x_part = x_stage.index(stage).slice(j * 16, 16, dim=1).load(X_FRAGMENT)
            step = k * (K_TILE // 32) + j
            # Beyond the end all values are zero, but the instruction still wants metadata in order.
            e = gl.load(e_from + step * 32, mask=e_exists & (step < e_steps), other=$valid)
            if j == 0:
                w_mask = (w_words + ahead * (K_TILE // 4) < K // 4)[None, :]
                x_mask = (x_words + ahead * (K_TILE // 2) < K // 2)[None, :]
                copy_to_shared(w_stage.index(ahead % STAGES), w_from + ahead * (K_TILE // 4), mask=w_mask)
                copy_to_shared(x_stage.index(ahead % STAGES), x_from + ahead * (K_TILE // 2), mask=x_mask)
                async_copy.commit_group()
            product = multiply(w, x_part, e, product)
    async_copy.wait_group(0)

    t = gl.reshape(product, [ROW_WARPS, COLUMN_WARPS, 8, 4, PAIRS, EIGHTS, 2, 2, 2])
    t = gl.reshape(gl.permute(t, [1, 4, 6, 7, 2, 0, 5, 3, 8]), [N_TILE, M_TILE])
    t = gl.convert_layout(t, Y_LAYOUT)
    columns = column_tile * N_TILE + gl.arange(0, N_TILE, gl.SliceLayout(1, Y_LAYOUT))
    rows = row_tile * M_TILE + gl.arange(0, M_TILE, gl.SliceLayout(0, Y_LAYOUT))
    y_rows = rows.to(gl.int64)
    exists = (columns < N)[:, None] & (rows < M)[None, :]
    $epilogue
    gl.store(y + y_rows[None, :] * y_stride + columns[:, None], t.to(gl.$dtype), mask=exists)
'''
