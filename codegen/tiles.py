"""Which tile a kernel runs with: a result of tuning where there is one, else a default for the number of rows.

`SHIPPED` lists every default, and the suite compiles each ahead of time for sm_80 and sm_90: none spills registers or
needs more shared memory than the device has.
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

SHIPPED: dict[str, dict[str, Tile]] = {
    "nm_linear": {
        DECODE: Tile(16, 32, 256, warps=4, stages=3),
        SMALL: Tile(64, 64, 64, warps=4, stages=3),
        LARGE: Tile(128, 128, 64, warps=8, stages=3),
    },
    "nm_linear_low_rank": {
        DECODE: Tile(16, 32, 128, warps=4, stages=3),
        SMALL: Tile(64, 64, 64, warps=4, stages=3),
        LARGE: Tile(128, 128, 32, warps=8, stages=3),
    },
    "nm_linear_grad_input": {
        DECODE: Tile(16, 64, 64, warps=4, stages=3),
        SMALL: Tile(64, 64, 64, warps=4, stages=3),
        LARGE: Tile(128, 128, 32, warps=8, stages=3),
    },
    "nm_linear_grad_values": {LARGE: Tile(128, 64, 64, warps=8, stages=3)},
    "gather_linear": {
        DECODE: Tile(16, 64, 64, warps=4, stages=4),
        SMALL: Tile(64, 64, 32, warps=4, stages=3),
        LARGE: Tile(128, 128, 32, warps=8, stages=3),
    },
    "gather_linear_grad_weight": {LARGE: Tile(128, 128, 32, warps=8, stages=3)},
    "demux_linear": {
        DECODE: Tile(16, 64, 64, warps=4, stages=4),
        SMALL: Tile(64, 64, 64, warps=4, stages=3),
        LARGE: Tile(64, 128, 32, warps=8, stages=3),
    },
    "nm_prune": {LARGE: Tile(16, 128, 1, warps=4, stages=1)},
    "mux": {LARGE: Tile(16, 128, 1, warps=4, stages=1)},
}

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


def default(kernel: str, rows: int, dtype: str = "bfloat16", *, aligned: bool = True) -> Tile:
    """The shipped tile of a kernel for an input of ``rows`` rows.

    Sizes that are not multiples of 16 are not ``aligned``: elements are then copied one by one, which takes registers
    that the largest tiles do not have.
    """
    tiles = SHIPPED[kernel]
    name = regime(rows) if len(tiles) > 1 else LARGE
    if name == LARGE and not aligned and SMALL in tiles:
        name = SMALL
    if dtype == "float32" and tiles[LARGE].depth > 1:
        return (FLOAT32 if kernel.startswith("nm_linear") else FLOAT32_DENSE)[name]
    return tiles[name]


SPARSE: dict[str, tuple[Tile, int, int]] = {
    DECODE: (Tile(16, 128, 128, warps=4, stages=3), 16, 32),
    SMALL: (Tile(64, 64, 64, warps=4, stages=4), 32, 32),
    LARGE: (Tile(128, 128, 64, warps=4, stages=3), 64, 64),
    "large with steps": (Tile(128, 128, 64, warps=8, stages=3), 64, 32),
}
"""Tiles on sparse tensor cores, each with the rows and columns of one warp. The largest part of a warp leaves no
registers for pointwise steps, so with them the same tile takes more warps."""


def sparse(rows: int, steps: bool) -> tuple[Tile, int, int]:
    """The shipped tile on sparse tensor cores for ``rows`` rows, and the rows and columns of a warp."""
    name = regime(rows)
    return SPARSE["large with steps" if steps and name == LARGE else name]
