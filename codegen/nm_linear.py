"""Products with an N:M weight, decompressed in registers: the forward pass and the gradient of the input.

    forward      y  [M, N] = x  [M, K] W^R [N, K]^T      then an epilogue, perhaps with a low-rank branch
    grad_input   dx [M, K] = dy [M, N] W^{R,C} [N, K]

(SLoPe, arXiv 2405.16325, eq. 4, 6 and 11.) Reading n/m of the weight's bytes is what makes the first worth while at few
rows. W^{R,C} is W^R without the values whose bit in the column mask is 0; it is stored nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fxsparse.codegen.epilogue import Epilogue
from fxsparse.codegen.spec import Argument, NMSpec
from fxsparse.codegen.template import fill, module, multiply, optional, order, weight_tile
from fxsparse.errors import OptionError

_I32 = "i32"


@dataclass(frozen=True)
class NMLinear(NMSpec):
    """The forward kernel.

    Attributes:
        even: K is a multiple of the tile's depth, so that the loop needs no masks.
        low_rank: ``"none"``; ``"inside"``: the branch ``scale (x down^T) up^T`` is computed in the same launch,
            x down^T anew by every tile of columns, which is right for small ranks; ``"after"``: x down^T is given and
            only its product with ``up`` is added.
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
        branch: tuple[Argument, ...] = ()
        if self.low_rank == "inside":
            branch = (Argument("down", value), Argument("up", value), Argument("scale", "fp32"), Argument("R", _I32))
        elif self.low_rank == "after":
            branch = (
                Argument("projected", value),
                Argument("up", value),
                Argument("scale", "fp32"),
                Argument("R", _I32),
            )
        return (
            *(Argument("x", value), Argument("values", value), Argument("indices", "*u8"), Argument("y", value)),
            *branch,
            *self.epilogue.arguments(value),
            *(Argument(name, _I32) for name in ("M", "N", "K")),
            *(Argument(f"{name}_stride", _I32) for name in ("x", "values", "indices", "y")),
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
            text=fill(_FORWARD_TEXT, n=str(n), m=str(m), bits=str(self.index_bits), branch=_BRANCH_TEXT[self.low_rank]),
            constants=constants,
            functions=[
                order("M_TILE", "N_TILE", tile.group),
                multiply(self, self.precision),
                weight_tile(self, groups_end=not self.even),
            ],
            body=self._body(),
        )

    def _body(self) -> str:
        masked, first = not self.even, self.tile.weight_first
        shape = "N_TILE, M_TILE" if first else "M_TILE, N_TILE"
        step = "multiply(w_tile, tl.trans(x_tile), product)" if first else "multiply(x_tile, tl.trans(w_tile), product)"
        return fill(
            _FORWARD,
            shape=shape,
            m=str(self.m),
            x_mask=optional(masked, ", mask=(depth < K)[None, :], other=0.0"),
            groups=optional(masked, f"K // {self.m},"),
            step=step,
            before_loop=optional(self.low_rank == "inside", _INSIDE_BEFORE),
            in_loop=optional(
                self.low_rank == "inside", fill(_INSIDE_LOOP, k=optional(masked, " & (depth < K)[None, :]"))
            ),
            transpose=optional(first, "product = tl.trans(product)"),
            branch=fill(
                {"none": "", "inside": _INSIDE_AFTER, "after": _AFTER}[self.low_rank] or "$nothing",
                dtype=self.dtype,
                nothing="",
            ),
            epilogue=self.epilogue.lines(
                column="columns[None, :]",
                offset="y_rows[:, None]",
                mask="exists",
                column_mask="(columns < N)[None, :]",
                gating=_GATING.strip(),
            ),
            dtype=self.dtype,
        )


@dataclass(frozen=True)
class NMGradInput(NMSpec):
    """The kernel of the input's gradient.

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
            *(Argument(name, _I32) for name in ("M", "N", "K")),
            *(Argument(f"{name}_stride", _I32) for name in ("dy", "values", "indices", "dx")),
            *((Argument("column_mask_stride", _I32),) if self.column_mask else ()),
        )

    def render(self) -> str:
        tile, n, m = self.tile, self.n, self.m
        weight = "W^{R,C}" if self.column_mask else "W^R"
        return module(
            self,
            title=f"dx = dy {weight}, W {n}:{m}, {self.dtype}.",
            text=fill(
                _GRAD_INPUT_TEXT,
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
                _GRAD_INPUT,
                dy_mask=optional(not self.even, ", mask=(depth < N)[None, :], other=0.0"),
                clamp="depth" if self.even else "tl.minimum(depth, N - 1)",
                inside=optional(not self.even, "depth < N,"),
                groups=optional(not self.even, f"K // {m},"),
                column=optional(self.column_mask, "column_mask,\ncolumn_mask_stride,"),
                m=str(m),
                dtype=self.dtype,
            ),
        )


_FORWARD_TEXT = """
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

_FORWARD = """
row_tile, column_tile = program_tile(M, N)
rows = row_tile * M_TILE + tl.arange(0, M_TILE)
columns = column_tile * N_TILE + tl.arange(0, N_TILE)
# Rows beyond the end repeat the last one, so that the loop needs no mask for them; they are not stored.
x_rows = tl.minimum(rows, M - 1).to(tl.int64)
w_rows = tl.minimum(columns, N - 1).to(tl.int64)
product = tl.zeros(($shape), tl.float32)
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
    product = $step
    $in_loop
$transpose
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

_GRAD_INPUT_TEXT = """
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

_GRAD_INPUT = """
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
