"""A product with a 2:4 weight on Hopper's sparse tensor cores: y = x W^T with W never expanded, then an epilogue.

    y [M, N] = x [M, K] W [N, K]^T

The kernel is written in Gluon and calls ``wgmma.sp`` (`wgmma_sp`). Its warps have three roles:

    producer       one warp lets TMA copy W, x and metadata of step after step into a ring of buffers
    two consumers  four warps each multiply, each for 64 of a tile's 128 columns of y

    full[s]    the copies of buffer s have landed             producer -> consumers
    empty[s]   both consumers have read buffer s              consumers -> producer

Programs are persistent: there is one for each multiprocessor, and it computes tile after tile while the producer runs
ahead. Where there are fewer tiles than multiprocessors, each tile's depth is split into parts: a part's sums go to
memory, and the part that arrives last adds all of them, in the order of the parts, so that results do not depend on
which one it is.

A low-rank branch beside the product, (x down^T) up^T, takes some more steps of the same ring. x down^T is given; its
columns and those of ``up``, 32 at a time, lie where x and W's values do.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxsparse.codegen.epilogue import Epilogue
from fxsparse.codegen.kernels.sparse_tensor_core_linear import unsupported_sparse
from fxsparse.codegen.launching import device_of, dtype_of, if_present, rows_of
from fxsparse.codegen.loaded import kernel
from fxsparse.codegen.spec import Argument, Spec, Tile
from fxsparse.codegen.split import multiprocessors, workspace
from fxsparse.codegen.template import fill, optional, parameters
from fxsparse.codegen.wgmma_sp import E_STEP, FEATURES, STEP, W_STEP, Ring, copied_to
from fxsparse.errors import OptionError

WGMMA: dict[int, Tile] = {
    8: Tile(8, FEATURES, STEP, stages=8),
    16: Tile(16, FEATURES, STEP, stages=8),
    32: Tile(32, FEATURES, STEP, stages=8),
    64: Tile(64, FEATURES, STEP, stages=8),
    128: Tile(128, FEATURES, STEP, stages=6),
    256: Tile(256, FEATURES, STEP, stages=4),
}
"""Shipped tiles by their rows. What is in flight, 80 to 170 KB, is more than DRAM needs to be busy."""

CAPABILITY = 9, 0
"""The compute capability that has the instruction, and no other has."""

MOST_PARTS = 32
_CHUNK = 32  # rows of y that an epilogue takes at once: their sums pass through shared memory


@dataclass(frozen=True)
class SparseWgmmaLinear(Spec):
    """The kernel; its tile's rows are along M, its columns along N, its depth along K.

    Attributes:
        split: the depth is computed in parts.
        epilogue: what follows the product.
        low_rank: a branch is added to the product, from ``hidden [M, R]``, which is x down^T, and ``up [N, R]``.
    """

    gluon: ClassVar[bool] = True
    relies_on_ptx: ClassVar[bool] = True

    split: bool = False
    epilogue: Epilogue = field(default_factory=Epilogue)
    low_rank: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        tile = self.tile
        if self.dtype == "float32":
            raise OptionError("sparse tensor cores take bfloat16 and float16, not float32")
        if (tile.columns, tile.depth, tile.warps) != (FEATURES, STEP, 4) or not 8 <= tile.rows <= 256:
            raise OptionError(f"tile {tile} is none of 8 to 256 rows x {FEATURES} x {STEP}, 4 warps")
        if tile.stages < 2:
            raise OptionError(f"tile {tile} needs 2 stages or more")

    @property
    def ring(self) -> Ring:
        return Ring(self.tile.rows, self.tile.stages)

    @property
    def name(self) -> str:
        return f"sparse_wgmma_linear_{self.short_dtype}"

    @property
    def arguments(self) -> tuple[Argument, ...]:
        return (
            Argument("values", f"tensordesc<{self.short_dtype}[{FEATURES}, {STEP // 2}]>"),
            Argument("x", f"tensordesc<{self.short_dtype}[{self.tile.rows}, {STEP}]>"),
            Argument("metadata", f"tensordesc<i32[{E_STEP // 4}]>"),
            *self._branch_arguments,
            Argument("y", self.pointer),
            *self._split_arguments,
            *self.epilogue.arguments(self.pointer),
            *(Argument(name, "i32") for name in ("M", "N", "K", "y_stride")),
        )

    @property
    def _split_arguments(self) -> tuple[Argument, ...]:
        some = Argument("sums", "*fp32"), Argument("arrived", "*i32"), Argument("parts", "i32")
        return some if self.split else ()

    @property
    def _branch_arguments(self) -> tuple[Argument, ...]:
        some = (
            Argument("up", f"tensordesc<{self.short_dtype}[{FEATURES}, {STEP // 2}]>"),
            Argument("hidden", f"tensordesc<{self.short_dtype}[{self.tile.rows}, {STEP}]>"),
            Argument("R", "i32"),
        )
        return some if self.low_rank else ()

    def types(self) -> dict[str, str]:
        """As the compiler takes them: a descriptor with the layout that it copies to."""
        w, x, metadata = shared_layouts()
        layouts = {"values": w, "x": x, "metadata": metadata} | ({"up": w, "hidden": x} if self.low_rank else {})
        types = super().types()
        return types | {name: f"{types[name][:-1]},{layout!r}>" for name, layout in layouts.items()}

    def check(self, ptx: str) -> None:
        """Refuses a compiled kernel whose copies go elsewhere than where its products read."""
        places = tuple(copied_to(ptx)[:2])
        if places != self.ring.offsets():
            raise RuntimeError(
                f"{self.name}, {self.tile}: this version of Triton puts W and x at {places} in shared memory, and not "
                f"at {self.ring.offsets()}, where wgmma.sp reads; options={{'lower': {{'nm_linear': "
                "'-sparse_wgmma'}} leaves the kernel out"
            )

    def render(self) -> str:
        tile, ring = self.tile, self.ring
        sizes = {
            "M_TILE": tile.rows,
            "N_TILE": tile.columns,
            "STAGES": tile.stages,
            "SUMS": tile.rows // 2,
            "CHUNK": min(tile.rows, _CHUNK),
            "STEP_BYTES": ring.step,
            **({"BRANCH_BYTES": W_STEP + ring.x_step} if self.low_rank else {}),
        }
        result = ["y", *(one.name for one in self.epilogue.arguments(self.pointer)), "M", "N", "y_stride"]
        split = [one.name for one in self._split_arguments]
        branch = [one.name for one in self._branch_arguments]
        rings = ["w_ring", "x_ring", "e_ring", "full", "empty"]
        return (
            fill(
                _SOURCE,
                title=self.epilogue.formula("x W^T + hidden up^T" if self.low_rank else "x W^T"),
                text=optional(self.low_rank, "hidden [M, R] is x down^T of a low-rank branch, and up [N, R]."),
                dtype=self.dtype,
                spec=self.describe(),
                sizes="\n".join(f"{name} = gl.constexpr({size})" for name, size in sizes.items()),
                y_lanes="[4, 1], [16, 2]" if tile.rows == 8 else "[8, 1], [8, 4]",
                element=self.dtype,
                instructions=ring.instructions(self.dtype),
                constraints=ring.constraints(),
                dense=optional(self.low_rank, _dense(ring, self.dtype)),
                consume_branch=optional(self.low_rank, fill(_CONSUME_BRANCH, when=_WHEN[self.split])),
                produce_branch=optional(self.low_rank, fill(_PRODUCE_BRANCH, when=_WHEN[self.split])),
                group=str(tile.group),
                name=self.name,
                parameters=parameters(self.arguments),
                result=", ".join(result),
                chunks=_chunks(tile.rows, ", ".join(result)),
                consumed=", ".join([*rings[2:], *result, "K", *split, *branch[2:]]),
                produced=", ".join(["values", "x", "metadata", *rings, "M", "N", "K", *split[2:], *branch]),
                units="row_tiles * column_tiles * parts" if self.split else "row_tiles * column_tiles",
                unit=_PART if self.split else _WHOLE,
                add_parts=optional(self.split, _ADD_PARTS),
                finish_product=fill(_FINISH_PARTS if self.split else _FINISH, result=", ".join(result)),
                epilogue=self.epilogue.lines(
                    lang="gl",
                    column="columns[:, None]",
                    offset="y_rows[None, :]",
                    mask="exists",
                    column_mask="(columns < N)[:, None]",
                ),
            )
            + "\n"
        )


def _chunks(rows: int, result: str) -> str:
    """Statements that finish the sums ``product`` of a tile in chunks of rows."""
    pieces, lines, size = ["product"], [], rows
    while size > _CHUNK:
        names = [f"{piece}_{half}" for piece in pieces for half in (0, 1)]
        lines += [f"{piece}_0, {piece}_1 = halves(product={piece}, EIGHTS={size // 8})" for piece in pieces]
        pieces, size = names, size // 2
    lines += [
        f"finish({piece}, first_row + {number * size}, first_column, {result})" for number, piece in enumerate(pieces)
    ]
    return "\n".join(lines)


_SOURCE = '''
"""y = $title, W 2:4 on Hopper's sparse tensor cores, $dtype.

x [M, K], values [N, K / 2], metadata [K / 64, N / 64, 128] words, sizes rounded up, read by TMA; y [M, N]. K is a
multiple of 16. One warp lets copies run ahead, two times four warps multiply.
$text

Made by fxsparse.codegen from
$spec
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
synchronize = getattr(gl, "barrier", None) or gl.thread_barrier

$sizes

W_SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2))
X_SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
E_SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1))
BARRIERS = gl.constexpr(mbarrier.MBarrierLayout())
# A word of metadata, and all sums, of a thread: warp, lane, register.
E_LAYOUT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
SUMS_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 1, SUMS.value], [1, 32, 1], [4, 1, 1], [2, 1, 0]))
Y_LAYOUT = gl.constexpr(gl.BlockedLayout($y_lanes, [1, 4], [0, 1]))

WGMMA_SP = gl.constexpr(
$instructions
)
CONSTRAINTS = gl.constexpr(
    "$constraints"
)
$dense


@gluon.jit
def tile_of(tile, row_tiles, column_tiles):
    # $group tiles of rows at a time, so that what all programs read at once stays in the L2 cache
    group = tile // ($group * column_tiles)
    height = gl.minimum(row_tiles - group * $group, $group)
    inside = tile % ($group * column_tiles)
    return group * $group + inside % height, inside // height


@gluon.jit
def following(stage, phase):
    """The next buffer of the ring, and the parity of its turn."""
    wraps = stage == STAGES - 1
    return gl.where(wraps, 0, stage + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def halves(product, EIGHTS: gl.constexpr):
    """The sums of the first and of the last half of the rows."""
    product = gl.reshape(product, [4, 8, 4, 2, EIGHTS // 2, 2, 2])
    return gl.split(gl.permute(product, [0, 1, 2, 4, 5, 6, 3]))


@gluon.jit
def finish(product, first_row, first_column, $result):
    """Stores the sums of CHUNK rows and 64 columns."""
    # from (warp, g, t, 8 rows, 8 columns, pair) to (column, row)
    t = gl.reshape(product, [4, 8, 4, CHUNK // 8, 2, 2])
    t = gl.reshape(gl.permute(t, [0, 4, 1, 3, 2, 5]), [64, CHUNK])
    t = gl.convert_layout(t, Y_LAYOUT)
    columns = first_column + gl.arange(0, 64, gl.SliceLayout(1, Y_LAYOUT))
    rows = first_row + gl.arange(0, CHUNK, gl.SliceLayout(0, Y_LAYOUT))
    y_rows = rows.to(gl.int64)
    exists = (columns < N)[:, None] & (rows < M)[None, :]
    $epilogue
    gl.store(y + y_rows[None, :] * y_stride + columns[:, None], t.to(gl.$element), mask=exists)


@gluon.jit
def finish_tile(product, first_row, first_column, $result):
    $chunks


$add_parts
@gluon.jit
def consume(w: gl.constexpr, $consumed):
    row_tiles = gl.cdiv(M, M_TILE)
    column_tiles = gl.cdiv(N, N_TILE)
    steps = gl.cdiv(K, 64)
    stage = 0
    phase = 0
    for unit in range(gl.program_id(0), $units, gl.num_programs(0)):
        $unit
        row_tile, column_tile = tile_of(tile, row_tiles, column_tiles)
        product = gl.full([4, 32, SUMS], 0.0, gl.float32, SUMS_LAYOUT)
        for k in range(first, end):
            mbarrier.wait(full.index(stage), phase)
            e = e_ring.index(stage).slice(w * 128, 128, dim=0).load(E_LAYOUT)
            e = gl.convert_layout(gl.reshape(e, [4, 32, 1]), SUMS_LAYOUT, assert_trivial=True)
            product = gl.inline_asm_elementwise(
                WGMMA_SP, CONSTRAINTS, [e, 2 * stage + w, product], dtype=gl.float32, is_pure=False, pack=SUMS
            )
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = following(stage, phase)
        $consume_branch
        first_row = row_tile * M_TILE
        first_column = column_tile * N_TILE + w * 64
        $finish_product


@gluon.jit
def consume_first($consumed):
    consume(0, $consumed)


@gluon.jit
def consume_last($consumed):
    consume(1, $consumed)


@gluon.jit
def produce($produced):
    row_tiles = gl.cdiv(M, M_TILE)
    column_tiles = gl.cdiv(N, N_TILE)
    steps = gl.cdiv(K, 64)
    stage = 0
    phase = 0
    for unit in range(gl.program_id(0), $units, gl.num_programs(0)):
        $unit
        row_tile, column_tile = tile_of(tile, row_tiles, column_tiles)
        for k in range(first, end):
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(full.index(stage), STEP_BYTES)
            load(values, [column_tile * N_TILE, k * 32], full.index(stage), w_ring.index(stage))
            load(x, [row_tile * M_TILE, k * 64], full.index(stage), x_ring.index(stage))
            load(metadata, [(k * column_tiles + column_tile) * (N_TILE * 2)], full.index(stage), e_ring.index(stage))
            stage, phase = following(stage, phase)
        $produce_branch


@gluon.jit
def $name(
    $parameters
):
    w_ring = gl.allocate_shared_memory(gl.$element, [STAGES, N_TILE, 32], W_SHARED)
    x_ring = gl.allocate_shared_memory(gl.$element, [STAGES, M_TILE, 64], X_SHARED)
    e_ring = gl.allocate_shared_memory(gl.int32, [STAGES, N_TILE * 2], E_SHARED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIERS)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIERS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume_first, ($consumed)),
            (consume_last, ($consumed)),
            (produce, ($produced)),
        ],
        [4, 1],
        [232, 40],
    )
'''

_WHOLE = """
tile = unit
first = 0
end = steps
"""

_PART = """
tile = unit // parts
part = unit % parts
first = part * steps // parts
end = (part + 1) * steps // parts
"""

# The last part of a depth adds the branch.
_WHEN = {False: "gl.cdiv(R, 32)", True: "gl.where(part == parts - 1, gl.cdiv(R, 32), 0)"}

_CONSUME_BRANCH = """
for r in range($when):
    mbarrier.wait(full.index(stage), phase)
    product = gl.inline_asm_elementwise(
        WGMMA, DENSE_CONSTRAINTS, [2 * stage + w, product], dtype=gl.float32, is_pure=False, pack=SUMS
    )
    mbarrier.arrive(empty.index(stage), count=1)
    stage, phase = following(stage, phase)
"""

# Of the 64 columns of x down^T that are copied, the first 32 are read.
_PRODUCE_BRANCH = """
for r in range($when):
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.expect(full.index(stage), BRANCH_BYTES)
    load(up, [column_tile * N_TILE, r * 32], full.index(stage), w_ring.index(stage))
    load(hidden, [row_tile * M_TILE, r * 32], full.index(stage), x_ring.index(stage))
    stage, phase = following(stage, phase)
"""


def _dense(ring: Ring, dtype: str) -> str:
    return fill(_DENSE, instructions=ring.dense_instructions(dtype), constraints=ring.dense_constraints())


_DENSE = """
WGMMA = gl.constexpr(
$instructions
)
DENSE_CONSTRAINTS = gl.constexpr(
    "$constraints"
)
"""

_FINISH = "finish_tile(product, first_row, first_column, $result)"

_FINISH_PARTS = """
product, is_last = add_parts(product, (tile * 2 + w), part, sums, arrived, parts)
if is_last:
    finish_tile(product, first_row, first_column, $result)
"""

_ADD_PARTS = """
@gluon.jit
def add_parts(product, half_tile, part, sums, arrived, parts):
    \"\"\"Leaves a part's sums in memory. For the one that arrives last, those of all parts, added in their order.\"\"\"
    warp = gl.arange(0, 4, gl.SliceLayout(1, gl.SliceLayout(2, SUMS_LAYOUT)))[:, None, None]
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, SUMS_LAYOUT)))[None, :, None]
    register = gl.arange(0, SUMS, gl.SliceLayout(0, gl.SliceLayout(1, SUMS_LAYOUT)))[None, None, :]
    place = sums + half_tile.to(gl.int64) * parts * (SUMS * 128) + (register * 128 + warp * 32 + lane)
    gl.store(place + part * (SUMS * 128), product)
    synchronize()
    is_last = gl.atomic_add(arrived + half_tile, 1, sem="acq_rel") == parts - 1
    if is_last:
        product = gl.full([4, 32, SUMS], 0.0, gl.float32, SUMS_LAYOUT)
        for other in range(parts):
            product += gl.load(place + other * (SUMS * 128), cache_modifier=".cg")
        gl.store(arrived + half_tile, 0)  # for the next launch
    return product, is_last


"""


def shared_layouts() -> tuple[Any, Any, Any]:
    """Layouts of a step's W, x and metadata in shared memory, which TMA copies to."""
    from triton.experimental.gluon import language as gl

    return (
        gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2),
        gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2),
        gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1),
    )


# --- launching --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """How a product is cut into units of work.

    Attributes:
        rows: of a tile.
        parts: of a tile's depth.
        units: parts of tiles.
    """

    rows: int
    parts: int
    units: int


@functools.cache
def split(rows: int, columns: int, depth: int, multiprocessors: int) -> Split:
    """The quickest way to cut a product, by :func:`cycles`."""
    steps, fitting = -(-depth // STEP), min((size for size in WGMMA if size >= rows), default=max(WGMMA))
    sizes = {fitting} if rows <= 64 else {size for size in (64, 128, 256) if size <= fitting}
    most = max(1, min(MOST_PARTS, steps // 4))
    ways = [
        Split(size, parts, -(-rows // size) * -(-columns // FEATURES) * parts)
        for size in sorted(sizes, reverse=True)
        for parts in range(1, most + 1)
    ]
    return min(ways, key=lambda way: cycles(way, rows, steps, multiprocessors))


def cycles(way: Split, rows: int, steps: int, multiprocessors: int) -> float:
    """Clock cycles that a product takes on an H100, as far as its tiles' size and number tell.

    A step reads 17 KB of W and 256 bytes a row of x from shared memory, into which TMA writes 9 KB and 128 bytes a row,
    at 128 bytes a cycle. The L2 cache gives a multiprocessor about 40 bytes a cycle, and where W is read once DRAM
    gives each of 132 about 14.5.
    """
    shared, cached = 136 + 3 * way.rows, (W_STEP + E_STEP + 128 * way.rows) / 40
    dram = (W_STEP + E_STEP) / 14.5 / -(-rows // way.rows)
    begin_and_end = 700 + 8 * way.rows
    adding = 1500 + 26 * way.rows if way.parts > 1 else 0
    waves = -(-way.units // multiprocessors)
    return waves * (-(-steps // way.parts) * max(shared, cached, dram) + begin_and_end + adding)


def sparse_wgmma_linear(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None,
    *,
    steps: Sequence[str] = (),
    operands: Sequence[Tensor] = (),
    hidden: Tensor | None = None,
    up: Tensor | None = None,
    way: Split | None = None,
    blocks: int | None = None,
) -> Tensor:
    """y = x W^T + bias, then an epilogue; W is 2:4.

    Args:
        x: ``[..., in]``, bfloat16 or float16; ``in`` is a multiple of 16.
        values: ``[out, in / 2]``.
        metadata: int32, of :func:`~fxsparse.codegen.metadata.pack_wgmma_metadata`.
        bias: ``[out]``.
        steps: of :class:`Epilogue`.
        operands: the tensors its steps take, each ``[..., out]``.
        hidden, up: ``[..., r]`` and ``[out, r]``: hidden up^T is added to the product.
        way, blocks: instead of what :func:`split` finds, and of one program for each multiprocessor.

    Returns:
        ``[..., out]``, contiguous.

    Raises:
        OptionError: the dtype, shape or device has no kernel.
        RuntimeError: Triton placed buffers elsewhere than where the kernel reads.
    """
    reason = unsupported_sparse(x.dtype, x.shape[-1])
    if reason is not None:
        raise OptionError(reason)
    inputs, columns = rows_of(x), values.shape[0]
    rows, depth = inputs.shape
    y = x.new_empty(*x.shape[:-1], columns)
    if y.numel() == 0:
        return y
    others = [rows_of(operand) for operand in operands]
    if x.is_cuda and torch.cuda.get_device_capability(x.device) != CAPABILITY:
        raise OptionError(
            "wgmma.sp needs a GPU of compute capability {}.{}, which {} is not".format(*CAPABILITY, x.device)
        )
    blocks = blocks or multiprocessors(x.device)
    way = way or split(rows, columns, depth, blocks)
    epilogue = Epilogue(bias is not None, tuple(steps))
    spec = SparseWgmmaLinear(dtype_of(x), WGMMA[way.rows], way.parts > 1, epilogue, hidden is not None)
    with device_of(x):
        kernel(spec).launch(
            (min(way.units, blocks),),
            *_descriptors(spec, inputs, values, metadata),
            *([] if hidden is None or up is None else _branch(spec, hidden, up)),
            *(rows_of(y), *_workspace(way, x.device), *if_present(bias), *others),
            *(other.stride(0) for other in others),
            *(rows, columns, depth, columns),
        )
    return y


def _descriptors(spec: SparseWgmmaLinear, x: Tensor, values: Tensor, metadata: Tensor) -> list[Any]:
    """What TMA is told of W, x and the metadata."""
    w, rows, words = _layouts()
    return [
        _descriptor(_copied_by_tma(values), [FEATURES, STEP // 2], w),
        _descriptor(_copied_by_tma(x), [spec.tile.rows, STEP], rows),
        _descriptor(metadata.view(-1), [E_STEP // 4], words),
    ]


def _branch(spec: SparseWgmmaLinear, hidden: Tensor, up: Tensor) -> list[Any]:
    """What TMA is told of a low-rank branch, and its rank; columns of zeros make rows of whole 16 bytes."""
    (w, rows, _), rank = _layouts(), up.shape[1]
    hidden, up = (pad(matrix, (0, -rank % 8)) if rank % 8 else matrix for matrix in (rows_of(hidden), up))
    return [
        _descriptor(_copied_by_tma(up), [FEATURES, STEP // 2], w),
        _descriptor(_copied_by_tma(hidden), [spec.tile.rows, STEP], rows),
        up.shape[1],
    ]


def _descriptor(tensor: Tensor, box: list[int], layout: Any) -> Any:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), box, layout)


_layouts = functools.cache(shared_layouts)


def _copied_by_tma(matrix: Tensor) -> Tensor:
    """A matrix whose rows begin at multiples of 16 bytes."""
    fits = matrix.stride(1) == 1 and matrix.stride(0) % 8 == 0 and matrix.data_ptr() % 16 == 0
    return matrix if fits else matrix.contiguous() if matrix.data_ptr() % 16 == 0 else matrix.clone()


def _workspace(way: Split, device: torch.device) -> tuple[Tensor | int, ...]:
    """What the parts of tiles, half a tile at a time, are added through; empty where there are none."""
    if way.parts == 1:
        return ()
    return *workspace(way.units // way.parts * 2, way.parts, way.rows * FEATURES // 2, device), way.parts
