"""Kernels for sparse tensor cores: their metadata, and their PTX executed by an emulator against a dense product."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fxsparse.codegen.aot import compile_for
from fxsparse.codegen.epilogue import Epilogue
from fxsparse.codegen.kernels import sparse_tensor_core_linear as file
from fxsparse.codegen.kernels.sparse_tensor_core_linear import (
    SparseTensorCoreLinear,
    parts_of,
    sparse_tensor_core_linear,
)
from fxsparse.codegen.metadata import compressed_transpose, pack_metadata, unpack_metadata
from fxsparse.codegen.spec import Tile
from fxsparse.codegen.split import workspace
from fxsparse.errors import OptionError
from fxsparse.ops.nm import Pattern, double_prune_mask, nm_mask, pack, pack_column_mask, unpack
from tests.support import ptx_emulator
from tests.support.emulated import emulation
from tests.support.ptx_emulator import Memory, Program
from tests.support.ptx_races import RaceError

PATTERN = Pattern(2, 4)


def weight_24(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """A pruned weight, its values and its indices."""
    weight = torch.randn(rows, columns).to(dtype)
    mask = nm_mask(torch.rand(rows, columns), PATTERN)
    return weight * mask, *pack(weight, mask, PATTERN)


# --- metadata ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 32), (96, 64), (40, 48), (7, 16)])
def test_metadata_round_trip(shape):
    _, _, indices = weight_24(*shape)
    metadata = pack_metadata(indices)
    assert metadata.shape == (-(-shape[0] // 32), 4 * -(-shape[1] // 128), 32)
    assert torch.equal(unpack_metadata(metadata, *shape), indices)


def test_metadata_words_follow_the_definition():
    _, _, indices = weight_24(64, 64)
    metadata = pack_metadata(indices)
    nibbles = torch.stack([indices & 15, indices >> 4], -1).flatten(1).long()
    for tile, step, lane in [(0, 0, 0), (1, 0, 31), (0, 1, 18), (1, 1, 5)]:
        g, s, h = lane // 4, lane // 2 % 2, lane % 2
        word = 0
        for high in (0, 1):
            row, first = 32 * tile + 16 * s + g + 8 * high, 8 * step + 4 * h
            for i in range(4):
                word |= int(nibbles[row, first + i]) << (16 * high + 4 * i)
        assert int(metadata[tile, step, lane]) & 0xFFFFFFFF == word


def test_padding_of_metadata_is_in_order():
    _, _, indices = weight_24(20, 16)
    nibbles = unpack_metadata(pack_metadata(indices), 32, 128)
    for nibble in (nibbles & 15, nibbles >> 4):
        assert ((nibble & 3) < (nibble >> 2)).all()


# --- the kernels, emulated --------------------------------------------------------------------------------------------


def emulate(
    spec: SparseTensorCoreLinear,
    capability: int,
    size: tuple[int, int, int],
    order: int = 1,
    bias: Tensor | None = None,
    operands: tuple[Tensor, ...] = (),
    operands_for: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs every block of a product; returns the result, x and the dense weight."""
    rows, columns, depth = size
    dtype = getattr(torch, spec.dtype)
    x = torch.randn(rows, depth).to(dtype)
    dense, values, indices = operands_for or weight_24(columns, depth, dtype)
    memory = Memory(1 << 22)
    memory.bytes[:] = 0xFF  # reading what was never written gives NaN
    inputs = [memory.put(_bits(tensor)) for tensor in (x, values)]
    inputs.append(memory.put(pack_metadata(indices).numpy()))
    result = memory.put(np.full((rows, columns), 0xFFFF, np.uint16))
    extra = [memory.put(_bits(tensor)) for tensor in ([] if bias is None else [bias])]
    extra += [memory.put(_bits(tensor)) for tensor in operands] + [columns] * len(operands)
    program = Program(compile_for(spec, capability, aligned=all(n % 16 == 0 for n in size)).asm["ptx"])
    blocks = -(-rows // spec.tile.rows) * -(-columns // spec.tile.columns)
    for block in range(blocks):
        params = [*inputs, result, *extra, rows, columns, depth, columns]
        program.run(memory, params, (block, 0, 0), spec.tile.warps, order)
    y = torch.from_numpy(memory.get(result, np.int16, (rows, columns))).view(dtype)
    return y, x, dense


def _bits(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.int16).numpy()


def close(y: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(y.float(), expected, rtol=8e-3, atol=8e-3 * float(expected.abs().max()))


LARGE = SparseTensorCoreLinear("bfloat16", Tile(128, 128, 64, 4, 3), 64, 64)
WIDE = SparseTensorCoreLinear("bfloat16", Tile(128, 128, 64, 8, 3), 64, 32)
SMALL = SparseTensorCoreLinear("bfloat16", Tile(64, 64, 64, 4, 4), 32, 32)
DECODE = SparseTensorCoreLinear("float16", Tile(16, 128, 128, 4, 3), 16, 32)
HALF = SparseTensorCoreLinear("bfloat16", Tile(16, 128, 128, 4, 3), 16, 32)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("spec", "size"),
    [
        (LARGE, (128, 128, 192)),
        (WIDE, (128, 128, 128)),
        (SMALL, (64, 128, 64)),
        (SMALL, (75, 70, 208)),
        (DECODE, (16, 128, 384)),
        (DECODE, (3, 150, 80)),
    ],
    ids=["large", "wide", "small", "small-tails", "decode", "decode-tails"],
)
def test_product_equals_dense(spec, size, capability):
    y, x, weight = emulate(spec, capability, size)
    close(y, x.float() @ weight.float().t())


def test_order_of_warps_does_not_matter():
    torch.manual_seed(3)
    first, _, _ = emulate(SMALL, 80, (64, 64, 256))
    torch.manual_seed(3)
    last, _, _ = emulate(SMALL, 80, (64, 64, 256), order=-1)
    assert torch.equal(first, last)


def test_a_missing_barrier_shows():
    source = compile_for(SMALL, 80).asm["ptx"]
    program = Program(source.replace("bar.sync", "// bar.sync"))
    x, (_, values, indices) = torch.randn(64, 128).bfloat16(), weight_24(64, 128)
    memory = Memory(1 << 20)
    inputs = [memory.put(_bits(tensor)) for tensor in (x, values)]
    inputs.append(memory.put(pack_metadata(indices).numpy()))
    result = memory.put(np.zeros((64, 64), np.uint16))
    with pytest.raises(RaceError, match="nobody wrote"):
        program.run(memory, [*inputs, result, 64, 64, 128, 64], (0, 0, 0), 4)


def test_epilogue_after_sparse_product():
    spec = SparseTensorCoreLinear(
        "bfloat16", Tile(64, 64, 64, 4, 4), 32, 32, Epilogue(True, ("silu", "mul", "add", "relu"))
    )
    rows, columns = 50, 40
    bias, gate, residual = torch.randn(columns), torch.randn(rows, columns), torch.randn(rows, columns)
    bias, gate, residual = bias.bfloat16(), gate.bfloat16(), residual.bfloat16()
    y, x, weight = emulate(spec, 90, (rows, columns, 80), bias=bias, operands=(gate, residual))
    expected = F.relu(F.silu(F.linear(x.float(), weight.float(), bias.float())) * gate.float() + residual.float())
    close(y, expected)


@pytest.mark.parametrize(("shape", "capability"), [(DECODE, 80), (SMALL, 90)], ids=["decode", "small"])
def test_depth_in_parts(shape, capability):
    """The parts are added in their order, whichever arrives last."""
    rows, columns, depth, results = 13, 70, 16 * 33, []
    weight, values, indices = weight_24(columns, depth, torch.float16)
    x, bias = torch.randn(rows, depth).half(), torch.randn(columns).half()
    gate = torch.randn(rows, columns).half()
    for blocks in (None, lambda count: [*range(1, count), 0]):
        with emulation(capability, blocks=blocks):
            how = {"steps": ("silu", "mul"), "operands": [gate], "spec": shape, "parts": 2}
            results.append(sparse_tensor_core_linear(x, values, pack_metadata(indices), bias, **how))
    close(results[0], F.silu(F.linear(x.float(), weight.float(), bias.float())) * gate.float())
    assert torch.equal(*results)


def test_rows_that_do_not_exist_are_neither_read_nor_kept(monkeypatch):
    """Of a tile of 16 rows; in parts, sums are left in memory and read for the rows of x alone."""
    columns, depth, moved, sums = 128, 1024, [], []
    _, values, indices = weight_24(columns, depth)
    metadata = pack_metadata(indices)
    read = ptx_emulator.Warp._read

    def counted(self, place, address, size, active):
        moved[-1] += size * int(active.sum()) if place == "global" else 0
        return read(self, place, address, size, active)

    def seen(*sizes):
        both = workspace(*sizes)
        sums.append(both[0].fill_(torch.nan))
        return both

    monkeypatch.setattr(ptx_emulator.Warp, "_read", counted)
    monkeypatch.setattr(file, "workspace", seen)
    for rows in (16, 1):
        moved.append(0)
        with emulation(80):
            sparse_tensor_core_linear(torch.randn(rows, depth).bfloat16(), values, metadata, None, spec=HALF, parts=2)
    assert moved[0] - moved[1] == 15 * depth * 2 + 15 * 2 * columns * 4  # of x, and of the sums of both parts
    assert moved[1] == depth * (2 + columns * 9 // 8) + 2 * columns * 4  # no step of a part is read by another
    kept = sums[-1].view(2, 16, columns)
    assert not kept[:, :1].isnan().any() and kept[:, 1:].isnan().all()


def test_a_depth_is_split_where_tiles_are_few():
    for columns, depth in [(5120, 5120), (5120, 20480), (4096, 4096), (1024, 4096), (4096, 14336)]:
        tiles, steps = columns // 128, depth // 128
        parts = parts_of(tiles, steps, 108)
        assert 0.55 * 108 <= tiles * parts <= 2 * 108 and steps // parts >= 4, (columns, depth, parts)
    assert parts_of(4096 // 128 * 8, 64, 108) == parts_of(20480 // 128, 3, 108) == 1


def test_input_gradient_from_the_sparse_transpose():
    rows, columns = 64, 96  # of W
    weight, values, indices = weight_24(rows, columns)
    mask = unpack(torch.ones_like(values), indices, PATTERN, columns).bool()
    kept = double_prune_mask(weight, mask, PATTERN)
    turned, packed = compressed_transpose(values, indices, pack_column_mask(kept, mask, PATTERN))
    given = ((weight * kept).t(), turned, packed)
    dx, dy, dense = emulate(SMALL, 80, (33, columns, rows), operands_for=given)
    close(dx, dy.float() @ dense.float().t())


def test_shapes_without_a_kernel_are_refused():
    with pytest.raises(OptionError, match="float32"):
        SparseTensorCoreLinear("float32", Tile(64, 64, 64), 32, 32)
    with pytest.raises(OptionError, match="warps"):
        SparseTensorCoreLinear("bfloat16", Tile(64, 64, 64, warps=8), 32, 32)
