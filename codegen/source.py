"""Files of the cache directory: generated sources, written once under the hash of their text and loaded as modules.

Triton compiles a function from the file that defines it, so a kernel has to be a file. The sources lie in
``$FXSPARSE_CACHE_DIR/kernels``, by default ``~/.cache/fxsparse/kernels``; deleting them is always safe.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType


def cache_dir() -> Path:
    """The directory of generated kernels and measured results: ``$FXSPARSE_CACHE_DIR``, or the user's cache."""
    chosen = os.environ.get("FXSPARSE_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxsparse"


def write(name: str, text: str) -> Path:
    """Stores a source and returns its path, ``<name>_<hash of the text>.py``.

    Processes may write the same source at the same time: each writes a file of its own and renames it, so a reader sees
    a whole file or none.
    """
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = cache_dir() / "kernels" / f"{name}_{digest}.py"
    if path.is_file() and path.read_text() == text:
        return path
    replace(path, text)
    return path


def replace(path: Path, text: str) -> None:
    """Writes a file so that no reader ever sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextlib.contextmanager
def locked(path: Path, patience: float = 5.0) -> Iterator[None]:
    """Holds the lock of a file; the system lets go of it when a process ends, however it ends.

    Raises:
        TimeoutError: another process held it for ``patience`` seconds.
    """
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as file:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise TimeoutError(f"another process held it for {patience:g} s") from None
                time.sleep(0.01)
        yield


def load(path: Path) -> ModuleType:
    """The module in a file, loaded once a process."""
    name = f"fxsparse_kernels.{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
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
