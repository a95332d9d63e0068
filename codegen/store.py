"""Measured results on disk: one JSON file for a device and the versions that matter, a table for each kind of result.

    {"format": 1, "device": ..., "torch": ..., "triton": ..., "kernels": hash of the sources of `fxsparse.codegen`,
     "milliseconds": {product: {implementation: time}},   # `fxsparse.lowering.timings`
     "tiles": {product: {"rows": 64, ...}}}               # `autotune`

The files lie in ``$FXSPARSE_CACHE_DIR/measured``. Several processes may write one at once: each reads it again under a
lock, adds its rows and replaces the file whole; if the lock does not come in time, the file is left to the others. A
file that cannot be read or is of another device or version, and a table of something else, is ignored with a warning
and replaced by the next result. If a file cannot be written, its results serve this process only.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxsparse.codegen import source
from fxsparse.codegen.cpu import instruction_sets

FORMAT = 1
PATIENCE = 5.0
"""Seconds that a process waits for the lock of a file."""

Rows = dict[str, dict[str, Any]]

_lock = threading.RLock()
_memory: dict[tuple[str, str, int, Path | None], Rows] = {}


@dataclass(frozen=True)
class Table:
    """Results of one kind: rows by key, each a dictionary of named values.

    Attributes:
        name: of the table in a file.
        is_row: whether a value read from a file is a row of it.
    """

    name: str
    is_row: Callable[[Any], bool]

    def row(self, key: str, device: str, folder: Path | None = None) -> Mapping[str, Any] | None:
        """The row of a key, None if nothing was measured.

        Args:
            key: of the result.
            device: device type.
            folder: of a file that was measured elsewhere, instead of this process's and this machine's results.
        """
        with _lock:
            return self._rows(device, folder).get(key)

    def update(self, key: str, device: str, values: Mapping[str, Any]) -> None:
        """Adds values to the row of a key, or replaces them, for this process and later ones."""
        place = path(device)
        with _lock:
            _add(self._rows(device, None), key, values)
            try:
                source.private_folder(place.parent.name)
                with source.locked(place, PATIENCE):
                    content = _read(place, device)
                    rows = self._of(content, place)
                    _add(rows, key, values)
                    content = {**content, "format": FORMAT, **_identity(device, threads_of(device)), self.name: rows}
                    source.replace(place, json.dumps(content, indent=1, sort_keys=True))
            except (OSError, TimeoutError) as error:
                _warn(f"cannot keep what was measured in {place} ({error}); it serves this process only")

    def _rows(self, device: str, folder: Path | None) -> Rows:
        """Rows as this process knows them: read once, then with its own additions."""
        threads = threads_of(device)
        rows = _memory.get((self.name, device, threads, folder))
        if rows is None:
            place = path(device) if folder is None else folder / path(device).name
            rows = _memory[self.name, device, threads, folder] = self._of(_read(place, device), place)
        return rows

    def _of(self, content: Mapping[str, Any], place: Path) -> Rows:
        """The table's part of a file; empty, with a warning, if it holds something else."""
        rows = content.get(self.name, {})
        if not isinstance(rows, dict) or not all(map(self.is_row, rows.values())):
            _warn(f"{place} holds something else than {self.name} and is ignored")
            return {}
        return rows


def path(device: str) -> Path:
    """The file of a device type; for a CPU also of the number of threads, which may change while a process runs."""
    return _path(device, threads_of(device))


def threads_of(device: str) -> int:
    """Threads that a product runs on; 0 where that is not torch's to say."""
    return torch.get_num_threads() if device == "cpu" else 0


@functools.cache
def _path(device: str, threads: int) -> Path:
    identity = _identity(device, threads)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    name = "".join(letter if letter.isalnum() else "-" for letter in identity["device"]).strip("-")
    return source.cache_dir() / "measured" / f"{name}-{digest}.json"


def forget() -> None:
    """Forgets what this process has read and measured; files stay."""
    with _lock:
        _memory.clear()
        _path.cache_clear()
        _identity.cache_clear()


def _add(rows: Rows, key: str, values: Mapping[str, Any]) -> None:
    rows[key] = {**rows.get(key, {}), **values}


def _read(place: Path, device: str) -> dict[str, Any]:
    """A whole file; empty if there is none, and with a warning if it is damaged or of something else."""
    try:
        if place.parent == source.cache_dir() / "measured" and place.exists():
            source.private_folder("measured")
        content = json.loads(place.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        _warn(f"{place} cannot be read and is ignored: {error}")
        return {}
    wanted = {"format": FORMAT, **_identity(device, threads_of(device))}
    if not isinstance(content, dict) or any(content.get(name) != value for name, value in wanted.items()):
        _warn(f"{place} is of another device, version or format and is ignored")
        return {}
    return content


@functools.cache
def _identity(device: str, threads: int) -> dict[str, str]:
    """The device and the versions that results hold for."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{instruction_sets.processor()}, {instruction_sets.chosen()}, {threads} threads"
    kernels = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        kernels.update(file.read_bytes())
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton_version,
        "kernels": kernels.hexdigest()[:16],
    }


def _warn(message: str) -> None:
    warnings.warn(f"fxsparse: {message}", stacklevel=2)
