"""Operators that exist for the kernels' sake: a product with its epilogue, and 2:4 products on sparse tensor cores.

    nm_linear_epilogue(x, values, indices, bias?, n, m, steps, operands)
    sparse_tensor_core_linear(x, values, metadata, bias?, steps, operands)
    cusparselt_linear(x, packed, bias?, out_features, alg_id=0, split_k=1, split_k_mode=-1)

``steps`` are names of :class:`~fxsparse.codegen.epilogue.Epilogue` separated by blanks; the last operator is NVIDIA's
library through torch. They are made with ``custom_op`` because the compiler cannot look into a kernel, they run on a
CPU through plain torch (but for the library's, whose packed form only it can read), and have no gradients: they stand
in graphs that are not differentiated, or below the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from fxsparse.codegen import launch
from fxsparse.codegen.epilogue import GATED
from fxsparse.codegen.metadata import unpack_metadata
from fxsparse.errors import OptionError
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


@torch.library.custom_op("fxsparse::nm_linear_epilogue", mutates_args=(), device_types="cuda")
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
    """steps(x W^T + bias); arguments as for ``launch.nm_linear``."""
    return launch.nm_linear(x, values, indices, None, bias, n, m, steps=steps.split(), operands=operands)


@nm_linear_epilogue.register_kernel("cpu")
def _(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    steps: str,
    operands: list[Tensor],
) -> Tensor:
    weight = unpack(values, indices, Pattern(n, m), x.shape[-1])
    return apply_steps(F.linear(x, weight, bias), steps, operands).contiguous()


@nm_linear_epilogue.register_fake
def _(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    steps: str,
    operands: list[Tensor],
) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0] // (2 if steps.startswith(GATED) else 1))


@torch.library.custom_op("fxsparse::sparse_tensor_core_linear", mutates_args=(), device_types="cuda")
def sparse_tensor_core_linear(
    x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, steps: str, operands: list[Tensor]
) -> Tensor:
    """steps(x W^T + bias), W 2:4; arguments as for ``launch.sparse_tensor_core_linear``."""
    return launch.sparse_tensor_core_linear(x, values, metadata, bias, steps=steps.split(), operands=operands)


@sparse_tensor_core_linear.register_kernel("cpu")
def _(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, steps: str, operands: list[Tensor]) -> Tensor:
    indices = unpack_metadata(metadata, values.shape[0], x.shape[-1])
    weight = unpack(values, indices, Pattern(2, 4), x.shape[-1])
    return apply_steps(F.linear(x, weight, bias), steps, operands).contiguous()


@sparse_tensor_core_linear.register_fake
def _(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, steps: str, operands: list[Tensor]) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


@torch.library.custom_op("fxsparse::cusparselt_linear", mutates_args=(), device_types="cuda")
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


@cusparselt_linear.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    alg_id: int = 0,
    split_k: int = 1,
    split_k_mode: int = -1,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)
