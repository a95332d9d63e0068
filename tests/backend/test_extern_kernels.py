"""Inductor calls C++ kernels with everything bound: every operator, strided and dynamic inputs, and what may not be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

from fxsparse.backend import extern_kernels
from fxsparse.codegen.cpu import build, extern, launch
from fxsparse.ops import nm
from fxsparse.ops.nm import Pattern

IN, OUT = 48, 40


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    try:
        build.compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    launch.kernel_id("nm_linear", torch.float32, 2, 4)
    assert extern.obstacle() is None
    extern_kernels.register()


@pytest.fixture(scope="module")
def weight() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dense, values, indices, column mask."""
    dense = torch.randn(OUT, IN)
    mask = nm.nm_mask(dense.abs(), Pattern(2, 4))
    column_mask = nm.pack_column_mask(nm.double_prune_mask(dense, mask, Pattern(2, 4)), mask, Pattern(2, 4))
    return dense * mask, *nm.pack(dense, mask, Pattern(2, 4)), column_mask


def compiled(run: Callable[..., object], *args: Tensor) -> tuple[object, str]:
    """The result, and Inductor's code; what was compiled before is forgotten."""
    torch.compiler.reset()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        result, (code,) = run_and_get_code(torch.compile(run), *args)
    return result, code


@pytest.mark.inductor
def test_every_operator_is_bound_and_right(weight):
    dense, values, indices, column_mask = weight
    ops = torch.ops.fxsparse_cpu
    forward, gated, grad_input, grad_values = (
        launch.kernel_id(kind, torch.float32, 2, 4, steps)
        for kind, steps in (
            ("nm_linear", ()),
            ("nm_linear", ("gated_silu", "add")),
            ("nm_linear_grad_input", ()),
            ("nm_linear_grad_values", ()),
        )
    )
    bias, down, up = torch.randn(OUT), torch.randn(3, IN), torch.randn(OUT, 3)

    def run(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        first, second = x.split(IN, -1)  # rows of another stride
        y = ops.linear.default(torch.tanh(first), values, indices, bias, forward)
        z = ops.linear_with.default(second, values, indices, None, down, up, None, None, 0.5, forward)
        other = y[..., : OUT // 2] + 1
        gate = ops.linear_with.default(first, values, indices, bias, None, None, other, None, 1.0, gated)
        dx = ops.grad_input.default(dy, values, indices, column_mask, grad_input)
        dv = ops.grad_values.default(dy.flatten(0, -2), second.flatten(0, -2), indices, grad_values)
        turned = ops.linear.default(second.transpose(0, 1), values, indices, None, forward)
        return y, z, gate, dx, dv, turned

    x, dy = torch.randn(3, 5, 2 * IN), torch.randn(3, 5, OUT)
    expected = run(x, dy)
    assert torch.allclose(expected[0], F.linear(torch.tanh(x[..., :IN]), dense, bias), atol=1e-5)
    results, code = compiled(run, x, dy)
    assert code.count("= fxsparse_bind(") == len(results)
    assert "torch.ops.fxsparse_cpu" not in code
    for result, right in zip(results, expected, strict=True):
        torch.testing.assert_close(result, right)


@pytest.mark.inductor
def test_a_free_number_of_tokens(weight):
    number = launch.kernel_id("nm_linear", torch.float32, 2, 4)

    class Linear(nn.Module):  # whose tensors have sizes that are known
        def __init__(self) -> None:
            super().__init__()
            self.values = nn.Parameter(weight[1])
            self.register_buffer("indices", weight[2])

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.fxsparse_cpu.linear.default(x + 1, self.values, self.indices, None, number) * 2

    run = Linear().requires_grad_(False)
    free = torch.randn(4, 7, IN)
    torch._dynamo.mark_dynamic(free, 0)
    torch._dynamo.mark_dynamic(free, 1)
    torch.compiler.reset()
    fast = torch.compile(run)
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        _, (code,) = run_and_get_code(fast, free)
        assert "fxsparse_bind" in code
        for size in ((2, 3), (5, 30), (4, 7)):
            x = torch.randn(*size, IN)
            torch.testing.assert_close(fast(x), run(x))


@pytest.mark.inductor
def test_what_cannot_be_bound_goes_through_the_dispatcher(weight):
    _, values, indices, _ = weight
    number = launch.kernel_id("nm_linear", torch.float32, 2, 4)

    def run(x: Tensor) -> Tensor:
        return torch.ops.fxsparse_cpu.linear.default(x, values, indices, None, number)

    x = torch.randn(IN)  # no rows
    result, code = compiled(run, x)
    assert "fxsparse_bind" not in code and "torch.ops.fxsparse_cpu.linear.default" in code
    torch.testing.assert_close(result, run(x))


def test_a_bound_kernel_says_what_is_wrong(weight):
    _, values, indices, _ = weight
    x, y = torch.randn(2, IN), torch.empty(2, OUT)
    number = launch.kernel_id("nm_linear", torch.float32, 2, 4)
    bound = extern.bind(number, ("x", "values", "indices"), IN, OUT)
    bound(x, values, indices, 2, IN, out=y)
    assert torch.equal(y, launch.nm_linear(x, values, indices, None, None, 2, 4))
    with pytest.raises(RuntimeError, match="not loaded"):
        extern.bind(1, ("x", "values", "indices"), IN, OUT)(x, values, indices, 2, IN, out=y)
    with pytest.raises(RuntimeError, match="takes its tensors"):
        bound(x, values, indices, out=y)
    with pytest.raises(RuntimeError, match="tensor"):
        bound(x, None, indices, 2, IN, out=y)
