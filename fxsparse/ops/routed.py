"""Products of rows that were sorted by expert: which rows are whose, and what such a product costs.

    rows      0 0 0 2 2 3 | .      row s belongs to expert e where offsets[e - 1] <= s < offsets[e]
    offsets   3 3 5 6              one for each expert, int32 or int64; expert 1 got no row, the last row has no expert

Rows without an expert have zeros as their result and no gradient. This is the form of ``torch._grouped_mm``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fxsparse.ops.define import Check
from fxsparse.ops.flops import Operand, Product


def spans(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """The experts that got rows, each with its rows; waits for the device once."""
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = max(start, end)


def apart(x: Tensor, offsets: Tensor) -> Tensor:
    """``[experts, rows, features]``: of every expert its rows of ``x [rows, features]``, zeros in the others."""
    row = torch.arange(x.shape[0], device=x.device)
    starts = torch.cat([offsets.new_zeros(1), offsets[:-1]])
    mine = (row >= starts[:, None]) & (row < offsets[:, None])
    return torch.where(mine[..., None], x, 0)


def times(weight: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """Each row of ``x [rows, in]`` times its expert's matrix of ``weight [experts, out, in]``, which is read as it is:
    what is computed from weights alone becomes a constant of an exported graph, under the weight's name."""
    return (weight @ apart(x, offsets).mT).sum(0).mT.contiguous()


def check_rows(check: Check, rows: Tensor, offsets: Tensor, experts: int) -> None:
    """The rows are a matrix, and the offsets one number for each expert."""
    check.matrix("its input", rows)
    integers = (torch.int32, torch.int64)
    check.tensor("offsets", offsets, (experts,), offsets.dtype if offsets.dtype in integers else torch.int32)


def check_experts(check: Check, argument: str, weight: Tensor) -> None:
    """A weight has a matrix for each expert."""
    check.require(weight.dim() == 3, f"{argument} is {list(weight.shape)}, expected [experts, rows, columns]")


# --- FLOPs: of the stored elements of one expert for each row ---------------------------------------------------------


def linear_flops(y: Operand, x: Operand, weight: Operand, *rest: Any, **named: Any) -> Sequence[Product]:
    """A product on stored weights. Its weight's gradient is computed whole, also where few elements are stored."""
    each = _per_row(x, weight)
    return (Product(each, {x: each, weight: 2 * y.numel * x.shape[-1]}),)


def grad_input_flops(dx: Operand, dy: Operand, weight: Operand, *rest: Any) -> Sequence[Product]:
    """The gradient of the input, as an operator."""
    return (Product(_per_row(dy, weight)),)


def grad_weight_flops(dweight: Operand, dy: Operand, x: Operand, *rest: Any) -> Sequence[Product]:
    """The gradient of the weight, as an operator."""
    return (Product(2 * dy.numel * x.shape[-1]),)


def _per_row(rows: Operand, weight: Operand) -> Any:
    _, out, stored = weight.shape
    return 2 * rows.shape[0] * out * stored
