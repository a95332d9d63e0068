"""Launches of the N:M kernels: tensors in, tensors out, arguments in the operators' order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxsparse.codegen import autotune
from fxsparse.codegen.epilogue import Epilogue
from fxsparse.codegen.launching import blocks, device_of, dtype_of, launch_tiles, power_of_two, precision_of, rows_of
from fxsparse.codegen.loaded import kernel
from fxsparse.codegen.nm_grad_values import NMGradValues
from fxsparse.codegen.nm_linear import NMGradInput, NMLinear
from fxsparse.codegen.nm_prune import NMPrune
from fxsparse.codegen.spec import Tile
from fxsparse.codegen.tiles import Plan
from fxsparse.errors import OptionError

LARGEST_RANK_INSIDE = 64
"""A low-rank branch up to this rank is computed whole inside the sparse product's launch."""


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
    return _forward(x, values, indices, bias, n, m, steps, operands, None, plan)


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

    One launch up to rank `LARGEST_RANK_INSIDE`, beyond it a dense product for x down^T and one launch.

    Args:
        down, up: ``[r, in]`` and ``[out, r]``.
        scale: 1/r unless given.
        others: as for :func:`nm_linear`.
    """
    factor = 1 / down.shape[0] if scale is None else float(scale)
    return _forward(x, values, indices, bias, n, m, steps, operands, (down, up, factor), plan)


def _forward(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    steps: Sequence[str],
    operands: Sequence[Tensor],
    branch: tuple[Tensor, Tensor, float] | None,
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
    low_rank, rank = "none", 16
    if branch is not None and branch[0].shape[0]:
        rank = power_of_two(branch[0].shape[0])
        low_rank = "inside" if rank <= LARGEST_RANK_INSIDE else "after"
    spec = NMLinear(
        dtype_of(x),
        plan.tile,
        n,
        m,
        even=depth % plan.tile.depth == 0,
        low_rank=low_rank,
        rank_tile=min(rank, 32) if low_rank == "after" else rank,
        precision=precision_of(x),
        epilogue=epilogue,
    )
    extra: tuple[Tensor, ...] = ()
    if branch is not None and low_rank != "none":
        first = inputs @ branch[0].t() if low_rank == "after" else branch[0].contiguous()
        extra = (first, branch[1].contiguous())
    out = rows_of(y)
    with device_of(x):
        for block in blocks(columns, depth, plan.square and not epilogue.gate):
            part, width = out[:, block], block.stop - block.start
            args = [inputs, values[block], indices[block], part]
            if branch is not None and extra:
                args += [extra[0], extra[1][block], branch[2], extra[1].shape[1]]  # type: ignore[list-item]
            args += [] if bias is None else [bias[block]]
            args += [other[:, block] for other in others]
            launch_tiles(
                spec,
                (rows, width),
                *args,
                *(other.stride(0) for other in others),
                rows,
                width,
                depth,
                *(inputs.stride(0), values.stride(0), indices.stride(0), out.stride(0)),
            )
    return y


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
        others: as for :func:`nm_linear`.

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
    packed = [tensor.contiguous() for tensor in (values, indices, *(() if column_mask is None else (column_mask,)))]
    out = rows_of(dx)
    with device_of(dy):
        launch_tiles(
            spec,
            (rows, columns),
            *(grads, packed[0], packed[1], out, *packed[2:]),
            *(rows, depth, columns),
            *(tensor.stride(0) for tensor in (grads, packed[0], packed[1], out, *packed[2:])),
        )
    return dx


def nm_linear_grad_values(
    dy: Tensor, x: Tensor, indices: Tensor, n: int, m: int, *, plan: Plan | None = None
) -> Tensor:
    """dy^T x at the kept positions.

    Args:
        dy: ``[..., out]``.
        x: ``[..., in]``.
        indices: of W.

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


def nm_prune(
    weight: Tensor, n: int, m: int, scores: Tensor | None = None, *, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """Keeps the n best of every m weights and compresses them, reading the weight once.

    Args:
        weight: ``[out, in]``; ``in`` is a multiple of m.
        scores: ``[out, in]``; the weights' magnitudes unless given.

    Returns:
        values ``[out, in * n / m]`` and indices, uint8, as ``fxsparse.ops.nm.pack`` gives them.

    Raises:
        OptionError: there is no kernel for the pattern or a dtype, or ``in`` is not a multiple of m.
    """
    rows, columns = weight.shape
    if columns % m:
        raise OptionError(f"{columns} columns are not a multiple of {m}, as {n}:{m} needs")
    tile = tile or autotune.plan("nm_prune", rows, rows, columns, weight, n, m).tile
    spec = NMPrune(dtype_of(weight), tile, n, m, "magnitude" if scores is None else dtype_of(scores))
    bits = spec.index_bits
    values = weight.new_empty(rows, columns // m * n)
    indices = torch.empty(rows, -(-values.shape[1] * bits // 8), dtype=torch.uint8, device=weight.device)
    tensors = [rows_of(tensor) for tensor in (weight, *(() if scores is None else (scores,)))] + [values, indices]
    if values.numel():
        with device_of(weight):
            kernel(spec).launch(
                (-(-rows // tile.rows), -(-columns // tile.columns)),
                *tensors,
                rows,
                columns,
                *(tensor.stride(0) for tensor in tensors),
            )
    return values, indices
