"""The default tile of a kernel for a number of rows; tuning (`autotune`) may find a better one for a shape.

The suite compiles every default ahead of time for sm_80 and sm_90: none spills registers or needs more shared memory
than the device has.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxsparse.codegen.spec import Tile


@dataclass(frozen=True)
class Plan:
    """How a product is run.

    Attributes:
        tile: of each launch.
        square: a weight taller than wide is split along its rows into square blocks, one launch each, that write
            columns of one result (SLoPe, arXiv 2405.16325, section on tiling): less of the weight at a time competes
            for the L2 cache.
    """

    tile: Tile
    square: bool = False


DECODE, SMALL, LARGE = "decode", "small", "large"
SHAPES = ((16, DECODE), (64, SMALL))
"""Most rows of the input for which a regime is the default; beyond them it is LARGE."""

SHIPPED: dict[str, dict[str, Tile]] = {}
"""Default tiles of every kernel by regime; each file of `fxsparse.codegen.kernels` adds its own."""

HOPPER: dict[str, Tile] = {}
"""Tiles that stand for LARGE on an H100 and its like, by kernel: products there take wider ones."""

# Elements of 32 bits take twice the shared memory and registers, and their exact product runs on ordinary cores.
FLOAT32 = {
    DECODE: Tile(16, 32, 32, warps=4, stages=2),
    SMALL: Tile(32, 64, 32, warps=4, stages=2),
    LARGE: Tile(64, 64, 32, warps=8, stages=2),
}

# Dense operands come with addresses of their own to keep.
FLOAT32_DENSE = {**FLOAT32, LARGE: Tile(64, 64, 16, warps=8, stages=2)}


def regime(rows: int) -> str:
    """The regime of a number of rows."""
    return next((name for most, name in SHAPES if rows <= most), LARGE)


def default(kernel: str, rows: int, dtype: str = "bfloat16", *, aligned: bool = True, hopper: bool = False) -> Tile:
    """The shipped tile of a kernel for an input of ``rows`` rows.

    Sizes that are not multiples of 16 are not ``aligned``: elements are then copied one by one, which takes registers
    that the largest tiles do not have. ``hopper`` is a device of compute capability 9.0.
    """
    tiles = SHIPPED[kernel]
    name = regime(rows) if len(tiles) > 1 else LARGE
    if name == LARGE and not aligned and SMALL in tiles:
        name = SMALL
    if dtype == "float32" and tiles[LARGE].depth > 1:
        return (FLOAT32 if kernel.startswith("nm_linear") else FLOAT32_DENSE)[name]
    return HOPPER.get(kernel, tiles[name]) if hopper and aligned and name == LARGE else tiles[name]
