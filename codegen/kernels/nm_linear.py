"""A product with an N:M weight that is decompressed in registers, then an epilogue; perhaps with a low-rank branch.

    y [M, N] = x [M, K] W^R [N, K]^T + scale (x down^T) up^T + bias

(SLoPe, arXiv 2405.16325, eq. 4 and 11.) For few rows of x the product takes the time of reading the weight, of which
only n/m of the bytes are read. Each kept value is moved to its place in a dense tile (`template.weight_tile`), which
tensor cores multiply.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

from fxsparse.codegen import autotune
from fxsparse.codegen.epilogue import Epilogue
from fxsparse.codegen.launching import device_of, dtype_of, if_present, launch_tiles, precision_of, rows_of
from fxsparse.codegen.operators import kernel_of
from fxsparse.codegen.spec import Argument, NMSpec, Tile
from fxsparse.codegen.template import fill, module, multiply, optional, order, weight_tile
from fxsparse.codegen.tiles import DECODE, LARGE, SHIPPED, SMALL, Plan, regime
from fxsparse.errors import OptionError
from fxsparse.ops import low_rank
from fxsparse.ops import nm_linear as ops

SHIPPED["nm_linear"] = {
    DECODE: Tile(16, 32, 256, warps=4, stages=3),
    SMALL: Tile(64, 64, 64, warps=4, stages=3),
    LARGE: Tile(128, 128, 64, warps=8, stages=3),
}
SHIPPED["nm_linear_low_rank"] = {
    DECODE: Tile(16, 32, 128, warps=4, stages=3),
    SMALL: Tile(64, 64, 64, warps=4, stages=3),
    LARGE: Tile(128, 128, 32, warps=8, stages=3),
}

LARGEST_RANK_INSIDE = 64
"""A low-rank branch up to this rank is computed whole inside the sparse product's launch for 17 to 64 rows, which
saves a launch. Every tile of columns computes x down^T anew. In decoding they would read more of ``down``
than of W; of many rows, tiles of 128 columns would multiply r/128 more, which a dense product does once for all."""


@dataclass(frozen=True)
class NMLinear(NMSpec):
    """The forward kernel.

    Attributes:
        even: K is a multiple of the tile's depth, so that the loop needs no masks.
        low_rank: ``"none"``; ``"inside"``: the branch ``scale (x down^T) up^T`` is computed in the same launch,
            x down^T anew by every tile of columns, which is right for small ranks and few rows; ``"after"``: x down^T
            is given and only its product with ``up`` is added.
        rank_tile: power of two, of at least 16: "inside" the rank rounded up, "after" a step along it.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.
        epilogue: what follows the product.
    """

    even: bool = False
    low_rank: str = "none"
    rank_tile: int = 16
    precision: str = "ieee"
    epilogue: Epilogue = field(default_factory=Epilogue)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_depth()
        if self.low_rank not in ("none", "inside", "after"):
            raise OptionError(f"low_rank={self.low_rank!r} is none of none, inside, after")

    @property
    def name(self) -> str:
        return f"nm_linear_{self.n}_{self.m}_{self.short_dtype}"

    @property
    def arguments(self) -> tuple[Argument, ...]:
        value = self.pointer
        first = {"none": "", "inside": "down", "after": "projected"}[self.low_rank]
        branch = (Argument(first, value), Argument("up", value), Argument("scale", "fp32"), Argument("R", "i32"))
        return (
            *(Argument("x", value), Argument("values", value), Argument("indices", "*u8"), Argument("y", value)),
            *(branch if first else ()),
            *self.epilogue.arguments(value),
            *(Argument(name, "i32") for name in ("M", "N", "K")),
            *(Argument(f"{name}_stride", "i32") for name in ("x", "values", "indices", "y")),
        )

    def render(self) -> str:
        tile, n, m = self.tile, self.n, self.m
        branch = {"none": "", "inside": " + scale (x down^T) up^T", "after": " + scale projected up^T"}[self.low_rank]
        constants = {
            "M_TILE": tile.rows,
            "N_TILE": tile.columns,
            "K_TILE": tile.depth,
            "GROUPS": tile.depth // m,
            **({} if self.low_rank == "none" else {"R_TILE": self.rank_tile}),
        }
        return module(
            self,
            title=f"y = {self.epilogue.formula(f'x W^T{branch}')}, W {n}:{m}, {self.dtype}.",
            text=fill(_TEXT, n=str(n), m=str(m), bits=str(self.index_bits), branch=_BRANCH_TEXT[self.low_rank]),
            constants=constants,
            functions=[
                order("M_TILE", "N_TILE", tile.group),
                multiply(self, self.precision),
                weight_tile(self, groups_end=not self.even),
            ],
            body=self._body(),
        )

    def _body(self) -> str:
        masked = not self.even
        return fill(
            _BODY,
            m=str(self.m),
            x_mask=optional(masked, ", mask=(depth < K)[None, :], other=0.0"),
            groups=optional(masked, f"K // {self.m},"),
            before_loop=optional(self.low_rank == "inside", _INSIDE_BEFORE),
            in_loop=optional(
                self.low_rank == "inside", fill(_INSIDE_LOOP, k=optional(masked, " & (depth < K)[None, :]"))
            ),
            branch={
                "none": "",
                "inside": fill(_INSIDE_AFTER, dtype=self.dtype),
                "after": fill(_AFTER, dtype=self.dtype),
            }[self.low_rank],
            epilogue=self.epilogue.lines(
                column="columns[None, :]",
                offset="y_rows[:, None]",
                mask="exists",
                column_mask="(columns < N)[None, :]",
                gating=_GATING.strip(),
            ),
            dtype=self.dtype,
        )


_TEXT = """
x [M, K], y [M, N]. W [N, K] keeps $n of every $m weights of a row, as
    values  [N, K / $m * $n]  in order
    indices [N, bytes]  the position of each inside its group, $bits bits, ascending, lowest bits first
$branch
Each program computes one tile of y. Along K it loads x and the kept weights, moves these to their places, and
multiplies.
"""

_BRANCH_TEXT = {
    "none": "",
    "inside": "The low-rank branch, down [R, K] and up [N, R], costs no launch of its own.",
    "after": "projected [M, R] = x down^T; up [N, R].",
}

_BODY = """
row_tile, column_tile = program_tile(M, N)
rows = row_tile * M_TILE + tl.arange(0, M_TILE)
columns = column_tile * N_TILE + tl.arange(0, N_TILE)
# Rows beyond the end repeat the last one, so that the loop needs no mask for them; they are not stored.
x_rows = tl.minimum(rows, M - 1).to(tl.int64)
w_rows = tl.minimum(columns, N - 1).to(tl.int64)
product = tl.zeros((M_TILE, N_TILE), tl.float32)
$before_loop
for k in range(0, K, K_TILE):
    depth = k + tl.arange(0, K_TILE)
    x_tile = tl.load(x + x_rows[:, None] * x_stride + depth[None, :]$x_mask)
    w_tile = weight_tile(
        values,
        indices,
        w_rows,
        k // $m,
        $groups
        values_stride,
        indices_stride,
    )
    product = multiply(x_tile, tl.trans(w_tile), product)
    $in_loop
$branch
t = product
y_rows = rows.to(tl.int64)
exists = (rows < M)[:, None] & (columns < N)[None, :]
$epilogue
tl.store(y + y_rows[:, None] * y_stride + columns[None, :], t.to(tl.$dtype), mask=exists)
"""

_GATING = """
t, other = tl.split(tl.reshape(t, (M_TILE, N_TILE // 2, 2)))
columns = column_tile * (N_TILE // 2) + tl.arange(0, N_TILE // 2)
exists = (rows < M)[:, None] & (columns < N // 2)[None, :]
"""

_INSIDE_BEFORE = """
ranks = tl.arange(0, R_TILE)
projected = tl.zeros((M_TILE, R_TILE), tl.float32)
"""

_INSIDE_LOOP = """
down_tile = tl.load(
    down + ranks[:, None].to(tl.int64) * K + depth[None, :], mask=(ranks < R)[:, None]$k, other=0.0
)
projected = multiply(x_tile, tl.trans(down_tile), projected)
"""

_INSIDE_AFTER = """
up_tile = tl.load(up + w_rows[:, None] * R + ranks[None, :], mask=(ranks < R)[None, :], other=0.0)
product = multiply((projected * scale).to(tl.$dtype), tl.trans(up_tile), product)
"""

_AFTER = """
for r in range(0, R, R_TILE):
    ranks = r + tl.arange(0, R_TILE)
    left = tl.load(projected + x_rows[:, None] * R + ranks[None, :], mask=(ranks < R)[None, :], other=0.0)
    left = (left.to(tl.float32) * scale).to(tl.$dtype)
    up_tile = tl.load(up + w_rows[:, None] * R + ranks[None, :], mask=(ranks < R)[None, :], other=0.0)
    product = multiply(left, tl.trans(up_tile), product)
"""


class _Branch(NamedTuple):
    """A low-rank branch: ``down [r, in]``, ``up [out, r]``, the factor of their product, and rows of its input."""

    down: Tensor
    up: Tensor
    scale: float
    rows: int

    @property
    def padded_rank(self) -> int:
        """The rank rounded up to a power of two of at least 16."""
        return max(16, 1 << (self.down.shape[0] - 1).bit_length())

    @property
    def is_inside(self) -> bool:
        return self.padded_rank <= LARGEST_RANK_INSIDE and regime(self.rows) == SMALL

    def beside(self, spec: NMLinear) -> NMLinear:
        """The spec of the product with this branch."""
        if self.is_inside:
            return replace(spec, low_rank="inside", rank_tile=self.padded_rank)
        return replace(spec, low_rank="after", rank_tile=32)


@kernel_of(ops.nm_linear)
def nm_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    column_mask: Tensor | None,
    bias: Tensor | None,
    n: int,
    m: int,
    *,
    steps: Sequence[str] = (),
    operands: Sequence[Tensor] = (),
    plan: Plan | None = None,
) -> Tensor:
    """y = x W^T + bias, then an epilogue.

    Args:
        x: ``[..., in]``.
        values, indices: W ``[out, in]`` in the form of ``fxsparse.ops.nm``.
        column_mask: not read; the forward pass is exact in W^R.
        bias: ``[out]``.
        n, m: the pattern.
        steps: of :class:`Epilogue`.
        operands: the tensors its steps take, each of the result's shape.
        plan: instead of the tuned or default one.

    Returns:
        ``[..., out]``, or ``[..., out / 2]`` after a gated step; contiguous.
    """
    return _launch(x, values, indices, bias, n, m, steps, operands, None, plan)


@kernel_of(low_rank.nm_linear_low_rank)
def nm_linear_low_rank(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    column_mask: Tensor | None,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    scale: float | None = None,
    *,
    steps: Sequence[str] = (),
    operands: Sequence[Tensor] = (),
    plan: Plan | None = None,
) -> Tensor:
    """y = x W^T + scale (x down^T) up^T + bias, then an epilogue (SLoPe, eq. 11, with ``down`` not pruned).

    One launch for 17 to 64 rows up to rank `LARGEST_RANK_INSIDE`, else a dense product for x down^T and one launch.

    Args:
        down, up: ``[r, in]`` and ``[out, r]``.
        scale: 1/r unless given.
        others: as for :func:`nm_linear`.
    """
    factor = 1 / down.shape[0] if scale is None else float(scale)
    branch = _Branch(down, up, factor, x.numel() // max(1, x.shape[-1]))
    return _launch(x, values, indices, bias, n, m, steps, operands, branch, plan)


def _launch(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    steps: Sequence[str],
    operands: Sequence[Tensor],
    branch: _Branch | None,
    plan: Plan | None,
) -> Tensor:
    inputs, columns = rows_of(x), values.shape[0]
    rows, depth = inputs.shape
    epilogue = Epilogue(bias is not None, tuple(steps))
    y = x.new_empty(*x.shape[:-1], columns // 2 if epilogue.gate else columns)
    if not y.numel():
        return y
    name = "nm_linear" if branch is None else "nm_linear_low_rank"
    plan = plan or autotune.plan(name, rows, columns, depth, x, n, m)
    values, indices, others = values.contiguous(), indices.contiguous(), [rows_of(operand) for operand in operands]
    spec = NMLinear(
        dtype_of(x),
        plan.tile,
        n,
        m,
        even=depth % plan.tile.depth == 0,
        precision=precision_of(x),
        epilogue=epilogue,
    )
    factors: tuple[Tensor, ...] = ()
    if branch is not None:
        spec = branch.beside(spec)
        first = branch.down.contiguous() if branch.is_inside else inputs @ branch.down.t()
        factors = (first, branch.up.contiguous())
    out = rows_of(y)
    with device_of(x):
        for block in _blocks(columns, depth, plan.square and not epilogue.gate):
            width = block.stop - block.start
            args: list[Tensor | float] = [inputs, values[block], indices[block], out[:, block]]
            if branch is not None:
                args += [factors[0], factors[1][block], branch.scale, branch.up.shape[1]]
            args += [tensor[block] for tensor in if_present(bias)]
            args += [other[:, block] for other in others]
            args += [other.stride(0) for other in others]
            args += [rows, width, depth, *(tensor.stride(0) for tensor in (inputs, values, indices, out))]
            launch_tiles(spec, (rows, width), *args)
    return y


def _blocks(rows: int, columns: int, square: bool) -> Iterator[slice]:
    """The rows of a weight that each launch takes: all, or those of a square block."""
    step = columns if square and rows > columns > 0 else rows
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
