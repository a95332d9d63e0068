"""The gradient of the input of a linear with an N:M weight, which is decompressed in registers.

    dx [M, K] = dy [M, N] W^{R,C} [N, K]

(SLoPe, arXiv 2405.16325, eq. 6.) W^{R,C} is W^R without the values whose bit in the column mask is 0; it is stored
nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxsparse.codegen import autotune
from fxsparse.codegen.launching import device_of, dtype_of, if_present, launch_tiles, precision_of, rows_of
from fxsparse.codegen.operators import kernel_of
from fxsparse.codegen.spec import Argument, NMSpec, Tile
from fxsparse.codegen.template import fill, module, multiply, optional, order, weight_tile
from fxsparse.codegen.tiles import DECODE, LARGE, SHIPPED, SMALL, Plan
from fxsparse.ops import nm_linear as ops

SHIPPED["nm_linear_grad_input"] = {
    DECODE: Tile(16, 64, 64, warps=4, stages=3),
    SMALL: Tile(64, 64, 64, warps=4, stages=3),
    LARGE: Tile(128, 128, 32, warps=8, stages=3),
}


@dataclass(frozen=True)
class NMGradInput(NMSpec):
    """The kernel; its tile's rows are along M, its columns along K, its depth along N.

    Attributes:
        column_mask: the weight is W^{R,C}, else W^R.
        even: N is a multiple of the tile's depth and K of its columns, so that the loop needs no masks.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.
    """

    column_mask: bool = False
    even: bool = False
    precision: str = "ieee"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_depth()

    @property
    def name(self) -> str:
        return f"nm_linear_grad_input_{self.n}_{self.m}_{self.short_dtype}"

    @property
    def arguments(self) -> tuple[Argument, ...]:
        value = self.pointer
        return (
            *(Argument("dy", value), Argument("values", value), Argument("indices", "*u8"), Argument("dx", value)),
            *((Argument("column_mask", "*u8"),) if self.column_mask else ()),
            *(Argument(name, "i32") for name in ("M", "N", "K")),
            *(Argument(f"{name}_stride", "i32") for name in ("dy", "values", "indices", "dx")),
            *((Argument("column_mask_stride", "i32"),) if self.column_mask else ()),
        )

    def render(self) -> str:
        tile, n, m = self.tile, self.n, self.m
        weight = "W^{R,C}" if self.column_mask else "W^R"
        return module(
            self,
            title=f"dx = dy {weight}, W {n}:{m}, {self.dtype}.",
            text=fill(
                _TEXT,
                n=str(n),
                m=str(m),
                bits=str(self.index_bits),
                column=optional(self.column_mask, _COLUMN_TEXT),
            ),
            constants={
                "M_TILE": tile.rows,
                "K_TILE": tile.columns,
                "N_TILE": tile.depth,
                "GROUPS": tile.columns // m,
            },
            functions=[
                order("M_TILE", "K_TILE", tile.group),
                multiply(self, self.precision),
                weight_tile(self, column_mask=self.column_mask, rows_end=not self.even, groups_end=not self.even),
            ],
            body=fill(
                _BODY,
                dy_mask=optional(not self.even, ", mask=(depth < N)[None, :], other=0.0"),
                clamp="depth" if self.even else "tl.minimum(depth, N - 1)",
                inside=optional(not self.even, "depth < N,"),
                groups=optional(not self.even, f"K // {m},"),
                column=optional(self.column_mask, "column_mask,\ncolumn_mask_stride,"),
                m=str(m),
                dtype=self.dtype,
            ),
        )


_TEXT = """
dy [M, N], dx [M, K]. W [N, K] keeps $n of every $m weights of a row, as
    values  [N, K / $m * $n]  in order
    indices [N, bytes]  the position of each inside its group, $bits bits, ascending, lowest bits first
$column
Each program computes one tile of dx. Along N it loads dy and the kept weights, moves these to their places, and
multiplies.
"""

_COLUMN_TEXT = """
    column_mask [N, bytes]  a bit for each value: whether it is in W^{R,C}, which is W^R pruned along N too
"""

_BODY = """
row_tile, column_tile = program_tile(M, K)
rows = row_tile * M_TILE + tl.arange(0, M_TILE)
columns = column_tile * K_TILE + tl.arange(0, K_TILE)
# Rows beyond the end repeat the last one, so that the loop needs no mask for them; they are not stored.
dy_rows = tl.minimum(rows, M - 1).to(tl.int64)
product = tl.zeros((M_TILE, K_TILE), tl.float32)
for n in range(0, N, N_TILE):
    depth = n + tl.arange(0, N_TILE)
    dy_tile = tl.load(dy + dy_rows[:, None] * dy_stride + depth[None, :]$dy_mask)
    w_tile = weight_tile(
        values,
        indices,
        $column
        ($clamp).to(tl.int64),
        $inside
        column_tile * GROUPS,
        $groups
        values_stride,
        indices_stride,
    )
    product = multiply(dy_tile, w_tile, product)
exists = (rows < M)[:, None] & (columns < K)[None, :]
tl.store(dx + rows.to(tl.int64)[:, None] * dx_stride + columns[None, :], product.to(tl.$dtype), mask=exists)
"""


@kernel_of(ops.nm_linear_grad_input)
def nm_linear_grad_input(
    dy: Tensor,
    values: Tensor,
    indices: Tensor,
    column_mask: Tensor | None,
    n: int,
    m: int,
    *,
    plan: Plan | None = None,
) -> Tensor:
    """dx = dy W^{R,C}, or dy W^R without a column mask.

    Args:
        dy: ``[..., out]``.
        values, indices, column_mask: W ``[out, in]`` in the form of ``fxsparse.ops.nm``.
        n, m: the pattern.
        plan: instead of the tuned or default one.

    Returns:
        ``[..., in]``, contiguous.
    """
    grads, columns = rows_of(dy), values.shape[1] // n * m
    rows, depth = grads.shape
    dx = dy.new_empty(*dy.shape[:-1], columns)
    if not dx.numel():
        return dx
    tile = (plan or autotune.plan("nm_linear_grad_input", rows, columns, depth, dy, n, m)).tile
    spec = NMGradInput(
        dtype_of(dy),
        tile,
        n,
        m,
        column_mask=column_mask is not None,
        even=depth % tile.depth == 0 and columns % tile.columns == 0,
        precision=precision_of(dy),
    )
    tensors = (grads, values.contiguous(), indices.contiguous(), rows_of(dx), *if_present(column_mask))
    with device_of(dy):
        strides = (tensor.stride(0) for tensor in tensors)
        launch_tiles(spec, (rows, columns), *tensors, rows, depth, columns, *strides)
    return dx
