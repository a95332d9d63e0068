"""The C++ kernels behind the operators: tensors in, tensors out, arguments in the operators' order.

Each function has a spec for the call's dtype and pattern, builds it the first time, and calls the operator of ``host``.
:func:`unavailable` says why a call has no kernel; the functions raise OptionError then.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fxsparse.codegen.cpu import instruction_sets, loaded
from fxsparse.codegen.cpu.instruction_sets import InstructionSet
from fxsparse.codegen.cpu.spec import CPUSpec, NMGradInput, NMGradValues, NMLinear, Tile, default_tile, unsupported
from fxsparse.codegen.epilogue import Epilogue
from fxsparse.errors import OptionError

KINDS: dict[str, type[CPUSpec]] = {kind.kind: kind for kind in (NMLinear, NMGradInput, NMGradValues)}


def unavailable(kind: str, dtype: torch.dtype, n: int, m: int, steps: Sequence[str] = ()) -> str | None:
    """Why there is no kernel for a product on this machine, None if there is one; builds it.

    Args:
        kind: ``nm_linear``, ``nm_linear_grad_input`` or ``nm_linear_grad_values``.
        dtype, n, m: of the weight.
        steps: of the epilogue.
    """
    name = str(dtype).removeprefix("torch.")
    reason = unsupported(name, n, m)
    if reason is None and Epilogue(False, tuple(steps)).operands > 2:
        reason = "kernels for a CPU take at most two tensors in their epilogue"
    if reason is None:
        made = loaded.kernel(spec_of(kind, name, n, m, tuple(steps)), Tile())
        reason = made if isinstance(made, str) else None
    return reason


def kernel_id(
    kind: str,
    dtype: torch.dtype,
    n: int,
    m: int,
    steps: Sequence[str] = (),
    tile: Tile | None = None,
    instruction_set: InstructionSet | None = None,
) -> int:
    """The number that the operators of ``host`` know a kernel by, for a compiled graph to hold; builds it.

    Raises:
        OptionError: there is no kernel, and why.
    """
    return _id(kind, dtype, n, m, tuple(steps), tile, instruction_set or instruction_sets.chosen())


@functools.cache
def _id(
    kind: str,
    dtype: torch.dtype,
    n: int,
    m: int,
    steps: tuple[str, ...],
    tile: Tile | None,
    instruction_set: InstructionSet,
) -> int:
    name = str(dtype).removeprefix("torch.")
    made = loaded.kernel(spec_of(kind, name, n, m, steps, instruction_set), tile or default_tile(name, instruction_set))
    if isinstance(made, str):
        raise OptionError(made)
    return made.id


def spec_of(
    kind: str, dtype: str, n: int, m: int, steps: tuple[str, ...] = (), instruction_set: InstructionSet | None = None
) -> CPUSpec:
    """The spec of a kernel, for this processor unless told otherwise."""
    one = instruction_set or instruction_sets.chosen()
    return (
        NMLinear(dtype, n, m, one, Epilogue(False, steps)) if kind == NMLinear.kind else KINDS[kind](dtype, n, m, one)
    )


def forget() -> None:
    """Forgets what was built and what failed."""
    loaded.forget()
    _id.cache_clear()


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
    tile: Tile | None = None,
    instruction_set: InstructionSet | None = None,
) -> Tensor:
    """y = x W^T + bias, then an epilogue.

    Args:
        x: ``[..., in]``.
        values, indices: W ``[out, in]`` in the form of ``fxsparse.ops.nm``.
        column_mask: not read; the forward pass is exact in W^R.
        bias: ``[out]``.
        n, m: the pattern.
        steps: of :class:`~fxsparse.codegen.epilogue.Epilogue`.
        operands: the tensors its steps take, at most two, each of the result's shape.
        tile, instruction_set: instead of the default ones.

    Returns:
        ``[..., out]``, or ``[..., out / 2]`` after a gated step; contiguous.

    Raises:
        OptionError: there is no kernel, and why.
    """
    kernel = kernel_id(NMLinear.kind, x.dtype, n, m, steps, tile, instruction_set)
    result: Tensor
    if not operands:
        result = torch.ops.fxsparse_cpu.linear.default(x, values, indices, bias, kernel)
        return result
    first, second = [*operands, None][:2]
    result = torch.ops.fxsparse_cpu.linear_with.default(
        x, values, indices, bias, None, None, first, second, 1.0, kernel
    )
    return result


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
    tile: Tile | None = None,
    instruction_set: InstructionSet | None = None,
) -> Tensor:
    """y = x W^T + scale (x down^T) up^T + bias, then an epilogue (SLoPe, arXiv 2405.16325, eq. 11).

    x down^T stays in float.

    Args:
        down, up: ``[r, in]`` and ``[out, r]``.
        scale: 1/r unless given.
        others: as for :func:`nm_linear`.
    """
    kernel = kernel_id(NMLinear.kind, x.dtype, n, m, steps, tile, instruction_set)
    factor = 1 / down.shape[0] if scale is None else float(scale)
    first, second = [*operands, None, None][:2]
    result: Tensor = torch.ops.fxsparse_cpu.linear_with.default(
        x, values, indices, bias, down, up, first, second, factor, kernel
    )
    return result


def nm_linear_grad_input(
    dy: Tensor,
    values: Tensor,
    indices: Tensor,
    column_mask: Tensor | None,
    n: int,
    m: int,
    *,
    tile: Tile | None = None,
    instruction_set: InstructionSet | None = None,
) -> Tensor:
    """dx = dy W^{R,C}, or dy W^R without a column mask.

    Args:
        dy: ``[..., out]``.
        others: as for :func:`nm_linear`.

    Returns:
        ``[..., in]``, contiguous.
    """
    kernel = kernel_id(NMGradInput.kind, dy.dtype, n, m, (), tile, instruction_set)
    result: Tensor = torch.ops.fxsparse_cpu.grad_input.default(dy, values, indices, column_mask, kernel)
    return result


def nm_linear_grad_values(
    dy: Tensor,
    x: Tensor,
    indices: Tensor,
    n: int,
    m: int,
    *,
    tile: Tile | None = None,
    instruction_set: InstructionSet | None = None,
) -> Tensor:
    """dy^T x at the kept positions.

    Args:
        dy: ``[..., out]``.
        x: ``[..., in]``.
        indices: of W.

    Returns:
        ``[out, in * n / m]``.
    """
    kernel = kernel_id(NMGradValues.kind, dy.dtype, n, m, (), tile, instruction_set)
    result: Tensor = torch.ops.fxsparse_cpu.grad_values.default(dy, x, indices, kernel)
    return result
