"""Kernels on a GPU: equality, gradients, CUDA graphs, memory errors. Skipped where there is none."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fxsparse.codegen import autotune, store
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
from fxsparse.codegen.kernels.nm_transpose import nm_transpose
from fxsparse.codegen.kernels.sparse_tensor_core_linear import (
    sparse_tensor_core_linear,
)
from fxsparse.codegen.kernels.sparse_wgmma_linear import sparse_wgmma_linear
from fxsparse.codegen.metadata import MMA_SP, PACK, compressed_transpose, pack_metadata, pack_wgmma_metadata
from fxsparse.codegen.spec import NMSpec
from fxsparse.ops import nm
from fxsparse.ops.nm import Pattern
from fxsparse.ops.operator import OPERATORS
from tests.support.tuned import TUNED

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 2e-3, torch.float32: 2e-5}
ROWS = (1, 13, 64, 300)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Memory that was not written holds NaN."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def weight(rows: int, columns: int, pattern: Pattern, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dense and pruned, values, indices, column mask."""
    dense = randn(rows, columns, dtype=dtype)
    mask = nm.nm_mask(torch.rand(rows, columns, device="cuda"), pattern)
    kept = torch.rand(rows, columns, device="cuda") < 0.7
    return dense * mask, *nm.pack(dense, mask, pattern), nm.pack_column_mask(kept, mask, pattern)


def exact(launch: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The reference of the operator that a launch runs behind."""
    return OPERATORS[launch.__name__].reference


def close(result: Tensor, expected: Tensor) -> None:
    error = (result.double() - expected).abs().max() / expected.abs().max()
    assert float(error) < TOLERANCE[result.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", NMSpec.PATTERNS, ids=lambda pattern: f"{pattern[0]}:{pattern[1]}")
def test_nm_products(pattern, dtype):
    for rows in ROWS:
        columns, depth = random.randint(1, 400), pattern[1] * random.randint(1, 60)
        dense, values, indices, column_mask = weight(columns, depth, Pattern(*pattern), dtype)
        x, dy, bias = (
            randn(rows, depth, dtype=dtype),
            randn(rows, columns, dtype=dtype),
            randn(columns, dtype=dtype),
        )
        close(
            nm_linear(x, values, indices, None, bias, *pattern),
            F.linear(x.double(), dense.double(), bias.double()),
        )
        close(
            nm_linear_grad_input(dy, values, indices, column_mask, *pattern),
            exact(nm_linear_grad_input)(dy.double(), values.double(), indices, column_mask, *pattern),
        )
        close(
            nm_linear_grad_values(dy, x, indices, *pattern),
            nm.gather_kept(dy.double().t() @ x.double(), indices, Pattern(*pattern)),
        )
        for rank in (8, 100):
            down, up = randn(rank, depth, dtype=dtype), randn(columns, rank, dtype=dtype)
            branch = x.double() @ down.double().t() @ up.double().t() / rank
            close(
                nm_linear_low_rank(x, values, indices, None, down, up, None, *pattern),
                F.linear(x.double(), dense.double()) + branch,
            )


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("steps", ["", "gelu", "silu mul"])
def test_sparse_tensor_cores(dtype, steps):
    for rows, columns, depth in [(1, 40, 64), (16, 128, 256), (50, 200, 208), (300, 257, 512)]:
        dense, values, indices, _ = weight(columns, depth, Pattern(2, 4), dtype)
        x, bias, gate = (randn(*shape, dtype=dtype) for shape in ((rows, depth), (columns,), (rows, columns)))
        operands = [gate] if "mul" in steps else []
        y = sparse_tensor_core_linear(x, values, pack_metadata(indices), bias, steps=steps.split(), operands=operands)
        expected = F.linear(x.double(), dense.double(), bias.double())
        if steps:
            expected = F.gelu(expected) if steps == "gelu" else F.silu(expected) * gate.double()
        close(y, expected)


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs wgmma")
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("steps", ["", "silu mul"])
def test_hoppers_sparse_tensor_cores(dtype, steps):
    for rows, columns, depth in [(1, 40, 64), (16, 4096, 4096), (50, 200, 208), (100, 1024, 4096), (700, 1288, 512)]:
        dense, values, indices, _ = weight(columns, depth, Pattern(2, 4), dtype)
        x, bias, gate = (randn(*shape, dtype=dtype) for shape in ((rows, depth), (columns,), (rows, columns)))
        metadata, operands = pack_wgmma_metadata(indices), [gate] if "mul" in steps else []
        results = [
            sparse_wgmma_linear(x, values, metadata, bias, steps=steps.split(), operands=operands) for _ in range(5)
        ]
        expected = F.linear(x.double(), dense.double(), bias.double())
        close(results[0], F.silu(expected) * gate.double() if steps else expected)
        assert all(torch.equal(result, results[0]) for result in results)


def test_input_gradient_on_sparse_tensor_cores():
    dense, values, indices, _ = weight(192, 256, Pattern(2, 4), torch.bfloat16)
    mask = nm.unpack_mask(indices, Pattern(2, 4), 256)
    kept = nm.double_prune_mask(dense, mask, Pattern(2, 4))
    args = values, indices, nm.pack_column_mask(kept, mask, Pattern(2, 4))
    expected, packed = compressed_transpose(*args)
    for instruction, pack in PACK.items():
        turned, metadata = nm_transpose(*args, instruction)
        assert torch.equal(turned, expected)
        assert torch.equal(metadata, pack(packed))
    dy = randn(70, 192, dtype=torch.bfloat16)
    dx = sparse_tensor_core_linear(dy, *nm_transpose(*args, MMA_SP), None)
    close(dx, dy.double() @ (dense * kept).double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prune_mux_demux(dtype):
    dense = randn(100, 240, dtype=dtype)
    for n, m in NMSpec.PATTERNS:
        values, indices = nm_prune(dense, n, m)
        expected = nm.pack(dense, nm.nm_mask(dense.abs(), Pattern(n, m)), Pattern(n, m))
        assert torch.equal(values, expected[0])
        assert torch.equal(indices, expected[1])
    h, keys = randn(6, 9, 240, dtype=dtype), randn(3, 240, dtype=dtype)
    close(mux(h, keys, 3), (h.double().view(2, 3, 9, 240) * keys.double()[:, None]).mean(1))
    both, bias = randn(50, 480, dtype=dtype), randn(50, dtype=dtype)
    for own in (keys, randn(6, 3, 240, dtype=dtype)):
        pairs = torch.cat([own.expand(6, 3, 240)[:, :, None].expand(6, 3, 9, 240), h[:, None].expand(6, 3, 9, 240)], -1)
        y = demux_linear(h, own, both, bias)
        expected = F.linear(pairs.double(), both.double(), bias.double()).flatten(0, 1)
        assert float((y - expected).abs().max() / expected.abs().max()) < 2 * TOLERANCE[dtype]  # keys' part is rounded


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by", ["rows", "columns", "both"])
def test_gather_linear(dtype, by):
    dense, bias = randn(100, 240, dtype=dtype), randn(100, dtype=dtype)
    rows = torch.randperm(100, device="cuda")[:33] if by != "columns" else None
    columns = torch.randperm(240, device="cuda")[:70] if by != "rows" else None
    outputs, inputs = (33 if rows is not None else 100), (70 if columns is not None else 240)
    for count in ROWS:
        x, dy = randn(count, inputs, dtype=dtype), randn(count, outputs, dtype=dtype)
        close(
            gather_linear(x, dense, rows, columns, bias),
            exact(gather_linear)(x.double(), dense.double(), rows, columns, bias.double()),
        )
        close(
            gather_linear_grad_input(dy, dense, rows, columns),
            exact(gather_linear_grad_input)(dy.double(), dense.double(), rows, columns),
        )
        close(
            gather_linear_grad_weight(dy, x, rows, columns, 100, 240),
            exact(gather_linear_grad_weight)(dy.double(), x.double(), rows, columns, 100, 240),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [16, 64])
def test_gather_linear_in_blocks(dtype, block):
    dense, chosen = randn(192, 320, dtype=dtype), torch.arange(64, device="cuda")
    chosen = torch.cat([chosen, chosen + 128])
    for rows, columns in ((chosen, None), (None, chosen), (chosen, chosen)):
        outputs, inputs = (192 if rows is None else 128), (320 if columns is None else 128)
        for count in ROWS:
            x, dy = randn(count, inputs, dtype=dtype), randn(count, outputs, dtype=dtype)
            close(
                gather_linear(x, dense, rows, columns, None, block),
                exact(gather_linear)(x.double(), dense.double(), rows, columns, None),
            )
            close(
                gather_linear_grad_input(dy, dense, rows, columns, block),
                exact(gather_linear_grad_input)(dy.double(), dense.double(), rows, columns),
            )
            close(
                gather_linear_grad_weight(dy, x, rows, columns, 192, 320, block),
                exact(gather_linear_grad_weight)(dy.double(), x.double(), rows, columns, 192, 320),
            )


@pytest.mark.parametrize("rows", [1, 64, 200])
def test_gated_epilogue(rows):
    pruned, values, indices, _ = weight(144, 256, Pattern(2, 4), torch.bfloat16)
    x = randn(rows, 256, dtype=torch.bfloat16)
    y = nm_linear(x, values, indices, None, None, 2, 4, steps=["gated_silu"])
    product = F.linear(x.double(), pruned.double())
    close(y, F.silu(product[:, ::2]) * product[:, 1::2])


def test_gradients_of_the_operators():
    _, values, indices, column_mask = weight(96, 128, Pattern(2, 4), torch.float32)
    x, bias = randn(40, 128, dtype=torch.float32), randn(96, dtype=torch.float32)
    down, up = randn(8, 128, dtype=torch.float32), randn(96, 8, dtype=torch.float32)
    inputs = [tensor.requires_grad_() for tensor in (x, values, down, up, bias)]

    def run(device: str) -> list[Tensor]:
        x, values, down, up, bias = (t.detach().to(device).requires_grad_() for t in inputs)
        packed = indices.to(device), column_mask.to(device)
        y = torch.ops.fxsparse.nm_linear_low_rank(x, values, *packed, down, up, bias, 2, 4)
        y.square().sum().backward()
        return [y, *(tensor.grad for tensor in (x, values, down, up, bias))]

    for gpu, cpu in zip(run("cuda"), run("cpu"), strict=True):
        torch.testing.assert_close(gpu.cpu(), cpu, rtol=1e-4, atol=1e-4 * float(cpu.detach().abs().max()))


def test_cuda_graph_replays():
    _, values, indices, column_mask = weight(256, 512, Pattern(2, 4), torch.bfloat16)
    metadata, x = pack_metadata(indices), randn(32, 512, dtype=torch.bfloat16)
    down, up = randn(16, 512, dtype=torch.bfloat16), randn(256, 16, dtype=torch.bfloat16)
    dense, keys = randn(96, 512, dtype=torch.bfloat16), randn(4, 512, dtype=torch.bfloat16)
    both, rows = randn(64, 1024, dtype=torch.bfloat16), torch.randperm(96, device="cuda")[:40]

    def run() -> list[Tensor]:
        gathered = gather_linear(x, dense, rows, None, None)
        mixed = mux(x, keys, 4)
        y = nm_linear(x, values, indices, None, None, 2, 4, steps=["relu"])
        return [
            y,
            sparse_tensor_core_linear(x, values, metadata, None),
            nm_linear_grad_input(y, values, indices, column_mask, 2, 4),
            nm_linear_grad_values(y, x, indices, 2, 4),
            nm_linear_low_rank(x, values, indices, None, down, up, None, 2, 4),
            gathered,
            gather_linear_grad_input(gathered, dense, rows, None),
            gather_linear_grad_weight(gathered, x, rows, None, 96, 512),
            mixed,
            demux_linear(mixed, keys, both, None),
        ]

    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        x.copy_(randn(32, 512, dtype=torch.bfloat16))
        graph.replay()
        for replayed, eager in zip(captured, run(), strict=True):
            assert torch.equal(replayed, eager)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_rewritten_model_under_inductor(cuda_graphs):
    import copy

    import fxsparse

    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 256)).cuda()
    passes = ["nm-masks{pattern=2:4,keep_first=false,keep_head=false}", "double-prune", "low-rank{rank=8,start=0.0}"]
    gm = fxsparse.rewrite(model, passes, (torch.randn(8, 256, device="cuda"),))
    pins = {"nm_linear": "compressed", "nm_linear_low_rank": "compressed"}  # a small product might be faster otherwise
    options = {"lower": pins, "triton.cudagraphs": cuda_graphs}
    compiled = torch.compile(gm, backend="fxsparse", options=options)
    exact = copy.deepcopy(gm).cpu().double()
    for rows in (8, 8, 8, 40):
        x = torch.randn(rows, 256, device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        compiled(x).square().sum().backward()
        exact(x.cpu().double()).square().sum().backward()
        for mine, its in zip(gm.parameters(), exact.parameters(), strict=True):
            torch.testing.assert_close(
                mine.grad.cpu().double(), its.grad, rtol=1e-3, atol=1e-3 * float(its.grad.abs().max())
            )
            mine.grad = its.grad = None
    assert {"nm_linear", "nm_linear_grad_input", "nm_linear_grad_values"} <= {
        item.name.partition("_2_4")[0] for item in fxsparse.kernels(compiled)
    }


def test_inference_with_every_implementation(monkeypatch, tmp_path):
    import fxsparse
    from fxsparse.lowering import timings

    monkeypatch.setenv("FXSPARSE_CACHE_DIR", str(tmp_path))
    timings.forget()
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 256))
    gm = fxsparse.rewrite(model, ["nm-masks{keep_first=false,keep_head=false}"], (torch.randn(8, 256),))
    gm = gm.cuda().bfloat16().requires_grad_(False)
    found = fxsparse.tune(gm, rows=[8], progress=False)
    assert all({"dense", "operator", "reference", "sparse_tensor_cores"} <= set(item.milliseconds) for item in found)
    for item in found:
        assert not {name for name in item.failed if not name.startswith("cusparselt")}, item.failed
    x = torch.randn(8, 256, device="cuda").bfloat16()
    with torch.no_grad():
        expected = gm(x).double()
        for choice in {name.partition(":")[0] for name in found[0].milliseconds} - {"operator"}:  # as compressed
            options = {"lower": {"nm_linear": choice}}
            close(torch.compile(gm, backend="fxsparse", options=options)(x), expected)
            torch._dynamo.reset()
    timings.forget()


@pytest.mark.parametrize("op", [*TUNED])
def test_every_product_is_measured_on_its_first_use(op, monkeypatch, tmp_path):
    from fxsparse.lowering import measure, timings

    monkeypatch.setenv("FXSPARSE_CACHE_DIR", str(tmp_path))
    timings.forget()
    found = measure.measure(TUNED[op], "cuda")
    assert {"operator", "reference"} <= set(found.milliseconds), found.failed
    assert not {name for name in found.failed if not name.startswith("cusparselt")}, found.failed
    timings.forget()


def test_tuning_chooses_a_plan(monkeypatch, tmp_path):
    monkeypatch.setenv("FXSPARSE_CACHE_DIR", str(tmp_path))
    store.forget()
    _, values, indices, _ = weight(1024, 512, Pattern(2, 4), torch.bfloat16)
    x = randn(128, 512, dtype=torch.bfloat16)
    key = autotune.key("nm_linear", 128, 1024, 512, "bfloat16", 2, 4)
    times = autotune.measure(
        key,
        lambda plan: nm_linear(x, values, indices, None, None, 2, 4, plan=plan),
        autotune.candidates("nm_linear", 128, tall=True),
    )
    assert autotune.plan("nm_linear", 128, 1024, 512, x, 2, 4) == min(times, key=lambda plan: times[plan])
    store.forget()


_SANITIZED = """
import torch
from fxsparse.codegen.kernels.gather_linear import gather_linear, gather_linear_grad_weight
from fxsparse.codegen.kernels.nm_linear import nm_linear
from fxsparse.codegen.kernels.nm_prune import nm_prune
from fxsparse.codegen.kernels.nm_transpose import nm_transpose
from fxsparse.codegen.kernels.sparse_tensor_core_linear import sparse_tensor_core_linear
from fxsparse.codegen.metadata import pack_metadata
weight = torch.randn(70, 80, device="cuda").bfloat16()
values, indices = nm_prune(weight, 2, 4)
x = torch.randn(37, 80, device="cuda").bfloat16()
nm_linear(x, values, indices, None, None, 2, 4)
sparse_tensor_core_linear(x, values, pack_metadata(indices), None)
rows = torch.randperm(70, device="cuda")[:23]
gather_linear_grad_weight(gather_linear(x, weight, rows, None, None), x, rows, None, 70, 80)
torch.cuda.synchronize()
"""


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer_finds_nothing(tool):
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "7", sys.executable, "-c", _SANITIZED]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
