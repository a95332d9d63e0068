"""The transpose of W^{R,C} for sparse tensor cores: in plain torch, and the kernel as compiled, in the emulator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxsparse.codegen.fused_ops import sparse_tensor_core_linear, sparse_transpose, sparse_wgmma_linear
from fxsparse.codegen.kernels.nm_transpose import NMTranspose, nm_transpose
from fxsparse.codegen.metadata import (
    MMA_SP,
    PACK,
    WGMMA_SP,
    columns_are_two_four,
    compressed_transpose,
    metadata_shape,
)
from fxsparse.codegen.spec import Tile
from fxsparse.errors import OptionError
from fxsparse.ops.nm import Pattern, double_prune_mask, nm_mask, pack, pack_column_mask, unpack
from tests.support.emulated import emulation

PATTERN = Pattern(2, 4)
LINEARS = {MMA_SP: sparse_tensor_core_linear, WGMMA_SP: sparse_wgmma_linear}
SIZES = [(48, 64), (16, 32), (144, 80), (64, 144)]


def doubly_pruned(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """W^{R,C}, and values, indices and column mask of W; some kept values are zeros, of either sign."""
    dense = torch.randn(rows, columns).to(dtype)
    dense[torch.rand(rows, columns) < 0.1] = 0.0
    dense[torch.rand(rows, columns) < 0.1] = -0.0
    mask = nm_mask(torch.rand(rows, columns), PATTERN)
    kept = double_prune_mask(torch.rand(rows, columns), mask, PATTERN)
    values, indices = pack(dense, mask, PATTERN)
    return dense * kept, values, indices, pack_column_mask(kept, mask, PATTERN)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_it_holds_the_doubly_pruned_weight(rows: int, columns: int) -> None:
    twice, *weight = doubly_pruned(rows, columns)
    turned, indices = compressed_transpose(*weight)
    assert torch.equal(unpack(turned, indices, PATTERN, rows), twice.t())
    assert turned.numel() == rows * columns // 2


@pytest.mark.parametrize("instruction", LINEARS)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_the_operator_makes_what_a_product_reads(rows: int, columns: int, instruction: str) -> None:
    twice, *weight = doubly_pruned(rows, columns)
    torch.library.opcheck(sparse_transpose, (*weight, instruction))
    turned, metadata = sparse_transpose(*weight, instruction)
    assert tuple(metadata.shape) == metadata_shape(instruction, columns, rows)
    dy = torch.randn(3, rows).bfloat16()
    dx = LINEARS[instruction](dy, turned, metadata, None, "", [])
    torch.testing.assert_close(dx, dy @ twice, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_the_kernel_equals_plain_torch(rows: int, columns: int, capability: int) -> None:
    """Bit for bit, words of padding too; memory that nobody wrote holds other bits."""
    dtype = torch.bfloat16 if rows < 100 else torch.float16
    _, *weight = doubly_pruned(rows, columns, dtype)
    expected, indices = compressed_transpose(*weight)
    for instruction in LINEARS:
        with emulation(capability):
            turned, metadata = nm_transpose(*weight, instruction, tile=Tile(64, 32, 1, warps=4, stages=1))
        assert torch.equal(turned.view(torch.int16), expected.view(torch.int16)), instruction
        assert torch.equal(metadata, PACK[instruction](indices)), instruction


def test_columns_that_keep_more_are_noticed() -> None:
    _, values, indices, column_mask = doubly_pruned(32, 48)
    assert columns_are_two_four(indices, column_mask, 48)
    assert columns_are_two_four(indices[:30], column_mask[:30], 48) is False  # not whole groups
    everything = torch.full_like(column_mask, 255)
    assert columns_are_two_four(indices, everything, 48) is False
    with pytest.raises(OptionError, match="multiple of 16"):
        nm_transpose(values[:8], indices[:8], column_mask[:8], MMA_SP)
    with pytest.raises(OptionError, match="2:4 and 16 bits"):
        NMTranspose("float32", Tile(64, 32, 1), 2, 4)
    with pytest.raises(OptionError, match="instruction"):
        NMTranspose("bfloat16", Tile(64, 32, 1), 2, 4, "dmma")
