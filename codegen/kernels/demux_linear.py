"""The first layer that tells multiplexed inputs apart after an encoder (DataMUX, arXiv 2202.09318).

    y[g N + i] = act(W [key_i ; h[g]] + bias),  W = [W_key | W_h]

The concatenation is never made: W_h h[g] does not depend on i, so it is computed once a group and not N times, and
W_key key_i, ``[N, out]`` or ``[groups * N, out]``, is an input of the kernel. Rows of y are consecutive in a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fxsparse.codegen import autotune
from fxsparse.codegen.epilogue import Epilogue
from fxsparse.codegen.launching import device_of, dtype_of, if_present, launch_tiles, precision_of, rows_of
from fxsparse.codegen.operators import kernel_of
from fxsparse.codegen.spec import Argument, Spec, Tile
from fxsparse.codegen.template import fill, module, multiply, order
from fxsparse.codegen.tiles import DECODE, LARGE, SHIPPED, SMALL, Plan
from fxsparse.errors import OptionError
from fxsparse.ops import multiplex as ops

SHIPPED["demux_linear"] = {
    DECODE: Tile(16, 64, 64, warps=4, stages=4),
    SMALL: Tile(64, 64, 64, warps=4, stages=3),
    LARGE: Tile(64, 128, 32, warps=8, stages=3),
}


@dataclass(frozen=True)
class DemuxLinear(Spec):
    """The kernel; its tile's rows are along M, its columns along N, its depth along K.

    Attributes:
        members: N, outputs of one input.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.
        epilogue: a bias and steps without further tensors.
    """

    members: int = 2
    precision: str = "ieee"
    epilogue: Epilogue = field(default_factory=Epilogue)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epilogue.operands:
            raise OptionError(f"epilogue {self.epilogue} of a demultiplexer takes no further tensors")

    @property
    def name(self) -> str:
        return f"demux_linear_{self.members}_{self.short_dtype}"

    @property
    def arguments(self) -> tuple[Argument, ...]:
        return (
            *(Argument(name, self.pointer) for name in ("h", "weight", "projected_keys", "y")),
            *self.epilogue.arguments(self.pointer),
            *(Argument(name, "i32") for name in ("M", "N", "K", "L", "members_of_group", "weight_stride")),
        )

    def render(self) -> str:
        tile = self.tile
        return module(
            self,
            title=f"y[g, i] = {self.epilogue.formula('h[g] W_h^T + projected_keys[i]')}, {self.dtype}.",
            text="h [M = groups * L, K], weight W_h [N, K], projected_keys [members, N] shared by all groups\n"
            "(members_of_group 0) or [groups * members, N] (members_of_group = members), y [groups * members * L, N].",
            constants={"M_TILE": tile.rows, "N_TILE": tile.columns, "K_TILE": tile.depth, "MEMBERS": self.members},
            functions=[order("M_TILE", "N_TILE", tile.group), multiply(self, self.precision)],
            body=fill(
                _BODY,
                epilogue=self.epilogue.lines(
                    column="columns[None, :]", offset="", mask="exists", column_mask="(columns < N)[None, :]"
                ),
                dtype=self.dtype,
            ),
        )


_BODY = """
row_tile, column_tile = program_tile(M, N)
rows = row_tile * M_TILE + tl.arange(0, M_TILE)
columns = column_tile * N_TILE + tl.arange(0, N_TILE)
h_rows = tl.minimum(rows, M - 1).to(tl.int64)
w_rows = tl.minimum(columns, N - 1).to(tl.int64)
product = tl.zeros((M_TILE, N_TILE), tl.float32)
for k in range(0, K, K_TILE):
    depth = k + tl.arange(0, K_TILE)
    h_tile = tl.load(h + h_rows[:, None] * K + depth[None, :], mask=(depth < K)[None, :], other=0.0)
    w_tile = tl.load(weight + w_rows[:, None] * weight_stride + depth[None, :], mask=(depth < K)[None, :], other=0.0)
    product = multiply(h_tile, tl.trans(w_tile), product)
exists = (rows < M)[:, None] & (columns < N)[None, :]
group = h_rows // L
position = h_rows % L
for i in range(MEMBERS):
    key_rows = group * members_of_group + i
    key = tl.load(projected_keys + key_rows[:, None] * N + columns[None, :], mask=exists, other=0.0)
    t = product + key.to(tl.float32)
    $epilogue
    y_rows = (group * MEMBERS + i) * L + position
    tl.store(y + y_rows[:, None] * N + columns[None, :], t.to(tl.$dtype), mask=exists)
"""


@kernel_of(ops.demux_linear)
def demux_linear(
    h: Tensor,
    keys: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    steps: Sequence[str] = (),
    plan: Plan | None = None,
) -> Tensor:
    """y[g N + i] = act(W [key_i ; h[g]] + bias) without making the concatenation.

    Args:
        h: ``[groups, ..., in]``.
        keys: ``[N, key_dim]``, or ``[groups, N, key_dim]`` if each group has keys of its own.
        weight: ``[out, key_dim + in]``.
        bias: ``[out]``.
        steps: of :class:`Epilogue`, without mul and add.
        plan: instead of the tuned or default one.

    Returns:
        ``[groups * N, ..., out]``.
    """
    members, key_dim = keys.shape[-2:]
    hidden = h.contiguous()
    rows, depth, columns = hidden.numel() // max(h.shape[-1], 1), h.shape[-1], weight.shape[0]
    y = h.new_empty(h.shape[0] * members, *h.shape[1:-1], columns)
    if y.numel():
        projected = keys.reshape(-1, key_dim) @ weight[:, :key_dim].t()
        right = rows_of(weight)[:, key_dim:]
        tile = (plan or autotune.plan("demux_linear", rows, columns, depth, h)).tile
        spec = DemuxLinear(dtype_of(h), tile, members, precision_of(h), Epilogue(bias is not None, tuple(steps)))
        members_of_group = members if keys.dim() == 3 else 0
        sizes = (rows, columns, depth, rows // h.shape[0], members_of_group, right.stride(0))
        with device_of(h):
            launch_tiles(spec, (rows, columns), hidden, right, projected, y, *if_present(bias), *sizes)
    return y
