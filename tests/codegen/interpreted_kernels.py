"""Kernels in Triton's interpreter against plain torch; ``test_interpreter.py`` runs this in another process."""

from __future__ import annotations

import math
import os
import random

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fxsparse.codegen.fused_ops import apply_steps
from fxsparse.codegen.kernels.demux_linear import demux_linear
from fxsparse.codegen.kernels.gather_linear import (
    GatherLinear,
    gather_linear,
    gather_linear_grad_input,
    gather_linear_grad_weight,
)
from fxsparse.codegen.kernels.mux import mux
from fxsparse.codegen.kernels.nm_linear import nm_linear, nm_linear_low_rank
from fxsparse.codegen.kernels.nm_linear_grad_input import nm_linear_grad_input
from fxsparse.codegen.kernels.nm_linear_grad_values import nm_linear_grad_values
from fxsparse.codegen.kernels.nm_prune import nm_prune
from fxsparse.codegen.kernels.nm_transpose import nm_transpose
from fxsparse.codegen.loaded import kernels, recording
from fxsparse.codegen.metadata import PACK, compressed_transpose
from fxsparse.codegen.spec import NMSpec, Tile
from fxsparse.codegen.tiles import Plan
from fxsparse.ops import nm
from fxsparse.ops.nm import Pattern

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SEED = int(os.environ.get("FXSPARSE_TEST_SEED", "0"))

# The interpreter rounds bfloat16 results towards zero.
TOLERANCE = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3, torch.float32: 2e-5}


def close(result: Tensor, expected: Tensor) -> None:
    assert result.is_contiguous()
    assert result.shape == expected.shape
    scale = float(expected.abs().max()) or 1.0
    error = float((result.double() - expected).abs().max()) / scale
    assert error < TOLERANCE[result.dtype], error


@pytest.fixture(autouse=True)
def draw(request) -> random.Random:
    """Numbers and tensors fresh for this run and test."""
    generator = random.Random(f"{SEED} {request.node.name}")
    torch.manual_seed(generator.randrange(1 << 30))
    return generator


class Weight:
    """A weight with masks of random scores, compressed."""

    def __init__(self, rows: int, columns: int, pattern: Pattern, dtype: torch.dtype):
        self.pattern, self.dtype = pattern, dtype
        dense = torch.randn(rows, columns).to(dtype)
        mask = nm.nm_mask(torch.rand(rows, columns), pattern)
        columns_kept = torch.rand(rows, columns) < 0.7
        self.values, self.indices = nm.pack(dense, mask, pattern)
        self.column_mask = nm.pack_column_mask(columns_kept, mask, pattern)
        self.pruned = (dense * mask).double()
        self.twice_pruned = self.pruned * columns_kept
        self.n, self.m = pattern.n, pattern.m


def sizes(draw: random.Random, m: int) -> tuple[int, int, int]:
    return draw.randint(1, 40), draw.randint(1, 70), m * draw.randint(1, 160 // m)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", NMSpec.PATTERNS, ids=lambda pattern: f"{pattern[0]}:{pattern[1]}")
class TestNM:
    def test_forward(self, draw, pattern, dtype):
        rows, columns, depth = sizes(draw, pattern[1])
        weight, x = Weight(columns, depth, Pattern(*pattern), dtype), torch.randn(rows, depth).to(dtype)
        bias = draw.choice([None, torch.randn(columns).to(dtype)])
        tile = Tile(16, 32, draw.choice([32, 64]))
        plan = Plan(tile, square=draw.random() < 0.5)
        y = nm_linear(x, weight.values, weight.indices, None, bias, *pattern, plan=plan)
        expected = F.linear(x.double(), weight.pruned, None if bias is None else bias.double())
        close(y, expected)

    def test_forward_without_masks(self, draw, pattern, dtype):
        weight, x = Weight(24, 128, Pattern(*pattern), dtype), torch.randn(2, 9, 128).to(dtype)
        plan = Plan(Tile(16, 16, 64, group=1))
        y = nm_linear(x, weight.values, weight.indices, None, None, *pattern, plan=plan)
        close(y, F.linear(x.double(), weight.pruned))

    @pytest.mark.parametrize("rank", [3, 64, 75])
    def test_low_rank(self, draw, pattern, dtype, rank):
        if dtype != torch.float32 and pattern != (2, 4):
            pytest.skip("the branch does not depend on the pattern")
        rows, columns, depth = sizes(draw, pattern[1])
        weight, x = Weight(columns, depth, Pattern(*pattern), dtype), torch.randn(rows, depth).to(dtype)
        down, up = torch.randn(rank, depth).to(dtype), torch.randn(columns, rank).to(dtype)
        bias, scale = torch.randn(columns).to(dtype), draw.choice([None, 0.5])
        plan = Plan(Tile(16, 32, 32), square=draw.random() < 0.5)
        with recording() as launches:
            y = nm_linear_low_rank(x, weight.values, weight.indices, None, down, up, bias, *pattern, scale, plan=plan)
        branch = x.double() @ down.double().t() @ up.double().t() * (1 / rank if scale is None else scale)
        close(y, F.linear(x.double(), weight.pruned, bias.double()) + branch)
        assert sum(launches.values()) == (-(-columns // depth) if plan.square and columns > depth else 1)

    def test_grad_input(self, draw, pattern, dtype):
        rows, columns, depth = sizes(draw, pattern[1])
        weight, dy = Weight(columns, depth, Pattern(*pattern), dtype), torch.randn(rows, columns).to(dtype)
        plan = Plan(Tile(16, 64, draw.choice([32, 64])))
        args = (dy, weight.values, weight.indices)
        close(
            nm_linear_grad_input(*args, weight.column_mask, *pattern, plan=plan),
            dy.double() @ weight.twice_pruned,
        )
        close(nm_linear_grad_input(*args, None, *pattern, plan=plan), dy.double() @ weight.pruned)

    def test_grad_input_without_masks(self, draw, pattern, dtype):
        weight, dy = Weight(32, 64, Pattern(*pattern), dtype), torch.randn(7, 32).to(dtype)
        plan = Plan(Tile(16, 32, 32))
        dx = nm_linear_grad_input(dy, weight.values, weight.indices, weight.column_mask, *pattern, plan=plan)
        close(dx, dy.double() @ weight.twice_pruned)

    @pytest.mark.parametrize("tails", [True, False])
    def test_grad_values(self, draw, pattern, dtype, tails):
        rows, columns, depth = sizes(draw, pattern[1]) if tails else (32, 32, 64)
        weight = Weight(columns, depth, Pattern(*pattern), dtype)
        dy, x = torch.randn(rows, columns).to(dtype), torch.randn(rows, depth).to(dtype)
        plan = Plan(Tile(16, 32, 16))
        grad = nm_linear_grad_values(dy, x, weight.indices, *pattern, plan=plan)
        dense = dy.double().t() @ x.double()
        close(grad, nm.gather_kept(dense, weight.indices, Pattern(*pattern)))

    def test_prune(self, draw, pattern, dtype):
        rows, columns = draw.randint(1, 40), pattern[1] * draw.randint(1, 40)
        weight = torch.randn(rows, columns).round(decimals=1).to(dtype)  # with ties
        scores = draw.choice([None, torch.randn(rows, columns).round(), torch.randn(rows, columns).to(dtype)])
        if scores is not None:
            scores[0, 0] = float("nan")
        mask = nm.nm_mask(weight.abs() if scores is None else scores, Pattern(*pattern))
        values, indices = nm_prune(weight, *pattern, scores, tile=Tile(8, 64, 1))
        expected_values, expected_indices = nm.pack(weight, mask, Pattern(*pattern))
        assert torch.equal(values, expected_values)
        assert torch.equal(indices, expected_indices)


@pytest.mark.parametrize("instruction", PACK)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_transpose(draw, dtype, instruction):
    rows, columns = 16 * draw.randint(1, 12), 16 * draw.randint(1, 12)
    dense, mask = torch.randn(rows, columns).to(dtype), nm.nm_mask(torch.rand(rows, columns), Pattern(2, 4))
    kept = nm.double_prune_mask(torch.rand(rows, columns), mask, Pattern(2, 4))
    args = *nm.pack(dense, mask, Pattern(2, 4)), nm.pack_column_mask(kept, mask, Pattern(2, 4))
    turned, metadata = nm_transpose(*args, instruction)
    expected, indices = compressed_transpose(*args)
    assert torch.equal(turned, expected)
    assert torch.equal(metadata, PACK[instruction](indices))


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("steps", ["gated_silu", "gated_gelu_tanh", "gated_relu mul add"])
def test_gated_epilogues(draw, steps, low_rank):
    """A weight whose rows alternate between two linears, one of which gates the other."""
    rows, columns = draw.randint(1, 40), 2 * draw.randint(1, 40)
    weight = Weight(columns, 48, Pattern(2, 4), torch.float32)
    x, bias = 3 * torch.randn(rows, 48), torch.randn(columns)
    down, up = torch.randn(5, 48), torch.randn(columns, 5)
    operands = [torch.randn(rows, columns // 2) for step in steps.split() if step in ("mul", "add")]
    how = {
        "steps": steps.split(),
        "operands": operands,
        "plan": Plan(Tile(16, 16, 32), True),
    }
    args = (x, weight.values, weight.indices, None)
    y = nm_linear_low_rank(*args, down, up, bias, 2, 4, 0.5, **how) if low_rank else nm_linear(*args, bias, 2, 4, **how)
    product = F.linear(x.double(), weight.pruned, bias.double())
    product += 0.5 * (x.double() @ down.double().t() @ up.double().t()) if low_rank else 0
    assert y.shape == (rows, columns // 2)
    close(y, apply_steps(product, steps, [operand.double() for operand in operands]))


@pytest.mark.parametrize("steps", ["gelu", "gelu_tanh", "relu", "silu", "tanh", "mul", "silu mul add", "add relu"])
def test_epilogues(draw, steps):
    weight = Weight(37, 48, Pattern(2, 4), torch.float32)
    x, bias = 3 * torch.randn(19, 48), torch.randn(37)
    operands = [torch.randn(19, 37) for step in steps.split() if step in ("mul", "add")]
    y = nm_linear(
        x,
        *(weight.values, weight.indices, None, bias, 2, 4),
        steps=steps.split(),
        operands=operands,
        plan=Plan(Tile(16, 16, 32)),
    )
    expected = F.linear(x.double(), weight.pruned, bias.double())
    close(y, apply_steps(expected, steps, [operand.double() for operand in operands]))


def test_strided_inputs_and_empty_ones(draw):
    weight = Weight(20, 32, Pattern(2, 4), torch.float32)
    plan = Plan(Tile(16, 16, 32))

    def forward(x: Tensor) -> Tensor:
        return nm_linear(x, weight.values, weight.indices, None, None, 2, 4, plan=plan)

    for x in (torch.randn(32, 5).t(), torch.randn(9, 40)[:, 3:35], torch.randn(1, 32).expand(4, 32)):
        close(forward(x), x.double() @ weight.pruned.t())
    assert forward(torch.randn(3, 0, 32)).shape == (3, 0, 20)
    grad = nm_linear_grad_values(torch.randn(0, 20), torch.randn(0, 32), weight.indices, 2, 4, plan=plan)
    assert grad.shape == (20, 16)
    assert not grad.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by", ["rows", "columns", "both", "none"])
def test_gather_linear(draw, by, dtype):
    out_features, in_features, tokens = draw.randint(8, 70), draw.randint(8, 70), draw.randint(1, 40)
    weight, bias = torch.randn(out_features, in_features).to(dtype), torch.randn(out_features).to(dtype)
    rows = torch.randperm(out_features)[: draw.randint(1, out_features)] if by in ("rows", "both") else None
    columns = torch.randperm(in_features)[: draw.randint(1, in_features)] if by in ("columns", "both") else None
    part = weight if rows is None else weight[rows]
    part = (part if columns is None else part[:, columns]).double()
    x, dy = torch.randn(tokens, part.shape[1]).to(dtype), torch.randn(tokens, part.shape[0]).to(dtype)
    plan = Plan(Tile(16, 32, 16))
    y = gather_linear(x, weight, rows, columns, bias, steps=["relu"], plan=plan)
    chosen = bias if rows is None else bias[rows]
    close(y, F.relu(F.linear(x.double(), part, chosen.double())))
    close(gather_linear_grad_input(dy, weight, rows, columns, plan=plan), dy.double() @ part)
    grad = gather_linear_grad_weight(dy, x, rows, columns, *weight.shape, plan=plan)
    expected = torch.zeros(weight.shape, dtype=torch.double)
    at = (
        torch.arange(out_features)[:, None] if rows is None else rows[:, None],
        torch.arange(in_features) if columns is None else columns,
    )
    expected[at] = dy.double().t() @ x.double()
    close(grad, expected)


def runs(draw: random.Random, size: int, block: int) -> Tensor:
    """Some of the blocks of consecutive numbers below ``size``, ascending."""
    blocks = torch.randperm(size // block)[: draw.randint(1, size // block)].sort().values
    return (blocks[:, None] * block + torch.arange(block)).flatten()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("block", "depth"), [(16, 16), (64, 16), (48, 32), (192, 32), (8, 16)], ids=str)
def test_gather_linear_in_blocks(draw, block, depth, dtype):
    """Runs that hold a step, several or a part of one; 48 and 192 are known to the kernels as 16 and 64."""
    plan = Plan(Tile(16, 32, depth))
    out_features, in_features = (block * draw.randint(2, 4) for _ in range(2))
    tokens, others = draw.randint(1, 40), draw.randint(8, 70)
    for rows, columns in (
        (runs(draw, out_features, block), None),
        (None, runs(draw, in_features, block)),
        (runs(draw, out_features, block), runs(draw, in_features, block)),
    ):
        shape = others if rows is None else out_features, others if columns is None else in_features
        weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
        by_row = torch.arange(shape[0]) if rows is None else rows
        by_column = torch.arange(shape[1]) if columns is None else columns
        part = weight[by_row[:, None], by_column].double()
        x, dy = torch.randn(tokens, part.shape[1]).to(dtype), torch.randn(tokens, part.shape[0]).to(dtype)
        y = gather_linear(x, weight, rows, columns, bias, block, steps=["relu"], plan=plan)
        close(y, F.relu(F.linear(x.double(), part, bias[by_row].double())))
        close(gather_linear_grad_input(dy, weight, rows, columns, block, plan=plan), dy.double() @ part)
        grad = gather_linear_grad_weight(dy, x, rows, columns, *weight.shape, block, plan=plan)
        expected = torch.zeros(weight.shape, dtype=torch.double)
        expected[by_row[:, None], by_column] = dy.double().t() @ x.double()
        close(grad, expected)
    known = [kernel.spec for kernel in kernels() if isinstance(kernel.spec, GatherLinear) and kernel.spec.block > 1]
    assert math.gcd(block, 64) in {spec.block for spec in known}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("members", [1, 2, 5])
def test_mux(draw, members, dtype):
    groups, length, dim = draw.randint(1, 3), draw.randint(1, 20), draw.randint(1, 70)
    x, keys = torch.randn(groups * members, length, dim).to(dtype), torch.randn(members, dim).to(dtype)
    mixed = mux(x, keys, members, tile=Tile(8, 32, 1))
    grouped = x.double().view(groups, members, length, dim)
    close(mixed, (grouped * keys.double()[:, None]).mean(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("own_keys", [False, True])
def test_demux_linear(draw, own_keys, dtype):
    groups, members, length = draw.randint(1, 3), draw.randint(1, 4), draw.randint(1, 12)
    key_dim, dim, out_features = draw.randint(1, 20), draw.randint(1, 40), draw.randint(1, 40)
    h = torch.randn(groups, length, dim).to(dtype)
    keys = torch.randn(*([groups] if own_keys else []), members, key_dim).to(dtype)
    weight, bias = torch.randn(out_features, key_dim + dim).to(dtype), torch.randn(out_features).to(dtype)
    y = demux_linear(h, keys, weight, bias, steps=["gelu"], plan=Plan(Tile(16, 16, 16)))
    every = keys.double().expand(groups, members, key_dim)[:, :, None].expand(-1, -1, length, -1)
    hidden = h.double()[:, None].expand(-1, members, -1, -1)
    expected = F.gelu(F.linear(torch.cat([every, hidden], -1), weight.double(), bias.double()))
    close(y, expected.flatten(0, 1))


def test_launches_are_counted_and_sources_listed(draw):
    weight = Weight(16, 32, Pattern(2, 4), torch.float32)
    plan, x = Plan(Tile(16, 16, 32, group=3)), torch.randn(4, 32)
    for _ in range(3):
        nm_linear(x, weight.values, weight.indices, None, None, 2, 4, plan=plan)
    found = next(kernel for kernel in kernels() if kernel.spec.tile == plan.tile)
    assert found.launches == 3
    assert "y = x W^T, W 2:4, float32" in found.file.read_text()
