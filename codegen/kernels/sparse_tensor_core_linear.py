"""A product with a 2:4 weight on sparse tensor cores: y = x W^T with W never expanded, then an epilogue.

    y [M, N] = x [M, K] W [N, K]^T

The kernel is written in Gluon and calls the instruction ``mma.sp`` (`mma_sp`). Copies from memory to shared memory, of
the metadata too, run some steps ahead of the products. Where there are fewer tiles than multiprocessors, the depth of
each is computed in parts (`split`).

The gradient of the input, dy W^{R,C}, is the same product with the transpose of W^{R,C}, which is 2:4 along ``out``;
`nm_transpose` makes it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fxsparse.codegen.epilogue import Epilogue
from fxsparse.codegen.launching import device_of, dtype_of, if_present, rows_of
from fxsparse.codegen.loaded import kernel
from fxsparse.codegen.mma_sp import Layouts, instructions
from fxsparse.codegen.spec import Argument, Spec, Tile
from fxsparse.codegen.split import multiprocessors, workspace
from fxsparse.codegen.template import fill, optional, parameters
from fxsparse.codegen.tiles import DECODE, LARGE, SMALL, regime
from fxsparse.errors import OptionError

SPARSE: dict[str, tuple[Tile, int, int]] = {
    DECODE: (Tile(16, 128, 128, warps=4, stages=3), 16, 32),
    SMALL: (Tile(64, 128, 64, warps=4, stages=3), 64, 32),
    LARGE: (Tile(128, 128, 64, warps=4, stages=3), 64, 64),
    "large with steps": (Tile(128, 128, 64, warps=8, stages=3), 64, 32),
}
"""Default tiles, each with the rows and columns of one warp. The largest part of a warp leaves no registers for
pointwise steps, so with them the same tile takes more warps."""


@dataclass(frozen=True)
class SparseTensorCoreLinear(Spec):
    """The kernel; its tile's rows are along M, its columns along N, its depth along K.

    Attributes:
        warp_rows, warp_columns: of the part of the tile that one warp computes; multiples of 8 and of 32.
        epilogue: what follows the product.
        split: the depth is computed in parts.
    """

    gluon: ClassVar[bool] = True

    warp_rows: int = 64
    warp_columns: int = 64
    epilogue: Epilogue = field(default_factory=Epilogue)
    split: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        tile = self.tile
        if self.dtype == "float32":
            raise OptionError("sparse tensor cores take bfloat16 and float16, not float32")
        fits = tile.rows % self.warp_rows == tile.columns % self.warp_columns == 0
        if not fits or self.warp_rows % 8 or self.warp_columns % 32 or tile.depth % 32:
            raise OptionError(f"tile {tile} cannot be cut into warps of {self.warp_rows}x{self.warp_columns}")
        warps = self._layouts.row_warps * self._layouts.column_warps
        if warps != tile.warps or tile.stages < 2:
            raise OptionError(f"tile {tile} needs {warps} warps and 2 stages or more")

    @property
    def _layouts(self) -> Layouts:
        return Layouts(self.tile, self.warp_rows, self.warp_columns)

    @property
    def name(self) -> str:
        return f"sparse_tensor_core_linear_{self.short_dtype}"

    @property
    def arguments(self) -> tuple[Argument, ...]:
        return (
            *(Argument(name, "*i32") for name in ("x", "values", "metadata")),
            Argument("y", self.pointer),
            *self._split_arguments,
            *self.epilogue.arguments(self.pointer),
            *(Argument(name, "i32") for name in ("M", "N", "K", "y_stride")),
        )

    @property
    def _split_arguments(self) -> tuple[Argument, ...]:
        some = Argument("sums", "*fp32"), Argument("arrived", "*i32"), Argument("parts", "i32")
        return some if self.split else ()

    def render(self) -> str:
        tile, layouts = self.tile, self._layouts
        sizes = {
            "M_TILE": tile.rows,
            "N_TILE": tile.columns,
            "K_TILE": tile.depth,
            "STAGES": tile.stages,
            "ROW_WARPS": layouts.row_warps,
            "COLUMN_WARPS": layouts.column_warps,
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
        masks_rows = tile.rows <= _FEW_ROWS
        source = fill(
            _SOURCE,
            title=self.epilogue.formula("x W^T"),
            dtype=self.dtype,
            spec=self.describe(),
            sizes="\n".join(f"{name} = gl.constexpr({size})" for name, size in sizes.items()),
            layouts="\n".join(f"{name} = gl.constexpr({text})" for name, text in layouts.source().items()),
            instructions=instructions(self.dtype),
            group=str(tile.group),
            name=self.name,
            parameters=parameters(self.arguments),
            beyond=_BEYOND[masks_rows],
            limits=optional(self.split, ", end") + optional(masks_rows, ", x_exist"),
            in_part=optional(self.split, " & (step < end)"),
            x_exist_is=optional(masks_rows, "x_exist = (x_rows < M)[:, None]"),
            x_mask=optional(masks_rows, " & x_exist"),
            unit=_PART if self.split else _WHOLE,
            program="gl.program_id(0) // parts" if self.split else "gl.program_id(0)",
            tile_argument=", parts" if self.split else "",
            finish=fill(_ADD_PARTS if self.split else _FINISH, dtype=self.dtype, epilogue=steps),
        )
        return source + "\n"


_SOURCE = '''
"""y = $title, W 2:4 on sparse tensor cores, $dtype.

x [M, K] and values [N, K / 2] as words of two elements; metadata [N / 32, K / 32, 32] words, N rounded up to a multiple
of 32 and K to one of 128; y [M, N]. K is a multiple of 16.
Each program computes one tile of y. Copies from memory run STAGES - 1 steps ahead of the products.

Made by fxsparse.codegen from
$spec
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
synchronize = getattr(gl, "barrier", None) or gl.thread_barrier

$sizes

# Which thread holds what: steps of register, lane and warp bits.
$layouts

MMA_SP = gl.constexpr(
$instructions
)
CONSTRAINTS = gl.constexpr(",".join(["=&f"] * 8 + ["r"] * 24 + [str(i) for i in range(8)]))


@gluon.jit
def program_tile(rows, columns$tile_argument):
    # $group tiles of rows at a time, so that what a wave of programs reads stays in the L2 cache
    program = $program
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
def copy_step(stage, step, K, w_stage, x_stage, e_stage, w_from, x_from, e_from$limits):
    """Begins to copy a step of W, x and metadata; beyond K they are 0, which are not valid words, but no step of the
    product is there."""
    w_words = step * (K_TILE // 4) + gl.arange(0, K_TILE // 4, gl.SliceLayout(0, W_COPY))
    x_words = step * (K_TILE // 2) + gl.arange(0, K_TILE // 2, gl.SliceLayout(0, X_COPY))
    e_words = step * K_TILE + gl.arange(0, K_TILE, gl.SliceLayout(0, E_COPY))
    copy_to_shared(w_stage.index(stage), w_from + step * (K_TILE // 4), mask=(w_words < K // 4)[None, :]$in_part)
    copy_to_shared(x_stage.index(stage), x_from + step * (K_TILE // 2), mask=(x_words < K // 2)[None, :]$in_part$x_mask)
    exists = (e_words < (K + 127) // 128 * 128)[None, :]$in_part
    copy_to_shared(e_stage.index(stage), e_from + step * K_TILE, mask=exists)
    async_copy.commit_group()


@gluon.jit
def $name(
    $parameters
):
    row_tile, column_tile = program_tile(M, N$tile_argument)
    w_stage = gl.allocate_shared_memory(gl.int32, [STAGES, N_TILE, K_TILE // 4], W_SHARED)
    x_stage = gl.allocate_shared_memory(gl.int32, [STAGES, M_TILE, K_TILE // 2], X_SHARED)
    e_stage = gl.allocate_shared_memory(gl.int32, [STAGES, N_TILE // 32, K_TILE], E_SHARED)

    # $beyond
    w_rows = column_tile * N_TILE + gl.arange(0, N_TILE, gl.SliceLayout(1, W_COPY))
    w_words = gl.arange(0, K_TILE // 4, gl.SliceLayout(0, W_COPY))
    w_from = values + gl.minimum(w_rows, N - 1).to(gl.int64)[:, None] * (K // 4) + w_words[None, :]
    x_rows = row_tile * M_TILE + gl.arange(0, M_TILE, gl.SliceLayout(1, X_COPY))
    x_words = gl.arange(0, K_TILE // 2, gl.SliceLayout(0, X_COPY))
    $x_exist_is
    x_from = x + gl.minimum(x_rows, M - 1).to(gl.int64)[:, None] * (K // 2) + x_words[None, :]
    e_rows = column_tile * (N_TILE // 32) + gl.arange(0, N_TILE // 32, gl.SliceLayout(1, E_COPY))
    e_words = gl.arange(0, K_TILE, gl.SliceLayout(0, E_COPY))
    e_from = metadata + gl.minimum(e_rows, (N + 31) // 32 - 1).to(gl.int64)[:, None] * ((K + 127) // 128 * 128)
    e_from += e_words[None, :]

    steps = gl.cdiv(K, K_TILE)
    $unit
    for s in gl.static_range(STAGES - 1):
        copy_step(s, first + s, K, w_stage, x_stage, e_stage, w_from, x_from, e_from$limits)
    product = gl.full([ROW_WARPS, COLUMN_WARPS, 32, PAIRS, EIGHTS, 2, 4], 0.0, gl.float32, DOMAIN)
    stage = 0
    free = STAGES - 1
    for k in range(first, end):
        async_copy.wait_group(STAGES - 2)
        for j in gl.static_range(K_TILE // 32):
            w = w_stage.index(stage).slice(j * 8, 8, dim=1).load(W_FRAGMENT)
            x_part = x_stage.index(stage).slice(j * 16, 16, dim=1).load(X_FRAGMENT)
            e = e_stage.index(stage).slice(j * 32, 32, dim=1).load(E_FRAGMENT)
            if j == 0:
                copy_step(free, k + STAGES - 1, K, w_stage, x_stage, e_stage, w_from, x_from, e_from$limits)
            product = multiply(w, x_part, e, product)
        free = stage
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
    async_copy.wait_group(0)

    t = gl.reshape(product, [ROW_WARPS, COLUMN_WARPS, 8, 4, PAIRS, EIGHTS, 2, 2, 2])
    t = gl.reshape(gl.permute(t, [1, 4, 6, 7, 2, 0, 5, 3, 8]), [N_TILE, M_TILE])
    t = gl.convert_layout(t, Y_LAYOUT)
    columns = column_tile * N_TILE + gl.arange(0, N_TILE, gl.SliceLayout(1, Y_LAYOUT))
    rows = row_tile * M_TILE + gl.arange(0, M_TILE, gl.SliceLayout(0, Y_LAYOUT))
    y_rows = rows.to(gl.int64)
    exists = (columns < N)[:, None] & (rows < M)[None, :]
    $finish
'''

_FEW_ROWS = 64
"""Rows up to which a tile may be mostly empty; of larger ones a product has one such tile of many."""

_BEYOND = {
    False: "Rows beyond the end repeat the last one; they are not stored.",
    True: "Rows of W beyond the end repeat the last one, those of x are not read; none is stored.",
}

_WHOLE = """
first = 0
end = steps
"""

_PART = """
part = gl.program_id(0) % parts
first = part * steps // parts
end = (part + 1) * steps // parts
"""

_FINISH = """
$epilogue
gl.store(y + y_rows[None, :] * y_stride + columns[:, None], t.to(gl.$dtype), mask=exists)
"""

# A part leaves the sums of rows that exist; the last to arrive adds those of all, in their order.
_ADD_PARTS = """
tile = gl.program_id(0) // parts
inside = gl.arange(0, N_TILE, gl.SliceLayout(1, Y_LAYOUT))[:, None]
inside = inside + gl.arange(0, M_TILE, gl.SliceLayout(0, Y_LAYOUT))[None, :] * N_TILE
place = sums + tile.to(gl.int64) * parts * (M_TILE * N_TILE) + inside
gl.store(place + part * (M_TILE * N_TILE), t, mask=exists)
synchronize()
if gl.atomic_add(arrived + tile, 1, sem="acq_rel") == parts - 1:
    t = gl.full([N_TILE, M_TILE], 0.0, gl.float32, Y_LAYOUT)
    for other in range(parts):
        t += gl.load(place + other * (M_TILE * N_TILE), mask=exists, other=0.0, cache_modifier=".cg")
    gl.store(arrived + tile, 0)  # for the next launch
    $epilogue
    gl.store(y + y_rows[None, :] * y_stride + columns[:, None], t.to(gl.$dtype), mask=exists)
"""


def unsupported_sparse(dtype: torch.dtype, in_features: int, n: int = 2, m: int = 4) -> str | None:
    """Why sparse tensor cores cannot run a product; None if they can."""
    if (n, m) != (2, 4):
        return f"sparse tensor cores take 2:4, not {n}:{m}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"sparse tensor cores take bfloat16 and float16, not {dtype}"
    if in_features % 16:
        return f"copies of 16 bytes need {in_features} columns to be a multiple of 16"
    return None


def sparse_tensor_core_linear(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None,
    *,
    steps: Sequence[str] = (),
    operands: Sequence[Tensor] = (),
    spec: SparseTensorCoreLinear | None = None,
    parts: int | None = None,
) -> Tensor:
    """y = x W^T + bias, then an epilogue; W is 2:4.

    Args:
        x: ``[..., in]``, bfloat16 or float16; ``in`` is a multiple of 16.
        values: ``[out, in / 2]``.
        metadata: int32, of :func:`~fxsparse.codegen.metadata.pack_metadata`.
        bias: ``[out]``.
        steps: of :class:`Epilogue`.
        operands: the tensors its steps take, each ``[..., out]``.
        spec: instead of the default; its dtype and epilogue are replaced.
        parts: of the depth, instead of what :func:`parts_of` finds.

    Returns:
        ``[..., out]``, contiguous.

    Raises:
        OptionError: the dtype or shape has no kernel.
    """
    reason = unsupported_sparse(x.dtype, x.shape[-1])
    if reason is not None:
        raise OptionError(reason)
    inputs, columns = _words(x.reshape(-1, x.shape[-1])), values.shape[0]
    rows, depth = inputs.shape[0], x.shape[-1]
    y = x.new_empty(*x.shape[:-1], columns)
    if y.numel():
        others = [rows_of(operand) for operand in operands]
        epilogue = Epilogue(bias is not None, tuple(steps))
        shape = _default(rows, bool(steps)) if spec is None else (spec.tile, spec.warp_rows, spec.warp_columns)
        tile, tiles = shape[0], -(-rows // shape[0].rows) * -(-columns // shape[0].columns)
        parts = parts or parts_of(tiles, -(-depth // tile.depth), multiprocessors(x.device))
        spec = SparseTensorCoreLinear(dtype_of(x), *shape, epilogue, parts > 1)
        added = () if parts == 1 else (*workspace(tiles, parts, tile.rows * tile.columns, x.device), parts)
        with device_of(x):
            kernel(spec).launch(
                (tiles * parts,),
                *(inputs, _words(values), metadata, rows_of(y), *added, *if_present(bias), *others),
                *(other.stride(0) for other in others),
                *(rows, columns, depth, columns),
            )
    return y


@functools.cache
def parts_of(tiles: int, steps: int, multiprocessors: int) -> int:
    """Into how many parts the depth of every tile is best cut: the fewest steps one after the other, where a launch of
    a part takes about 6 more and adding it another 4."""

    def time(parts: int) -> float:
        waves = -(-tiles * parts // multiprocessors)
        return waves * (-(-steps // parts) + 6 + (4 if parts > 1 else 0))

    return min(range(1, max(1, min(16, steps // 4)) + 1), key=time)


def _default(rows: int, steps: bool) -> tuple[Tile, int, int]:
    """The shipped tile for ``rows`` rows, and the rows and columns of a warp."""
    name = regime(rows)
    return SPARSE["large with steps" if steps and name == LARGE else name]


def _words(matrix: Tensor) -> Tensor:
    """Pairs of 16-bit elements as words."""
    matrix = matrix.contiguous()
    return (matrix.clone() if matrix.storage_offset() % 2 else matrix).view(torch.int32)
