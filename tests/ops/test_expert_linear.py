"""The operators of routed rows against a dense product of each row with its expert's matrix, in float64."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from fxsparse.backend.inductor import inline_references
from fxsparse.errors import RewriteError
from fxsparse.ops.nm import (
    Pattern,
    double_prune_mask,
    gather_kept,
    nm_mask,
    pack,
    pack_column_mask,
    transposable_mask,
    unpack,
    unpack_column_mask,
    unpack_mask,
)
from fxsparse.ops.operator import OPERATORS

F = torch.ops.fxsparse
COUNTS: dict[str, tuple[int, ...]] = {
    "all": (3, 2, 4, 1),
    "none at the ends": (0, 5, 2, 0),
    "one expert": (0, 0, 7, 0),
    "no rows": (0, 0, 0, 0),
}


class Case:
    """Random experts and rows; ``spare`` rows behind the last offset belong to none."""

    def __init__(
        self,
        text: str = "2:4",
        counts: Sequence[int] = COUNTS["all"],
        dtype: torch.dtype = torch.float32,
        spare: int = 0,
        index: torch.dtype = torch.int32,
    ):
        self.pattern = Pattern.parse(text)
        self.n, self.m = self.pattern.n, self.pattern.m
        experts, out, in_features = len(counts), 2 * self.m, self.m * random.choice([1, 3, 5])
        self.expert = torch.repeat_interleave(torch.arange(experts), torch.tensor(counts))
        self.rows = sum(counts)
        self.offsets = torch.tensor(counts).cumsum(0).to(index)
        self.dense = torch.randn(experts, out, in_features, dtype=dtype)
        self.mask = nm_mask(torch.rand(experts, out, in_features), self.pattern)
        self.column = double_prune_mask(self.dense, self.mask, self.pattern)
        self.values, self.indices = pack(self.dense, self.mask, self.pattern)
        self.packed_column = pack_column_mask(self.column, self.mask, self.pattern)
        self.x = torch.randn(self.rows + spare, in_features, dtype=dtype)
        self.dy = torch.randn(self.rows + spare, out, dtype=dtype)
        for tensor in (self.dense, self.values, self.x):
            tensor.requires_grad_()

    def nm(self, column: bool = True) -> tuple[Any, ...]:
        return self.x, self.values, self.indices, self.packed_column if column else None, self.offsets, self.n, self.m

    def masked(self, column: bool = True, *straight: bool) -> tuple[Any, ...]:
        return self.x, self.dense, self.mask, self.column if column else None, self.offsets, *straight

    def expected(self, column: bool) -> tuple[Tensor, Tensor, Tensor]:
        """y, dx and dW by the formulas, row by row."""
        x, dy, dense = (tensor.detach().double() for tensor in (self.x, self.dy, self.dense))
        pruned = dense * self.mask
        y, dx, dw = torch.zeros_like(dy), torch.zeros_like(x), torch.zeros_like(dense)
        for row, expert in enumerate(self.expert.tolist()):
            y[row] = pruned[expert] @ x[row]
            dx[row] = dy[row] @ (pruned[expert] * self.column[expert] if column else pruned[expert])
            dw[expert] += torch.outer(dy[row], x[row])
        return y, dx, dw


def _close(actual: Tensor | None, expected: Tensor) -> None:
    assert actual is not None
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("text", ["1:2", "2:4", "3:5", "2:16"])
def test_compressed_experts_compute_slopes_equations(text: str, counts: tuple[int, ...], column: bool) -> None:
    case = Case(text, counts, spare=random.choice([0, 2]), index=random.choice([torch.int32, torch.int64]))
    y, dx, dw = case.expected(column)
    output = F.nm_expert_linear(*case.nm(column))
    output.backward(case.dy)
    _close(output.detach(), y)
    _close(case.x.grad, dx)
    _close(case.values.grad, gather_kept(dw, case.indices, case.pattern))


@pytest.mark.parametrize("straight", [False, True])
@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_masked_experts_compute_the_same_on_a_dense_weight(
    counts: tuple[int, ...], column: bool, straight: bool
) -> None:
    case = Case("3:5", counts, spare=1)
    y, dx, dw = case.expected(column)
    output = F.masked_expert_linear(*case.masked(column, straight))
    output.backward(case.dy)
    _close(output.detach(), y)
    _close(case.x.grad, dx)
    _close(case.dense.grad, dw if straight else dw * case.mask)


def _calls(case: Case) -> list[tuple[str, tuple[Any, ...]]]:
    x, values, dense = case.x.detach(), case.values.detach(), case.dense.detach()
    return [
        ("nm_expert_linear", case.nm()),
        ("nm_expert_linear", case.nm(False)),
        (
            "nm_expert_linear_grad_input",
            (case.dy, values, case.indices, case.packed_column, case.offsets, case.n, case.m),
        ),
        ("nm_expert_linear_grad_input", (case.dy, values, case.indices, None, case.offsets, case.n, case.m)),
        ("nm_expert_linear_grad_values", (case.dy, x, case.indices, case.offsets, case.n, case.m)),
        ("masked_expert_linear", case.masked()),
        ("masked_expert_linear", case.masked(False, True)),
        ("masked_expert_linear_grad_input", (case.dy, dense, case.mask, case.column, case.offsets)),
        ("masked_expert_linear_grad_input", (case.dy, dense, case.mask, None, case.offsets)),
        ("masked_expert_linear_grad_weight", (case.dy, x, case.mask, case.offsets)),
        ("masked_expert_linear_grad_weight", (case.dy, x, None, case.offsets)),
    ]


WHICH = range(len(_calls(Case())))


@pytest.mark.parametrize("which", WHICH)
def test_opcheck(which: int) -> None:
    name, args = _calls(Case(counts=COUNTS["none at the ends"]))[which]
    torch.library.opcheck(OPERATORS[name].overload, args)


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_references_compute_what_runs(which: int, counts: tuple[int, ...]) -> None:
    """A reference has no loop over data, so that a compiler can trace it."""
    name, args = _calls(Case("2:8", counts, spare=2))[which]
    detached = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
    torch.testing.assert_close(OPERATORS[name].reference(*detached), OPERATORS[name](*detached), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("counts", [COUNTS["all"], COUNTS["no rows"]], ids=str)
def test_meta_tensors_tell_the_shape_dtype_and_strides(which: int, counts: tuple[int, ...]) -> None:
    name, args = _calls(Case("3:5", counts, torch.bfloat16))[which]
    real = OPERATORS[name](*args)
    meta = OPERATORS[name](*(arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args))
    assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("call", ["nm", "masked"])
def test_gradcheck(call: str) -> None:
    case = Case(counts=(2, 0, 1), dtype=torch.float64)
    args = getattr(case, call)(False)
    operator = getattr(F, f"{call}_expert_linear")
    assert torch.autograd.gradcheck(lambda *tensors: operator(*tensors, *args[2:]), args[:2])


def test_pruned_weights_that_are_not_finite_take_no_part() -> None:
    case = Case()
    with torch.no_grad():
        case.dense.masked_fill_(~case.mask, float("nan"))
    output = F.masked_expert_linear(*case.masked(False))
    output.backward(case.dy)
    assert output.isfinite().all() and case.x.grad is not None and case.x.grad.isfinite().all()


def test_flops_are_those_of_the_kept_weights_of_one_expert_for_each_row() -> None:
    case = Case("2:8")
    _, out, in_features = case.dense.shape
    dense = 2 * case.rows * out * in_features
    with FlopCounterMode(display=False) as counter:
        output = F.nm_expert_linear(*case.nm())
    assert counter.get_total_flops() == dense // 4
    with FlopCounterMode(display=False) as counter:
        output.backward(case.dy)
    assert counter.get_total_flops() == dense // 4 + dense  # dW is computed whole
    with FlopCounterMode(display=False) as counter:
        F.masked_expert_linear(*case.masked()).backward(case.dy)
    assert counter.get_total_flops() == 3 * dense


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"x": torch.randn(2, 3, 4)}, r"its input is \[2, 3, 4\], expected a matrix"),
        ({"values": torch.randn(8, 2)}, r"values is \[8, 2\], expected \[experts, rows, columns\]"),
        ({"offsets": torch.tensor([1, 2])}, r"offsets is torch\.int64 \[2\]"),
        ({"offsets": torch.tensor([1.0, 2, 3, 4])}, r"offsets is torch\.float32"),
        ({"x": torch.randn(10, 7)}, "7 columns are not a multiple of 4"),
    ],
    ids=lambda item: next(iter(item)) if isinstance(item, dict) else "message",
)
def test_arguments_that_do_not_fit_are_named(changed: dict[str, Tensor], match: str) -> None:
    names = ("x", "values", "indices", "column_mask", "offsets", "n", "m")
    with pytest.raises(RewriteError, match=match):
        F.nm_expert_linear(*{**dict(zip(names, Case().nm(), strict=True)), **changed}.values())


def test_masks_that_do_not_fit_are_named() -> None:
    case = Case()
    with pytest.raises(RewriteError, match=r"mask is torch\.float32"):
        F.masked_expert_linear(case.x, case.dense, case.mask.float(), None, case.offsets)
    with pytest.raises(RewriteError, match=r"column_mask is torch\.bool"):
        F.masked_expert_linear(case.x, case.dense, case.mask, case.column[:1], case.offsets)


def test_no_second_derivative() -> None:
    case = Case()
    (dx,) = torch.autograd.grad(F.nm_expert_linear(*case.nm()).square().sum(), case.x, create_graph=True)
    with pytest.raises(RewriteError, match="cannot be derived once more"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("call", ["nm", "masked"])
def test_autocast_casts_operands_and_keeps_the_dtype_of_gradients(call: str, dtype: torch.dtype) -> None:
    case = Case()
    args = getattr(case, call)(False)
    with torch.autocast("cpu", dtype=dtype):
        output = getattr(F, f"{call}_expert_linear")(*args)
    output.float().sum().backward()
    assert output.dtype == dtype
    assert case.x.grad is not None and case.x.grad.dtype == torch.float32
    rows = (case.dense * case.mask).detach()[case.expert]
    torch.testing.assert_close(output.float(), torch.einsum("soi,si->so", rows, case.x.detach()), rtol=3e-2, atol=6e-2)


def test_a_compiler_may_inline_the_references() -> None:
    case = Case("2:4", (3, 0, 4))

    def step(x: Tensor, values: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
        y: Tensor = F.nm_expert_linear(x, values, indices, None, offsets, 2, 4)
        return y

    inputs = (case.x.detach(), case.values.detach(), case.indices, case.offsets)
    fake = make_fx(step, tracing_mode="fake")(*inputs)
    assert inline_references(fake.graph) == 1
    fake.recompile()
    torch.testing.assert_close(fake(*inputs), step(*inputs), rtol=1e-4, atol=1e-5)


def test_masks_of_several_matrices_are_those_of_each() -> None:
    """What the format says of a matrix it says of several, each on its own."""
    case = Case("2:4")
    pattern, in_features = case.pattern, case.dense.shape[-1]
    scores = torch.rand(3, 8, 12)
    assert torch.equal(transposable_mask(scores, pattern), torch.stack([transposable_mask(s, pattern) for s in scores]))
    for expert in range(len(case.dense)):
        weight, mask = case.dense[expert].detach(), case.mask[expert]
        assert torch.equal(case.column[expert], double_prune_mask(weight, mask, pattern))
        for together, alone in zip((case.values, case.indices), pack(weight, mask, pattern), strict=True):
            assert torch.equal(together[expert], alone)
        assert torch.equal(case.packed_column[expert], pack_column_mask(case.column[expert], mask, pattern))
    assert torch.equal(unpack(case.values, case.indices, pattern, in_features), case.dense * case.mask)
    assert torch.equal(unpack_mask(case.indices, pattern, in_features), case.mask)
    assert torch.equal(unpack_column_mask(case.packed_column, case.mask, pattern), case.column)
