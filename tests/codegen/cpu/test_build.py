"""Sources, builds and the reasons why there is no kernel."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from fxsparse.codegen import source
from fxsparse.codegen.cpu import build, instruction_sets, launch, loaded
from fxsparse.codegen.cpu.instruction_sets import ALL, AVX2, AVX512, PORTABLE
from fxsparse.codegen.cpu.spec import NMGradInput, NMGradValues, NMLinear, Tile
from fxsparse.codegen.epilogue import Epilogue
from fxsparse.errors import OptionError

ADD = 'extern "C" __attribute__((visibility("default"))) int add(int a, int b) { return a + b; }\n'


def has_compiler() -> bool:
    try:
        build.compiler()
    except build.BuildError:
        return False
    return True


compiles = pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler")


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("FXSPARSE_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def fresh(cache: Path) -> Path:
    """No kernel is remembered, neither before nor after the test."""
    launch.forget()
    yield cache
    launch.forget()


def test_golden_source():
    """``FXSPARSE_UPDATE_GOLDEN=1`` writes it anew."""
    spec = NMLinear("bfloat16", 2, 4, ALL[0], Epilogue(False, ("gated_silu",)))
    path = Path(__file__).parents[1] / "golden" / "cpu_nm_linear.txt"
    text = spec.render()
    if os.environ.get("FXSPARSE_UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()
    assert text.startswith("/* y = gated_silu(") and "Made by fxsparse.codegen.cpu from" in text


def test_sources_depend_on_everything_in_a_spec():
    specs = [
        kind(dtype, n, m, one)
        for kind in (NMLinear, NMGradInput, NMGradValues)
        for dtype in ("float32", "bfloat16", "float16")
        for n, m in ((1, 2), (2, 4), (1, 4), (2, 8), (4, 8))
        for one in ALL
    ]
    numbers = [*(spec.id(Tile()) for spec in specs), specs[0].id(Tile(few=3))]
    assert len(set(numbers)) == len(specs) + 1
    assert all(0 < number < 2**63 for number in numbers)
    for spec in specs:
        text = spec.render()
        assert "$" not in text
        assert ("immintrin" in text) == (spec.instruction_set is not PORTABLE)


def test_refusals():
    with pytest.raises(OptionError, match="not for 3:4"):
        NMLinear("float32", 3, 4, PORTABLE)
    with pytest.raises(OptionError, match="not for float64"):
        NMGradValues("float64", 2, 4, PORTABLE)
    with pytest.raises(OptionError, match="multiple of 64"):
        Tile(rows=100)
    with pytest.raises(OptionError, match="2, 4 or 8"):
        Tile(vectors=3)
    with pytest.raises(OptionError, match="takes 2 tensors"):
        NMLinear("float32", 2, 4, PORTABLE, Epilogue(False, ("mul", "add", "mul")))
    assert "float64" in str(launch.unavailable("nm_linear", torch.float64, 2, 4))
    assert "2:16" in str(launch.unavailable("nm_linear", torch.float32, 2, 16))
    assert "two tensors" in str(launch.unavailable("nm_linear", torch.float32, 2, 4, ("mul", "mul", "mul")))


def test_instruction_sets_follow_the_processor(monkeypatch):
    everything = {need: True for one in ALL for need in one.needs}
    assert instruction_sets.available(everything) == ALL
    assert instruction_sets.available({**everything, "avx512_bf16": False}) == (AVX512, AVX2, PORTABLE)
    assert instruction_sets.available({**everything, "avx512_f": False}) == (AVX2, PORTABLE)
    assert instruction_sets.available({}) == (PORTABLE,)
    assert instruction_sets.available()[-1] == PORTABLE
    monkeypatch.setenv("FXSPARSE_CPU", "portable")
    assert instruction_sets.chosen() == PORTABLE
    monkeypatch.setenv("FXSPARSE_CPU", "abacus")
    with pytest.raises(OptionError, match="'abacus' is not an instruction set of this processor"):
        instruction_sets.chosen()


@compiles
def test_libraries_are_built_once(cache, capfd):
    file, target = build.library("add", ADD)
    assert file.read_text() == ADD and file.parent == cache / "cpu"
    assert target.parent.stat().st_mode & 0o077 == 0
    assert build.load(target).add(2, 3) == 5
    changed = target.stat().st_mtime_ns
    assert build.library("add", ADD) == (file, target)
    assert target.stat().st_mtime_ns == changed
    assert build.library("add", ADD, ["-DOTHER"])[1] != target
    assert capfd.readouterr().err.count("building add") == 2


@compiles
def test_damaged_libraries_are_built_anew(cache, capfd):
    _, target = build.library("add", ADD)
    whole = target.read_bytes()
    target.write_bytes(whole[: len(whole) // 2])
    assert build.library("add", ADD)[1] == target and target.read_bytes() == whole
    assert capfd.readouterr().err.count("building add") == 2


def _build(results: multiprocessing.Queue) -> None:
    results.put(str(build.library("add", ADD)[1]))


@compiles
def test_processes_may_build_at_once(cache):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=_build, args=(results,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    targets = {results.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(targets) == 1
    assert build.load(Path(targets.pop())).add(1, 1) == 2
    assert not [path for path in (cache / "cpu").iterdir() if path.suffix == ".so" and path.name.startswith(".")]


def test_without_a_compiler_there_is_a_reason(fresh, monkeypatch):
    monkeypatch.setenv("PATH", str(fresh))
    build._compiler.cache_clear()
    assert "there is no C++ compiler" in str(launch.unavailable("nm_linear", torch.float32, 2, 4))
    with pytest.raises(OptionError, match="there is no C"):
        launch.nm_linear_grad_values(torch.ones(1, 1), torch.ones(1, 4), torch.zeros(1, 1, dtype=torch.uint8), 2, 4)


@compiles
def test_a_failing_build_is_a_reason(fresh, monkeypatch):
    monkeypatch.setattr(build, "FLAGS", ("-no-such-flag",))
    reason = str(launch.unavailable("nm_linear_grad_values", torch.float32, 2, 4))
    assert "cannot build nm_linear_grad_values_2_4_float32" in reason and "no-such-flag" in reason
    assert not list((fresh / "cpu").glob("*.so"))


@compiles
def test_a_folder_of_others_is_not_trusted(fresh):
    folder = source.private_folder("cpu")
    folder.chmod(0o777)
    assert "is not yours alone" in str(launch.unavailable("nm_linear", torch.float32, 2, 4))


@compiles
def test_kernels_are_listed_with_launches():
    number = launch.kernel_id("nm_linear_grad_values", torch.float32, 2, 4)
    kernel = loaded.by_id(number)
    before = kernel.launches
    launch.nm_linear_grad_values(torch.ones(2, 3), torch.ones(2, 8), torch.zeros(3, 1, dtype=torch.uint8), 2, 4)
    assert kernel.launches == before + 1
    assert kernel in loaded.kernels()
    assert kernel.file.read_text() == kernel.spec.render()
