"""A linear on chosen rows and columns of a weight, and both its gradients; the slice is never copied.

    S = W[rows][:, columns]  [N, K]
    forward      y  [M, N] = x  [M, K] S^T, then an epilogue
    grad_input   dx [M, K] = dy [M, N] S
    grad_weight  dW [rows][:, columns] = dy^T x, the rest of dW stays as it is

(A step of sparse fine-tuning: SAT, arXiv 2406.01392.) The index vectors are int64; without one a kernel takes all rows
or all columns. An index may appear only once if the gradient of the weight is taken.

A column chosen by itself is a load of 2 bytes. Where columns are chosen in blocks, aligned runs of consecutive ones, a
thread copies 16 bytes, and where a run holds whole steps of the loop, one number tells a step where its run begins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fxsparse.codegen import autotune
from fxsparse.codegen.epilogue import Epilogue
from fxsparse.codegen.launching import device_of, dtype_of, if_present, launch_tiles, precision_of, rows_of
from fxsparse.codegen.operators import kernel_of
from fxsparse.codegen.spec import Argument, Spec, Tile
from fxsparse.codegen.template import fill, module, multiply, optional, order
from fxsparse.codegen.tiles import DECODE, LARGE, SHIPPED, SMALL, Plan
from fxsparse.errors import OptionError
from fxsparse.ops import gather_linear as ops

SHIPPED["gather_linear"] = {
    DECODE: Tile(16, 64, 64, warps=4, stages=4),
    SMALL: Tile(64, 64, 32, warps=4, stages=3),
    LARGE: Tile(128, 128, 32, warps=8, stages=3),
}
SHIPPED["gather_linear_grad_weight"] = {LARGE: Tile(128, 128, 32, warps=8, stages=3)}


@dataclass(frozen=True)
class GatherLinear(Spec):
    """The kernels.

    Attributes:
        product: ``"forward"``, ``"grad_input"`` or ``"grad_weight"``.
        rows, columns: whether there is an index vector of each.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.
        epilogue: of the forward kernel; its bias is indexed by ``rows`` as the weight is.
        block: both indices come in runs of so many consecutive ones, the first of each a multiple of it.
    """

    PRODUCTS: ClassVar[tuple[str, ...]] = ("forward", "grad_input", "grad_weight")

    product: str = "forward"
    rows: bool = False
    columns: bool = False
    precision: str = "ieee"
    epilogue: Epilogue = field(default_factory=Epilogue)
    block: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.product not in self.PRODUCTS:
            raise OptionError(f"product={self.product!r} is none of {', '.join(self.PRODUCTS)}")
        if self.block < 1 or self.block & (self.block - 1):
            raise OptionError(f"block={self.block} must be a power of two")

    @property
    def name(self) -> str:
        suffix = "" if self.product == "forward" else f"_{self.product}"
        return f"gather_linear{suffix}_{self.short_dtype}"

    @property
    def _tensors(self) -> tuple[str, str, str]:
        """The two operands and the result."""
        return {
            "forward": ("x", "weight", "y"),
            "grad_input": ("dy", "weight", "dx"),
            "grad_weight": ("dy", "x", "weight_grad"),
        }[self.product]

    @property
    def arguments(self) -> tuple[Argument, ...]:
        return (
            *(Argument(name, self.pointer) for name in self._tensors),
            *((Argument("row_index", "*i64"),) if self.rows else ()),
            *((Argument("column_index", "*i64"),) if self.columns else ()),
            *self.epilogue.arguments(self.pointer),
            *(Argument(name, "i32") for name in ("M", "N", "K")),
            *(Argument(f"{name}_stride", "i32") for name in self._tensors),
        )

    def render(self) -> str:
        tile = self.tile
        sizes = {
            "forward": ("M_TILE", "N_TILE", "K_TILE"),
            "grad_input": ("M_TILE", "K_TILE", "N_TILE"),
            "grad_weight": ("N_TILE", "K_TILE", "M_TILE"),
        }[self.product]
        part = "W" + optional(self.rows, "[rows]") + optional(self.columns, "[:, columns]")
        title = {
            "forward": f"y = {self.epilogue.formula(f'x {part}^T')}",
            "grad_input": f"dx = dy {part}",
            "grad_weight": f"d{part} = dy^T x",
        }[self.product]
        return module(
            self,
            title=f"{title}, {self.dtype}.",
            text="x [M, K], y [M, N]; rows [N] and columns [K] are int64 and choose from a larger weight.",
            constants=dict(zip(sizes, (tile.rows, tile.columns, tile.depth), strict=True)),
            functions=[order(sizes[0], sizes[1], tile.group), multiply(self, self.precision)],
            body=self._body(),
        )

    def _index(self, axis: str, numbers: str, end: str) -> str:
        """Which row (or column) of the weight each of ``numbers`` is, int64."""
        if not (self.rows if axis == "row" else self.columns):
            return f"{numbers}.to(tl.int64)"
        index = f"tl.load({axis}_index + {numbers}, mask={numbers} < {end}, other=0)"
        if axis == "column" and self.block > 1:
            return f"tl.max_contiguous(tl.multiple_of({index}, {self.block}), {self.block})"
        return index

    @property
    def _steps_in_runs(self) -> bool:
        """Whether every step of the loop lies within a run of the index that the loop follows."""
        is_indexed = {"forward": self.columns, "grad_input": self.rows, "grad_weight": False}[self.product]
        return is_indexed and self.block % self.tile.depth == 0

    def _loop(self, axis: str, step: str) -> dict[str, str]:
        """Pieces of a loop along rows or columns of the weight: their index, and the masks of what exists.

        Within runs no step is partial, and where the next one begins is loaded a step ahead.
        """
        end, tile = step.upper(), f"{step.upper()}_TILE"
        if not self._steps_in_runs:
            return {
                "before": "",
                "index": f"w_{axis}s = {self._index(axis, 'depth', end)}",
                "after": "",
                "depth_mask": f", mask=(depth < {end})[None, :], other=0.0",
                "depth_exists": f"(depth < {end})",
            }
        following = f"{step} + {tile}"
        return {
            "before": f"start = tl.load({axis}_index)",
            "index": f"w_{axis}s = start // {tile} * {tile} + tl.arange(0, {tile})",
            "after": f"start = tl.load({axis}_index + {following}, mask={following} < {end}, other=0)",
            "depth_mask": "",
            "depth_exists": "",
        }

    def _body(self) -> str:
        if self.product == "forward":
            loop = self._loop("column", "k")
            exists = loop.pop("depth_exists")
            return fill(
                _FORWARD,
                w_rows=self._index("row", "columns", "N"),
                w_mask=f"(columns < N)[:, None]{exists and f' & {exists}[None, :]'}",
                epilogue=self.epilogue.lines(
                    column="columns[None, :]",
                    offset="y_rows[:, None]",
                    mask="exists",
                    column_mask="(columns < N)[None, :]",
                ).replace("bias + columns[None, :]", "bias + w_rows[None, :]"),
                dtype=self.dtype,
                **loop,
            )
        w_columns = self._index("column", "columns", "K")
        if self.product == "grad_weight":
            return fill(_GRAD_WEIGHT, w_rows=self._index("row", "rows", "N"), w_columns=w_columns, dtype=self.dtype)
        loop = self._loop("row", "n")
        exists = loop.pop("depth_exists")
        w_mask = f"{exists and f'{exists}[:, None] & '}(columns < K)[None, :]"
        return fill(_GRAD_INPUT, w_columns=w_columns, w_mask=w_mask, dtype=self.dtype, **loop)


_FORWARD = """
row_tile, column_tile = program_tile(M, N)
rows = row_tile * M_TILE + tl.arange(0, M_TILE)
columns = column_tile * N_TILE + tl.arange(0, N_TILE)
x_rows = tl.minimum(rows, M - 1).to(tl.int64)
w_rows = $w_rows
product = tl.zeros((M_TILE, N_TILE), tl.float32)
$before
for k in range(0, K, K_TILE):
    depth = k + tl.arange(0, K_TILE)
    $index
    x_tile = tl.load(x + x_rows[:, None] * x_stride + depth[None, :]$depth_mask)
    w_tile = tl.load(
        weight + w_rows[:, None] * weight_stride + w_columns[None, :],
        mask=$w_mask,
        other=0.0,
    )
    $after
    product = multiply(x_tile, tl.trans(w_tile), product)
t = product
y_rows = rows.to(tl.int64)
exists = (rows < M)[:, None] & (columns < N)[None, :]
$epilogue
tl.store(y + y_rows[:, None] * y_stride + columns[None, :], t.to(tl.$dtype), mask=exists)
"""

_GRAD_INPUT = """
row_tile, column_tile = program_tile(M, K)
rows = row_tile * M_TILE + tl.arange(0, M_TILE)
columns = column_tile * K_TILE + tl.arange(0, K_TILE)
dy_rows = tl.minimum(rows, M - 1).to(tl.int64)
w_columns = $w_columns
product = tl.zeros((M_TILE, K_TILE), tl.float32)
$before
for n in range(0, N, N_TILE):
    depth = n + tl.arange(0, N_TILE)
    $index
    dy_tile = tl.load(dy + dy_rows[:, None] * dy_stride + depth[None, :]$depth_mask)
    w_tile = tl.load(
        weight + w_rows[:, None] * weight_stride + w_columns[None, :],
        mask=$w_mask,
        other=0.0,
    )
    $after
    product = multiply(dy_tile, w_tile, product)
exists = (rows < M)[:, None] & (columns < K)[None, :]
tl.store(dx + rows.to(tl.int64)[:, None] * dx_stride + columns[None, :], product.to(tl.$dtype), mask=exists)
"""

_GRAD_WEIGHT = """
row_tile, column_tile = program_tile(N, K)
rows = row_tile * N_TILE + tl.arange(0, N_TILE)
columns = column_tile * K_TILE + tl.arange(0, K_TILE)
product = tl.zeros((N_TILE, K_TILE), tl.float32)
for m in range(0, M, M_TILE):
    depth = m + tl.arange(0, M_TILE)
    tokens = depth.to(tl.int64)[:, None]
    present = (depth < M)[:, None]
    dy_tile = tl.load(dy + tokens * dy_stride + rows[None, :], mask=present & (rows < N)[None, :], other=0.0)
    x_tile = tl.load(x + tokens * x_stride + columns[None, :], mask=present & (columns < K)[None, :], other=0.0)
    product = multiply(tl.trans(dy_tile), x_tile, product)
w_rows = $w_rows
w_columns = $w_columns
exists = (rows < N)[:, None] & (columns < K)[None, :]
tl.store(
    weight_grad + w_rows[:, None] * weight_grad_stride + w_columns[None, :], product.to(tl.$dtype), mask=exists
)
"""


@kernel_of(ops.gather_linear)
def gather_linear(
    x: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    bias: Tensor | None,
    block: int = 1,
    *,
    steps: Sequence[str] = (),
    operands: Sequence[Tensor] = (),
    plan: Plan | None = None,
) -> Tensor:
    """y = x W[rows][:, columns]^T + bias[rows], then an epilogue.

    Args:
        x: ``[..., k]``, k the number of columns chosen.
        weight: ``[out, in]``.
        rows, columns: int64, or None for all.
        bias: ``[out]``.
        block: both indices come in runs of so many consecutive ones, the first of each a multiple of it.
        steps: of :class:`Epilogue`.
        operands: the tensors its steps take, each of the result's shape.
        plan: instead of the tuned or default one.

    Returns:
        ``[..., s]``, s the number of rows chosen; contiguous.
    """
    inputs, dense = rows_of(x), rows_of(weight)
    size = (inputs.shape[0], _count(rows, weight.shape[0]), inputs.shape[1])
    y = x.new_empty(*x.shape[:-1], size[1])
    if y.numel():
        tile = (plan or autotune.plan("gather_linear", *size, x)).tile
        others = [rows_of(operand) for operand in operands]
        epilogue = Epilogue(bias is not None, tuple(steps))
        spec = GatherLinear(
            dtype_of(x), tile, "forward", *_chosen(rows, columns), precision_of(x), epilogue, _known_run(block)
        )
        extra: list[Tensor | int] = [*if_present(bias), *others, *(other.stride(0) for other in others)]
        _launch(spec, size[:2], (inputs, dense, rows_of(y)), rows, columns, extra, size)
    return y


@kernel_of(ops.gather_linear_grad_input)
def gather_linear_grad_input(
    dy: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    block: int = 1,
    *,
    plan: Plan | None = None,
) -> Tensor:
    """dx = dy W[rows][:, columns].

    Args:
        dy: ``[..., s]``.
        others: as for :func:`gather_linear`.

    Returns:
        ``[..., k]``, contiguous.
    """
    grads, dense = rows_of(dy), rows_of(weight)
    size = (grads.shape[0], grads.shape[1], _count(columns, weight.shape[1]))
    dx = dy.new_empty(*dy.shape[:-1], size[2])
    if dx.numel():
        tile = (plan or autotune.plan("gather_linear", size[0], size[2], size[1], dy)).tile
        spec = GatherLinear(
            dtype_of(dy), tile, "grad_input", *_chosen(rows, columns), precision_of(dy), block=_known_run(block)
        )
        _launch(spec, (size[0], size[2]), (grads, dense, rows_of(dx)), rows, columns, [], size)
    return dx


@kernel_of(ops.gather_linear_grad_weight)
def gather_linear_grad_weight(
    dy: Tensor,
    x: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    out_features: int,
    in_features: int,
    block: int = 1,
    *,
    plan: Plan | None = None,
) -> Tensor:
    """The gradient of the whole weight: dy^T x at the chosen rows and columns, zero elsewhere.

    Args:
        dy, x: ``[..., s]`` and ``[..., k]``.
        rows, columns: int64, each index once, or None for all.
        out_features, in_features: of the weight.
        block: as for :func:`gather_linear`.
        plan: instead of the tuned or default one.

    Returns:
        ``[out_features, in_features]``.
    """
    grads, inputs = rows_of(dy), rows_of(x)
    whole = rows is None and columns is None
    weight_grad = (dy.new_empty if whole else dy.new_zeros)((out_features, in_features))
    size = (grads.shape[0], grads.shape[1], inputs.shape[1])
    if size[1] and size[2]:
        tile = (plan or autotune.plan("gather_linear_grad_weight", *size, dy)).tile
        spec = GatherLinear(
            dtype_of(dy), tile, "grad_weight", *_chosen(rows, columns), precision_of(dy), block=_known_run(block)
        )
        _launch(spec, size[1:], (grads, inputs, weight_grad), rows, columns, [], size)
    return weight_grad


def _chosen(rows: Tensor | None, columns: Tensor | None) -> tuple[bool, bool]:
    return rows is not None, columns is not None


def _known_run(block: int) -> int:
    """The longest run that kernels are made for in blocks of this size."""
    return math.gcd(block, ops.LONGEST_RUN)


def _count(index: Tensor | None, size: int) -> int:
    """The number of rows or columns chosen among ``size``."""
    return size if index is None else index.shape[0]


def _launch(
    spec: Spec,
    result: Sequence[int],
    tensors: Sequence[Tensor],
    rows: Tensor | None,
    columns: Tensor | None,
    extra: Sequence[Tensor | int],
    size: Sequence[int],
) -> None:
    with device_of(tensors[0]):
        strides = (tensor.stride(0) for tensor in tensors)
        launch_tiles(spec, result, *tensors, *if_present(rows), *if_present(columns), *extra, *size, *strides)
