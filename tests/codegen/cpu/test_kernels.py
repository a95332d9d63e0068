"""C++ kernels against float64: every instruction set this machine has, patterns, dtypes, shapes with tails."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fxsparse.codegen.cpu import build, instruction_sets, launch
from fxsparse.codegen.cpu.instruction_sets import ALL, AVX2, AVX512, AVX512_BF16, PORTABLE, InstructionSet
from fxsparse.codegen.cpu.spec import Tile
from fxsparse.codegen.fused_ops import apply_steps
from fxsparse.ops import nm
from fxsparse.ops.nm import Pattern

CASES = (
    (AVX512_BF16, (2, 4), torch.bfloat16),
    (AVX512_BF16, (4, 8), torch.float32),
    (AVX512_BF16, (1, 4), torch.float16),
    (AVX512, (1, 2), torch.bfloat16),
    (AVX512, (2, 4), torch.float16),
    (AVX512, (2, 8), torch.float32),
    (AVX2, (2, 4), torch.float32),
    (AVX2, (1, 4), torch.bfloat16),
    (AVX2, (4, 8), torch.float16),
    (PORTABLE, (1, 2), torch.float32),
    (PORTABLE, (4, 8), torch.bfloat16),
    (PORTABLE, (2, 8), torch.float16),
)
"""Each instruction set with each dtype; over all of them every pattern."""

EVERY = bool(os.environ.get("FXSPARSE_TEST_EVERY_KERNEL"))
GRADIENT_CASES = CASES if EVERY else [CASES[case] for case in (0, 1, 3, 5, 6, 7, 9, 11)]
"""Two for each instruction set, unless ``FXSPARSE_TEST_EVERY_KERNEL`` asks for all: each takes two builds."""

SHAPES = ((1, 5, 3), (2, 16, 65), (3, 33, 9), (9, 3, 130), (13, 70, 52), (40, 20, 49), (130, 9, 70), (300, 17, 33))
"""Tokens, groups of 4 or 8 columns, rows."""

# of the largest element: rounding of the result, then of its inputs' sums
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(scope="module", autouse=True)
def quick_builds() -> Iterator[None]:
    """Less optimised, for the sake of the compiler's time; a build that fails is an error where there is a compiler."""
    try:
        build.compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "FLAGS", tuple(flag.replace("-O3", "-O1") for flag in build.FLAGS))
        yield


def needs(instruction_set: InstructionSet) -> None:
    if instruction_set not in instruction_sets.available():
        pytest.skip(f"this processor has no {instruction_set}")


def weight(
    rows: int, columns: int, pattern: Pattern, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Dense in float64, dense W^{R,C} in float64, values, indices, column mask."""
    dense = torch.randn(rows, columns).to(dtype)
    mask = nm.nm_mask(dense.float().abs(), pattern)
    dense = dense * mask
    values, indices = nm.pack(dense, mask, pattern)
    columns_kept = mask if rows % pattern.m else nm.double_prune_mask(dense.float(), mask, pattern)
    pruned = (dense * columns_kept).double()
    return dense.double(), pruned, values, indices, nm.pack_column_mask(columns_kept, mask, pattern)


def same(result: Tensor, expected: Tensor) -> None:
    assert result.shape == expected.shape and result.is_contiguous()
    error = (result.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-9)
    assert error < TOLERANCE[result.dtype], error


@pytest.mark.parametrize(("instruction_set", "pattern", "dtype"), CASES, ids=str)
def test_products(instruction_set, pattern, dtype):
    needs(instruction_set)
    n, m = pattern
    for tokens, groups, rows in SHAPES:
        columns = groups * m
        dense, _, values, indices, _ = weight(rows, columns, Pattern(n, m), dtype)
        x, bias = torch.randn(tokens, columns).to(dtype), torch.randn(rows).to(dtype)
        expected = x.double() @ dense.t()
        run = launch.nm_linear
        same(run(x, values, indices, None, None, n, m, instruction_set=instruction_set), expected)
        expected = expected + bias.double()
        strided = torch.cat([x, x], 1)[:, :columns]
        same(run(strided, values, indices, None, bias, n, m, instruction_set=instruction_set), expected)
        rank = rows % 21 + 1
        down, up = (torch.randn(rank, columns) / columns**0.5).to(dtype), torch.randn(rows, rank).to(dtype)
        branch = 0.5 * (x.double() @ down.double().t()) @ up.double().t()
        result = launch.nm_linear_low_rank(
            x, values, indices, None, down, up, bias, n, m, 0.5, instruction_set=instruction_set
        )
        same(result, expected + branch)


@pytest.mark.parametrize(("instruction_set", "pattern", "dtype"), GRADIENT_CASES, ids=str)
def test_gradients(instruction_set, pattern, dtype):
    needs(instruction_set)
    n, m = pattern
    for tokens, groups, rows in SHAPES:
        columns = groups * m
        for height in (rows, rows // m * m + m):  # the second can have a column mask
            dense, pruned, values, indices, column_mask = weight(height, columns, Pattern(n, m), dtype)
            x, dy = torch.randn(tokens, columns).to(dtype), torch.randn(tokens, height).to(dtype)
            run = launch.nm_linear_grad_input
            same(run(dy, values, indices, None, n, m, instruction_set=instruction_set), dy.double() @ dense)
            same(run(dy, values, indices, column_mask, n, m, instruction_set=instruction_set), dy.double() @ pruned)
        result = launch.nm_linear_grad_values(dy, x, indices, n, m, instruction_set=instruction_set)
        same(result, nm.gather_kept(dy.double().t() @ x.double(), indices, Pattern(n, m)))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(("tokens", "columns", "rows"), ((520, 72, 1300), (300, 2180, 68)))
def test_sizes_that_are_cut(tokens, columns, rows, dtype):
    """More rows, columns and tokens than are taken at once, on one thread and on three."""
    dense, pruned, values, indices, column_mask = weight(rows, columns, Pattern(2, 4), dtype)
    x, dy = torch.randn(tokens, columns).to(dtype), torch.randn(tokens, rows).to(dtype)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            same(launch.nm_linear(x, values, indices, None, None, 2, 4), x.double() @ dense.t())
            same(launch.nm_linear_grad_input(dy, values, indices, column_mask, 2, 4), dy.double() @ pruned)
            expected = nm.gather_kept(dy.double().t() @ x.double(), indices, Pattern(2, 4))
            same(launch.nm_linear_grad_values(dy, x, indices, 2, 4), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("instruction_set", (ALL[0], PORTABLE), ids=str)
@pytest.mark.parametrize("steps", ("gated_silu mul", "gelu add", "gelu_tanh", "relu tanh"))
def test_epilogues(instruction_set, steps):
    names = steps.split()
    if instruction_set is PORTABLE and names[0] not in ("gated_silu", "gelu"):
        pytest.skip("the same functions")
    needs(instruction_set)
    for tokens, rows in ((1, 6), (5, 74), (35, 70)):
        dense, _, values, indices, _ = weight(rows, 24, Pattern(2, 4), torch.float32)
        x, bias = 2 * torch.randn(tokens, 24), torch.randn(rows)
        width = rows // 2 if steps.startswith("gated") else rows
        operands = [torch.randn(tokens, width) for step in names if step in ("mul", "add")]
        result = launch.nm_linear(
            x, values, indices, None, bias, 2, 4, steps=names, operands=operands, instruction_set=instruction_set
        )
        expected = apply_steps(x.double() @ dense.t() + bias.double(), steps, [o.double() for o in operands])
        same(result, expected)


def test_columns_that_keep_too_many_are_exact():
    """A column mask whose columns are not n:m."""
    dense, _, values, indices, _ = weight(64, 48, Pattern(2, 4), torch.float32)
    whole = torch.full((64, 3), 255, dtype=torch.uint8)
    dy = torch.randn(20, 64)
    same(launch.nm_linear_grad_input(dy, values, indices, whole, 2, 4), dy.double() @ dense)


def test_threads_change_no_bit():
    _, _, values, indices, column_mask = weight(200, 180, Pattern(2, 4), torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 1, 3):
            torch.set_num_threads(count)
            torch.manual_seed(1)
            made = []
            for tokens in (1, 7, 30, 300):
                x, dy = torch.randn(tokens, 180), torch.randn(tokens, 200)
                made += [
                    launch.nm_linear(x, values, indices, None, None, 2, 4),
                    launch.nm_linear_grad_input(dy, values, indices, column_mask, 2, 4),
                    launch.nm_linear_grad_input(dy, values, indices, None, 2, 4),
                    launch.nm_linear_grad_values(dy, x, indices, 2, 4),
                ]
            results.append(made)
        for made in results[1:]:
            assert all(torch.equal(one, other) for one, other in zip(results[0], made, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_tiles_change_only_rounding():
    dense, _, values, indices, _ = weight(140, 96, Pattern(2, 4), torch.float32)
    x = torch.randn(70, 96)
    tile = Tile(few=0, vectors=2, rows=64)
    same(launch.nm_linear(x, values, indices, None, None, 2, 4, tile=tile), x.double() @ dense.t())


def test_empty_and_higher_dimensions():
    dense, _, values, indices, _ = weight(12, 16, Pattern(2, 4), torch.float32)
    bias = torch.randn(12)
    x = torch.randn(2, 3, 5, 16)
    run = launch.nm_linear
    same(run(x, values, indices, None, bias, 2, 4), x.double() @ dense.t() + bias.double())
    turned = x.transpose(0, 2)
    same(run(turned, values, indices, None, bias, 2, 4), turned.double() @ dense.t() + bias.double())
    same(run(x[0, 0, 0], values, indices, None, bias, 2, 4), x[0, 0, 0].double() @ dense.t() + bias.double())
    assert run(x[:0], values, indices, None, bias, 2, 4).shape == (0, 3, 5, 12)
    assert not launch.nm_linear_grad_values(torch.empty(0, 12), torch.empty(0, 16), indices, 2, 4).any()
    assert not launch.nm_linear_grad_input(torch.empty(3, 0), values[:0], indices[:0], None, 2, 4).any()


@pytest.mark.parametrize("instruction_set", (ALL[0], AVX2, PORTABLE), ids=str)
@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_what_is_not_finite_is_not_lost_and_does_not_spread(instruction_set, bad):
    """It shows in everything that a kept weight or a gradient carries it to, and in no other token or row."""
    needs(instruction_set)
    pattern, dtype = {  # the cases above, whose builds are shared
        PORTABLE: (Pattern(1, 2), torch.float32), AVX2: (Pattern(2, 4), torch.float32)
    }.get(instruction_set, (Pattern(4, 8), torch.float32))  # fmt: skip
    n, m = pattern.n, pattern.m
    dense, pruned, values, indices, column_mask = weight(24, 40, pattern, dtype)
    for tokens in (1, 5, 40):
        x, dy = torch.randn(tokens, 40), torch.randn(tokens, 24)
        x[0, 7], dy[0, 3] = bad, bad
        y = launch.nm_linear(x, values, indices, None, None, n, m, instruction_set=instruction_set)
        assert not y[0, dense[:, 7] != 0].isfinite().any()
        same(y[1:], x[1:].double() @ dense.t()) if tokens > 1 else None
        dx = launch.nm_linear_grad_input(dy, values, indices, column_mask, n, m, instruction_set=instruction_set)
        assert not dx[0, pruned[3] != 0].isfinite().any()
        same(dx[1:], dy[1:].double() @ pruned) if tokens > 1 else None
        x[0, 7] = 1.0
        dv = launch.nm_linear_grad_values(dy, x, indices, n, m, instruction_set=instruction_set)
        assert not dv[3].isfinite().any() and dv[[r for r in range(24) if r != 3]].isfinite().all()


def test_operators_pass_opcheck():
    _, _, values, indices, column_mask = weight(12, 16, Pattern(2, 4), torch.float32)
    x, dy = torch.randn(3, 16), torch.randn(3, 12)
    ops = torch.ops.fxsparse_cpu
    number = launch.kernel_id("nm_linear", torch.float32, 2, 4)
    torch.library.opcheck(ops.linear.default, (x, values, indices, None, number))
    number = launch.kernel_id("nm_linear_grad_input", torch.float32, 2, 4)
    torch.library.opcheck(ops.grad_input.default, (dy, values, indices, column_mask, number))
    number = launch.kernel_id("nm_linear_grad_values", torch.float32, 2, 4)
    torch.library.opcheck(ops.grad_values.default, (dy, x, indices, number))
    with pytest.raises(RuntimeError, match="not loaded"):
        ops.linear.default(x, values, indices, None, 1)
    with pytest.raises(RuntimeError, match="another dtype"):
        ops.grad_values.default(dy.half(), x.half(), indices, number)
