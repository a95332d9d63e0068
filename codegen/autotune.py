"""Tuning: measuring tiles for a shape on the device at hand, and remembering the fastest.

Nothing is measured unless :func:`measure` is called: a launch looks up the plan that an earlier tuning found, in this
process or in the file of the device (`store`), and takes the shipped default otherwise.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from fxsparse.codegen import store, tiles
from fxsparse.codegen.launching import dtype_of
from fxsparse.codegen.spec import Tile
from fxsparse.codegen.tiles import Plan
from fxsparse.errors import OptionError


def plan(
    kernel: str, rows: int, columns: int, depth: int, like: Tensor, n: int | None = None, m: int | None = None
) -> Plan:
    """How to run a product of this size on a tensor's device and dtype."""
    dtype = dtype_of(like)
    best = tuned(key(kernel, rows, columns, depth, dtype, n, m)) if like.is_cuda else None
    if best is not None:
        return best
    aligned = columns % 16 == 0 and depth % 16 == 0
    return Plan(tiles.default(kernel, rows, dtype, aligned=aligned, hopper=is_hopper(like.device)))


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether a device is a GPU of compute capability 9.0."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def key(
    kernel: str, rows: int, columns: int, depth: int, dtype: str, n: int | None = None, m: int | None = None
) -> str:
    """What tuning results are kept under; numbers of rows share one up to the next power of two."""
    bucket = 1 << max(0, rows - 1).bit_length()
    pattern = "" if n is None else f" {n}:{m}"
    return f"{kernel}{pattern} {dtype} {bucket}x{columns}x{depth}"


def tuned(name: str) -> Plan | None:
    """The plan that tuning remembered under a key; None if there is none."""
    row = _TABLE.row(name, "cuda")
    return None if row is None else _plan(frozenset(row.items()))


def candidates(
    kernel: str, rows: int, dtype: str = "bfloat16", *, tall: bool = False, hopper: bool = False
) -> list[Plan]:
    """Plans worth measuring for an input of ``rows`` rows.

    The shipped tiles of the kernel; for few rows also twice as many columns; for the gradient of a weight also half as
    many rows, which occupies more of a device where the weight is small; for a ``tall`` weight, of more rows than
    columns, also square blocks; on a ``hopper``, its own tile.
    """
    tried = [tiles.default(kernel, number, dtype) for number in (1, 64, 1 << 30)]
    if kernel.endswith(("grad_values", "grad_weight")):
        tried.append(replace(tried[-1], rows=tried[-1].rows // 2, warps=4))
    if rows <= 64 and kernel.startswith("nm_linear") and "grad" not in kernel:
        small = tried[0]
        tried.append(replace(small, columns=2 * small.columns, depth=small.depth // 2))
    if hopper and dtype != "float32" and kernel in tiles.HOPPER:
        tried.append(tiles.HOPPER[kernel])
    blocks = [False, True] if tall else [False]
    return [Plan(tile, square) for tile in dict.fromkeys(tried) for square in blocks]


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


_changes = itertools.count(1)
_latest = 0


def changes() -> int:
    """How often a plan was remembered in this process."""
    return _latest


def remember(name: str, best: Plan) -> None:
    """Keeps a plan for this process and later ones."""
    global _latest
    _latest = next(_changes)
    _TABLE.update(name, "cuda", {**asdict(best.tile), "square": best.square})


@functools.cache
def _plan(row: frozenset[tuple[str, Any]]) -> Plan:
    """The plan of a row's items; remembered, because every launch asks for one."""
    fields = dict(row)
    return Plan(square=bool(fields.pop("square")), tile=Tile(**fields))


def _is_row(row: Any) -> bool:
    try:
        _plan(frozenset(row.items()))
    except (AttributeError, TypeError, ValueError, KeyError):
        return False
    return True


_TABLE = store.Table("tiles", _is_row)
