"""Files of the cache directory: generated sources, written once under the hash of their text and loaded as modules.

Triton compiles a function from the file that defines it, so a kernel has to be a file. The sources lie in
``$FXSPARSE_CACHE_DIR/kernels``, by default ``~/.cache/fxsparse/kernels``; deleting them is always safe.

What lies there is run, so its folders are the user's alone, a file whose text is not that of its name is written anew,
and byte code is neither taken from there nor put there.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType

from fxsparse import files


class Untrusted(OSError):
    """A folder of the cache is not the user's alone."""


def cache_dir() -> Path:
    """The directory of generated kernels and measured results: ``$FXSPARSE_CACHE_DIR``, or the user's cache."""
    chosen = os.environ.get("FXSPARSE_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxsparse"


def private_folder(name: str) -> Path:
    """A folder of the cache directory that only the user can read and write.

    Raises:
        Untrusted: it belongs to somebody else, others may write it, or it is a link.
        OSError: it cannot be made.
    """
    root = cache_dir()
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder = root / name
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if hasattr(os, "getuid"):  # Windows gives a user's folders to the user
        alone = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
        above = root.stat().st_mode
        if not alone or (above & 0o022 and not above & stat.S_ISVTX):
            raise Untrusted(f"{folder} is not yours alone, so no code is loaded from it; set FXSPARSE_CACHE_DIR")
        if status.st_mode & 0o077:
            folder.chmod(0o700)
    return folder


def write(name: str, text: str) -> Path:
    """Stores a source and returns its path, ``<name>_<hash of the text>.py``.

    Processes may write the same source at the same time: each writes a file of its own and renames it, so a reader sees
    a whole file or none.
    """
    path = private_folder("kernels") / f"{name}_{_digest(text.encode())}.py"
    if path.is_symlink() or not path.is_file() or path.read_bytes() != text.encode():
        replace(path, text)
    return path


def replace(path: Path, text: str) -> None:
    """Writes a file so that no reader ever sees a part of it."""
    with files.unfinished(path.parent, path.name) as part:
        (part / path.name).write_text(text)
        place(part / path.name, path)


def place(made: Path, path: Path) -> None:
    """Moves a finished file to its place, whatever stands there."""
    _clear(path)
    os.replace(made, path)


def _clear(path: Path) -> None:
    """Removes a link or a folder that stands where a file of the cache belongs."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    elif path.is_dir():
        shutil.rmtree(path)


@contextlib.contextmanager
def locked(path: Path, patience: float = 5.0) -> Iterator[None]:
    """Holds the lock of a file; the system lets go of it when a process ends, however it ends.

    Raises:
        TimeoutError: another process held it for ``patience`` seconds.
    """
    import fcntl

    lock = path.with_suffix(".lock")
    _clear(lock)
    handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise TimeoutError(f"another process held it for {patience:g} s") from None
                time.sleep(0.01)
        yield
    finally:
        os.close(handle)


def load(path: Path) -> ModuleType:
    """The module in a file of `write`, loaded once a process.

    Raises:
        ImportError: its text is not what its name says.
    """
    name = f"fxsparse_kernels.{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path, loader=_Source(name, str(path)))
    if found is None or found.loader is None:
        raise ImportError(f"{path} is not a Python source file")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class _Source(importlib.machinery.SourceFileLoader):
    """Compiles the text of a file whose name has its hash; Python's own loader prefers byte code that lies beside."""

    def get_code(self, fullname: str) -> CodeType:
        text = self.get_data(self.path)
        if not Path(self.path).stem.endswith(f"_{_digest(text)}"):
            raise ImportError(f"{self.path} was changed after it was written")
        code: CodeType = self.source_to_code(text, self.path)
        return code


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]
