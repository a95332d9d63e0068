"""The linear on chosen rows and columns against slices of a dense weight."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fxsparse.backend.inductor import inline_references
from fxsparse.cost import formulas
from fxsparse.errors import RewriteError
from fxsparse.ops.define import decompositions

F = torch.ops.fxsparse
CHOICES = [(True, True), (True, False), (False, True), (False, False)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


class Case:
    """A random layer and a random choice of its rows and columns."""

    def __init__(
        self,
        by: tuple[bool, bool] = (True, True),
        leading: Sequence[int] = (7,),
        dtype: torch.dtype = torch.float64,
        *,
        bias: bool = True,
    ):
        out, in_features = random.choice([5, 16, 33]), random.choice([3, 16, 29])
        self.row = torch.randperm(out)[: random.randint(1, out)] if by[0] else None
        self.column = torch.randperm(in_features)[: random.randint(1, in_features)] if by[1] else None
        self.weight = torch.randn(out, in_features, dtype=dtype, requires_grad=True)
        self.bias = torch.randn(out, dtype=dtype, requires_grad=True) if bias else None
        k = in_features if self.column is None else len(self.column)
        self.x = torch.randn(*leading, k, dtype=dtype, requires_grad=True)
        self.s = out if self.row is None else len(self.row)
        self.dy = torch.randn(*leading, self.s, dtype=dtype)

    @property
    def args(self) -> tuple[Any, ...]:
        return self.x, self.weight, self.row, self.column, self.bias

    def expected(self) -> list[Tensor]:
        """y, dx, dW and db in float64, by indexing."""
        x, weight, bias = (t.detach().double().requires_grad_() for t in (self.x, self.weight, self.bias))
        rows = torch.arange(len(weight)) if self.row is None else self.row
        columns = torch.arange(weight.shape[1]) if self.column is None else self.column
        y = x @ weight[rows[:, None], columns[None, :]].t() + bias[rows]
        return [y.detach(), *torch.autograd.grad(y, (x, weight, bias), self.dy.double())]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("leading", [(), (7,), (2, 3), (0,), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("by", CHOICES, ids=str)
def test_values_and_gradients(by: tuple[bool, bool], leading: tuple[int, ...], dtype: torch.dtype) -> None:
    case = Case(by, leading, dtype)
    y = F.gather_linear(*case.args)
    gradients = torch.autograd.grad(y, (case.x, case.weight, case.bias), case.dy)
    for actual, expected in zip((y, *gradients), case.expected(), strict=True):
        assert actual.dtype == dtype and actual.is_contiguous()
        scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
        torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


def test_gradients_are_zero_where_not_chosen() -> None:
    case = Case(dtype=torch.float32)
    F.gather_linear(*case.args).backward(case.dy)
    chosen = torch.zeros(case.weight.shape, dtype=torch.bool)
    chosen[case.row[:, None], case.column[None, :]] = True
    assert case.weight.grad[~chosen].count_nonzero() == 0 and case.weight.grad[chosen].count_nonzero() > 0
    off = torch.ones(len(case.weight), dtype=torch.bool).index_fill(0, case.row, False)
    assert case.bias.grad[off].count_nonzero() == 0


def test_gradcheck_and_frozen_inputs() -> None:
    case = Case()
    assert torch.autograd.gradcheck(F.gather_linear, case.args)
    for frozen in range(3):
        case = Case()
        wanted = [t for at, t in enumerate((case.x, case.weight, case.bias)) if at != frozen]
        (case.x, case.weight, case.bias)[frozen].requires_grad_(False)
        y = F.gather_linear(*case.args)
        _, *gradients = case.expected()
        kept = [gradient for at, gradient in enumerate(gradients) if at != frozen]
        for actual, expected in zip(torch.autograd.grad(y, wanted, case.dy), kept, strict=True):
            torch.testing.assert_close(actual, expected)


def _calls(case: Case) -> list[tuple[Any, tuple[Any, ...]]]:
    x, weight = case.x.detach(), case.weight.detach()
    return [
        (F.gather_linear, case.args),
        (F.gather_linear_grad_input, (case.dy, weight, case.row, case.column)),
        (F.gather_linear_grad_weight, (case.dy, x, case.row, case.column, *weight.shape)),
    ]


@pytest.mark.parametrize("by", CHOICES, ids=str)
def test_opcheck_and_meta(by: tuple[bool, bool]) -> None:
    for op, args in _calls(Case(by, (2, 3), bias=by[0])):
        torch.library.opcheck(op.default, args)
        real, meta = op(*args), op(*(arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args))
        assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("by", CHOICES, ids=str)
def test_flops_are_those_of_the_chosen_part(by: tuple[bool, bool]) -> None:
    case = Case(by, (5, 3))
    expected = 2 * 15 * case.s * case.x.shape[-1]
    for op, args in _calls(case):
        with FlopCounterMode(display=False) as counter:
            op(*args)
        assert counter.get_total_flops() == expected, op
    operands = [formulas.Operand(tuple(t.shape), t.dtype) for t in (case.dy, case.x, case.weight)]
    formula = formulas.formula_of(F.gather_linear.default)
    assert formula is not None
    (product,) = formula(*operands)
    assert product.flops == expected and set(product.gradients.values()) == {expected}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    case = Case(dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        y = F.gather_linear(*case.args)
    assert y.dtype == dtype
    gradients = torch.autograd.grad(y, (case.x, case.weight, case.bias), case.dy.to(dtype))
    for actual, expected in zip((y, *gradients), case.expected(), strict=True):
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(actual.double(), expected, rtol=4e-2, atol=4e-2 * scale)
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


def test_other_choices_of_the_same_size_compile_once() -> None:
    graphs = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)

    case = Case((True, False), dtype=torch.float32)
    compiled = torch.compile(lambda *args: F.gather_linear(*args), backend=backend)
    for _ in range(3):
        case.row.copy_(torch.randperm(len(case.weight))[: case.s])
        y = compiled(*case.args)
        gradients = torch.autograd.grad(y, (case.x, case.weight, case.bias), case.dy)
        for actual, expected in zip((y, *gradients), case.expected(), strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-4)
    assert len(graphs) == 1


def test_reference_inlined() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    for op, args in _calls(Case(dtype=torch.float32)):
        args = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
        gm = make_fx(lambda *given, op=op: op(*given), tracing_mode="fake")(*args)
        assert op.default in decompositions() and inline_references(gm.graph) == 1
        gm.recompile()
        torch.testing.assert_close(gm(*args), op(*args))


def test_errors_name_the_argument() -> None:
    case = Case(dtype=torch.float32)
    x, weight, rows, columns, bias = case.args
    for args, message in (
        ((x, weight, rows.int(), columns, bias), r"rows is torch\.int32"),
        ((x, weight, rows, columns[None], bias), "expected a vector"),
        ((torch.randn(3, 99), weight, rows, columns, bias), "has 99 features"),
        ((x, weight.double(), rows, columns, bias), "weight is torch.float64"),
        ((x, weight, rows, columns, bias[:-1]), "bias is"),
        ((x.long(), weight, rows, columns, bias), "not a real floating-point"),
    ):
        with pytest.raises(RewriteError, match=f"gather_linear: .*{message}"):
            F.gather_linear(*args)
    y = F.gather_linear(*case.args)
    (dx,) = torch.autograd.grad(y, x, case.dy.requires_grad_(), create_graph=True)
    with pytest.raises(RewriteError, match="create_graph"):
        dx.sum().backward()
