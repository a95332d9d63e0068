"""Files and folders that are replaced whole, so that whoever is killed, or has no space left, destroys nothing.

    model.safetensors             what is there
    .model.safetensors.4f..part   a folder beside it that a writer fills; it is locked as long as the writer lives
    .fxsparse-complete            a folder of finished files that only have to be moved into the folder it lies in

One file is moved by one rename. Several cannot be, so the folder of finished files is renamed first, and that is the
moment of the save: whoever comes next, a reader or a writer, moves what was not moved.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where a folder cannot be removed while its files are open
    fcntl = None  # type: ignore[assignment]

_PART = ".part"
_COMPLETE = ".fxsparse-complete"
_REMOVED = ".fxsparse-removed"
"""Among finished files: the names, one a line, of the files that go when these come."""


@contextlib.contextmanager
def unfinished(parent: Path, name: str) -> Iterator[Path]:
    """An empty folder in ``parent`` to write to, which goes when the block ends; those of killed writers go first.

    Args:
        parent: where the files shall lie in the end; it is made if it does not exist.
        name: of what is written, by which folders that killed writers left are known.
    """
    parent.mkdir(parents=True, exist_ok=True)
    beginning = f".{name[:200]}."
    for folder in parent.iterdir():
        if folder.name.startswith(beginning) and folder.name.endswith(_PART):
            _remove_abandoned(folder)
    folder, lock = _locked_folder(parent, beginning)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def put(file: Path, path: Path) -> None:
    """Moves a finished file of an `unfinished` folder to its place, in one step and for good."""
    _settle(file)
    os.replace(file, path)
    _sync(path.parent)


def put_all(files: Path, folder: Path, removed: Collection[str] = ()) -> None:
    """Moves the files of an `unfinished` folder into ``folder``, in which it lies, and removes others: all or nothing.

    Args:
        files: the unfinished folder; it holds files only.
        folder: the place.
        removed: names of files in ``folder`` that go, unless a new one has the name.
    """
    new = sorted(files.iterdir())
    for file in new:
        _settle(file)
    (files / _REMOVED).write_text("\n".join(sorted(set(removed) - {file.name for file in new})))
    _sync(files / _REMOVED)
    _sync(files)
    while True:
        finish(folder)
        try:
            os.rename(files, folder / _COMPLETE)  # from here on the save is done
            break
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:  # another writer was a little faster
                raise
    _sync(folder)
    _move(folder / _COMPLETE, folder)


def finish(folder: Path) -> None:
    """Moves the finished files of a `put_all` that was killed; nothing if there are none."""
    complete = folder / _COMPLETE
    while complete.is_dir() and not complete.is_symlink():
        with contextlib.suppress(FileNotFoundError):
            lock = _lock(complete)
            try:
                if lock is None or os.fstat(lock).st_ino == complete.stat().st_ino:  # else another has moved these
                    _move(complete, folder)
            finally:
                if lock is not None:
                    os.close(lock)


def _move(complete: Path, folder: Path) -> None:
    """Moves files only, and removes only files of ``folder`` itself: what lies there may come from anybody."""
    names = (complete / _REMOVED).read_text().splitlines() if (complete / _REMOVED).is_file() else []
    for file in sorted(complete.iterdir()):
        if file.is_file() and file.name != _REMOVED:
            os.replace(file, folder / file.name)
    for name in names:
        if name == Path(name).name:
            (folder / name).unlink(missing_ok=True)
    _sync(folder)
    shutil.rmtree(complete)


def _locked_folder(parent: Path, beginning: str) -> tuple[Path, int | None]:
    while True:
        folder = parent / f"{beginning}{secrets.token_hex(4)}{_PART}"
        folder.mkdir()
        lock = _lock(folder)
        if lock is None or folder.is_dir():
            return folder, lock
        os.close(lock)  # another writer took it for abandoned before it was locked


def _lock(folder: Path) -> int | None:
    """Waits for the lock of a folder, which the system lets go of when a process ends; None where there are none."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


def _remove_abandoned(folder: Path) -> None:
    """Removes the folder of a writer that was killed; one whose writer lives is locked."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        finally:
            os.close(handle)


def _settle(file: Path) -> None:
    """Gives a file the mode of the umask, as its folder has, and waits until it is on the disk."""
    os.chmod(file, file.parent.stat().st_mode & 0o666)
    _sync(file)


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    with contextlib.suppress(PermissionError):  # Windows opens no folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
