"""Files and folders that are replaced whole, by writers that are killed at every call that changes the disk."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fxsparse import files

OLD, NEW = (
    {"a": "old", "b": "old", "theirs": "of somebody else"},
    {"a": "new", "c": "new", "theirs": "of somebody else"},
)


def replace_all(folder: Path) -> None:
    """Writes ``a`` and ``c`` and takes ``b`` away."""
    with files.unfinished(folder, "test") as part:
        for name in ("a", "c"):
            (part / name).write_text("new")
        files.put_all(part, folder, ["b"])


def content(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir() if file.is_file()}


def killed_at(call: int, write: Callable[[Path], None], folder: Path) -> bool:
    """Runs ``write`` in a process that dies in place of its n-th call that changes names; whether it died."""

    def run() -> None:
        left = [call]

        def dying(function: Callable[..., object]) -> Callable[..., object]:
            def wrapped(*args: object, **kwargs: object) -> object:
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return function(*args, **kwargs)

            return wrapped

        for name in ("replace", "rename", "unlink", "rmdir", "fsync", "mkdir"):
            setattr(os, name, dying(getattr(os, name)))
        write(folder)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return process.exitcode == 9


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    for name, text in OLD.items():
        (tmp_path / name).write_text(text)
    yield tmp_path
    assert (tmp_path / "theirs").read_text() == OLD["theirs"]


def test_a_folder_is_old_or_new_wherever_its_writer_was_killed(folder: Path) -> None:
    seen = set()
    for call in range(60):
        for name in ("a", "b", "c"):
            (folder / name).unlink(missing_ok=True)
        for name, text in OLD.items():
            (folder / name).write_text(text)
        died = killed_at(call, replace_all, folder)
        files.finish(folder)
        assert content(folder) in (OLD, NEW), call
        seen.add(content(folder)["a"])
        replace_all(folder)
        assert content(folder) == NEW
        assert [path.name for path in folder.iterdir() if path.is_dir()] == []  # what the killed left is gone
        if not died:
            break
    assert not died and call > 8 and seen == {"old", "new"}


def test_a_live_writer_keeps_its_folder_and_the_umask_gives_the_mode(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with files.unfinished(tmp_path, "x") as mine:
            (mine / "x").write_text("mine")
            os.chmod(mine / "x", 0o600)
            with files.unfinished(tmp_path, "x") as other:
                assert mine.is_dir() and other != mine
            files.put(mine / "x", tmp_path / "x")
    finally:
        os.umask(before)
    assert (tmp_path / "x").read_text() == "mine" and (tmp_path / "x").stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_finished_files_touch_nothing_outside_of_their_folder(tmp_path: Path) -> None:
    """The folder may come from anybody."""
    outside = tmp_path / "outside"
    outside.write_text("stays")
    complete = tmp_path / "folder" / ".fxsparse-complete"
    complete.mkdir(parents=True)
    (complete / ".fxsparse-removed").write_text("../outside\n" + str(outside))
    (complete / "inside").mkdir()
    (complete / "file").write_text("moves")
    files.finish(tmp_path / "folder")
    assert outside.read_text() == "stays" and content(tmp_path / "folder") == {"file": "moves"}
    other = tmp_path / "other"
    other.mkdir()
    (other / ".fxsparse-complete").symlink_to(tmp_path)
    files.finish(other)
    assert outside.exists()
