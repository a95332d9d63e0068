"""Launches of the linear on chosen rows and columns."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fxsparse.codegen import autotune
from fxsparse.codegen.epilogue import Epilogue
from fxsparse.codegen.gather import GatherLinear
from fxsparse.codegen.launching import count, device_of, dtype_of, given, launch_tiles, precision_of, rows_of
from fxsparse.codegen.spec import Spec
from fxsparse.codegen.tiles import Plan


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
    inputs, dense = rows_of(x), rows_of(weight)
    size = (inputs.shape[0], count(rows, weight.shape[0]), inputs.shape[1])
    y = x.new_empty(*x.shape[:-1], size[1])
    if y.numel():
        tile = (plan or autotune.plan("gather_linear", *size, x)).tile
        others = [rows_of(operand) for operand in operands]
        epilogue = Epilogue(bias is not None, tuple(steps))
        spec = GatherLinear(
            dtype_of(x), tile, "forward", rows is not None, columns is not None, precision_of(x), epilogue
        )
        extra: list[Tensor | int] = [*given(bias), *others, *(other.stride(0) for other in others)]
        _gather(spec, size[:2], (inputs, dense, rows_of(y)), rows, columns, extra, size)
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
    grads, dense = rows_of(dy), rows_of(weight)
    size = (grads.shape[0], grads.shape[1], count(columns, weight.shape[1]))
    dx = dy.new_empty(*dy.shape[:-1], size[2])
    if dx.numel():
        tile = (plan or autotune.plan("gather_linear", size[0], size[2], size[1], dy)).tile
        spec = GatherLinear(dtype_of(dy), tile, "grad_input", rows is not None, columns is not None, precision_of(dy))
        _gather(spec, (size[0], size[2]), (grads, dense, rows_of(dx)), rows, columns, [], size)
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
    grads, inputs = rows_of(dy), rows_of(x)
    whole = rows is None and columns is None
    weight_grad = dy.new_empty(tuple(shape)) if whole else dy.new_zeros(tuple(shape))
    size = (grads.shape[0], grads.shape[1], inputs.shape[1])
    if size[1] and size[2]:
        tile = (plan or autotune.plan("gather_linear_grad_weight", size[0], size[1], size[2], dy)).tile
        spec = GatherLinear(dtype_of(dy), tile, "grad_weight", rows is not None, columns is not None, precision_of(dy))
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
    with device_of(tensors[0]):
        strides = (tensor.stride(0) for tensor in tensors)
        launch_tiles(spec, result, *tensors, *given(rows), *given(columns), *extra, *size, *strides)
