"""Launches of the product on sparse tensor cores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxsparse.codegen import tiles
from fxsparse.codegen.epilogue import Epilogue
from fxsparse.codegen.launching import device_of, dtype_of, given, launch_tiles, rows_of
from fxsparse.codegen.metadata import SparseTranspose
from fxsparse.codegen.sparse_tensor_cores import SparseTensorCoreLinear
from fxsparse.errors import OptionError


def unsupported_sparse(dtype: torch.dtype, in_features: int, n: int = 2, m: int = 4) -> str | None:
    """Why sparse tensor cores cannot run a product; None where they can."""
    if (n, m) != (2, 4):
        return f"sparse tensor cores take 2:4, not {n}:{m}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"sparse tensor cores take bfloat16 and float16, not {dtype}"
    if in_features % 16:
        return f"copies of 16 bytes need {in_features} columns to be a multiple of 16"
    return None


def sparse_tensor_core_linear(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None,
    *,
    steps: Sequence[str] = (),
    operands: Sequence[Tensor] = (),
    spec: SparseTensorCoreLinear | None = None,
) -> Tensor:
    """y = x W^T + bias, then an epilogue; W is 2:4.

    Args:
        x: ``[..., in]``, bfloat16 or float16; ``in`` is a multiple of 16.
        values: ``[out, in / 2]``.
        metadata: int32, of :func:`~fxsparse.codegen.metadata.pack_metadata`.
        bias: ``[out]``.
        steps: of :class:`Epilogue`.
        operands: the tensors its steps take, each ``[..., out]``.
        spec: instead of the default; its dtype and epilogue are replaced.

    Returns:
        ``[..., out]``, contiguous.

    Raises:
        OptionError: the dtype or shape has no kernel.
    """
    reason = unsupported_sparse(x.dtype, x.shape[-1])
    if reason is not None:
        raise OptionError(reason)
    inputs, columns = _words(x.reshape(-1, x.shape[-1])), values.shape[0]
    rows, depth = inputs.shape[0], x.shape[-1]
    y = x.new_empty(*x.shape[:-1], columns)
    if y.numel():
        others = [rows_of(operand) for operand in operands]
        epilogue = Epilogue(bias is not None, tuple(steps))
        tile, warp_rows, warp_columns = (
            tiles.sparse(rows, bool(steps)) if spec is None else (spec.tile, spec.warp_rows, spec.warp_columns)
        )
        made = SparseTensorCoreLinear(dtype_of(x), tile, warp_rows, warp_columns, epilogue)
        with device_of(x):
            launch_tiles(
                made,
                (rows, columns),
                *(inputs, _words(values), metadata, rows_of(y), *given(bias), *others),
                *(other.stride(0) for other in others),
                *(rows, columns, depth, columns),
            )
    return y


def sparse_tensor_core_grad_input(dy: Tensor, transpose: SparseTranspose) -> Tensor:
    """dx = dy W^{R,C} from the kept transpose of W^{R,C}.

    Args:
        dy: ``[..., out]``, ``out`` a multiple of 16.
        transpose: of W, its values up to date.

    Returns:
        ``[..., in]``, contiguous.
    """
    return sparse_tensor_core_linear(dy, transpose.values, transpose.metadata, None)


def _words(matrix: Tensor) -> Tensor:
    """Pairs of 16-bit elements as words."""
    matrix = matrix.contiguous()
    return (matrix.clone() if matrix.storage_offset() % 2 else matrix).view(torch.int32)
