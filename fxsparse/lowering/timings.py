"""Times of the implementations of a product on a device, kept in `fxsparse.codegen.store`.

Files that come with the package lie in `SHIPPED`, under the same names as those in ``$FXSPARSE_CACHE_DIR/measured``;
what was measured here goes before them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxsparse.codegen import store
from fxsparse.ops.operator import Problem

SHIPPED = Path(__file__).parent / "shipped_times"
"""Where files are kept that were measured before a release; it holds none for a device that was not at hand."""


def key(problem: Problem) -> str:
    """What the times of a product are kept under; numbers of rows share one up to the next power of two."""
    rows = 1 << max(0, problem.rows - 1).bit_length()
    dtype = str(problem.dtype).removeprefix("torch.")
    pattern = "" if problem.pattern is None else f" {problem.pattern}"
    extra = "".join(f" {size}" for size in problem.extra)
    return f"{problem.op}{pattern} {dtype} {rows}x{problem.out_features}x{problem.in_features}{extra}"


def times(problem: Problem, device: str) -> dict[str, float]:
    """Milliseconds of each implementation measured, by its name; empty if none was. Of one that was measured in
    several variants, ``cusparselt:3/1/-1`` and the like, the fastest."""
    fastest: dict[str, float] = {}
    for name, time in _row(problem, device).items():
        name = name.partition(":")[0]
        fastest[name] = min(time, fastest.get(name, math.inf))
    return fastest


def variant(problem: Problem, device: str, implementation: str) -> str | None:
    """What stands behind the colon of an implementation's fastest variant; None if none was measured."""
    row = {name: time for name, time in _row(problem, device).items() if name.startswith(f"{implementation}:")}
    return min(row, key=lambda name: row[name]).partition(":")[2] if row else None


def remember(problem: Problem, device: str, milliseconds: Mapping[str, float]) -> None:
    """Keeps times, in milliseconds, for this process and later ones."""
    _TABLE.update(key(problem), device, milliseconds)


def forget() -> None:
    """Forgets what this process has read and measured; files stay."""
    store.forget()


def _row(problem: Problem, device: str) -> Mapping[str, float]:
    return _TABLE.row(key(problem), device) or _TABLE.row(key(problem), device, SHIPPED) or {}


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict):
        return False
    return all(isinstance(t, float) and math.isfinite(t) and t > 0 for t in row.values())


_TABLE = store.Table("milliseconds", _is_row)
