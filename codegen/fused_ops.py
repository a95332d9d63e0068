"""Operators that exist for the kernels' sake: a product with its epilogue, and 2:4 products on sparse tensor cores.

    nm_linear_epilogue(x, values, indices, bias?, n, m, steps, operands)
    sparse_tensor_core_linear(x, values, metadata, bias?, steps, operands)
    sparse_wgmma_linear(x, values, metadata, bias?, steps, operands)
    sparse_tensor_core_linear_low_rank(x, values, metadata, down, up, bias?, scale?, steps, operands)
    sparse_wgmma_linear_low_rank(x, values, metadata, down, up, bias?, scale?, steps, operands)
    sparse_transpose(values, indices, column_mask, instruction) -> (values, metadata)
    cusparselt_linear(x, packed, bias?, out_features, alg_id=0, split_k=1, split_k_mode=-1)

``steps`` are names of :class:`~fxsparse.codegen.epilogue.Epilogue` separated by blanks. The transpose is that of
W^{R,C}, for the gradient of an input; the last operator is NVIDIA's library through torch. On a CPU they run plain
torch (but for the library's, whose packed form only it can read). They have no gradients: they stand in graphs that are
not differentiated, or below the gradients. Nor have they rules for autocast or a reference to inline, which is why they
are not made with ``fxsparse.ops.define``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.nn import functional as F

from fxsparse.codegen.epilogue import GATED
from fxsparse.codegen.kernels import nm_linear as nm_kernels
from fxsparse.codegen.kernels import sparse_tensor_core_linear as sparse_kernels
from fxsparse.codegen.kernels import sparse_wgmma_linear as wgmma_kernels
from fxsparse.codegen.kernels.nm_transpose import nm_transpose
from fxsparse.codegen.metadata import (
    MMA_SP,
    PACK,
    WGMMA_SP,
    compressed_transpose,
    metadata_shape,
    unpack_metadata,
    unpack_wgmma_metadata,
)
from fxsparse.codegen.operators import HAS_TRITON
from fxsparse.errors import OptionError
from fxsparse.ops.define import declare_kernel
from fxsparse.ops.nm import Pattern, unpack

_STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def apply_steps(y: Tensor, steps: str, operands: list[Tensor]) -> Tensor:
    """An epilogue's steps in plain torch."""
    rest: Iterator[Tensor] = iter(operands)
    for step in steps.split():
        if step.startswith(GATED):
            y, other = y.unflatten(-1, (-1, 2)).unbind(-1)
            y = _STEPS[step.removeprefix(GATED)](y) * other
        elif step == "mul":
            y = y * next(rest)
        elif step == "add":
            y = y + next(rest)
        elif step in _STEPS:
            y = _STEPS[step](y)
        else:
            raise OptionError(f"no epilogue step {step!r}")
    return y


def _operator(features: Callable[..., int]) -> Callable[[Callable[..., Tensor]], CustomOpDef]:
    """Makes an operator of the function that it runs on every device.

    Args:
        features: of the result, from the arguments by name; its other sizes, its dtype and device are those of ``x``.
    """

    def make(compute: Callable[..., Tensor]) -> CustomOpDef:
        op = torch.library.custom_op(f"fxsparse::{compute.__name__}", compute, mutates_args=())
        signature = inspect.signature(compute)

        @op.register_fake
        def _(x: Tensor, *args: Any) -> Tensor:
            return x.new_empty(*x.shape[:-1], features(**signature.bind(x, *args).arguments))

        return op

    return make


@_operator(lambda values, steps, **_: values.shape[0] // (2 if steps.startswith(GATED) else 1))
def nm_linear_epilogue(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    steps: str,
    operands: list[Tensor],
) -> Tensor:
    """steps(x W^T + bias); arguments as for the kernel's ``nm_linear``."""
    if x.is_cuda:
        return nm_kernels.nm_linear(x, values, indices, None, bias, n, m, steps=steps.split(), operands=operands)
    weight = unpack(values, indices, Pattern(n, m), x.shape[-1])
    return apply_steps(F.linear(x, weight, bias), steps, operands).contiguous()


@_operator(lambda values, **_: values.shape[0])
def sparse_tensor_core_linear(
    x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, steps: str, operands: list[Tensor]
) -> Tensor:
    """steps(x W^T + bias), W 2:4; arguments as for the kernel's ``sparse_tensor_core_linear``."""
    if x.is_cuda:
        return sparse_kernels.sparse_tensor_core_linear(
            x, values, metadata, bias, steps=steps.split(), operands=operands
        )
    indices = unpack_metadata(metadata, values.shape[0], x.shape[-1])
    weight = unpack(values, indices, Pattern(2, 4), x.shape[-1])
    return apply_steps(F.linear(x, weight, bias), steps, operands).contiguous()


@_operator(lambda values, **_: values.shape[0])
def sparse_wgmma_linear(
    x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, steps: str, operands: list[Tensor]
) -> Tensor:
    """steps(x W^T + bias), W 2:4; arguments as for the kernel's ``sparse_wgmma_linear``."""
    if x.is_cuda:
        return wgmma_kernels.sparse_wgmma_linear(x, values, metadata, bias, steps=steps.split(), operands=operands)
    indices = unpack_wgmma_metadata(metadata, values.shape[0], x.shape[-1])
    weight = unpack(values, indices, Pattern(2, 4), x.shape[-1])
    return apply_steps(F.linear(x, weight, bias), steps, operands).contiguous()


@_operator(lambda values, **_: values.shape[0])
def sparse_tensor_core_linear_low_rank(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    scale: float | None,
    steps: str,
    operands: list[Tensor],
) -> Tensor:
    """steps(x W^T + scale (x down^T) up^T + bias), W 2:4; the branch is a dense product that the epilogue adds."""
    branch = _hidden(x, down, scale) @ up.t()
    return sparse_tensor_core_linear(x, values, metadata, bias, f"add {steps}", [branch, *operands])


@_operator(lambda values, **_: values.shape[0])
def sparse_wgmma_linear_low_rank(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    scale: float | None,
    steps: str,
    operands: list[Tensor],
) -> Tensor:
    """steps(x W^T + scale (x down^T) up^T + bias), W 2:4; the kernel multiplies by ``up`` in steps of its own loop."""
    hidden = _hidden(x, down, scale)
    if not x.is_cuda:
        return sparse_wgmma_linear(x, values, metadata, bias, f"add {steps}", [hidden @ up.t(), *operands])
    return wgmma_kernels.sparse_wgmma_linear(
        x, values, metadata, bias, steps=steps.split(), operands=operands, hidden=hidden, up=up
    )


def _hidden(x: Tensor, down: Tensor, scale: float | None) -> Tensor:
    """scale x down^T ``[..., r]``, by one dense product. Not inside the sparse one: each of its tiles of columns would
    read ``down`` anew, which in decoding is more than it reads of W."""
    inputs = x.reshape(-1, x.shape[-1])
    alpha = 1 / down.shape[0] if scale is None else scale
    hidden = torch.addmm(x.new_zeros(()), inputs, down.t(), beta=0, alpha=alpha)
    return hidden.view(*x.shape[:-1], down.shape[0])


INSTRUCTIONS = {
    f"{name}{branch}": instruction
    for name, instruction in (("sparse_tensor_core_linear", MMA_SP), ("sparse_wgmma_linear", WGMMA_SP))
    for branch in ("", "_low_rank")
}
"""What the operators on sparse tensor cores run, by their names."""


@torch.library.custom_op("fxsparse::sparse_transpose", mutates_args=())
def sparse_transpose(values: Tensor, indices: Tensor, column_mask: Tensor, instruction: str) -> tuple[Tensor, Tensor]:
    """The transpose of W^{R,C}; arguments and results as of the kernel's ``nm_transpose``."""
    if values.is_cuda:
        return nm_transpose(values, indices, column_mask, instruction)
    turned, packed = compressed_transpose(values, indices, column_mask)
    return turned, PACK[instruction](packed)


@sparse_transpose.register_fake
def _(values: Tensor, indices: Tensor, column_mask: Tensor, instruction: str) -> tuple[Tensor, Tensor]:
    rows, columns = values.shape[0], values.shape[1] * 2
    shape = metadata_shape(instruction, columns, rows)
    return values.new_empty(columns, rows // 2), values.new_empty(shape, dtype=torch.int32)


@_operator(lambda out_features, **_: out_features)
def cusparselt_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    alg_id: int = 0,
    split_k: int = 1,
    split_k_mode: int = -1,
) -> Tensor:
    """x W^T + bias, W ``[out_features, in]`` as ``torch._cslt_compress`` packs it; 16-bit. The last three are
    ``torch._cslt_sparse_mm``'s."""
    inputs = x.reshape(-1, x.shape[-1])
    rows = inputs.shape[0]
    padded = F.pad(inputs, (0, 0, 0, -rows % 16))  # what the library asks of a dense operand
    y = torch._cslt_sparse_mm(
        packed,
        padded.t(),
        bias=bias,
        transpose_result=True,
        alg_id=alg_id,
        split_k=split_k,
        split_k_mode=split_k_mode,
    )
    return y[:rows].reshape(*x.shape[:-1], out_features).contiguous()


if HAS_TRITON:
    for _name in ("nm_linear_epilogue", *INSTRUCTIONS):
        declare_kernel(_name, "cuda")
