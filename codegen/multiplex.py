"""Mixing inputs before an encoder and telling them apart after it.

    mux      x_mux[g] = 1/N  sum over i < N of  keys[i] * x[g N + i]          (DataMUX, arXiv 2202.09318)
    demux    y[g N + i] = act(W [key_i ; h[g]] + bias),  W = [W_key | W_h]    (its first layer)

In the second the concatenation is never made: W_h h[g] does not depend on i, so it is computed once a group and not N
times, and W_key key_i, ``[N, out]`` or ``[groups * N, out]``, is an input. Rows of x and y are consecutive in a group.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fxsparse.codegen.epilogue import Epilogue
from fxsparse.codegen.spec import Argument, Spec
from fxsparse.codegen.template import fill, module, multiply, order
from fxsparse.errors import OptionError


@dataclass(frozen=True)
class Mux(Spec):
    """The mixing kernel; its tile's rows are positions of a group, its columns features.

    Attributes:
        members: N, inputs mixed into one.
    """

    members: int = 2

    @property
    def name(self) -> str:
        return f"mux_{self.members}_{self.short_dtype}"

    @property
    def arguments(self) -> tuple[Argument, ...]:
        tensors = ("x", "keys", "mixed")
        return (*(Argument(name, self.pointer) for name in tensors), Argument("L", "i32"), Argument("D", "i32"))

    def render(self) -> str:
        return module(
            self,
            title=f"mixed = 1/{self.members} sum of keys[i] * x[i], {self.dtype}.",
            text="x [groups * N, L, D], keys [N, D], mixed [groups, L, D], all contiguous.",
            constants={"L_TILE": self.tile.rows, "D_TILE": self.tile.columns, "N": self.members},
            functions=[],
            body=fill(_MUX, dtype=self.dtype),
        )


@dataclass(frozen=True)
class DemuxLinear(Spec):
    """The first layer of a demultiplexer.

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
                _DEMUX,
                epilogue=self.epilogue.lines(
                    column="columns[None, :]", offset="", mask="exists", column_mask="(columns < N)[None, :]"
                ),
                dtype=self.dtype,
            ),
        )


_MUX = """
position = tl.program_id(0) * L_TILE + tl.arange(0, L_TILE)
feature = tl.program_id(1) * D_TILE + tl.arange(0, D_TILE)
group = tl.program_id(2).to(tl.int64)
exists = (position < L)[:, None] & (feature < D)[None, :]
place = position.to(tl.int64)[:, None] * D + feature[None, :]
total = tl.zeros((L_TILE, D_TILE), tl.float32)
for i in range(N):
    key = tl.load(keys + i * D + feature, mask=feature < D, other=0.0).to(tl.float32)
    member = tl.load(x + (group * N + i) * L * D + place, mask=exists, other=0.0).to(tl.float32)
    total += key[None, :] * member
tl.store(mixed + group * L * D + place, (total / N).to(tl.$dtype), mask=exists)
"""

_DEMUX = """
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
