"""Sources: golden ones, the cache on disk, and what the generator refuses."""

from __future__ import annotations

import ast
import importlib.util
import json
import multiprocessing
import os
import py_compile
from pathlib import Path

import pytest
import torch

from fxsparse.codegen import autotune, source, store
from fxsparse.codegen.epilogue import Epilogue
from fxsparse.codegen.kernels.gather_linear import GatherLinear
from fxsparse.codegen.kernels.nm_linear import NMLinear, nm_linear_low_rank
from fxsparse.codegen.kernels.nm_linear_grad_input import NMGradInput
from fxsparse.codegen.kernels.nm_transpose import NMTranspose
from fxsparse.codegen.kernels.sparse_tensor_core_linear import SparseTensorCoreLinear, unsupported_sparse
from fxsparse.codegen.kernels.sparse_wgmma_linear import WGMMA, SparseWgmmaLinear
from fxsparse.codegen.launching import unsupported
from fxsparse.codegen.loaded import Kernel
from fxsparse.codegen.spec import Tile
from fxsparse.codegen.template import fill
from fxsparse.codegen.tiles import Plan
from fxsparse.errors import OptionError

GOLDEN = {
    "nm_linear": NMLinear(
        "bfloat16", Tile(64, 64, 64), 2, 4, low_rank="inside", epilogue=Epilogue(True, ("gelu", "mul"))
    ),
    "nm_linear_grad_input": NMGradInput("float32", Tile(32, 64, 32), 4, 8, column_mask=True, even=True),
    "nm_transpose": NMTranspose("bfloat16", Tile(64, 32, 1), 2, 4, "wgmma.sp"),
    "sparse_wgmma_linear": SparseWgmmaLinear("bfloat16", WGMMA[16], split=True, epilogue=Epilogue(True, ("silu",))),
    "sparse_tensor_core_linear": SparseTensorCoreLinear(
        "bfloat16", Tile(64, 64, 64, stages=4), 32, 32, Epilogue(True, ("silu",))
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_sources(name):
    """``FXSPARSE_UPDATE_GOLDEN=1`` writes them anew."""
    path = Path(__file__).parent / "golden" / f"{name}.txt"
    text = GOLDEN[name].render()
    if os.environ.get("FXSPARSE_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()
    tree = ast.parse(text)
    assert "Made by fxsparse.codegen from" in (ast.get_docstring(tree) or "")
    kernel = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == GOLDEN[name].name)
    assert [arg.arg for arg in kernel.args.args] == [argument.name for argument in GOLDEN[name].arguments]


def test_templates():
    template = "a $b\n    $block\nend"
    assert fill(template, b="1", block="x\n  y") == "a 1\n    x\n      y\nend"
    assert fill(template, b="1", block="") == "a 1\nend"


def test_cache_directory_is_the_users_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("FXSPARSE_CACHE_DIR", str(tmp_path))
    path = source.write("answer", "ANSWER = 42\n")
    assert path.parent == tmp_path / "kernels"
    assert source.write("answer", "ANSWER = 42\n") == path
    assert source.write("answer", "ANSWER = 43\n") != path
    assert source.load(path).ANSWER == 42
    assert source.load(path) is source.load(path)
    path.write_text("damaged")
    assert source.write("answer", "ANSWER = 42\n").read_text() == "ANSWER = 42\n"
    monkeypatch.delenv("FXSPARSE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert source.cache_dir() == tmp_path / "xdg" / "fxsparse"


def _write_often() -> None:
    for i in range(200):
        path = source.write("x", f"VALUE = {i % 5}\n" + "#" * 20000)
        assert path.read_text().startswith(f"VALUE = {i % 5}") and len(path.read_text()) == 20010


def test_processes_may_write_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("FXSPARSE_CACHE_DIR", str(tmp_path))
    workers = [multiprocessing.get_context("fork").Process(target=_write_often) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(list((tmp_path / "kernels").iterdir())) == 5


def test_the_cache_runs_only_what_the_user_wrote(monkeypatch, tmp_path):
    """No byte code beside a source, no changed or undecodable source, no folder of others, no links."""
    monkeypatch.setenv("FXSPARSE_CACHE_DIR", str(tmp_path / "cache"))
    text = "ANSWER = 'mine'\n"
    path = source.write("trusted", text)
    assert (path.parent.stat().st_mode | path.parents[1].stat().st_mode) & 0o777 == 0o700
    other = tmp_path / "other.py"
    other.write_text("ANSWER = 'theirs'\n")
    cached = Path(importlib.util.cache_from_source(str(path)))
    py_compile.compile(str(other), str(cached), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    assert source.load(path).ANSWER == "mine"
    before = cached.read_bytes()
    for content in (b"ANSWER = 'theirs'\n", b"\xff\xfe"):
        path = source.write(f"changed_{content[0]}", text)
        path.write_bytes(content)
        with pytest.raises(ImportError, match="was changed after it was written"):
            source.load(path)
        assert source.write(f"changed_{content[0]}", text).read_text() == text
        assert source.load(path).ANSWER == "mine"
    assert list(cached.parent.iterdir()) == [cached] and cached.read_bytes() == before
    path.unlink()
    path.symlink_to(other)
    source.write(f"changed_{content[0]}", text)
    assert not path.is_symlink() and "theirs" in other.read_text()
    path.with_suffix(".lock").symlink_to(other)
    with source.locked(path):
        assert not path.with_suffix(".lock").is_symlink() and "theirs" in other.read_text()
    path.parent.chmod(0o770)
    with pytest.raises(source.Untrusted, match="is not yours alone"):
        source.write("x", text)
    path.parent.rename(tmp_path / "elsewhere")
    path.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(source.Untrusted, match="is not yours alone"):
        source.write("x", text)


def test_what_the_generator_refuses():
    tile = Tile(16, 16, 32)
    with pytest.raises(OptionError, match="power of two"):
        Tile(16, 48, 16)
    with pytest.raises(OptionError, match="no kernel for pattern 3:4"):
        NMLinear("bfloat16", tile, 3, 4)
    with pytest.raises(OptionError, match="no kernel for float64"):
        NMLinear("float64", tile, 2, 4)
    with pytest.raises(OptionError, match="depth of at least 32"):
        NMGradInput("bfloat16", Tile(32, 32, 16), 2, 4)
    with pytest.raises(OptionError, match="product='sideways'"):
        GatherLinear("bfloat16", tile, "sideways")
    with pytest.raises(OptionError, match="block=48"):
        GatherLinear("bfloat16", tile, columns=True, block=48)
    assert unsupported(torch.bfloat16, 2, 4) is None
    assert "float64" in str(unsupported(torch.float64, 2, 4))
    assert "2:16" in str(unsupported(torch.bfloat16, 2, 16))
    assert unsupported_sparse(torch.bfloat16, 64) is None
    assert "multiple of 16" in str(unsupported_sparse(torch.bfloat16, 40))


@pytest.mark.parametrize(
    ("rows", "rank", "expected"),
    [(1, 8, "after"), (16, 8, "after"), (17, 8, "inside"), (64, 64, "inside"), (64, 65, "after"), (65, 8, "after")],
)
def test_a_branch_is_computed_inside_for_few_rows_only(monkeypatch, rows, rank, expected):
    """Neither in decoding nor for many rows, nor of a large rank, does every tile of columns compute x down^T."""
    seen = []
    monkeypatch.setattr(Kernel, "launch", lambda kernel, grid, *args: seen.append(kernel.spec.low_rank))
    values, indices = torch.zeros(32, 32).bfloat16(), torch.zeros(32, 8, dtype=torch.uint8)
    down, up = torch.zeros(rank, 64).bfloat16(), torch.zeros(32, rank).bfloat16()
    nm_linear_low_rank(torch.zeros(rows, 64).bfloat16(), values, indices, None, down, up, None, 2, 4)
    assert seen == [expected]


@pytest.mark.usefixtures("own_times")
def test_tuning_is_remembered():
    key = autotune.key("nm_linear", 100, 256, 128, "bfloat16", 2, 4)
    assert key == autotune.key("nm_linear", 65, 256, 128, "bfloat16", 2, 4)
    assert key != autotune.key("nm_linear", 64, 256, 128, "bfloat16", 2, 4)
    best = Plan(Tile(64, 128, 32, warps=8), square=True)
    autotune.remember(key, best)
    store.forget()
    assert autotune.tuned(key) == best


def tiles_of(text: str) -> str:
    """The file of the device with other tiles."""
    return json.dumps({**json.loads(store.path("cuda").read_text()), "tiles": json.loads(text)})


@pytest.mark.usefixtures("own_times")
@pytest.mark.parametrize(
    "damage",
    [
        lambda: "{",
        lambda: "[]",
        lambda: '{"a": 1}',
        lambda: tiles_of("[]"),
        lambda: tiles_of('{"a": 1}'),
        lambda: tiles_of('{"a": {"square": false, "rows": 3}}'),
    ],
)
def test_damaged_tuning_is_ignored_with_a_warning(damage):
    best = Plan(Tile(64, 128, 32, warps=8))
    autotune.remember("a", best)
    store.path("cuda").write_text(damage())
    store.forget()
    with pytest.warns(UserWarning, match="ignored"):
        assert autotune.tuned("a") is None
    with pytest.warns(UserWarning, match="ignored"):
        autotune.remember("b", best)
    store.forget()
    assert autotune.tuned("a") is None
    assert autotune.tuned("b") == best  # the damage is gone


@pytest.mark.usefixtures("own_times")
def test_tuning_where_nothing_can_be_written_serves_this_process(monkeypatch, tmp_path):
    monkeypatch.setenv("FXSPARSE_CACHE_DIR", str(tmp_path / "file" / "below"))
    (tmp_path / "file").write_text("")
    best = Plan(Tile(64, 128, 32, warps=8))
    with pytest.warns(UserWarning, match="serves this process only"):
        autotune.remember("a", best)
    assert autotune.tuned("a") == best


@pytest.mark.usefixtures("own_times")
def test_tables_of_one_file_leave_each_other_alone():
    """Tiles and times of a device lie in one file; what damages one is no matter to the other."""
    best, times = Plan(Tile(64, 128, 32, warps=8)), store.Table("milliseconds", lambda row: isinstance(row, dict))
    times.update("product", "cuda", {"dense": 0.25})
    autotune.remember("a", best)
    store.forget()
    assert times.row("product", "cuda") == {"dense": 0.25} and autotune.tuned("a") == best
    store.path("cuda").write_text(tiles_of("[]"))
    store.forget()
    assert times.row("product", "cuda") == {"dense": 0.25}
    with pytest.warns(UserWarning, match="something else than tiles"):
        autotune.remember("a", best)
    store.forget()
    assert times.row("product", "cuda") == {"dense": 0.25} and autotune.tuned("a") == best


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_tuning_needs_a_gpu():
    with pytest.raises(OptionError, match="this machine has none"):
        autotune.measure("key", lambda plan: None, autotune.candidates("nm_linear", 8, tall=True))
