"""Tensors in, tensors out: the kernels behind the operators, with their arguments in the operators' order.

Each function allocates its result, launches on the current stream and returns without waiting, so it can be captured in
a CUDA graph. Leading dimensions of an input are flattened to rows and restored. `unsupported` says why a call has no
kernel; the functions raise OptionError then.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from fxsparse.codegen import tune
from fxsparse.codegen.epilogue import Epilogue
from fxsparse.codegen.gather import GatherLinear
from fxsparse.codegen.multiplex import DemuxLinear, Mux
from fxsparse.codegen.nm_grad_values import NMGradValues
from fxsparse.codegen.nm_linear import NMGradInput, NMLinear
from fxsparse.codegen.nm_prune import NMPrune
from fxsparse.codegen.registry import kernel
from fxsparse.codegen.spec import DTYPES, NMSpec, Spec, Tile
from fxsparse.codegen.tiles import Plan
from fxsparse.errors import OptionError

LARGEST_RANK_INSIDE = 64
"""A low-rank branch up to this rank is computed whole inside the sparse product's launch."""


def unsupported(dtype: torch.dtype, n: int | None = None, m: int | None = None) -> str | None:
    """Why there is no kernel for a dtype and pattern; None where there is one."""
    if _name(dtype) not in DTYPES:
        return f"there are kernels for {', '.join(DTYPES)}, not for {_name(dtype)}"
    if n is not None and (n, m) not in NMSpec.PATTERNS:
        return f"there are kernels for {', '.join(f'{a}:{b}' for a, b in NMSpec.PATTERNS)}, not for {n}:{m}"
    return None


# --- N:M --------------------------------------------------------------------------------------------------------------


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
        values, indices: W ``[out, in]`` in the form of ``fxsparse.nm``.
        column_mask: not read; the forward pass is exact in W^R.
        bias: ``[out]``.
        n, m: the pattern.
        steps: of :class:`Epilogue`.
        operands: the tensors its steps take, each ``[..., out]``.
        plan: instead of the tuned or default one.

    Returns:
        ``[..., out]``, contiguous.
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
    inputs, columns = _rows(x), values.shape[0]
    rows, depth = inputs.shape
    y = x.new_empty(*x.shape[:-1], columns)
    if not y.numel():
        return y
    name = "nm_linear" if branch is None else "nm_linear_low_rank"
    plan = plan or tune.plan(name, rows, columns, depth, x, n, m)
    values, indices, others = values.contiguous(), indices.contiguous(), [_rows(operand) for operand in operands]
    low_rank, rank = "none", 16
    if branch is not None and branch[0].shape[0]:
        rank = _power_of_two(branch[0].shape[0])
        low_rank = "inside" if rank <= LARGEST_RANK_INSIDE else "after"
    spec = NMLinear(
        _dtype(x),
        plan.tile,
        n,
        m,
        even=depth % plan.tile.depth == 0,
        low_rank=low_rank,
        rank_tile=min(rank, 32) if low_rank == "after" else rank,
        precision=_precision(x),
        epilogue=Epilogue(bias is not None, tuple(steps)),
    )
    extra: tuple[Tensor, ...] = ()
    if branch is not None and low_rank != "none":
        first = inputs @ branch[0].t() if low_rank == "after" else branch[0].contiguous()
        extra = (first, branch[1].contiguous())
    out = _rows(y)
    with _device(x):
        for block in _blocks(columns, depth, plan.square):
            part = out[:, block]
            args = [inputs, values[block], indices[block], part]
            if branch is not None and extra:
                args += [extra[0], extra[1][block], branch[2], extra[1].shape[1]]  # type: ignore[list-item]
            args += [] if bias is None else [bias[block]]
            args += [other[:, block] for other in others]
            _launch(
                spec,
                (rows, part.shape[1]),
                *args,
                *(other.stride(0) for other in others),
                rows,
                part.shape[1],
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
    grads, columns = _rows(dy), values.shape[1] // n * m
    rows, depth = grads.shape
    dx = dy.new_empty(*dy.shape[:-1], columns)
    if not dx.numel():
        return dx
    tile = (plan or tune.plan("nm_linear_grad_input", rows, columns, depth, dy, n, m)).tile
    spec = NMGradInput(
        _dtype(dy),
        tile,
        n,
        m,
        column_mask=column_mask is not None,
        even=depth % tile.depth == 0 and columns % tile.columns == 0,
        precision=_precision(dy),
    )
    packed = [tensor.contiguous() for tensor in (values, indices, *(() if column_mask is None else (column_mask,)))]
    out = _rows(dx)
    with _device(dy):
        _launch(
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
    grads, inputs, packed = _rows(dy), _rows(x), indices.contiguous()
    depth, rows, columns = grads.shape[0], grads.shape[1], inputs.shape[1]
    values_grad = dy.new_empty(rows, columns // m * n)
    if not values_grad.numel():
        return values_grad
    tile = (plan or tune.plan("nm_linear_grad_values", depth, rows, columns, dy, n, m)).tile
    even = depth % tile.depth == 0 and rows % tile.rows == 0 and columns % tile.columns == 0
    spec = NMGradValues(_dtype(dy), tile, n, m, even=even, precision=_precision(dy))
    tensors = (grads, inputs, packed, values_grad)
    with _device(dy):
        _launch(spec, (rows, columns), *tensors, depth, rows, columns, *(tensor.stride(0) for tensor in tensors))
    return values_grad


def nm_prune(
    weight: Tensor, n: int, m: int, scores: Tensor | None = None, *, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """Keeps the n best of every m weights and compresses them, reading the weight once.

    Args:
        weight: ``[out, in]``; ``in`` is a multiple of m.
        scores: ``[out, in]``; the weights' magnitudes unless given.

    Returns:
        values ``[out, in * n / m]`` and indices, uint8, as ``fxsparse.nm.pack`` gives them.

    Raises:
        OptionError: there is no kernel for the pattern or a dtype, or ``in`` is not a multiple of m.
    """
    rows, columns = weight.shape
    if columns % m:
        raise OptionError(f"{columns} columns are not a multiple of {m}, as {n}:{m} needs")
    tile = tile or tune.plan("nm_prune", rows, rows, columns, weight, n, m).tile
    spec = NMPrune(_dtype(weight), tile, n, m, "magnitude" if scores is None else _dtype(scores))
    bits = spec.index_bits
    values = weight.new_empty(rows, columns // m * n)
    indices = torch.empty(rows, -(-values.shape[1] * bits // 8), dtype=torch.uint8, device=weight.device)
    tensors = [_rows(tensor) for tensor in (weight, *(() if scores is None else (scores,)))] + [values, indices]
    if values.numel():
        with _device(weight):
            kernel(spec).launch(
                (-(-rows // tile.rows), -(-columns // tile.columns)),
                *tensors,
                rows,
                columns,
                *(tensor.stride(0) for tensor in tensors),
            )
    return values, indices


# --- chosen rows and columns ------------------------------------------------------------------------------------------


def gather_linear(
    x: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    bias: Tensor | None,
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
        steps, operands, plan: as for :func:`nm_linear`.

    Returns:
        ``[..., s]``, s the number of rows chosen; contiguous.
    """
    inputs, dense = _rows(x), _rows(weight)
    size = (inputs.shape[0], _count(rows, weight.shape[0]), inputs.shape[1])
    y = x.new_empty(*x.shape[:-1], size[1])
    if y.numel():
        tile = (plan or tune.plan("gather_linear", *size, x)).tile
        others = [_rows(operand) for operand in operands]
        epilogue = Epilogue(bias is not None, tuple(steps))
        spec = GatherLinear(_dtype(x), tile, "forward", rows is not None, columns is not None, _precision(x), epilogue)
        extra = [*_given(bias), *others, *(other.stride(0) for other in others)]
        _gather(spec, size[:2], (inputs, dense, _rows(y)), rows, columns, extra, size)
    return y


def gather_linear_grad_input(
    dy: Tensor, weight: Tensor, rows: Tensor | None, columns: Tensor | None, *, plan: Plan | None = None
) -> Tensor:
    """dx = dy W[rows][:, columns].

    Args:
        dy: ``[..., s]``.
        others: as for :func:`gather_linear`.

    Returns:
        ``[..., k]``, contiguous.
    """
    grads, dense = _rows(dy), _rows(weight)
    size = (grads.shape[0], grads.shape[1], _count(columns, weight.shape[1]))
    dx = dy.new_empty(*dy.shape[:-1], size[2])
    if dx.numel():
        tile = (plan or tune.plan("gather_linear", size[0], size[2], size[1], dy)).tile
        spec = GatherLinear(_dtype(dy), tile, "grad_input", rows is not None, columns is not None, _precision(dy))
        _gather(spec, (size[0], size[2]), (grads, dense, _rows(dx)), rows, columns, [], size)
    return dx


def gather_linear_grad_weight(
    dy: Tensor,
    x: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    shape: Sequence[int],
    *,
    plan: Plan | None = None,
) -> Tensor:
    """The gradient of the whole weight ``shape``: dy^T x at the chosen rows and columns, zero elsewhere.

    Args:
        dy, x: ``[..., s]`` and ``[..., k]``.
        rows, columns: int64, each index once, or None for all.
    """
    grads, inputs = _rows(dy), _rows(x)
    whole = rows is None and columns is None
    weight_grad = dy.new_empty(tuple(shape)) if whole else dy.new_zeros(tuple(shape))
    size = (grads.shape[0], grads.shape[1], inputs.shape[1])
    if size[1] and size[2]:
        tile = (plan or tune.plan("gather_linear_grad_weight", size[0], size[1], size[2], dy)).tile
        spec = GatherLinear(_dtype(dy), tile, "grad_weight", rows is not None, columns is not None, _precision(dy))
        _gather(spec, size[1:], (grads, inputs, weight_grad), rows, columns, [], size)
    return weight_grad


def _gather(
    spec: Spec,
    result: Sequence[int],
    tensors: Sequence[Tensor],
    rows: Tensor | None,
    columns: Tensor | None,
    extra: Sequence[Tensor | int],
    size: Sequence[int],
) -> None:
    with _device(tensors[0]):
        strides = (tensor.stride(0) for tensor in tensors)
        _launch(spec, result, *tensors, *_given(rows), *_given(columns), *extra, *size, *strides)


# --- multiplexing -----------------------------------------------------------------------------------------------------


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
        tile = tile or tune.plan("mux", length, length, dim, x).tile
        with _device(x):
            grid = (-(-length // tile.rows), -(-dim // tile.columns), groups)
            kernel(Mux(_dtype(x), tile, members)).launch(grid, inputs, keys.contiguous(), mixed, length, dim)
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
        right = _rows(weight)[:, key_dim:]
        tile = (plan or tune.plan("demux_linear", rows, columns, depth, h)).tile
        spec = DemuxLinear(_dtype(h), tile, members, _precision(h), Epilogue(bias is not None, tuple(steps)))
        own = members if keys.dim() == 3 else 0
        args = (hidden, right, projected, y, *_given(bias))
        with _device(h):
            _launch(spec, (rows, columns), *args, rows, columns, depth, rows // h.shape[0], own, right.stride(0))
    return y


# --- shared -----------------------------------------------------------------------------------------------------------


def _launch(spec: Spec, result: Sequence[int], *args: Tensor | float) -> None:
    """One program for each tile of a result."""
    tile = spec.tile
    kernel(spec).launch((-(-result[0] // tile.rows) * -(-result[1] // tile.columns),), *args)


def _blocks(rows: int, columns: int, square: bool) -> Iterator[slice]:
    step = columns if square and rows > columns > 0 else rows
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _rows(x: Tensor) -> Tensor:
    """``[..., features]`` as a matrix whose features are adjacent in memory."""
    matrix = x.reshape(-1, x.shape[-1])
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _count(index: Tensor | None, size: int) -> int:
    return size if index is None else index.shape[0]


def _given(tensor: Tensor | None) -> tuple[Tensor, ...]:
    return () if tensor is None else (tensor.contiguous(),)


@functools.cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(x: Tensor) -> str:
    return _name(x.dtype)


def _precision(x: Tensor) -> str:
    """What the user allows float32 products: torch's own setting."""
    if x.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    return "tf32"


def _power_of_two(rank: int) -> int:
    return max(16, 1 << (rank - 1).bit_length())


def _device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
