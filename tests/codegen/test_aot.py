"""Every shipped configuration compiled for an A100 and an H100, on a machine that needs neither."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

import pytest
from triton.backends.nvidia.compiler import get_ptxas

from fxsparse.codegen import autotune, tiles
from fxsparse.codegen.aot import SHARED_LIMIT, compile_for, resources
from fxsparse.codegen.epilogue import Epilogue
from fxsparse.codegen.kernels.demux_linear import DemuxLinear
from fxsparse.codegen.kernels.gather_linear import GatherLinear
from fxsparse.codegen.kernels.mux import Mux
from fxsparse.codegen.kernels.nm_linear import LARGEST_RANK_INSIDE, NMLinear
from fxsparse.codegen.kernels.nm_linear_grad_input import NMGradInput
from fxsparse.codegen.kernels.nm_linear_grad_values import NMGradValues
from fxsparse.codegen.kernels.nm_prune import NMPrune
from fxsparse.codegen.kernels.nm_transpose import NMTranspose
from fxsparse.codegen.kernels.sparse_tensor_core_linear import SPARSE, SparseTensorCoreLinear
from fxsparse.codegen.kernels.sparse_wgmma_linear import WGMMA, SparseWgmmaLinear
from fxsparse.codegen.loaded import kernel
from fxsparse.codegen.metadata import MMA_SP, PACK
from fxsparse.codegen.spec import NMSpec, Spec, Tile
from fxsparse.codegen.tiles import DECODE, FLOAT32, FLOAT32_DENSE, HOPPER, LARGE, SHIPPED, SMALL

BIAS = Epilogue(True)
GELU = Epilogue(True, ("gelu",))
GATED = Epilogue(False, ("gated_silu",))


def half_precision(pattern: tuple[int, int]) -> Iterator[Spec]:
    """Kernels of one pattern; bfloat16 and float16 differ in no instruction that counts."""
    usual = pattern == (2, 4)
    for even in (True, False) if usual else (True,):
        for tile in SHIPPED["nm_linear"].values():
            yield NMLinear("bfloat16", tile, *pattern, even=even, epilogue=GELU if usual else BIAS)
        for tile in SHIPPED["nm_linear_grad_input"].values():
            yield NMGradInput("bfloat16", tile, *pattern, column_mask=True, even=even)
        for tile in SHIPPED["nm_linear_grad_values"].values():
            yield NMGradValues("bfloat16", tile, *pattern, even=even)
    for tile in SHIPPED["nm_prune"].values():
        yield NMPrune("bfloat16", tile, *pattern)
    if usual:
        for instruction in PACK:
            yield NMTranspose("bfloat16", SHIPPED["nm_transpose"][LARGE], *pattern, instruction)
        tiles_beside = SHIPPED["nm_linear_low_rank"]
        few = tiles_beside[SMALL]
        yield NMLinear("bfloat16", few, *pattern, even=True, low_rank="inside", rank_tile=LARGEST_RANK_INSIDE)
        for tile in tiles_beside.values():
            yield NMLinear("float16", tile, *pattern, even=True, low_rank="after", rank_tile=32)
        for tile in measured("nm_linear_grad_values"):
            yield NMGradValues("bfloat16", tile, *pattern, even=True)
            yield NMGradValues("bfloat16", tile, *pattern, even=False)
        for tile in measured("nm_linear"):
            yield NMLinear("bfloat16", tile, *pattern, even=True, epilogue=GELU)
        for tile in {*SHIPPED["nm_linear"].values(), *measured("nm_linear")}:
            yield NMLinear("bfloat16", tile, *pattern, even=True, epilogue=GATED)
        for tile in measured("nm_linear_low_rank"):
            yield NMLinear("bfloat16", tile, *pattern, even=True, low_rank="inside", rank_tile=LARGEST_RANK_INSIDE)


def measured(kernel: str) -> set[Tile]:
    """Tiles that only tuning runs."""
    tried = {plan.tile for rows in (1, 64) for plan in autotune.candidates(kernel, rows, tall=True)}
    return tried - set(SHIPPED[kernel].values())


def single_precision() -> Iterator[Spec]:
    for tile in FLOAT32.values():
        for pattern in ((1, 2), (2, 4)):
            yield NMLinear("float32", tile, *pattern, even=True, epilogue=BIAS if pattern == (2, 4) else GATED)
            yield NMGradInput("float32", tile, *pattern, column_mask=True, even=True)
    large = FLOAT32[LARGE]
    yield NMLinear("float32", large, 4, 8)
    yield NMLinear("float32", large, 2, 4, even=True, precision="tf32")
    yield NMLinear("float32", large, 2, 4, even=True, low_rank="inside", rank_tile=LARGEST_RANK_INSIDE)
    yield NMGradValues("float32", large, 2, 4, even=True)
    for tile in FLOAT32_DENSE.values():
        yield GatherLinear("float32", tile, "forward", rows=True)
        yield GatherLinear("float32", tile, "forward", columns=True, block=64)
    for product in ("grad_input", "grad_weight"):
        yield GatherLinear("float32", FLOAT32_DENSE[LARGE], product, rows=True)
    yield DemuxLinear("float32", FLOAT32_DENSE[LARGE], members=5, epilogue=GELU)


def others() -> Iterator[Spec]:
    for tile in SHIPPED["gather_linear"].values():
        yield GatherLinear("bfloat16", tile, "forward", rows=True, epilogue=GELU)
        yield GatherLinear("bfloat16", tile, "forward", columns=True)
        yield GatherLinear("bfloat16", tile, "grad_input", rows=True)
        yield GatherLinear("bfloat16", tile, "grad_input", columns=True)
        yield GatherLinear("bfloat16", tile, "forward", columns=True, block=64)
        yield GatherLinear("bfloat16", tile, "grad_input", rows=True, block=64)
    for tile in (*SHIPPED["gather_linear_grad_weight"].values(), *measured("gather_linear_grad_weight")):
        yield GatherLinear("bfloat16", tile, "grad_weight", rows=True)
        yield GatherLinear("bfloat16", tile, "grad_weight", columns=True)
    yield GatherLinear("bfloat16", SHIPPED["gather_linear"][LARGE], "grad_input", columns=True, block=64)
    yield GatherLinear("bfloat16", SHIPPED["gather_linear_grad_weight"][LARGE], "grad_weight", columns=True, block=64)
    for tile in SHIPPED["demux_linear"].values():
        yield DemuxLinear("bfloat16", tile, members=5, epilogue=GELU)
    for tile in SHIPPED["mux"].values():
        yield Mux("bfloat16", tile, members=5)


def sparse_tensor_cores() -> Iterator[Spec]:
    for name, (tile, warp_rows, warp_columns) in SPARSE.items():
        epilogue = BIAS if name == LARGE else Epilogue(True, ("gelu", "mul"))
        for split in (False, True):
            yield SparseTensorCoreLinear("bfloat16", tile, warp_rows, warp_columns, epilogue, split)
    yield SparseTensorCoreLinear("float16", *SPARSE[DECODE])


def wgmma() -> Iterator[Spec]:
    for tile in WGMMA.values():
        yield SparseWgmmaLinear("bfloat16", tile, split=tile.rows <= 64, epilogue=BIAS)
        yield SparseWgmmaLinear("bfloat16", tile, tile.rows <= 64, Epilogue(True, ("gelu", "add")), low_rank=True)
    for rows in (16, 256):
        yield SparseWgmmaLinear("float16", WGMMA[rows], split=True, epilogue=Epilogue(True, ("gelu", "mul", "add")))


GROUPS = {
    **{f"{n}:{m}": (lambda pattern=(n, m): half_precision(pattern)) for n, m in NMSpec.PATTERNS},
    "float32": single_precision,
    "others": others,
    "sparse tensor cores": sparse_tensor_cores,
}


@pytest.mark.parametrize("capability", sorted(SHARED_LIMIT))
@pytest.mark.parametrize("group", GROUPS)
def test_shipped_configurations_fit(group, capability):
    """Prints what each uses (``pytest -s``)."""
    failures = []
    for spec in GROUPS[group]():
        used = resources(compile_for(spec, capability))
        line = (
            f"sm_{capability}  {spec.name:34} {spec.tile!s:48} "
            f"{used.registers:3} registers  {used.shared:6} bytes shared  {used.spills} spills"
        )
        print(line)
        if used.spills or used.shared > SHARED_LIMIT[capability]:
            failures.append(line)
    assert not failures, "\n".join(failures)


def test_hoppers_own_tiles_fit():
    for pattern in NMSpec.PATTERNS:
        for even in (True, False):
            used = resources(compile_for(NMGradValues("bfloat16", HOPPER["nm_linear_grad_values"], *pattern, even), 90))
            assert not used.spills and used.shared <= SHARED_LIMIT[90], (pattern, even)
    assert tiles.default("nm_linear_grad_values", 4096, hopper=True) == HOPPER["nm_linear_grad_values"]
    assert tiles.default("nm_linear", 4096, hopper=True) == SHIPPED["nm_linear"][LARGE]


def test_hoppers_sparse_tensor_cores_fit():
    for spec in wgmma():
        used = resources(compile_for(spec, 90))
        print(spec.tile, spec.epilogue, used)
        assert not used.spills and used.shared <= SHARED_LIMIT[90], spec


@pytest.mark.parametrize(("rows", "split", "low_rank"), [(16, True, False), (256, False, True)])
def test_products_in_flight_are_not_serialised(tmp_path, rows, split, low_rank):
    """The assembler says so where it waits for each product because registers are used in between."""
    ptx = compile_for(SparseWgmmaLinear("bfloat16", WGMMA[rows], split=split, low_rank=low_rank), 90).asm["ptx"]

    def said(text: str) -> str:
        path = tmp_path / "kernel.ptx"
        path.write_text(text)
        tool = get_ptxas(90).path
        command = [tool, "--gpu-name", "sm_90a", "-v", str(path), "-o", str(tmp_path / "kernel.cubin")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr

    assert "erialized" not in said(ptx)
    assert "erialized" in said(ptx.replace("wgmma.wait_group.sync.aligned 0", "wgmma.wait_group.sync.aligned 1"))


@pytest.mark.parametrize("capability", sorted(SHARED_LIMIT))
def test_unaligned_sizes_fit(capability):
    """Sizes that are not multiples of 16 get the smaller tiles."""
    small, decode = (tiles.default("nm_linear", rows, aligned=False) for rows in (5000, 1))
    specs = [
        NMLinear("bfloat16", small, 2, 4, epilogue=GELU),
        NMLinear("bfloat16", decode, 2, 4),
        NMGradInput("bfloat16", tiles.default("nm_linear_grad_input", 5000, aligned=False), 2, 4, column_mask=True),
        NMGradValues("bfloat16", tiles.default("nm_linear_grad_values", 5000, aligned=False), 2, 4),
        NMLinear("float32", tiles.default("nm_linear", 5000, "float32", aligned=False), 2, 4),
        GatherLinear("bfloat16", tiles.default("gather_linear", 5000, aligned=False), "forward", rows=True),
        next(sparse_tensor_cores()),
    ]
    for spec in specs:
        assert not resources(compile_for(spec, capability, aligned=False)).spills, spec


@pytest.mark.parametrize("capability", sorted(SHARED_LIMIT))
@pytest.mark.parametrize("product", ["forward", "grad_input"])
def test_columns_in_blocks_are_copied_16_bytes_at_a_time(product, capability):
    def copied(block: int) -> list[str]:
        spec = GatherLinear("bfloat16", SHIPPED["gather_linear"][LARGE], product, columns=True, block=block)
        return re.findall(r"(?:cp\.async\S+ \[.*\], \[.*\], (0x\w+)|ld\.global\S*\.(b16|u16))", ptx_of(spec))

    def ptx_of(spec: Spec) -> str:
        return compile_for(spec, capability).asm["ptx"]

    assert {size for size, single in copied(64) if size} == {"0x10"} and not any(single for _, single in copied(64))
    assert any(single for _, single in copied(1))


@pytest.mark.parametrize("capability", [86, 89, 100, 120])
def test_sparse_tensor_cores_of_other_devices(capability):
    """``mma.sp`` is all that they have, or all that is known here of what they have; they hold 99 KB and more."""
    for name in (DECODE, SMALL, LARGE):
        spec = SparseTensorCoreLinear("bfloat16", *SPARSE[name], split=name != LARGE)
        used = resources(compile_for(spec, capability))
        assert not used.spills and used.shared <= 99 * 1024


@pytest.mark.parametrize("capability", [86, 89, 100, 120])
def test_training_and_low_rank_on_other_devices(capability):
    """The transpose that ``mma.sp`` takes, branches beside a product, and gathers in blocks, within 99 KB."""
    few, many = (SHIPPED["nm_linear_low_rank"][name] for name in (SMALL, LARGE))
    for spec in (
        NMTranspose("bfloat16", SHIPPED["nm_transpose"][LARGE], 2, 4, MMA_SP),
        NMLinear("bfloat16", few, 2, 4, even=True, low_rank="inside", rank_tile=LARGEST_RANK_INSIDE),
        NMLinear("bfloat16", many, 2, 4, even=True, low_rank="after", rank_tile=32),
        GatherLinear("bfloat16", SHIPPED["gather_linear"][LARGE], columns=True, block=64),
    ):
        used = resources(compile_for(spec, capability))
        assert not used.spills and used.shared <= 99 * 1024, spec


def test_sparse_tensor_cores_run_their_instruction():
    (tile, rows, columns), depth = SPARSE[LARGE], 32
    ptx = compile_for(SparseTensorCoreLinear("bfloat16", tile, rows, columns), 90).asm["ptx"]
    each_step = (rows // 8) * (columns // 16) * (tile.depth // depth)
    assert ptx.count("mma.sp::ordered_metadata") == each_step
    assert ptx.count("wait_group") == ptx.count("cp.async.wait_group") >= 1


def test_spills_are_noticed():
    crowded = NMLinear("float32", Tile(64, 64, 32, warps=4, stages=2), 2, 4, even=True)
    assert resources(compile_for(crowded, 80)).spills > 0


def test_defaults_are_shipped():
    for name, shipped in SHIPPED.items():
        for rows in (1, 16, 17, 64, 65, 5000):
            assert tiles.default(name, rows) in shipped.values()
            single = tiles.default(name, rows, "float32")
            assert single in (*FLOAT32.values(), *FLOAT32_DENSE.values(), *shipped.values())


def test_kernel_of_equal_specs_is_one():
    tile = SHIPPED["mux"][LARGE]
    assert kernel(Mux("bfloat16", tile, 3)) is kernel(Mux("bfloat16", tile, 3))
    assert kernel(Mux("bfloat16", tile, 3)).file != kernel(Mux("bfloat16", tile, 4)).file
