"""What was measured: the time of each implementation of a product on a device, kept on disk.

One JSON file for a device and the versions that matter (torch, triton, this package's kernel sources), in
``$FXSPARSE_CACHE_DIR/measured``. Several processes may write it at once: each reads it again under a lock, adds its
own and replaces the file whole; a lock that is not had in time leaves the file to the others. A file that cannot be
read, or is of something else, is ignored with a warning; one that cannot be written leaves the times to this process.

Files that come with the package lie in `SHIPPED`, under the same names; what was measured here goes before them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fxsparse.codegen import source
from fxsparse.lowering.estimates import Work

FORMAT = 1
PATIENCE = 5.0
"""Seconds that a process waits for the lock of a file."""

SHIPPED = Path(__file__).parent / "shipped_times"
"""Where files are kept that were measured before a release; it holds none for a device that was not at hand."""

_lock = threading.Lock()
_known: dict[Path, dict[str, dict[str, float]]] = {}


def key(work: Work) -> str:
    """What the times of a product are kept under; numbers of rows share one up to the next power of two."""
    rows = 1 << max(0, work.rows - 1).bit_length()
    dtype = str(work.dtype).removeprefix("torch.")
    pattern = "" if work.pattern is None else f" {work.pattern}"
    further = "".join(f" {size}" for size in work.further)
    return f"{work.op}{pattern} {dtype} {rows}x{work.out_features}x{work.in_features}{further}"


def times(work: Work, device: str) -> dict[str, float]:
    """Milliseconds of each implementation measured, by its name; empty where none was. Of one that was measured in
    several variants, ``cusparselt:3/1/-1`` and the like, the fastest."""
    found: dict[str, float] = {}
    for name, time in _row(work, device).items():
        name = name.partition(":")[0]
        found[name] = min(time, found.get(name, math.inf))
    return found


def variant(work: Work, device: str, implementation: str) -> str | None:
    """What stands behind the colon of an implementation's fastest variant; None where none was measured."""
    row = {name: time for name, time in _row(work, device).items() if name.startswith(f"{implementation}:")}
    return min(row, key=lambda name: row[name]).partition(":")[2] if row else None


def _row(work: Work, device: str) -> dict[str, float]:
    with _lock:
        own, shipped = _load(_path(device), device), _load(SHIPPED / _path(device).name, device)
        return dict(own.get(key(work)) or shipped.get(key(work), {}))


def remember(work: Work, device: str, found: Mapping[str, float]) -> None:
    """Keeps times, in milliseconds, for this process and later ones."""
    path = _path(device)
    with _lock:
        rows = _load(path, device)
        rows[key(work)] = {**rows.get(key(work), {}), **found}
        try:
            with source.locked(path, PATIENCE):
                rows = _read(path, device) if path.is_file() else {}
                rows[key(work)] = {**rows.get(key(work), {}), **found}
                content = {"format": FORMAT, **_identity(device), "milliseconds": rows}
                source.replace(path, json.dumps(content, indent=1, sort_keys=True))
        except (OSError, TimeoutError) as error:
            _warn(f"cannot keep what was measured in {path} ({error}); it serves this process only")


def forget() -> None:
    """Forgets what this process has read and measured; files stay."""
    with _lock:
        _known.clear()
        _path.cache_clear()
        _identity.cache_clear()
        _warned.clear()


@functools.cache
def _identity(device: str) -> dict[str, str]:
    """What a file is of. Not cached across changes of the environment: a process has one."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    kernels = hashlib.sha256()
    for path in sorted(Path(source.__file__).parent.rglob("*.py")):
        kernels.update(path.read_bytes())
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton_version,
        "kernels": kernels.hexdigest()[:16],
    }


@functools.cache
def _path(device: str) -> Path:
    identity = json.dumps(_identity(device), sort_keys=True)
    name = "".join(letter if letter.isalnum() else "-" for letter in _identity(device)["device"]).strip("-")
    return source.cache_dir() / "measured" / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.json"


def _load(path: Path, device: str) -> dict[str, dict[str, float]]:
    if path not in _known:
        _known[path] = _read(path, device)
    return _known[path]


def _read(path: Path, device: str) -> dict[str, dict[str, float]]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _warn(f"{path} cannot be read and is ignored: {error}")
        return {}
    wanted: dict[str, Any] = {"format": FORMAT, **_identity(device)}
    if not isinstance(content, dict) or any(content.get(name) != value for name, value in wanted.items()):
        _warn(f"{path} is of another device, version or format and is ignored")
        return {}
    rows = content.get("milliseconds")
    if not isinstance(rows, dict) or not all(map(_is_row, rows.values())):
        _warn(f"{path} holds something else than times and is ignored")
        return {}
    return rows


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict):
        return False
    return all(isinstance(t, float) and math.isfinite(t) and t > 0 for t in row.values())


_warned: set[str] = set()


def _warn(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(f"fxsparse: {message}", stacklevel=3)
