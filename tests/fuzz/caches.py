"""Random damage to the folder of generated code and measured times: what is used from it is what was put there.

A case fills a folder with a generated kernel, a table of times and a built library, damages some of its files, and uses
it as the next process would: the kernel computes the same, the library is the one that was built, times are those that
were measured or none, and what is measured next is kept. Only a folder that is no longer the user's alone is refused.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from hypothesis import strategies as st

from fxsparse.codegen import source, store
from fxsparse.codegen.cpu import build

KERNEL = "def answer():\n    return 42\n"
LIBRARY = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'
KINDS = (
    "flip", "cut", "empty", "garbage", "nested", "other json", "link", "folder", "gone", "unreadable", "byte code",
    "abandoned", "open folder", "linked folder",
)  # fmt: skip


@dataclass(frozen=True)
class Damage:
    """Kinds of damage, each with a file as a share of all of them and a place in it."""

    steps: tuple[tuple[str, float, float], ...]


def damages() -> st.SearchStrategy[Damage]:
    share = st.floats(0, 1, exclude_max=True)
    return st.builds(
        Damage, st.lists(st.tuples(st.sampled_from(KINDS), share, share), min_size=1, max_size=3).map(tuple)
    )


def check(damage: Damage) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as place, _cache(Path(place) / "cache"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root, outside = Path(place) / "cache", Path(place) / "outside"
        outside.mkdir()
        (outside / "file").write_text("mine")
        shutil.copytree(_whole(), root)
        table = store.Table("milliseconds", _is_row)
        table.update("a product", "cpu", {"dense": 1.5})
        for kind, file, at in damage.steps:
            _hurt(root, outside, kind, file, at)
        store.forget()
        sys.modules.pop(f"fxsparse_kernels.{Path(_kernel_name()).stem}", None)
        refused = _use(table)
        assert (outside / "file").read_text() == "mine", "a file outside of the cache was written"
        assert sorted(item.name for item in outside.iterdir()) == ["file"], "files were put outside of the cache"
        return ("refused", "a folder that is not the user's alone") if refused else ("healed", damage.steps[0][0])


def _use(table: store.Table) -> bool:
    """Whether code is refused because of the folder it lies in."""
    refused = False
    try:
        assert source.load(source.write("kernel", KERNEL)).answer() == 42
    except source.Untrusted:
        refused = True
    try:
        _, library = build.library("library", LIBRARY)
        assert ctypes.CDLL(str(library)).answer() == 42
    except build.BuildError as error:
        if "not yours alone" not in str(error):
            raise
        refused = True
    assert table.row("a product", "cpu") in (None, {"dense": 1.5})
    table.update("another", "cpu", {"dense": 2.5})
    assert table.row("another", "cpu") == {"dense": 2.5}
    return refused


def _hurt(root: Path, outside: Path, kind: str, share: float, at: float) -> None:
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    if not files:
        return
    file = files[int(share * len(files))]
    data = file.read_bytes()
    place = int(at * len(data))
    written = {
        "flip": data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :] if data else b"x",
        "cut": data[:place],
        "empty": b"",
        "garbage": os.urandom(64),
        "nested": b"[" * 100_000,
        "other json": json.dumps([{"format": 1}, {"milliseconds": 3}, [], "x", 1e400][int(at * 5)]).encode(),
    }
    if kind in written:
        file.write_bytes(written[kind])
    elif kind == "unreadable":
        file.chmod(0)
    elif kind == "byte code":
        (file.parent / "__pycache__").mkdir(exist_ok=True)
        (
            file.parent / "__pycache__" / f"{file.stem}.cpython-{sys.version_info[0]}{sys.version_info[1]}.pyc"
        ).write_bytes(b"x")
    elif kind == "abandoned":
        (file.parent / f".{file.name}.0123abcd.part").mkdir(exist_ok=True)
    elif kind == "open folder":
        file.parent.chmod(0o777)
    elif kind == "linked folder":
        shutil.rmtree(file.parent)
        file.parent.symlink_to(outside, target_is_directory=True)
    else:
        file.unlink()
        if kind == "link":
            file.symlink_to(outside / "file")
        elif kind == "folder":
            file.mkdir()


@contextmanager
def _cache(root: Path) -> Iterator[None]:
    with mock.patch.dict(os.environ, FXSPARSE_CACHE_DIR=str(root)):
        store.forget()
        yield
    store.forget()


@functools.cache
def _whole() -> Path:
    """A cache with a kernel and a library."""
    root = Path(tempfile.mkdtemp(prefix="fxsparse-fuzz-"))
    with mock.patch.dict(os.environ, FXSPARSE_CACHE_DIR=str(root)):
        source.write("kernel", KERNEL)
        build.library("library", LIBRARY)
    return root


def _kernel_name() -> str:
    return next((_whole() / "kernels").glob("kernel_*.py")).name


def _is_row(row: object) -> bool:
    return isinstance(row, dict) and all(isinstance(time, float) for time in row.values())
