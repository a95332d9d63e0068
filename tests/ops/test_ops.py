"""The fxsparse operators against dense matrices: values, gradients, mixed precision, optimizers, compilers."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from fxsparse.backend.inductor import inline_references
from fxsparse.errors import OptionError, RewriteError
from fxsparse.ops import low_rank, masked_linear, nm_linear
from fxsparse.ops.define import Check, decompositions, define, implement
from fxsparse.ops.nm import Pattern, double_prune_mask, gather_kept, nm_mask, pack, pack_column_mask, unpack
from fxsparse.ops.operator import OPERATORS, Operator

F = torch.ops.fxsparse
PATTERNS = ["1:2", "2:3", "2:4", "3:5", "2:8", "4:8", "2:16", "5:32"]
LEADING = [(), (7,), (2, 3), (0,), (3, 0, 2), (2, 1, 3, 2)]


class Case:
    """A random sparse layer and its dense twins; rows of packed bits that end inside a byte are likely."""

    def __init__(
        self, text: str = "2:4", leading: Sequence[int] = (7,), dtype: torch.dtype = torch.float32, groups: int = 0
    ):
        self.pattern = Pattern.parse(text)
        self.n, self.m = self.pattern.n, self.pattern.m
        out, self.in_features = 3 * self.m, self.m * (groups or random.choice([1, 3, 5, 6]))
        self.dense = torch.randn(out, self.in_features, dtype=dtype)
        self.mask = nm_mask(torch.rand(out, self.in_features), self.pattern)
        self.column = double_prune_mask(self.dense, self.mask, self.pattern)
        self.values, self.indices = pack(self.dense, self.mask, self.pattern)
        self.packed_column = pack_column_mask(self.column, self.mask, self.pattern)
        self.x = torch.randn(*leading, self.in_features, dtype=dtype)
        self.bias = torch.randn(out, dtype=dtype)
        self.dy = torch.randn(*leading, out, dtype=dtype)
        self.down = torch.randn(2, self.in_features, dtype=dtype)
        self.up = torch.randn(out, 2, dtype=dtype)
        for tensor in (self.dense, self.values, self.x, self.bias, self.down, self.up):
            tensor.requires_grad_()

    def nm(self, *, column: bool = True, bias: bool = True) -> tuple[Any, ...]:
        column_mask, given = self.packed_column if column else None, self.bias if bias else None
        return self.x, self.values, self.indices, column_mask, given, self.n, self.m

    def nm_low_rank(self, *scale: float, column: bool = True, bias: bool = True) -> tuple[Any, ...]:
        *product, given, n, m = self.nm(column=column, bias=bias)
        return *product, self.down, self.up, given, n, m, *scale

    def masked(self, *, column: bool = True, bias: bool = True) -> tuple[Any, ...]:
        return self.x, self.dense, self.mask, self.column if column else None, self.bias if bias else None

    def masked_low_rank(self, *options: Any, column: bool = True, bias: bool = True) -> tuple[Any, ...]:
        *product, given = self.masked(column=column, bias=bias)
        return *product, self.down, self.up, given, *options

    def kept(self, dense: Tensor) -> Tensor:
        return gather_kept(dense, self.indices, self.pattern)

    def expected(self, *, column: bool = True, scale: float | None = None) -> dict[str, Tensor]:
        """y and all gradients in float64, by the formulas."""
        x, dy = (t.detach().double().reshape(-1, t.shape[-1]) for t in (self.x, self.dy))
        weight, bias, down, up = (t.detach().double() for t in (self.dense, self.bias, self.down, self.up))
        pruned = weight * self.mask
        y, dx = x @ pruned.t() + bias, dy @ (pruned * (self.column if column else 1))
        result = {"dense_gradient": dy.t() @ x, "bias": dy.sum(0)}
        if scale is not None:
            y, dx = y + scale * (x @ down.t() @ up.t()), dx + scale * (dy @ up @ down)
            result |= {"down": scale * (dy @ up).t() @ x, "up": scale * dy.t() @ (x @ down.t())}
        return result | {"y": y.view(self.dy.shape), "x": dx.view(self.x.shape)}


def _close(actual: Tensor | None, expected: Tensor) -> None:
    assert actual is not None
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[actual.dtype]
    scale = expected.abs().max().item() if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance * max(scale, 1.0))


def _gradients(case: Case, call: Callable[..., Tensor], args: Sequence[Any], *names: str) -> dict[str, Tensor]:
    y = call(*args)
    wanted = [getattr(case, name) for name in names]
    return {"y": y.detach(), **dict(zip(names, torch.autograd.grad(y, wanted, case.dy.to(y.dtype)), strict=True))}


# --- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("text", PATTERNS)
def test_nm_linear_computes_slopes_equations(text: str, leading: tuple[int, ...], column: bool) -> None:
    case = Case(text, leading)
    expected = case.expected(column=column)
    actual = _gradients(case, F.nm_linear, case.nm(column=column), "x", "values", "bias")
    for name in ("y", "x", "bias"):
        _close(actual[name], expected[name])
    _close(actual["values"], case.kept(expected["dense_gradient"]))


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("text", ["2:4", "3:5"])
def test_masked_linear_computes_the_same_on_a_dense_weight(
    text: str, leading: tuple[int, ...], column: bool, straight_through: bool
) -> None:
    case = Case(text, leading)
    expected = case.expected(column=column)
    args = (*case.masked(column=column), straight_through)
    actual = _gradients(case, F.masked_linear, args, "x", "dense", "bias")
    for name in ("y", "x", "bias"):
        _close(actual[name], expected[name])
    _close(actual["dense"], expected["dense_gradient"] * (1 if straight_through else case.mask))
    if not straight_through:
        assert not actual["dense"][~case.mask].any()


@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("kind", ["nm", "masked", "masked, straight through"])
def test_low_rank_branches_add_to_the_sparse_product(kind: str, leading: tuple[int, ...], scale: float | None) -> None:
    case = Case("2:8", leading)
    expected = case.expected(scale=scale or 1 / 2)
    weight = "values" if kind == "nm" else "dense"
    if kind == "nm":
        call, args = F.nm_linear_low_rank, case.nm_low_rank(*([scale] if scale else []))
    else:
        call, args = F.masked_linear_low_rank, case.masked_low_rank("straight" in kind, scale)
    actual = _gradients(case, call, args, "x", weight, "bias", "down", "up")
    for name in ("y", "x", "bias", "down", "up"):
        _close(actual[name], expected[name])
    dense = expected["dense_gradient"]
    _close(actual[weight], {"nm": case.kept(dense), "masked": dense * case.mask}.get(kind, dense))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nm", "masked", "nm_low_rank", "masked_low_rank"])
def test_every_dtype(kind: str, dtype: torch.dtype) -> None:
    case = Case("2:4", (5, 3), dtype)
    low_rank = kind.endswith("low_rank")
    expected = case.expected(scale=0.5 if low_rank else None)
    call = getattr(F, f"{kind.removesuffix('_low_rank')}_linear{'_low_rank' if low_rank else ''}")
    weight = "values" if kind.startswith("nm") else "dense"
    actual = _gradients(case, call, getattr(case, kind)(), "x", weight, "bias", *(("down", "up") if low_rank else ()))
    dense = expected["dense_gradient"]
    expected[weight] = case.kept(dense) if weight == "values" else dense * case.mask
    for name, tensor in actual.items():
        assert tensor.dtype == dtype
        _close(tensor, expected[name])


@pytest.mark.parametrize("groups", range(1, 10))
@pytest.mark.parametrize("text", ["1:4", "3:4", "1:8", "3:17"])
def test_rows_that_end_inside_a_byte(text: str, groups: int) -> None:
    case = Case(text, (3,), groups=groups)
    actual = _gradients(case, F.nm_linear, case.nm(), "x", "values")
    expected = case.expected()
    _close(actual["x"], expected["x"])
    _close(actual["values"], case.kept(expected["dense_gradient"]))


def test_inputs_that_are_not_contiguous() -> None:
    case = Case("2:4", (4, 6))
    apart = Case("2:4", (4, 6))
    apart.__dict__.update(case.__dict__)
    apart.x = case.x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    apart.dy = case.dy[:1, :1].expand_as(case.dy)
    case.dy = apart.dy.contiguous()
    for call, args in (("nm_linear", "nm"), ("masked_linear", "masked")):
        weight = "values" if args == "nm" else "dense"
        one = _gradients(case, getattr(F, call), getattr(case, args)(), "x", weight, "bias")
        other = _gradients(apart, getattr(F, call), getattr(apart, args)(), "x", weight, "bias")
        for name in one:
            torch.testing.assert_close(other[name], one[name])
    weight = case.dense.detach().t().contiguous().requires_grad_()  # stored [in, out], as Conv1D does
    y = F.masked_linear(case.x, weight.t(), case.mask.t().contiguous().t(), None, None)
    (grad,) = torch.autograd.grad(y, weight, case.dy)
    _close(grad.t(), case.expected()["dense_gradient"] * case.mask)


def test_pruned_weights_that_are_not_finite_take_no_part() -> None:
    case = Case("2:4", (3,))
    with torch.no_grad():
        case.dense[~case.mask] = float("nan")
    y = F.masked_linear(*case.masked())
    y.backward(case.dy)
    assert y.isfinite().all() and case.x.grad.isfinite().all() and case.dense.grad.isfinite().all()


def test_a_kept_zero_is_alive() -> None:
    case = Case("2:4", (8,))
    with torch.no_grad():
        case.values.zero_()
    (grad,) = torch.autograd.grad(F.nm_linear(*case.nm()), case.values, case.dy)
    _close(grad, case.kept(case.expected()["dense_gradient"]))
    assert (grad != 0).all()


@pytest.mark.parametrize("call", ["nm_linear", "nm_linear_low_rank", "masked_linear", "masked_linear_low_rank"])
def test_gradcheck(call: str) -> None:
    case = Case("2:4", (2, 3), torch.float64, groups=2)
    args = getattr(case, call.replace("_linear", ""))(column=False)
    if call.startswith("masked"):
        assert torch.autograd.gradcheck(
            lambda x, w, *rest: getattr(F, call)(x, w.where(case.mask, 0), *rest), args, fast_mode=True
        )
    else:
        assert torch.autograd.gradcheck(getattr(F, call), args, fast_mode=True)


def test_only_the_gradients_that_are_needed_are_computed_and_only_their_inputs_kept() -> None:
    case = Case("2:4", (6,))
    leaves = {"x": case.x, "values": case.values, "bias": case.bias}
    saved_for = {"x": "values", "values": "x"}
    for wanted in ({"x"}, {"values"}, {"bias"}, {"x", "bias"}, set(leaves)):
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in wanted).grad = None
        y = F.nm_linear(*case.nm())
        saved = [tensor.data_ptr() for tensor in y.grad_fn.saved_tensors if tensor is not None]
        assert {name for name in saved_for if leaves[saved_for[name]].data_ptr() in saved} == wanted - {"bias"}
        with FlopCounterMode(display=False) as counter:
            y.backward(case.dy)
        assert {name for name, leaf in leaves.items() if leaf.grad is not None} == wanted
        counted = {str(op) for op in counter.get_flop_counts().get("Global", {})}
        expected = {"x": "fxsparse.nm_linear_grad_input", "values": "fxsparse.nm_linear_grad_values"}
        assert counted == {expected[name] for name in wanted - {"bias"}}


def test_no_second_derivative() -> None:
    case = Case("2:4", (3,))
    for call, args in ((F.nm_linear, case.nm()), (F.masked_linear, case.masked())):
        (dx,) = torch.autograd.grad(call(*args).square().sum(), case.x, create_graph=True)
        with pytest.raises(RewriteError, match=r"_grad_input: is a gradient and cannot be derived once more"):
            dx.sum().backward()


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"x": torch.randn(3, 13)}, "13 columns are not a multiple of 4"),
        ({"x": torch.randn(3, 16)}, r"values is torch.float32 \[12, 6\] on cpu, expected torch.float32 \[12, 8\]"),
        ({"x": torch.randn(())}, "scalar"),
        ({"x": torch.randn(3, 12, dtype=torch.float64)}, "values is torch.float32 .* expected torch.float64"),
        ({"x": torch.ones(3, 12, dtype=torch.long)}, "its input is torch.int64"),
        ({"x": torch.randn(3, 12, device="meta")}, "on cpu, expected .* on meta"),
        ({"values": torch.randn(72)}, "expected a matrix"),
        ({"indices": torch.zeros(12, 2, dtype=torch.int64)}, "indices is torch.int64"),
        ({"indices": torch.zeros(12, 3, dtype=torch.uint8)}, r"indices is torch.uint8 \[12, 3\]"),
        ({"packed_column": torch.zeros(12, 6, dtype=torch.uint8)}, r"column_mask is .* expected torch.uint8 \[12, 1\]"),
        ({"bias": torch.randn(11)}, r"bias is torch.float32 \[11\]"),
        ({"down": torch.randn(2, 8)}, r"down is .* expected torch.float32 \[2, 12\]"),
        ({"up": torch.randn(12, 3)}, r"up is .* expected torch.float32 \[12, 2\]"),
        ({"down": torch.randn(0, 12), "up": torch.randn(12, 0)}, "a rank is at least 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_arguments_that_do_not_fit_are_named(wrong: dict[str, Tensor], match: str) -> None:
    case = Case("2:4", (3,), groups=3)
    case.__dict__.update(wrong)
    with pytest.raises(RewriteError, match=f"fxsparse::nm_linear_low_rank: .*{match}"):
        F.nm_linear_low_rank(*case.nm_low_rank())


def test_masks_that_do_not_fit_are_named() -> None:
    case = Case("2:4", (3,), groups=3)
    with pytest.raises(RewriteError, match=r"mask is torch\.float32"):
        F.masked_linear(case.x, case.dense, case.mask.float(), None, None)
    with pytest.raises(RewriteError, match=r"column_mask is torch\.bool"):
        F.masked_linear(case.x, case.dense, case.mask, case.column[:1], None)
    with pytest.raises(RewriteError, match="weight is"):
        F.masked_linear(case.x[:, :8], case.dense, case.mask, None, None)
    with pytest.raises(RewriteError, match="x is"):
        F.masked_linear_grad_weight(case.dy, case.x[:2], case.mask)
    with pytest.raises(OptionError, match="pattern 4:2"):
        F.nm_linear(case.x, case.values, case.indices, None, None, 4, 2)


# --- torch.library ----------------------------------------------------------------------------------------------------


def _calls(case: Case) -> list[tuple[Any, tuple[Any, ...]]]:
    x, values, dense = case.x.detach(), case.values.detach(), case.dense.detach()
    return [
        (F.nm_linear, case.nm()),
        (F.nm_linear, case.nm(column=False, bias=False)),
        (F.nm_linear_grad_input, (case.dy, values, case.indices, case.packed_column, case.n, case.m)),
        (F.nm_linear_grad_input, (case.dy, values, case.indices, None, case.n, case.m)),
        (F.nm_linear_grad_values, (case.dy, x, case.indices, case.n, case.m)),
        (F.nm_linear_low_rank, case.nm_low_rank()),
        (F.nm_linear_low_rank, case.nm_low_rank(0.3, column=False, bias=False)),
        (F.masked_linear, case.masked()),
        (F.masked_linear, (*case.masked(column=False, bias=False), True)),
        (F.masked_linear_grad_input, (case.dy, dense, case.mask, case.column)),
        (F.masked_linear_grad_input, (case.dy, dense, case.mask, None)),
        (F.masked_linear_grad_weight, (case.dy, x, case.mask)),
        (F.masked_linear_grad_weight, (case.dy, x, None)),
        (F.masked_linear_low_rank, case.masked_low_rank()),
        (F.masked_linear_low_rank, case.masked_low_rank(True, 0.3, column=False, bias=False)),
    ]


@pytest.mark.parametrize("which", range(len(_calls(Case()))))
def test_opcheck(which: int) -> None:
    op, args = _calls(Case("2:4", (2, 3)))[which]
    torch.library.opcheck(op.default, args)


def test_opcheck_covers_every_operator() -> None:
    modules = (nm_linear, masked_linear, low_rank)
    here = {op for op in decompositions() if any(op._opname in vars(module) for module in modules)}
    assert {op.default for op, _ in _calls(Case())} == here
    elsewhere = {"mux", "demux_linear", "nm_values", "nm_spread"} | {
        f"{name}{gradient}"
        for name in ("gather_linear", "pruned_operand_linear", "masked_expert_linear", "nm_expert_linear")
        for gradient in ("", "_grad_input", "_grad_weight", "_grad_values")
    }
    assert {op._opname for op in set(decompositions()) - here} <= elsewhere  # with their own tests


@pytest.mark.parametrize("which", range(len(_calls(Case()))))
@pytest.mark.parametrize("leading", [(), (0,), (2, 3)], ids=str)
def test_meta_tensors_tell_the_shape_dtype_and_strides(which: int, leading: tuple[int, ...]) -> None:
    op, args = _calls(Case("3:5", leading, torch.bfloat16))[which]
    real = op(*args)
    meta = op(*(arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args))
    assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


def test_flops_are_those_of_the_kept_weights() -> None:
    case = Case("2:8", (5, 3))
    out, tokens, rank = case.bias.shape[0], 15, case.down.shape[0]
    dense = 2 * tokens * out * case.in_features
    branch = 2 * tokens * rank * (case.in_features + out)
    expected = {
        "nm_linear": dense // 4,
        "nm_linear_grad_input": dense // 4,
        "nm_linear_grad_values": dense,
        "nm_linear_low_rank": dense // 4 + branch,
        "masked_linear": dense,
        "masked_linear_grad_input": dense,
        "masked_linear_grad_weight": dense,
        "masked_linear_low_rank": dense + branch,
    }
    for op, args in _calls(case):
        with FlopCounterMode(display=False) as counter:
            op(*args)
        assert counter.get_total_flops() == expected[op.__name__], op


def test_a_further_operator_is_one_definition() -> None:
    def test_double(x: Tensor) -> Tensor:
        return x * 2

    def output(name: str, x: Tensor) -> tuple[Tensor, Sequence[int]]:
        Check(name, x)
        return x, x.shape

    op = define(
        Operator(
            "test_double",
            "Tensor x",
            test_double,
            output,
            lambda y, x: (),
            lambda ctx, inputs, output: None,
            lambda ctx, dy: dy * 2,
        )
    )
    try:
        x = torch.randn(3, requires_grad=True)
        torch.library.opcheck(op.overload, (x,))
        ran = []

        @implement(op, "cpu")
        def kernel(x: Tensor) -> Tensor:
            ran.append(x.shape)
            return x + x

        assert torch.equal(op(x), 2 * x) and ran == [(3,)]
        with pytest.raises(RewriteError, match=r"test_double: its input is torch\.int64"):
            op(torch.ones(3, dtype=torch.long))
    finally:
        del OPERATORS[op.name]


# --- mixed precision --------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """One of the operators as a module, and its dense twin, whose weight is masked."""

    def __init__(self, in_features: int, out_features: int, kind: str, pattern: str = "2:4"):
        super().__init__()
        self.kind, self.pattern = kind, Pattern.parse(pattern)
        dense = torch.randn(out_features, in_features) / in_features**0.5
        mask = nm_mask(dense.abs(), self.pattern)
        values, indices = pack(dense, mask, self.pattern)
        self.register_buffer("mask", mask)
        self.register_buffer("indices", indices)
        self.weight = nn.Parameter(values if kind == "nm" else dense * mask)
        self.bias = nn.Parameter(torch.randn(out_features))
        if kind == "dense":
            self.weight.register_hook(lambda grad: grad.where(self.mask, 0))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "nm":
            return F.nm_linear(x, self.weight, self.indices, None, self.bias, self.pattern.n, self.pattern.m)
        if self.kind == "masked":
            return F.masked_linear(x, self.weight, self.mask, None, self.bias)
        return linear(x, self.weight, self.bias)

    def as_dense(self, tensor: Tensor) -> Tensor:
        return unpack(tensor, self.indices, self.pattern, self.mask.shape[1]) if self.kind == "nm" else tensor


def _models(*kinds: str) -> list[nn.Sequential]:
    """The same model with its linears in several forms."""
    seed, models = random.getrandbits(32), []
    for kind in kinds:
        torch.manual_seed(seed)
        models.append(nn.Sequential(Layer(16, 24, kind), nn.GELU(), Layer(24, 24, kind, "2:8"), Layer(24, 8, kind)))
    return models


def _assert_equal(model: nn.Sequential, dense: nn.Sequential, of: Callable[[Tensor], Tensor] = lambda p: p) -> None:
    for ours, theirs in zip(model, dense, strict=True):
        if isinstance(ours, Layer):
            assert torch.equal(ours.as_dense(of(ours.weight)), of(theirs.weight))
            assert torch.equal(of(ours.bias), of(theirs.bias))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nm", "masked"])
def test_autocast_does_what_it_does_to_a_dense_linear(kind: str, dtype: torch.dtype, backend: str) -> None:
    model, dense = _models(kind, "dense")
    x = torch.randn(5, 16, requires_grad=True)
    run = torch.compile(model, backend=backend, fullgraph=True)
    results = []
    for call in (run, dense):
        with torch.autocast("cpu", dtype=dtype):
            y = call(x)
        assert y.dtype == dtype
        results.append((y.detach(), *torch.autograd.grad(y.float().square().sum(), [x], retain_graph=True)))
        y.float().square().sum().backward()
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    _assert_equal(model, dense, lambda p: p.grad)


def test_autocast_around_the_backward_pass_and_for_branches() -> None:
    case = Case("2:4", (6,))
    names = ("x", "values", "bias", "down", "up")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = _gradients(case, F.nm_linear_low_rank, case.nm_low_rank(), *names)
        y = F.nm_linear_low_rank(*case.nm_low_rank())
    outside = torch.autograd.grad(y, [getattr(case, name) for name in names], case.dy.to(y.dtype))
    expected = case.expected(scale=0.5)
    expected["values"] = case.kept(expected["dense_gradient"])
    for name, grad in zip(names, outside, strict=True):
        assert grad.dtype == inside[name].dtype == torch.float32
        torch.testing.assert_close(inside[name], grad, rtol=2e-2, atol=2e-2)
        _close(grad.bfloat16(), expected[name])


def test_autocast_leaves_double_precision_and_full_precision_gradients_alone() -> None:
    case = Case("2:4", (6,), torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.nm_linear(*case.nm()).dtype == torch.float64
    case = Case("2:4", (6,))
    y = F.nm_linear(*case.nm())
    (outside,) = torch.autograd.grad(y, case.x, case.dy, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (inside,) = torch.autograd.grad(y, case.x, case.dy)
    assert torch.equal(inside, outside)


# --- training ---------------------------------------------------------------------------------------------------------


def _train(
    model: nn.Module, batches: Sequence[Tensor], settings: dict[str, Any], clip: bool, accumulate: int, scale: bool
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **settings)
    scaler = torch.amp.GradScaler("cpu", enabled=scale, init_scale=2.0**8)
    for step, x in enumerate(batches):
        with torch.autocast("cpu", dtype=torch.float16, enabled=scale):
            loss = model(x).float().square().mean() / accumulate
        scaler.scale(loss).backward()
        if (step + 1) % accumulate == 0:
            scaler.unscale_(optimizer)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["nm", "masked"])
@pytest.mark.parametrize("settings", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize(("accumulate", "scale"), [(1, False), (2, False), (1, True)])
def test_training_equals_that_of_a_masked_dense_model(
    kind: str, settings: dict[str, Any], accumulate: int, scale: bool
) -> None:
    model, dense = _models(kind, "dense")
    before = copy.deepcopy(model)
    batches = [torch.randn(9, 16) for _ in range(8)]
    for each in (model, dense):
        _train(each, batches, settings, False, accumulate, scale)
    _assert_equal(model, dense)
    for layer, old in zip(model, before, strict=True):
        if isinstance(layer, Layer):
            assert not layer.as_dense(layer.weight)[~layer.mask].any()
            assert (layer.weight != old.weight)[layer.as_dense(layer.weight) != 0 if kind == "masked" else ...].all()


@pytest.mark.parametrize("kind", ["nm", "masked"])
def test_clipping_sees_the_norm_of_the_kept_gradients(kind: str) -> None:
    model, dense = _models(kind, "dense")
    batches = [torch.randn(9, 16) for _ in range(4)]
    for each in (model, dense):
        _train(each, batches, {}, True, 1, False)
    for ours, theirs in zip(model, dense, strict=True):
        if isinstance(ours, Layer):  # the norm sums fewer zeros, so its last bit may differ
            torch.testing.assert_close(ours.as_dense(ours.weight), theirs.weight, rtol=1e-5, atol=1e-6)


def test_optimizer_state_is_as_small_as_the_values() -> None:
    (model,) = _models("nm")
    _train(model, [torch.randn(9, 16)], {}, False, 1, False)
    assert [p.numel() for p in model.parameters() if p.dim() == 2] == [24 * 8, 24 * 6, 8 * 12]


# --- export and compilers ---------------------------------------------------------------------------------------------


class Every(nn.Module):
    """All four linears in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(16, 16, "nm"), Layer(16, 16, "masked")])
        self.down, self.up = nn.Parameter(torch.randn(3, 16)), nn.Parameter(torch.randn(16, 3) / 16)
        for layer in self.layers:
            column = double_prune_mask(layer.as_dense(layer.weight), layer.mask, layer.pattern)
            packed = pack_column_mask(column, layer.mask, layer.pattern) if layer.kind == "nm" else column
            layer.register_buffer("column", packed)

    def forward(self, x: Tensor) -> Tensor:
        nm, masked = self.layers
        compressed, dense = (nm.weight, nm.indices, nm.column), (masked.weight, masked.mask, masked.column)
        x = F.nm_linear(x, *compressed, nm.bias, 2, 4).relu()
        x = F.nm_linear_low_rank(x, *compressed, self.down, self.up, None, 2, 4).relu()
        x = F.masked_linear(x, *dense, masked.bias, True).relu()
        return F.masked_linear_low_rank(x, *dense, self.down, self.up, None, False, 0.5)


def _step(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = run(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]


def _assert_steps_equal(run: Callable[[Tensor], Tensor], model: nn.Module, batches: Sequence[int]) -> None:
    for batch in batches:
        x = torch.randn(batch, 3, 16)
        for ours, theirs in zip(_step(run, model, x), _step(model, model, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_export_keeps_one_node_an_operator_and_any_batch() -> None:
    model = Every()
    x = torch.randn(4, 3, 16)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    called = [str(node.target) for node in program.graph.nodes if "fxsparse" in str(node.target)]
    assert called == [
        f"fxsparse.{name}.default"
        for name in ("nm_linear", "nm_linear_low_rank", "masked_linear", "masked_linear_low_rank")
    ]
    module = program.module()
    for batch in (4, 1, 7):
        x = torch.randn(batch, 3, 16)
        assert torch.equal(module(x), model(x))
    assert not [
        node for node in program.run_decompositions(decompositions()).graph.nodes if "fxsparse" in str(node.target)
    ]


def test_compile_with_a_dynamic_batch_compiles_once() -> None:
    model = Every()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager", dynamic=True, fullgraph=True)
    _assert_steps_equal(compiled, model, (4, 7, 2))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_references_inline_below_autograd() -> None:
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[GraphModule] = []

    def keep(gm: GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm

    model = Every()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, decompositions=decompositions())
    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    _assert_steps_equal(compiled, model, (4, 7, 2))
    targets = [str(node.target) for gm in graphs for node in gm.graph.nodes]
    assert len(graphs) == 2 and not [target for target in targets if "fxsparse" in target]
    assert any("where" in target for target in targets)  # which puts kept values in their places


@pytest.mark.inductor
def test_references_inlined_after_the_partition_keep_no_weight_between_the_passes() -> None:
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.custom_graph_pass import CustomGraphPass

    graphs: list[torch.fx.Graph] = []
    inlined: list[int] = []

    class Inline(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            inlined.append(inline_references(graph))
            graph.lint()
            graphs.append(copy.deepcopy(graph))

        def uuid(self) -> None:
            return None  # neither cache

    model = Every()
    patches = {"post_grad_custom_pre_pass": Inline()}
    compiled = torch.compile(
        model, backend=lambda gm, inputs: compile_fx(gm, inputs, config_patches=patches), dynamic=True, fullgraph=True
    )
    _assert_steps_equal(compiled, model, (4, 7, 2))
    assert inlined == [4, 8]  # and two gradients for each in the backward pass
    assert not [node for graph in graphs for node in graph.nodes if "fxsparse" in str(node.target)]
    held = [node.meta["val"] for node in graphs[0].output_node().all_input_nodes if node.op != "placeholder"]
    held = [val for val in held if isinstance(val, Tensor)]
    assert held and all(isinstance(val.shape[0], torch.SymInt) for val in held), (
        "only what depends on the batch is held"
    )


def test_reference_agrees_with_the_operator_of_its_name() -> None:
    for op, _ in _calls(Case()):
        assert decompositions()[op.default] is OPERATORS[op.__name__].reference


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("which", range(len(_calls(Case()))))
@pytest.mark.parametrize("leading", [(), (0,), (2, 3)], ids=str)
def test_cuda_computes_what_the_cpu_does(which: int, leading: tuple[int, ...]) -> None:
    op, args = _calls(Case("2:4", leading))[which]
    here = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
    there = [arg.cuda() if isinstance(arg, Tensor) else arg for arg in here]
    torch.testing.assert_close(op(*there).cpu(), op(*here), rtol=2e-3, atol=2e-3)  # TF32 may be on
    torch.library.opcheck(op.default, tuple(there))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nm", "masked"])
def test_autocast_on_cuda(kind: str, dtype: torch.dtype) -> None:
    model, dense = (each.cuda() for each in _models(kind, "dense"))
    x = torch.randn(5, 16, device="cuda")
    for each in (model, dense):
        with torch.autocast("cuda", dtype=dtype):
            y = each(x)
        assert y.dtype == dtype
        y.float().square().mean().backward()
    for ours, theirs in zip(model, dense, strict=True):
        if isinstance(ours, Layer):
            assert ours.weight.grad.dtype == torch.float32
            torch.testing.assert_close(ours.as_dense(ours.weight.grad), theirs.weight.grad, rtol=2e-2, atol=2e-2)
