"""`Operator`: everything the library must know of one ``fxsparse::`` operator, in one frozen record.

Torch is told its schema, reference, shape, gradient and FLOPs (`fxsparse.ops.define`). Everybody else looks the rest up
in `OPERATORS`: the cost model its FLOPs, lowering its implementations, the size of a call and the bytes it moves,
measuring its random arguments and the tiles of its kernel. A new operator is one file in this package.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from fxsparse.ops.flops import Formula
from fxsparse.ops.nm import Pattern

DENSE, COMPRESSED, OPERATOR, REFERENCE = "dense", "compressed", "operator", "reference"
SPARSE_TENSOR_CORES, SPARSE_WGMMA, CUSPARSELT = "sparse_tensor_cores", "sparse_wgmma", "cusparselt"
"""Names of implementations; `fxsparse.lowering.choose` says what each is."""

Output: TypeAlias = "tuple[Tensor, Sequence[int]]"
"""A tensor whose dtype and device an operator's result has, and the result's shape."""

Dimension: TypeAlias = "int | torch.SymInt"


@dataclass(frozen=True)
class Problem:
    """The size of one call, which measurements and estimates are kept by.

    Attributes:
        op: the operator.
        pattern: of an N:M weight; None if the weight is dense or there is none.
        dtype: of the operands.
        rows: of the input; of ``mux``, of its result.
        out_features, in_features: of the weight, as far as it takes part; of ``mux``, the width twice.
        extra: sizes that only this operator has; its `Operator.sizes` says which.
    """

    op: str
    pattern: Pattern | None
    dtype: torch.dtype
    rows: int
    out_features: int
    in_features: int
    extra: tuple[int, ...] = ()

    @property
    def nm(self) -> Pattern:
        """Of a weight that is N:M."""
        assert self.pattern is not None, f"{self.op} has no pattern"
        return self.pattern

    @property
    def weight(self) -> int:
        """Elements of the weight."""
        return self.out_features * self.in_features

    @property
    def flops(self) -> float:
        """Of the product with a dense weight."""
        return 2.0 * self.rows * self.weight

    @property
    def weight_bytes(self) -> int:
        """Of the weight where it is dense."""
        return self.weight * self.dtype.itemsize

    @property
    def input_bytes(self) -> int:
        return self.rows * self.in_features * self.dtype.itemsize

    @property
    def output_bytes(self) -> int:
        return self.rows * self.out_features * self.dtype.itemsize


@dataclass(frozen=True)
class Sizes:
    """The sizes of one call, which may be symbols of its graph.

    Attributes:
        rows: sizes whose product is the number of rows.
        out_features, in_features, extra: as in `Problem`.
    """

    rows: Sequence[Dimension]
    out_features: Dimension
    in_features: Dimension
    extra: tuple[Dimension, ...] = ()


@dataclass(frozen=True)
class Traffic:
    """Bytes that a call moves, for estimates where nobody measured.

    Attributes:
        kernel: with the operator's own kernel.
        copies: with its reference, beside the product of dense matrices that it ends in.
        decompresses: whether the kernel spends instructions on decompressing the weight.
    """

    kernel: float
    copies: float
    decompresses: bool = False


@dataclass(frozen=True)
class Tiles:
    """How the tile of an operator's kernel is tuned.

    Attributes:
        kernel: the name that tiles are kept under.
        transposed: whether columns of the result are those of the weight, as in the gradient of an input.
        square: whether a weight taller than wide may be split into square blocks.
    """

    kernel: str
    transposed: bool = False
    square: bool = False

    def sizes(self, problem: Problem) -> tuple[int, int, int]:
        """Rows and columns of the result, and the depth of the product."""
        out, in_features = problem.out_features, problem.in_features
        return (problem.rows, in_features, out) if self.transposed else (problem.rows, out, in_features)


def _whole(result: Tensor) -> Tensor:
    return result


@dataclass(frozen=True)
class Operands:
    """Random arguments of a call, and the product that it is compared with.

    Attributes:
        args: of the operator.
        dense: computes the same where nothing is sparse; None if there is nothing like it.
        result: takes the operator's result out of that of ``dense``.
    """

    args: tuple[Any, ...]
    dense: Callable[[], Tensor] | None = None
    result: Callable[[Tensor], Tensor] = _whole


class Random:
    """Draws tensors. Its generator is its own: training that waits for a measurement draws as if there was none."""

    def __init__(self, dtype: torch.dtype, device: str):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """A tensor of normal numbers."""
        return torch.randn(*shape, device=self.device, generator=self.generator).to(self.dtype)

    def choice(self, count: int, size: int, block: int = 1) -> Tensor | None:
        """``count`` indices below ``size`` in order, int64, in whole blocks of consecutive ones; None for all."""
        if count == size:
            return None
        blocks = torch.randperm(size // block, device=self.device, generator=self.generator)[: count // block]
        return (blocks.sort().values[:, None] * block + torch.arange(block, device=self.device)).flatten()


@dataclass(frozen=True, eq=False)
class Operator:
    """A ``fxsparse::`` operator. It is called with its arguments in order and returns one tensor.

    Attributes:
        name: after ``fxsparse::``.
        schema: its arguments.
        reference: computes it in plain torch, without control flow on data and without writing in place, so that a
            compiler may inline it. What every other implementation must equal.
        output: called with the operator's name and its arguments; checks them and describes the result.
        flops: of its forward pass and of each input's gradient.
        save, backward: its gradient, as ``register_autograd`` takes them; an operator without is a gradient itself.
        gradients: the operators that give the gradients of its first two arguments.
        implementations: those that a user may pin.
        sizes: of a call, from its result and, by name, its arguments; None if it has one implementation.
        operands: random arguments of a problem.
        dense: the same with a dense weight ``[out, in]`` in the place of a compressed one, called with that weight and,
            by name, the arguments; None if it cannot be expanded.
        traffic: bytes that a problem moves; None if they do not tell implementations apart.
        tiles: of its kernel; None if there is nothing to tune.
        row_multiple: a number of rows that those of every problem are a multiple of.
    """

    name: str
    schema: str
    reference: Callable[..., Tensor]
    output: Callable[..., Output]
    flops: Formula
    save: Callable[..., None] | None = None
    backward: Callable[..., Any] | None = None
    gradients: tuple[str, ...] = ()
    implementations: tuple[str, ...] = ()
    sizes: Callable[..., Sizes] | None = None
    operands: Callable[[Problem, Random], Operands] | None = None
    dense: Callable[..., Tensor] | None = None
    traffic: Callable[[Problem], Traffic] | None = None
    tiles: Tiles | None = None
    row_multiple: Callable[[Problem], int] = lambda problem: 1

    @functools.cached_property
    def overload(self) -> OpOverload:
        """As graphs call it."""
        overload: OpOverload = getattr(torch.ops.fxsparse, self.name).default
        return overload

    @property
    def is_nm(self) -> bool:
        """Whether it takes a compressed weight, or the positions of one, and its pattern."""
        return {"n", "m"} <= {argument.name for argument in self.overload._schema.arguments}

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args)


OPERATORS: dict[str, Operator] = {}
"""Every operator of this package by its name; `fxsparse.ops.define` fills it while the package is imported."""


def operator_name(target: Any) -> str | None:
    """``nm_linear`` for ``torch.ops.fxsparse.nm_linear`` and its overload; None for anything else."""
    packet = target.overloadpacket if isinstance(target, OpOverload) else target
    if not isinstance(packet, OpOverloadPacket):
        return None
    namespace, _, name = str(packet._qualified_op_name).partition("::")
    return name if namespace == "fxsparse" else None


def operator_of(target: Any) -> Operator | None:
    """The operator that a node of a graph calls; None for anything else."""
    return OPERATORS.get(operator_name(target) or "")
