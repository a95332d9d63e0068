"""Launches of the multiplexing kernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fxsparse.codegen import autotune
from fxsparse.codegen.epilogue import Epilogue
from fxsparse.codegen.launching import device_of, dtype_of, given, launch_tiles, precision_of, rows_of
from fxsparse.codegen.loaded import kernel
from fxsparse.codegen.multiplex import DemuxLinear, Mux
from fxsparse.codegen.spec import Tile
from fxsparse.codegen.tiles import Plan


def mux(x: Tensor, keys: Tensor, members: int, *, tile: Tile | None = None) -> Tensor:
    """x_mux[g] = 1/N sum of keys[i] * x[g N + i].

    Args:
        x: ``[groups * N, ..., dim]``.
        keys: ``[N, dim]``.
        members: N.

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
        keys: ``[N, key_dim]``, or ``[groups, N, key_dim]`` where each group has its own.
        weight: ``[out, key_dim + in]``.
        bias: ``[out]``.
        steps: of :class:`Epilogue`, without mul and add.

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
        own = members if keys.dim() == 3 else 0
        args = (hidden, right, projected, y, *given(bias))
        with device_of(h):
            launch_tiles(spec, (rows, columns), *args, rows, columns, depth, rows // h.shape[0], own, right.stride(0))
    return y
