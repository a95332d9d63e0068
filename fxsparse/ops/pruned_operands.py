"""The ``fxsparse::`` operators of a linear whose input, or whose output's gradient, is pruned n:m as it is computed.

SLoPe's ablation (arXiv 2405.16325, appendix; ``pruned_matrix`` of its accuracy code) prunes one operand of the products
of a training step, always along the dimension that the product sums over, and leaves the weight dense:

    matrix      inputs                                    gradients
    forward     y  = P(x) W^T + b                         y  = x W^T + b
    BWD-1       dW = dy^T T(P(x))                         dW = T(dy)^T x
    BWD-2       dx = (dy W) where P keeps x, else 0       dx = P(dy) W
                db = sum of dy                            db = sum of dy

P keeps the n of every m consecutive features of a token with the largest magnitudes, T the n of every m consecutive
tokens of a feature. Leading dimensions are flattened to tokens; where fewer than m are left at the end, T keeps the n
largest of those. The authors' code skips T on inputs where it would leave at most 37 % of them, which at their 1:2 and
2:4 does not happen; here it is never skipped.

| operator | computes |
|---|---|
| ``pruned_operand_linear(x, weight, bias?, n, m, matrix)`` | y |
| ``pruned_operand_linear_grad_input(dy, x, weight, n, m, matrix)`` | dx |
| ``pruned_operand_linear_grad_weight(dy, x, n, m, matrix)`` | dW |

Shapes: ``x [*, in]``, ``y`` and ``dy [*, out]``, ``weight [out, in]``, ``bias [out]``.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from fxsparse.ops import flops
from fxsparse.ops.define import Check, define
from fxsparse.ops.flops import Operand, Product, Size
from fxsparse.ops.nm import Pattern, nm_mask
from fxsparse.ops.operator import Operator, Output
from fxsparse.ops.reference import bias_gradient, outer_product

Matrix = Literal["inputs", "gradients"]
MATRICES = get_args(Matrix)

# --- references -------------------------------------------------------------------------------------------------------


def _along_features(x: Tensor, pattern: Pattern) -> Tensor:
    """P of ``[*, features]``, as a mask."""
    return nm_mask(x.abs(), pattern)


def _along_tokens(x: Tensor, pattern: Pattern) -> Tensor:
    """T of ``[*, features]``, flattened to ``[tokens, features]``."""
    x = x.reshape(-1, x.shape[-1])
    tokens = x.shape[0]
    missing = (tokens + pattern.m - 1) // pattern.m * pattern.m - tokens
    scores = pad(x.abs(), (0, 0, 0, missing), value=-1.0)
    return torch.where(nm_mask(scores, pattern, dim=0)[:tokens], x, 0)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, n: int, m: int, matrix: str) -> Tensor:
    if matrix == "inputs":
        x = torch.where(_along_features(x, Pattern(n, m)), x, 0)
    return linear(x, weight, bias)


def _grad_input(dy: Tensor, x: Tensor, weight: Tensor, n: int, m: int, matrix: str) -> Tensor:
    pattern = Pattern(n, m)
    if matrix == "inputs":
        return torch.where(_along_features(x, pattern), dy @ weight, 0)
    return torch.where(_along_features(dy, pattern), dy, 0) @ weight


def _grad_weight(dy: Tensor, x: Tensor, n: int, m: int, matrix: str) -> Tensor:
    pattern = Pattern(n, m)
    if matrix == "inputs":
        x = torch.where(_along_features(x, pattern), x, 0)
        return outer_product(dy, _along_tokens(x, pattern)).contiguous()
    return outer_product(_along_tokens(dy, pattern), x).contiguous()


# --- checks and shapes ------------------------------------------------------------------------------------------------


def _check(check: Check, features: int, out: int, n: int, m: int, matrix: str) -> None:
    check.require(matrix in MATRICES, f"matrix={matrix!r} is none of {', '.join(MATRICES)}")
    name, size = ("input", features) if matrix == "inputs" else ("output", out)
    check.require(size % Pattern(n, m).m == 0, f"{size} {name} features are not a multiple of {m}, as {n}:{m} needs")


def _output(name: str, x: Tensor, weight: Tensor, bias: Tensor | None, n: int, m: int, matrix: str) -> Output:
    check = Check(name, x)
    check.matrix("weight", weight)
    out = weight.shape[0]
    check.tensor("weight", weight, (out, x.shape[-1]))
    check.tensor("bias", bias, (out,))
    _check(check, x.shape[-1], out, n, m, matrix)
    return x, (*x.shape[:-1], out)


def _grad_input_output(name: str, dy: Tensor, x: Tensor, weight: Tensor, n: int, m: int, matrix: str) -> Output:
    check = Check(name, dy)
    check.tensor("x", x, (*dy.shape[:-1], x.shape[-1]))
    check.tensor("weight", weight, (dy.shape[-1], x.shape[-1]))
    _check(check, x.shape[-1], dy.shape[-1], n, m, matrix)
    return dy, x.shape


def _grad_weight_output(name: str, dy: Tensor, x: Tensor, n: int, m: int, matrix: str) -> Output:
    check = Check(name, dy)
    check.tensor("x", x, (*dy.shape[:-1], x.shape[-1]))
    _check(check, x.shape[-1], dy.shape[-1], n, m, matrix)
    return dy, (dy.shape[-1], x.shape[-1])


# --- gradient ---------------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.n, ctx.m, ctx.matrix = inputs
    ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs, options = ctx.needs_input_grad, (ctx.n, ctx.m, ctx.matrix)
    dx = pruned_operand_linear_grad_input(dy, x, weight, *options) if needs[0] else None
    dweight = pruned_operand_linear_grad_weight(dy, x, *options) if needs[1] else None
    return dx, dweight, bias_gradient(dy) if needs[2] else None, None, None, None


def _grad_input_flops(dx: Operand, dy: Operand, x: Operand, weight: Operand, *rest: Any) -> tuple[Product, ...]:
    size: Size = flops.rows_times(dy, weight)
    return (Product(size),)


# --- the operators ----------------------------------------------------------------------------------------------------

pruned_operand_linear_grad_input = define(
    Operator(
        "pruned_operand_linear_grad_input",
        "Tensor dy, Tensor x, Tensor weight, int n, int m, str matrix",
        _grad_input,
        _grad_input_output,
        _grad_input_flops,
    )
)

pruned_operand_linear_grad_weight = define(
    Operator(
        "pruned_operand_linear_grad_weight",
        "Tensor dy, Tensor x, int n, int m, str matrix",
        _grad_weight,
        _grad_weight_output,
        flops.linear_grad_weight,
    )
)

pruned_operand_linear = define(
    Operator(
        "pruned_operand_linear",
        "Tensor x, Tensor weight, Tensor? bias, int n, int m, str matrix",
        _forward,
        _output,
        flops.linear,
        _save,
        _backward,
        gradients=("pruned_operand_linear_grad_input", "pruned_operand_linear_grad_weight"),
    )
)
