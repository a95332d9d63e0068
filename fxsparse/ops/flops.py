"""What FLOPs are said in: the tensors an operator takes as shapes, and the matrix products it is made of.

A matrix product ``[m, k] x [k, n]`` is ``2 m k n`` FLOPs, and so is the gradient of either factor, as
``torch.utils.flop_counter`` counts. Formulas are plain arithmetic on shapes: they give integers for integer shapes and
sympy expressions for symbolic ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

if TYPE_CHECKING:
    import sympy

Size: TypeAlias = "int | sympy.Expr"


@dataclass(frozen=True, eq=False)
class Operand:
    """A tensor an operator reads or writes: its shape, integers or expressions, and its dtype."""

    shape: tuple[Size, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> Size:
        return math.prod(self.shape)

    @property
    def bytes(self) -> Size:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Product:
    """A matrix product inside an operator.

    Attributes:
        flops: FLOPs of the forward pass.
        gradients: FLOPs of the gradient of each factor, an operand or an earlier product of the same operator. Operands
            that no product names (a bias) enter the last one at no cost.
        name: of the product where an operator holds several.
    """

    flops: Size
    gradients: dict[Operand | Product, Size] = field(default_factory=dict)
    name: str = ""


Formula = Callable[..., Sequence[Product]]
"""``f(out, *args, **kwargs)``: the products of an operator, in order. ``args`` and ``kwargs`` are its arguments with an
`Operand` for every tensor, ``out`` is the operand of its result (a tuple for several)."""


def rows_times(x: Operand, weight: Operand) -> Size:
    """FLOPs of ``x [*, in]`` times a weight of which only the stored elements take part."""
    return 2 * math.prod(x.shape[:-1]) * weight.numel


def outer(dy: Operand, x: Operand) -> Size:
    """FLOPs of ``dy^T x [out, in]`` over the rows of ``dy [*, out]`` and ``x [*, in]``."""
    return 2 * dy.numel * x.shape[-1]


def linear(y: Operand, x: Operand, weight: Operand, *rest: Any, **named: Any) -> Sequence[Product]:
    """A linear on stored weights. Its weight's gradient is computed whole, also where few elements are stored."""
    return (Product(rows_times(x, weight), {x: rows_times(y, weight), weight: outer(y, x)}),)


def linear_grad_input(dx: Operand, dy: Operand, weight: Operand, *rest: Any) -> Sequence[Product]:
    """The gradient of a linear's input, as an operator."""
    return (Product(rows_times(dy, weight)),)


def linear_grad_weight(dweight: Operand, dy: Operand, x: Operand, *rest: Any) -> Sequence[Product]:
    """The gradient of a linear's weight, as an operator."""
    return (Product(outer(dy, x)),)


def total(formula: Formula, out: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """FLOPs of the forward pass of a call with tensors."""

    def operand(item: Any) -> Any:
        return Operand(tuple(item.shape), item.dtype) if isinstance(item, torch.Tensor) else item

    named = {name: operand(item) for name, item in kwargs.items()}
    return sum(product.flops for product in formula(operand(out), *map(operand, args), **named))
