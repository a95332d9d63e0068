"""Tuning: measuring tiles for a shape on the device at hand, and remembering the fastest.

Nothing is measured unless :func:`measure` is called: a launch looks up what an earlier tuning found, in this process or
in ``tuning.json`` of the cache directory, and takes the shipped default otherwise. A file that cannot be read is
ignored with a warning, one that cannot be written leaves the result to this process.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from fxsparse.codegen import source, tiles
from fxsparse.codegen.spec import Tile
from fxsparse.codegen.tiles import Plan
from fxsparse.errors import OptionError


def plan(
    kernel: str, rows: int, columns: int, depth: int, like: Tensor, n: int | None = None, m: int | None = None
) -> Plan:
    """How to run a product of this size on a tensor's device and dtype."""
    dtype = str(like.dtype).removeprefix("torch.")
    found = _tuned().get(key(kernel, rows, columns, depth, dtype, n, m)) if like.is_cuda else None
    return found or Plan(tiles.default(kernel, rows, dtype, aligned=columns % 16 == 0 and depth % 16 == 0))


def key(
    kernel: str, rows: int, columns: int, depth: int, dtype: str, n: int | None = None, m: int | None = None
) -> str:
    """What tuning results are kept under; numbers of rows share one up to the next power of two."""
    bucket = 1 << max(0, rows - 1).bit_length()
    pattern = "" if n is None else f" {n}:{m}"
    return f"{kernel}{pattern} {dtype} {bucket}x{columns}x{depth} {_platform()}"


@functools.cache
def _platform() -> str:
    """What tuning results hold for: the device and the compiler."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return f"{device}, triton {triton.__version__}"


def candidates(kernel: str, rows: int, dtype: str = "bfloat16", *, tall: bool = False) -> list[Plan]:
    """Plans worth measuring for an input of ``rows`` rows.

    The shipped tiles of the kernel; for few rows also twice as many columns, and the weight as the left operand; for
    the gradient of a weight also half as many rows, which occupies more of a device where the weight is small; for a
    ``tall`` weight, of more rows than columns, also square blocks.
    """
    found = [tiles.default(kernel, number, dtype) for number in (1, 64, 1 << 30)]
    if kernel.endswith(("grad_values", "grad_weight")):
        found.append(replace(found[-1], rows=found[-1].rows // 2, warps=4))
    if rows <= 64 and kernel.startswith("nm_linear") and "grad" not in kernel:
        small = found[0]
        found += [replace(small, weight_first=True), replace(small, columns=2 * small.columns, depth=small.depth // 2)]
    blocks = [False, True] if tall else [False]
    return [Plan(tile, square) for tile in dict.fromkeys(found) for square in blocks]


def measure(name: str, run: Callable[[Plan], object], plans: Iterable[Plan]) -> dict[Plan, float]:
    """Times plans for one product and remembers the fastest.

    Args:
        name: of :func:`key`.
        run: runs the product with a plan.
        plans: to try.

    Returns:
        milliseconds of each, the median; nothing of those that the device cannot run.

    Raises:
        OptionError: there is no GPU.
        RuntimeError: the device can run none, with the reason of the last.
    """
    if not torch.cuda.is_available():
        raise OptionError("tuning measures on a GPU and this machine has none")
    from triton.testing import do_bench

    times: dict[Plan, float] = {}
    failure: Exception | None = None
    for plan in plans:
        try:
            times[plan] = float(do_bench(functools.partial(run, plan), quantiles=[0.5]))
        except Exception as error:  # not enough shared memory, or the compiler gives up
            failure = error
    if not times:
        raise RuntimeError(f"no tile runs {name}: {failure}") from failure
    remember(name, min(times, key=lambda plan: times[plan]))
    return times


def remember(name: str, best: Plan) -> None:
    """Keeps a plan for this process and later ones."""
    _tuned()[name] = best
    path = _path()
    try:
        with source.locked(path):
            stored = {**_read(path), name: {**asdict(best.tile), "square": best.square}}
            source.replace(path, json.dumps(stored, indent=1, sort_keys=True))
    except (OSError, TimeoutError) as error:
        warnings.warn(f"fxsparse: cannot keep tuning in {path} ({error}); it serves this process only", stacklevel=2)


@functools.cache
def _tuned() -> dict[str, Plan]:
    return {name: _plan(fields) for name, fields in _read(_path()).items()}


def _plan(fields: dict[str, Any]) -> Plan:
    return Plan(Tile(**{name: value for name, value in fields.items() if name != "square"}), bool(fields["square"]))


def _path() -> Path:
    return source.cache_dir() / "tuning.json"


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The plans in a file; nothing where it is damaged."""
    try:
        found: dict[str, dict[str, Any]] = json.loads(path.read_text())
        for fields in found.values():
            _plan(fields)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(f"fxsparse: {path} cannot be read and is ignored: {error!r}", stacklevel=2)
        return {}
    return found
