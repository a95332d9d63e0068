"""The gradient of the kept values of an N:M weight; the dense gradient never leaves registers.

    values_grad[o, j] = sum over rows r of dy[r, o] x[r, column of kept value j]

(SLoPe, arXiv 2405.16325, eq. 5.)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxsparse.codegen import autotune
from fxsparse.codegen.launching import device_of, dtype_of, launch_tiles, precision_of, rows_of
from fxsparse.codegen.operators import kernel_of
from fxsparse.codegen.spec import Argument, NMSpec, Tile
from fxsparse.codegen.template import fill, join, load_words, module, multiply, optional, order, planes, position
from fxsparse.codegen.tiles import HOPPER, LARGE, SHIPPED, Plan
from fxsparse.ops import nm_linear as ops

SHIPPED["nm_linear_grad_values"] = {LARGE: Tile(128, 128, 64, warps=8, stages=3)}
HOPPER["nm_linear_grad_values"] = Tile(128, 256, 64, warps=8, stages=3)


@dataclass(frozen=True)
class NMGradValues(NMSpec):
    """The kernel; its tile's rows are along N, its columns along K, its depth along M.

    Attributes:
        even: all three sizes are multiples of the tile's, so that nothing is masked.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.
    """

    even: bool = False
    precision: str = "ieee"

    @property
    def name(self) -> str:
        return f"nm_linear_grad_values_{self.n}_{self.m}_{self.short_dtype}"

    @property
    def arguments(self) -> tuple[Argument, ...]:
        return (
            *(Argument(name, self.pointer) for name in ("dy", "x")),
            Argument("indices", "*u8"),
            Argument("values_grad", self.pointer),
            *(Argument(name, "i32") for name in ("M", "N", "K")),
            *(Argument(f"{name}_stride", "i32") for name in ("dy", "x", "indices", "values_grad")),
        )

    def render(self) -> str:
        tile, n, m = self.tile, self.n, self.m
        masked = not self.even
        return module(
            self,
            title=f"dW = dy^T x where W {n}:{m} keeps values, {self.dtype}.",
            text=fill(_TEXT, n=str(n), m=str(m), bits=str(self.index_bits)),
            constants={"N_TILE": tile.rows, "K_TILE": tile.columns, "M_TILE": tile.depth, "GROUPS": tile.columns // m},
            functions=[order("N_TILE", "K_TILE", tile.group), multiply(self, self.precision)],
            body=fill(
                _BODY,
                dy_mask=optional(masked, ", mask=(rows < N)[:, None] & (depth < M)[None, :], other=0.0"),
                x_mask=optional(masked, ", mask=(depth < M)[:, None] & (columns < K)[None, :], other=0.0"),
                n=str(n),
                m=str(m),
                load_index=load_words("indices", "index", n * self.index_bits, ends=masked),
                planes=planes("product", m, "d"),
                select=self._select(),
                kept=join([f"v{j}" for j in range(n)]),
                dtype=self.dtype,
            ),
        )

    def _select(self) -> str:
        """Of the m elements of a group, the one at each kept position; positions ascend."""
        lines = []
        for j in range(self.n):
            lines += [f"p{j} = {position(self, j)}", f"v{j} = d{j}"]
            lines += [f"v{j} = tl.where(p{j} == {i}, d{i}, v{j})" for i in range(j + 1, self.m - self.n + j + 1)]
        return "\n".join(lines)


_TEXT = """
dy [M, N], x [M, K], values_grad [N, K / $m * $n]; indices [N, bytes] hold the position of each kept value inside its
group of $m, $bits bits, ascending, lowest bits first.
Each program accumulates one dense tile of dW in registers, picks from it what is kept, and stores only that.
"""

_BODY = """
row_tile, column_tile = program_tile(N, K)
rows = row_tile * N_TILE + tl.arange(0, N_TILE)
columns = column_tile * K_TILE + tl.arange(0, K_TILE)
product = tl.zeros((N_TILE, K_TILE), tl.float32)
for m in range(0, M, M_TILE):
    depth = m + tl.arange(0, M_TILE)
    tokens = depth.to(tl.int64)
    # Loaded as it is multiplied: a tile that is transposed afterwards does not go to shared memory without registers.
    dy_tile = tl.load(dy + tokens[None, :] * dy_stride + rows[:, None]$dy_mask)
    x_tile = tl.load(x + tokens[:, None] * x_stride + columns[None, :]$x_mask)
    product = multiply(dy_tile, x_tile, product)
$planes
group = column_tile * GROUPS
groups = K // $m
exists = (rows < N)[:, None]
rows = tl.minimum(rows, N - 1).to(tl.int64)
$load_index
$select
kept = tl.reshape($kept, (N_TILE, GROUPS * $n))
place = group * $n + tl.arange(0, GROUPS * $n)
tl.store(
    values_grad + rows[:, None] * values_grad_stride + place[None, :],
    kept.to(tl.$dtype),
    mask=exists & (place < groups * $n)[None, :],
)
"""


@kernel_of(ops.nm_linear_grad_values)
def nm_linear_grad_values(
    dy: Tensor, x: Tensor, indices: Tensor, n: int, m: int, *, plan: Plan | None = None
) -> Tensor:
    """dy^T x at the kept positions.

    Args:
        dy: ``[..., out]``.
        x: ``[..., in]``.
        indices: of W ``[out, in]`` in the form of ``fxsparse.ops.nm``.
        n, m: the pattern.
        plan: instead of the tuned or default one.

    Returns:
        ``[out, in * n / m]``.
    """
    grads, inputs, packed = rows_of(dy), rows_of(x), indices.contiguous()
    depth, rows, columns = grads.shape[0], grads.shape[1], inputs.shape[1]
    values_grad = dy.new_empty(rows, columns // m * n)
    if not values_grad.numel():
        return values_grad
    tile = (plan or autotune.plan("nm_linear_grad_values", depth, rows, columns, dy, n, m)).tile
    even = depth % tile.depth == 0 and rows % tile.rows == 0 and columns % tile.columns == 0
    spec = NMGradValues(dtype_of(dy), tile, n, m, even=even, precision=precision_of(dy))
    tensors = (grads, inputs, packed, values_grad)
    with device_of(dy):
        launch_tiles(spec, (rows, columns), *tensors, depth, rows, columns, *(tensor.stride(0) for tensor in tensors))
    return values_grad
