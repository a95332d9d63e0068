"""Mixing inputs before an encoder (DataMUX, arXiv 2202.09318).

    mixed[g] = 1/N  sum over i < N of  keys[i] * x[g N + i]

Rows of x are consecutive in a group.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxsparse.codegen import autotune
from fxsparse.codegen.launching import device_of, dtype_of
from fxsparse.codegen.loaded import kernel
from fxsparse.codegen.operators import kernel_of
from fxsparse.codegen.spec import Argument, Spec, Tile
from fxsparse.codegen.template import fill, module
from fxsparse.codegen.tiles import LARGE, SHIPPED
from fxsparse.ops import multiplex as ops

SHIPPED["mux"] = {LARGE: Tile(16, 128, 1, warps=4, stages=1)}


@dataclass(frozen=True)
class Mux(Spec):
    """The kernel; its tile's rows are positions of a group, its columns features.

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
            body=fill(_BODY, dtype=self.dtype),
        )


_BODY = """
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


@kernel_of(ops.mux)
def mux(x: Tensor, keys: Tensor, members: int, *, tile: Tile | None = None) -> Tensor:
    """x_mux[g] = 1/N sum of keys[i] * x[g N + i].

    Args:
        x: ``[groups * N, ..., dim]``.
        keys: ``[N, dim]``.
        members: N.
        tile: instead of the tuned or default one.

    Returns:
        ``[groups, ..., dim]``.
    """
    inputs = x.contiguous()
    groups, dim = x.shape[0] // members, x.shape[-1]
    mixed = x.new_empty(groups, *x.shape[1:])
    if mixed.numel():
        length = mixed.numel() // groups // dim
        tile = tile or autotune.plan("mux", length, length, dim, x).tile
        with device_of(x):
            grid = (-(-length // tile.rows), -(-dim // tile.columns), groups)
            kernel(Mux(dtype_of(x), tile, members)).launch(grid, inputs, keys.contiguous(), mixed, length, dim)
    return mixed
