"""FLOPs of what is no matrix product: biases, norms, activations, softmax, sums, losses, tables.

GreenTrainer counts biases, norms and activations beside the products (arXiv 2309.13192, section 3.1; its code counts
biases and norms). A FLOP here is one operation on one element: an addition, a product, a comparison, or the value of a
function (exp, erf, tanh, a root, a quotient). The forward pass and the gradient of each operand cost so many for every
element of the result:

| operator | forward | gradient |
|---|---|---|
| bias of a product | 1 | 1: the sum over rows |
| layer norm | 5, weight and bias 1 each | input 7, or 8 with a weight; weight 2; bias 1 |
| RMS norm as an operator | 3, weight 1 | input 6, or 7 with a weight; weight 2 |
| softmax | 5 | 4; inside attention 1 more each for the scale, and 1 for a mask |
| table (embedding) | 0 | 1: the sum by row |
| copies, joins, views | 0 | 0 |
| any other pointwise operator or reduction | 1 | 1, unless `_PER_ELEMENT` says otherwise |

The gradient of an operand that was broadcast is a sum over the result and costs 1 more. What these numbers are is a
convention, unlike those of products: a compiler fuses this work, and its time is that of the bytes it moves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils._pytree import tree_leaves

from fxsparse.graph import traits
from fxsparse.ops.flops import Formula, Operand, Product, Size

_PER_ELEMENT: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("add", "sub", "rsub", "sum", "cumsum"), (1, 0)),
    **dict.fromkeys(("cat", "stack", "clone", "contiguous", "to", "_to_copy", "type_as", "copy", "pad"), (0, 0)),
    **dict.fromkeys(("constant_pad_nd", "roll", "flip", "slice_scatter", "select_scatter", "lift_fresh_copy"), (0, 0)),
    **dict.fromkeys(("repeat", "tile", "repeat_interleave"), (0, 0)),
    "tanh": (1, 3),
    "sigmoid": (4, 3),
    "gelu": (5, 11),
    "silu": (4, 9),
    **dict.fromkeys(("softmax", "_softmax"), (5, 4)),
    **dict.fromkeys(("log_softmax", "_log_softmax"), (5, 4)),
    "cross_entropy_loss": (5, 3),
}
_NORMS = {"layer_norm": (5, 7), "rms_norm": (3, 6), "batch_norm": (5, 7), "group_norm": (5, 7), "instance_norm": (5, 7)}


def formula_of(target: Any) -> Formula | None:
    """The FLOPs of an operator that is no product; None if it has none."""
    facts = traits.of(target)
    if facts.work == "gather":
        return _table
    if facts.work != "elementwise":
        return None
    name = str(target._schema.name).rpartition("::")[2].removesuffix("_")
    if name in _NORMS:
        return functools.partial(_norm, [argument.name for argument in target._schema.arguments], *_NORMS[name])
    return functools.partial(_elementwise, facts.axes == "pointwise", *_PER_ELEMENT.get(name, (1, 1)))


def beside(formula: Formula, target: Any) -> Formula:
    """The FLOPs of a product together with those of its bias, or of the softmax and scale inside attention."""
    is_attention = str(target._schema.name) == "aten::scaled_dot_product_attention"

    def count(out: Any, *args: Any, **kwargs: Any) -> Sequence[Product]:
        *before, last = formula(out, *args, **kwargs)
        named = {factor for product in (*before, last) for factor in product.gradients}
        biases = [operand for operand in _floating(args, kwargs) if operand not in named]
        size = _numel(out)
        gradients: dict[Operand | Product, Size] = {**last.gradients}
        gradients.update((bias, size) for bias in biases)
        if not is_attention:
            return (*before, Product(last.flops + size * len(biases), gradients, last.name))
        (scores,) = before
        _, key, *masks = scores.gradients  # query, key
        number = math.prod(out.shape[:-1]) * key.shape[-2]  # type: ignore[union-attr]
        counted = Product(
            scores.flops + number * (1 + len(masks)), {**scores.gradients, **dict.fromkeys(masks, number)}, scores.name
        )
        through = {counted if factor is scores else factor: flops for factor, flops in gradients.items()}
        through[counted] += 5 * number
        return counted, Product(last.flops + 5 * number, through, last.name)

    return count


def _elementwise(
    broadcasts: bool, forward: int, gradient: int, out: Any, *args: Any, **kwargs: Any
) -> Sequence[Product]:
    operands = list(_floating(args, kwargs))
    size = _largest([_numel(out), *(operand.numel for operand in operands)])
    gradients: dict[Operand | Product, Size] = {
        operand: size * (gradient + (broadcasts and operand.numel != size)) for operand in operands
    }
    return (Product(forward * size, gradients),)


def _norm(
    names: Sequence[str], forward: int, gradient: int, out: Any, x: Operand, *args: Any, **kwargs: Any
) -> Sequence[Product]:
    named = {**dict(zip(names[1:], args, strict=False)), **kwargs}
    affine = {named[name]: flops for name, flops in (("weight", 2), ("bias", 1)) if named.get(name) is not None}
    gradients = {x: gradient + ("weight" in named and named["weight"] is not None), **affine}
    size = x.numel
    return (Product(size * (forward + len(affine)), {operand: size * flops for operand, flops in gradients.items()}),)


def _table(out: Operand, *args: Any, **kwargs: Any) -> Sequence[Product]:
    return (Product(0, dict.fromkeys(_floating(args, kwargs), _numel(out))),)


def _floating(args: Any, kwargs: Any) -> Iterator[Operand]:
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Operand) and leaf.dtype.is_floating_point:
            yield leaf


def _numel(out: Any) -> Size:
    return tree_leaves(out)[0].numel if isinstance(out, (tuple, list)) else out.numel


def _largest(sizes: Sequence[Size]) -> Size:
    """The largest of some sizes; expressions are compared with all their symbols at some number."""

    def number(size: Size) -> int:
        return size if isinstance(size, int) else int(size.subs(dict.fromkeys(size.free_symbols, 97)))

    return max(sizes, key=number)
