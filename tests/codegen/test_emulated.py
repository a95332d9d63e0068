"""Triton kernels as compiled, with 16-bit arithmetic that the interpreter does not have, run by the PTX emulator.

Tiles are small enough that an H100 too runs ``mma.sync``.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fxsparse.codegen.kernels.demux_linear import demux_linear
from fxsparse.codegen.kernels.gather_linear import (
    gather_linear,
    gather_linear_grad_input,
    gather_linear_grad_weight,
)
from fxsparse.codegen.kernels.mux import mux
from fxsparse.codegen.kernels.nm_linear import nm_linear, nm_linear_low_rank
from fxsparse.codegen.kernels.nm_linear_grad_input import nm_linear_grad_input
from fxsparse.codegen.kernels.nm_linear_grad_values import nm_linear_grad_values
from fxsparse.codegen.kernels.nm_prune import nm_prune
from fxsparse.codegen.spec import NMSpec, Tile
from fxsparse.codegen.tiles import Plan
from fxsparse.ops import nm
from fxsparse.ops.nm import Pattern
from tests.support.emulated import emulation

BF16, FP16 = torch.bfloat16, torch.float16
TOLERANCE = {BF16: 4e-3, FP16: 6e-4}

by_pattern = pytest.mark.parametrize("pattern", NMSpec.PATTERNS, ids=lambda pattern: f"{pattern[0]}:{pattern[1]}")


def close(result: Tensor, expected: Tensor) -> None:
    error = (result.double() - expected).abs().max() / expected.abs().max()
    assert float(error) < TOLERANCE[result.dtype]


def weight(rows: int, columns: int, pattern: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Pruned, pruned twice, values, indices, column mask."""
    dense = torch.randn(rows, columns).to(dtype)
    mask = nm.nm_mask(torch.rand(rows, columns), Pattern(*pattern))
    kept = torch.rand(rows, columns) < 0.7
    values, indices = nm.pack(dense, mask, Pattern(*pattern))
    pruned = dense.double() * mask
    return pruned, pruned * kept, values, indices, nm.pack_column_mask(kept, mask, Pattern(*pattern))


@by_pattern
@pytest.mark.parametrize("capability", [80, 90])
def test_forward(pattern, capability):
    pruned, _, values, indices, _ = weight(40, 80, pattern, BF16)
    x, bias = torch.randn(19, 80).to(BF16), torch.randn(40).to(BF16)
    with emulation(capability):
        y = nm_linear(x, values, indices, None, bias, *pattern, plan=Plan(Tile(16, 32, 64)))
        close(y, F.linear(x.double(), pruned, bias.double()))
        head = Pattern(*pattern)  # the first 64 columns, through strides of 80
        args = x[:, :64], values[:, : head.kept(64)], indices[:, : head.index_bytes(64)], None, None
        y = nm_linear(*args, *pattern, plan=Plan(Tile(16, 32, 32), square=True))
        close(y, F.linear(x[:, :64].double(), pruned[:, :64]))


@pytest.mark.parametrize("capability", [80, 90])
def test_gated(capability):
    pruned, _, values, indices, _ = weight(44, 80, (2, 4), BF16)
    x, bias, operand = (torch.randn(*shape).to(BF16) for shape in ((19, 80), (44,), (19, 22)))
    with emulation(capability):
        plan = Plan(Tile(16, 32, 64))
        args = x, values, indices, None, bias, 2, 4
        y = nm_linear(*args, steps=["gated_silu", "add"], operands=[operand], plan=plan)
    product = F.linear(x.double(), pruned, bias.double())
    close(y, F.silu(product[:, ::2]) * product[:, 1::2] + operand.double())


@by_pattern
def test_gradients(pattern):
    pruned, twice_pruned, values, indices, column_mask = weight(40, 48, pattern, FP16)
    x, dy = torch.randn(35, 48).to(FP16), torch.randn(35, 40).to(FP16)
    plan = Plan(Tile(32, 32, 32))
    with emulation(80):
        close(
            nm_linear_grad_input(dy, values, indices, column_mask, *pattern, plan=plan),
            dy.double() @ twice_pruned,
        )
        close(nm_linear_grad_input(dy, values, indices, None, *pattern, plan=plan), dy.double() @ pruned)
        grad = nm_linear_grad_values(dy, x, indices, *pattern, plan=plan)
        close(grad, nm.gather_kept(dy.double().t() @ x.double(), indices, Pattern(*pattern)))


@pytest.mark.parametrize("rank", [9, 80])
def test_low_rank(rank):
    pruned, _, values, indices, _ = weight(40, 64, (2, 4), BF16)
    x, down, up = torch.randn(19, 64).to(BF16), torch.randn(rank, 64).to(BF16), torch.randn(40, rank).to(BF16)
    with emulation(80):
        plan = Plan(Tile(16, 32, 32))
        y = nm_linear_low_rank(x, values, indices, None, down, up, None, 2, 4, plan=plan)
    branch = x.double() @ down.double().t() @ up.double().t() / rank
    assert ((y.double() - F.linear(x.double(), pruned) - branch).abs().max() / y.abs().max()) < 8e-3


def test_tf32():
    pruned, _, values, indices, _ = weight(40, 80, (2, 4), torch.float32)
    x = torch.randn(19, 80)
    precision = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with emulation(80):
            y = nm_linear(x, values, indices, None, None, 2, 4, plan=Plan(Tile(16, 32, 32)))
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision
    assert float((y - F.linear(x.double(), pruned)).abs().max() / y.abs().max()) < 2e-3


@pytest.mark.parametrize("pattern", [(1, 2), (2, 4), (1, 4), (4, 8)])  # 2:8 compiles to local memory on Triton 3.6
def test_prune(pattern):
    dense, scores = torch.randn(13, pattern[1] * 11).to(BF16), torch.randn(13, pattern[1] * 11).round(decimals=1)
    with emulation(80):
        values, indices = nm_prune(dense, *pattern, scores, tile=Tile(16, 64, 1))
    expected = nm.pack(dense, nm.nm_mask(scores, Pattern(*pattern)), Pattern(*pattern))
    assert torch.equal(values, expected[0])
    assert torch.equal(indices, expected[1])


def test_gather_linear():
    dense, rows = torch.randn(50, 48).to(BF16), torch.randperm(50)[:21]
    x, dy, plan = torch.randn(19, 48).to(BF16), torch.randn(19, 21).to(BF16), Plan(Tile(16, 32, 16))
    with emulation(80):
        close(gather_linear(x, dense, rows, None, None, plan=plan), x.double() @ dense[rows].double().t())
        close(gather_linear_grad_input(dy, dense, rows, None, plan=plan), dy.double() @ dense[rows].double())
        grad = gather_linear_grad_weight(dy, x, rows, None, *dense.shape, plan=plan)
    expected = torch.zeros(50, 48, dtype=torch.double)
    expected[rows] = dy.double().t() @ x.double()
    close(grad, expected)


@pytest.mark.parametrize("capability", [80, 90])
def test_gather_linear_in_blocks(capability):
    dense, chosen = torch.randn(128, 192).to(BF16), torch.cat([torch.arange(64), torch.arange(128, 192)])
    rows, few = torch.arange(64, 128), torch.arange(32, 64)
    plan = Plan(Tile(16, 32, 32))
    x, dy = torch.randn(19, 128).to(BF16), torch.randn(19, 128).to(BF16)
    with emulation(capability):
        close(gather_linear(x, dense, None, chosen, None, 64, plan=plan), x.double() @ dense[:, chosen].double().t())
        close(gather_linear_grad_input(dy, dense, None, chosen, 64, plan=plan), dy.double() @ dense[:, chosen].double())
        head = dy[:, :64].contiguous()
        close(gather_linear_grad_input(head, dense, rows, None, 64, plan=plan), head.double() @ dense[rows].double())
        part = gather_linear(x[:, :32], dense, rows, few, None, 32, plan=plan)  # more rows than the strides say
        close(part, x[:, :32].double() @ dense[rows[:, None], few].double().t())
        grad = gather_linear_grad_weight(dy, x, None, chosen, *dense.shape, 64, plan=plan)
    expected = torch.zeros(128, 192, dtype=torch.double)
    expected[:, chosen] = dy.double().t() @ x.double()
    close(grad, expected)


def test_multiplexing():
    x, keys = torch.randn(6, 5, 40).to(BF16), torch.randn(3, 40).to(BF16)
    both = torch.randn(24, 80).to(BF16)
    with emulation(80):
        close(mux(x, keys, 3, tile=Tile(8, 32, 1)), (x.double().view(2, 3, 5, 40) * keys.double()[:, None]).mean(1))
        y = demux_linear(x, keys, both, None, plan=Plan(Tile(16, 32, 16)))
    pairs = torch.cat([keys[None, :, None].expand(6, 3, 5, 40), x[:, None].expand(6, 3, 5, 40)], -1)
    expected = F.linear(pairs.double(), both.double()).flatten(0, 1)
    assert ((y.double() - expected).abs().max() / expected.abs().max()) < 8e-3  # the keys' part is rounded on its own
