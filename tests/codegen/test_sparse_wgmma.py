"""The kernel for Hopper's sparse tensor cores: its PTX executed by the emulator, and what the emulator notices."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import pytest
import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton.backends.compiler import GPUTarget

from fxsparse.codegen.aot import compile_for
from fxsparse.codegen.epilogue import Epilogue
from fxsparse.codegen.kernels.sparse_wgmma_linear import (
    WGMMA,
    SparseWgmmaLinear,
    Split,
    sparse_wgmma_linear,
    split,
)
from fxsparse.codegen.loaded import Kernel
from fxsparse.codegen.metadata import pack_wgmma_metadata, unpack_wgmma_metadata
from fxsparse.codegen.spec import Tile
from fxsparse.codegen.wgmma_sp import copied_to
from fxsparse.errors import OptionError
from tests.codegen.test_sparse_tensor_cores import weight_24
from tests.support.emulated import emulation
from tests.support.ptx_block import DeadlockError
from tests.support.ptx_races import RaceError

BF16, FP16 = torch.bfloat16, torch.float16
H100 = 132


def way(size: tuple[int, int, int], rows: int, parts: int = 1) -> Split:
    """Tiles of a number of rows, their depth in parts."""
    return Split(rows, parts, -(-size[0] // rows) * -(-size[1] // 128) * parts)


def product(size: tuple[int, int, int], dtype: torch.dtype = BF16, **how: object) -> tuple[Tensor, Tensor, Tensor]:
    """A random product on the kernel, x and the dense weight."""
    rows, columns, depth = size
    weight, values, indices = weight_24(columns, depth, dtype)
    x = torch.randn(rows, depth).to(dtype)
    return sparse_wgmma_linear(x, values, pack_wgmma_metadata(indices), None, **how), x, weight  # type: ignore[arg-type]


def close(y: Tensor, expected: Tensor) -> None:
    error = (y.double() - expected).abs().max() / expected.abs().max()
    assert float(error) < {BF16: 4e-3, FP16: 6e-4}[y.dtype]


# --- metadata and shared memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(128, 64), (200, 96), (7, 16)])
def test_metadata_round_trip(shape):
    _, _, indices = weight_24(*shape)
    metadata = pack_wgmma_metadata(indices)
    assert metadata.shape == (-(-shape[1] // 64), 2 * -(-shape[0] // 128), 128)
    assert torch.equal(unpack_wgmma_metadata(metadata, *shape), indices)
    whole = unpack_wgmma_metadata(metadata, metadata.shape[1] * 64, metadata.shape[0] * 64)
    for nibble in (whole & 15, whole >> 4):
        assert ((nibble & 3) < (nibble >> 2)).all()  # the padding too


def test_metadata_words_follow_the_definition():
    """Of an instruction on 64 rows and 32 columns, 16 columns of a row are half of a thread's word: the first bit of a
    lane picks which 16 columns, the second which of two instructions, the rest and the warp the row."""
    _, _, indices = weight_24(128, 128)
    metadata = pack_wgmma_metadata(indices)
    nibbles = torch.stack([indices & 15, indices >> 4], -1).flatten(1).long()
    for step, half, thread in [(0, 0, 0), (1, 0, 31), (0, 1, 50), (1, 1, 127)]:
        warp, lane = divmod(thread, 32)
        word = 0
        for high in (0, 1):
            row = 64 * half + 16 * warp + lane // 4 + 8 * high
            column = 64 * step + 32 * (lane // 2 % 2) + 16 * (lane % 2)
            for i in range(4):
                word |= int(nibbles[row, column // 4 + i]) << (16 * high + 4 * i)
        assert int(metadata[step, half, thread]) & 0xFFFFFFFF == word


@pytest.mark.parametrize("rows", WGMMA)
def test_products_read_where_copies_write(rows):
    spec = SparseWgmmaLinear("bfloat16", WGMMA[rows], split=rows <= 16)
    ptx = compile_for(spec, 90).asm["ptx"]
    assert tuple(copied_to(ptx)[:2]) == spec.ring.offsets()
    assert f"m64n{rows}k32.f32.bf16.bf16" in ptx
    # the assembly adds what it relies on to the symbol; elsewhere, the check before the first launch refuses
    w, x = spec.ring.offsets()
    assert ptx.count(f"add.u32 w, w, {w};") == ptx.count(f"add.u32 x, x, {x};") == 2
    moved = SparseWgmmaLinear("bfloat16", Tile(rows, 128, 64, stages=WGMMA[rows].stages - 1), split=rows <= 16)
    with pytest.raises(RuntimeError, match="puts W and x at"):
        moved.check(ptx)


# --- the product, emulated --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "rows", "parts", "blocks", "dtype"),
    [
        ((5, 256, 448), 8, 1, 1, BF16),
        ((16, 128, 704), 16, 1, 1, FP16),
        ((30, 200, 144), 32, 1, 2, BF16),
        ((70, 136, 80), 64, 1, 3, BF16),
        ((100, 128, 448), 128, 1, 1, FP16),
        ((33, 120, 336), 256, 1, 1, BF16),
        ((3, 130, 528), 8, 3, 4, FP16),
        ((20, 128, 640), 16, 2, 3, BF16),
        ((40, 128, 320), 128, 2, 2, BF16),
    ],
    ids=str,
)
def test_product_equals_dense(size, rows, parts, blocks, dtype):
    """Ragged sizes, rings that wrap, several tiles for a program, depths in parts."""
    with emulation(90):
        y, x, weight = product(size, dtype, way=way(size, rows, parts), blocks=blocks)
    close(y, F.linear(x.double(), weight.double()))


def test_random_products_in_random_turns():
    draw = random.Random()
    for _ in range(3):
        size = draw.randint(1, 60), 8 * draw.randint(1, 40), 16 * draw.randint(4, 24)
        rows, parts = draw.choice([8, 16, 32]), draw.randint(1, 2)
        with emulation(90, lambda warps: draw.sample(range(warps), warps)):
            y, x, weight = product(size, way=way(size, rows, parts), blocks=draw.randint(1, 5))
        close(y, F.linear(x.double(), weight.double()))


def test_parts_are_added_in_their_order_whoever_is_last():
    size, results = (8, 128, 512), []
    for blocks in (None, lambda count: reversed(range(count)), lambda count: [1, 2, 0]):
        torch.manual_seed(0)
        with emulation(90, blocks=blocks):
            results.append(product(size, way=way(size, 8, 3), blocks=3)[0])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("parts", [1, 2])
def test_epilogue(parts):
    rows, columns, depth = 20, 136, 256
    weight, values, indices = weight_24(columns, depth)
    x, bias = torch.randn(2, rows // 2, depth).to(BF16), torch.randn(columns).to(BF16)
    gate, residual = (torch.randn(2, rows // 2, columns).to(BF16) for _ in range(2))
    with emulation(90):
        y = sparse_wgmma_linear(
            x,
            values,
            pack_wgmma_metadata(indices),
            bias,
            steps=("silu", "mul", "add", "relu"),
            operands=[gate, residual],
            way=way((rows, columns, depth), 32, parts),
            blocks=2,
        )
    expected = F.silu(F.linear(x.double(), weight.double(), bias.double())) * gate.double() + residual.double()
    close(y, F.relu(expected))


@pytest.mark.parametrize(
    ("size", "rows", "parts", "rank", "dtype"),
    [
        ((20, 136, 144), 32, 1, 40, BF16),
        ((5, 128, 64 * 9), 8, 1, 96, FP16),  # the ring wraps inside the branch
        ((16, 256, 512), 16, 2, 5, BF16),
        ((130, 128, 128), 256, 1, 64, BF16),
    ],
    ids=str,
)
def test_a_low_rank_branch(size, rows, parts, rank, dtype):
    """In steps of the same ring; its last part adds it, and an epilogue sees the sum."""
    tokens, columns, depth = size
    weight, values, indices = weight_24(columns, depth, dtype)
    x, hidden = torch.randn(tokens, depth).to(dtype), torch.randn(tokens, rank).to(dtype)
    up, bias = torch.randn(columns, rank).to(dtype), torch.randn(columns).to(dtype)
    draw = random.Random()
    with emulation(90, lambda warps: draw.sample(range(warps), warps)):
        y = sparse_wgmma_linear(
            x,
            *(values, pack_wgmma_metadata(indices), bias),
            steps=("silu",),
            hidden=hidden,
            up=up,
            way=way(size, rows, parts),
            blocks=3,
        )
    branch = hidden.double() @ up.double().t()
    close(y, F.silu(F.linear(x.double(), weight.double(), bias.double()) + branch))


def test_rows_that_are_not_adjacent():
    weight, values, indices = weight_24(128, 64)
    wide = torch.randn(9, 130).to(BF16)
    with emulation(90):
        for x in (wide[:, 3:67], wide[:, :64], wide[:, :128:2]):
            y = sparse_wgmma_linear(x, values, pack_wgmma_metadata(indices), None)
            close(y, F.linear(x.double(), weight.double()))


class Hopper:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def test_a_launch_compiles_what_is_tested(monkeypatch):
    """Triton reads the same types from the tensors of a launch, its descriptors of them included."""
    seen = []

    def launch(kernel: Kernel, grid: tuple[int, ...], *args: object) -> None:
        compiled = kernel.function.warmup(*args, grid=grid, num_warps=4)
        kernel.spec.check(compiled.asm["ptx"])
        seen.append((dict(compiled.src.signature), kernel.spec.types()))

    monkeypatch.setattr(Kernel, "launch", launch)
    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    product((5, 128, 1024), blocks=8)
    ((found, expected),) = seen
    assert found == expected and "parts" in found


# --- what the emulator notices ----------------------------------------------------------------------------------------


def instead(pattern: str, text: str, which: int | None = None) -> Callable[[str], str]:
    """Writes something else, everywhere or in one place."""

    def mutate(ptx: str) -> str:
        found = list(re.finditer(pattern, ptx))
        assert found, pattern
        for match in reversed(found if which is None else [found[which]]):
            ptx = ptx[: match.start()] + match.expand(text) + ptx[match.end() :]
        return ptx

    return mutate


WAIT = r"mbarrier\.try_wait\S+ complete, (\[%r\d+\]), (%r\d+);"
"""Of the consumers for a full buffer, one after the other; the last one of the producer for an empty one."""
ARRIVE = r"bar\.sync\s+\d+, 128;(?=\s*(?://[^\n]*\n\s*|\.loc[^\n]*\n\s*)*@%p\d+ mbarrier\.arrive\.shared)"
"""The barrier of a consumer's warps before one of them says that a buffer is free."""


@pytest.mark.parametrize(
    ("mutate", "error", "says"),
    [
        (instead(ARRIVE, ""), RaceError, "overwrites shared memory .* which warp .* may still read"),
        (instead(WAIT, "setp.eq.u32 complete, 0, 0;", 0), RaceError, "nobody wrote|reads .* no barrier lies between"),
        (instead(WAIT, "setp.eq.u32 complete, 0, 0;", -1), RaceError, "copies of barrier 0 writes shared memory"),
        (
            instead(WAIT, r"mbarrier.try_wait complete, \1, 1;", -1),
            RaceError,
            "copies of barrier 0 writes shared memory",
        ),
        (instead(r"wgmma\.wait_group[^;]*;", "", 0), RuntimeError, "which a product in flight writes|may still read"),
        (
            instead(r"@%p\d+ mbarrier\.arrive\.shared[^;]*;", "", 0),
            DeadlockError,
            r"warp \d+ at the barrier .* arrivals",
        ),
        (instead(r"(expect_tx[^,]*, \[%r\d+\], )\d+", r"\g<1>99999"), DeadlockError, "bytes missing"),
        (instead(r"(mbarrier\.init[^,]*, )2", r"\g<1>1"), RuntimeError, "overwrites|more arrivals|no warp can go on"),
        (instead(r"(setmaxnreg\.dec\S+\s+)120", r"\g<1>160"), DeadlockError, "setmaxnreg"),
    ],
    ids=["barrier", "full", "empty", "phase", "wait-group", "arrive", "bytes", "count", "registers"],
)
def test_a_broken_kernel_is_noticed(mutate, error, says):
    size = 8, 128, 64 * 12
    with emulation(90, mutate=mutate), pytest.raises(error, match=says):
        product(size, way=way(size, 8), blocks=1)


def test_sums_that_no_barrier_orders_are_noticed():
    def mutate(ptx: str) -> str:
        before, after = ptx[: ptx.index("atom.global")], ptx[ptx.index("atom.global") :]
        parts = re.split(r"bar\.sync\s+\d+, 128;", before)  # the last two: what was asked for, and the atomic's own
        return "bar.sync 0, 128;".join(parts[:-2]) + "".join(parts[-2:]) + after

    size = 8, 128, 512
    with emulation(90, mutate=mutate), pytest.raises(RaceError, match="reads global memory"):
        product(size, way=way(size, 8, 2), blocks=2)


# --- how a product is cut ---------------------------------------------------------------------------------------------

LINEARS = {
    "opt-13b": [(5120, 5120), (20480, 5120), (5120, 20480)],
    "llama-3-8b": [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)],
}


@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_decoding_occupies_the_device(tokens):
    for columns, depth in [shape for shapes in LINEARS.values() for shape in shapes]:
        chosen = split(tokens, columns, depth, H100)
        waves = -(-chosen.units // H100)
        assert chosen.rows >= tokens
        assert chosen.units / (waves * H100) > 0.8, (columns, depth, chosen)
        assert -(-depth // 64) >= 4 * chosen.parts


def test_large_products_are_not_split():
    for columns, depth in LINEARS["opt-13b"]:
        assert split(4096, columns, depth, H100) == Split(256, 1, 16 * columns // 128)


def test_what_has_no_kernel_is_refused():
    with pytest.raises(OptionError, match="float32"):
        SparseWgmmaLinear("float32", WGMMA[8])
    with pytest.raises(OptionError, match="rows x 128 x 64"):
        SparseWgmmaLinear("bfloat16", Tile(64, 64, 64))
    with pytest.raises(OptionError, match="2 stages"):
        SparseWgmmaLinear("bfloat16", Tile(64, 128, 64, stages=1))
    with pytest.raises(OptionError, match="multiple of 16"):
        sparse_wgmma_linear(torch.zeros(1, 24).bfloat16(), torch.zeros(8, 12).bfloat16(), torch.zeros(1), None)
    assert SparseWgmmaLinear("bfloat16", WGMMA[8], epilogue=Epilogue(True)).arguments[4].name == "bias"
