"""The fxsparse operators that C++ kernels compute on a CPU: where one can, and as calls that a compiled graph holds.

Run eagerly, an operator takes its kernel where that beats its reference (which expands the weight on every call) on
every processor we know; compiled graphs choose by times (`fxsparse.lowering`), and call the operators of ``host``, with
everything about the kernel resolved while the graph is compiled.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from fxsparse.codegen.cpu import build, instruction_sets, launch, loaded
from fxsparse.codegen.cpu.spec import NMGradInput, NMGradValues, NMLinear, Tile, default_tile, index_bits, unsupported
from fxsparse.ops import low_rank, nm_linear
from fxsparse.ops.define import implement
from fxsparse.ops.operator import Operator

KINDS = {
    "nm_linear": NMLinear.kind,
    "nm_linear_low_rank": NMLinear.kind,
    "nm_linear_grad_input": NMGradInput.kind,
    "nm_linear_grad_values": NMGradValues.kind,
}
"""The kernel of each operator."""

SMALLEST = 1 << 16
"""Elements of a weight; a smaller one is not worth a kernel."""

FEW = 64
"""Tokens up to which reading the weight is most of a product's time."""


def obstacle(op: str, dtype: torch.dtype, pattern: tuple[int, int] | None, shape: Sequence[int] = ()) -> str | None:
    """Why an operator has no kernel on this CPU, as far as that is known without building it; None if it may have one.

    Args:
        op: its name.
        dtype, pattern: of the weight.
        shape: of the weight, where it is known.
    """
    if op not in KINDS:
        return "there is no kernel for cpu"
    if pattern is None:
        return "its pattern is not known"
    name = str(dtype).removeprefix("torch.")
    if (reason := unsupported(name, *pattern)) is not None:
        return reason
    if len(shape) == 2 and shape[0] * shape[1] < SMALLEST:
        return f"a weight of {shape[0]} x {shape[1]} is too small for a kernel"
    if os.environ.get("FXSPARSE_CPU") == instruction_sets.NONE:
        return f"FXSPARSE_CPU={instruction_sets.NONE} turns kernels for cpu off"
    try:
        build.compiler()
    except build.BuildError as error:
        return str(error)
    return loaded.failure(launch.spec_of(KINDS[op], name, *pattern))


def prepare(op: str, dtype: torch.dtype, pattern: tuple[int, int], steps: Sequence[str] = ()) -> str | None:
    """Builds and loads the kernel of an operator; says why there is none, None if there is."""
    return launch.unavailable(KINDS[op], dtype, *pattern, steps)


def kernel_of(
    op: str, dtype: torch.dtype, pattern: tuple[int, int], tile: Tile | None = None, steps: Sequence[str] = ()
) -> int:
    """The number of an operator's kernel, for :func:`direct`.

    Raises:
        OptionError: there is none, and why.
    """
    return launch.kernel_id(KINDS[op], dtype, *pattern, steps, tile)


def tiles(op: str, dtype: torch.dtype, rows: int) -> tuple[Tile, ...]:
    """Ways to cut a product of that many rows that are worth measuring; they share a build."""
    default = default_tile(str(dtype).removeprefix("torch."), instruction_sets.chosen())
    if KINDS[op] == NMLinear.kind and 4 < rows <= FEW:
        return replace(default, few=4), replace(default, few=FEW)
    return (default, replace(default, rows=default.rows // 2)) if rows > FEW and "values" not in op else (default,)


def direct(op: str, named: Mapping[str, Any], kernel: int) -> tuple[OpOverload, tuple[Any, ...]]:
    """The call of ``host`` that computes a call of an operator.

    Args:
        op: its name.
        named: its arguments: tensors, or whatever stands for them but for ``down``, whose ``shape`` gives a scale.
        kernel: of :func:`kernel_of`.
    """
    ops, weight = torch.ops.fxsparse_cpu, ("values", "indices")
    if op == "nm_linear_grad_values":
        return ops.grad_values.default, (named["dy"], named["x"], named["indices"], kernel)
    if op == "nm_linear_grad_input":
        return ops.grad_input.default, (named["dy"], *map(named.__getitem__, (*weight, "column_mask")), kernel)
    product = (named["x"], *map(named.__getitem__, (*weight, "bias")))
    if op == "nm_linear":
        return ops.linear.default, (*product, kernel)
    scale = named.get("scale")
    factor = 1 / _shape(named["down"])[0] if scale is None else float(scale)
    return ops.linear_with.default, (*product, named["down"], named["up"], None, None, factor, kernel)


def _shape(tensor: Any) -> Sequence[int]:
    """Of a tensor, or of the value of a node."""
    shape: Sequence[int] = tensor.shape if isinstance(tensor, Tensor) else tensor.meta["val"].shape
    return shape


# --- run eagerly ------------------------------------------------------------------------------------------------------


def _eager(op: Operator, run: Callable[..., Tensor], pays: Callable[..., bool]) -> None:
    names = [argument.name for argument in op.overload._schema.arguments]
    first, second, n, m = (names.index(name) for name in (names[0], "indices", "n", "m"))

    def compute(*args: Any) -> Tensor:
        x, indices, pattern = args[first], args[second], (args[n], args[m])
        shape = (indices.shape[0], indices.shape[1] * 8 // index_bits(pattern[1]) // pattern[0] * pattern[1])
        if shape[0] * shape[1] >= SMALLEST and pays(*args) and not _missing(op.name, x.dtype, pattern):
            return run(*args)
        return op.reference(*args)

    implement(op, "cpu", declared=False)(compute)


def _missing(op: str, dtype: torch.dtype, pattern: tuple[int, int]) -> bool:
    return obstacle(op, dtype, pattern) is not None or prepare(op, dtype, pattern) is not None


def _rows(x: Tensor) -> int:
    return x.numel() // max(1, x.shape[-1])


def _product_pays(x: Tensor, *rest: Any) -> bool:
    return x.dtype == torch.float32 or _rows(x) <= FEW


def _grad_input_pays(dy: Tensor, values: Tensor, indices: Tensor, column_mask: Tensor | None, *rest: Any) -> bool:
    return column_mask is not None and dy.dtype == torch.float32


def _grad_values_pays(dy: Tensor, *rest: Any) -> bool:
    return dy.dtype == torch.float32


_eager(nm_linear.nm_linear, launch.nm_linear, _product_pays)
_eager(low_rank.nm_linear_low_rank, launch.nm_linear_low_rank, _product_pays)
_eager(nm_linear.nm_linear_grad_input, launch.nm_linear_grad_input, _grad_input_pays)
_eager(nm_linear.nm_linear_grad_values, launch.nm_linear_grad_values, _grad_values_pays)
