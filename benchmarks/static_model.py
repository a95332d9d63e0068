"""A model of a kernel's time from its machine code: which unit of a multiprocessor is busy for how long.

A step of the main loop needs, for every block that a multiprocessor holds at once,

    issue    its instructions, one a cycle on each of four schedulers
    integer  its integer instructions, two cycles each
    tensor   its matrix products, at the device's rate
    shared   what it reads and writes of shared memory, 128 bytes a cycle
    L2       the bytes of its tiles
    DRAM     those of them that no other block has just read, at the bandwidth that the bytes in flight sustain

and takes as long as the busiest, but not less than what a block does one after the other. Rates are the manufacturer's;
those marked so are estimates. A kernel is taken to reach 90 % of any of them, and the library's dense product 90 % of
the bandwidth and what was published of the tensor cores' rate (85 % on an A100; 75 % on an H100, whose clock falls
under that load). So ratios say more than times, and neither says more than a measurement.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from fxsparse.codegen.aot import Resources, compile_for, resources
from fxsparse.codegen.kernels.nm_linear_grad_values import NMGradValues
from fxsparse.codegen.kernels.sparse_wgmma_linear import SparseWgmmaLinear
from fxsparse.codegen.sass import ALU, SHARED, Loop, main_loop
from fxsparse.codegen.spec import Spec

REACHED = 0.9
FIXED = 2000.0  # cycles of a launch before and after its main loops: an estimate
LATENCY = 800.0  # cycles until DRAM answers: an estimate
ADDING = 1500.0  # cycles until the parts of a split product have been added: an estimate


@dataclass(frozen=True)
class Machine:
    """A GPU.

    Attributes:
        clock: of the multiprocessors, Hz.
        bandwidth: of DRAM, bytes a second.
        l2: bytes a cycle to a multiprocessor; an estimate.
        rate: multiply-adds of 16-bit numbers a cycle and multiprocessor.
        synchronous: share of it that ``mma.sync`` reaches; an estimate.
        library: share of it that dense products of the library reach.
    """

    name: str
    capability: int
    multiprocessors: int
    clock: float
    bandwidth: float
    l2: float
    rate: int
    synchronous: float
    library: float


MACHINES = (
    Machine("A100", 80, 108, 1.41e9, 2.04e12, 32, 1024, 0.95, 0.85),
    Machine("H100", 90, 132, 1.755e9, 3.35e12, 40, 2048, 0.6, 0.75),
    Machine("H200", 90, 132, 1.755e9, 4.8e12, 40, 2048, 0.6, 0.75),
)


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: its spec, what it uses, its main loop, and whether a ``wgmma`` is left in flight there while
    the next step begins."""

    spec: Spec
    resources: Resources
    loop: Loop
    overlaps: bool

    @classmethod
    def of(cls, spec: Spec, capability: int) -> Kernel:
        return _compiled(spec, capability)

    @property
    def warps(self) -> int:
        """Warps of a block that multiply."""
        return 8 if isinstance(self.spec, SparseWgmmaLinear) else self.spec.tile.warps

    @property
    def operands(self) -> tuple[float, float]:
        """Bytes of a step's tile of the weight, kept values and their positions, and of the other operand. Those of a
        gradient of values are both dense."""
        tile = self.spec.tile
        an_element = 2.0 if isinstance(self.spec, NMGradValues) else 1.125
        return tile.columns * tile.depth * an_element, tile.rows * tile.depth * 2.0

    @property
    def resident(self) -> int:
        """Blocks that a multiprocessor holds at once."""
        threads = 384 if isinstance(self.spec, SparseWgmmaLinear) else 32 * self.spec.tile.warps
        by_registers = 65536 // (-(-self.resources.registers // 8) * 8 * threads)
        limit = 164 * 1024 if self.resources.shared <= 164 * 1024 else 228 * 1024
        return max(1, min(by_registers, limit // (self.resources.shared + 1024), 2048 // threads))


@functools.cache
def _compiled(spec: Spec, capability: int) -> Kernel:
    compiled = compile_for(spec, capability)
    overlaps = re.search(r"wgmma\.wait_group\S+\s+[1-9]", compiled.asm["ptx"]) is not None
    return Kernel(spec, resources(compiled), main_loop(compiled), overlaps)


@dataclass(frozen=True)
class Prediction:
    """What the model says of a product.

    Attributes:
        blocks: of work, parts of tiles counted.
        in_flight: bytes on their way to a multiprocessor at once.
        bound: the busiest unit, or ``latency``.
        ratio: of a dense product's time to this one's.
    """

    blocks: int
    in_flight: float
    bound: str
    microseconds: float
    ratio: float


def predict(kernel: Kernel, machine: Machine, size: tuple[int, int, int], parts: int = 1) -> Prediction:
    """Predicts a product of ``size`` rows, columns and depth.

    Blocks come in waves of as many as the device holds; the rest, a last wave, has DRAM for itself.
    """
    rows, columns, depth = size
    tile, sms = kernel.spec.tile, machine.multiprocessors
    row_tiles = -(-rows // tile.rows)
    blocks = row_tiles * -(-columns // tile.columns) * parts
    full, rest = divmod(blocks, sms * kernel.resident)
    waves = [(_wave(kernel, machine, row_tiles, sms * kernel.resident), full)] if full else []
    waves += [(_wave(kernel, machine, row_tiles, rest), 1)] if rest else []
    steps, ends = -(-depth // tile.depth) / parts, 600 + 4 * tile.rows + (ADDING + 26 * tile.rows) * (parts > 1)
    microseconds = (FIXED + sum(times * (steps * wave.step + ends) for wave, times in waves)) / machine.clock * 1e6
    in_flight, bound = waves[0][0].in_flight, waves[0][0].bound
    return Prediction(blocks, in_flight, bound, microseconds, dense(machine, size) / microseconds)


@dataclass(frozen=True)
class _Wave:
    """Blocks that run at once: bytes on their way to the busiest multiprocessor, its busiest unit and the cycles of a
    step."""

    in_flight: float
    bound: str
    step: float


def _wave(kernel: Kernel, machine: Machine, row_tiles: int, blocks: int) -> _Wave:
    weight, others = kernel.operands
    ahead = (kernel.spec.tile.stages - 1) * (weight + others)
    held = -(-blocks // machine.multiprocessors)
    units = {unit: cycles / REACHED for unit, cycles in _units(kernel, machine).items()}
    units["L2"] = (weight + others) / machine.l2 / REACHED
    dram = min(machine.bandwidth * REACHED / machine.clock / blocks, ahead / LATENCY)
    busy = {unit: held * cycles for unit, cycles in units.items()} | {"DRAM": weight / row_tiles / dram}
    bound = max(busy, key=lambda unit: busy[unit])
    alone = _alone(kernel, units)
    return _Wave(held * ahead, bound if busy[bound] >= alone else "latency", max(busy[bound], alone))


def one_pass(kernel: Kernel, machine: Machine, rows: int, columns: int, bytes_: float) -> float:
    """Microseconds of a kernel without a main loop, each program of which computes one tile of ``rows x columns``.

    Args:
        kernel: the kernel.
        machine: the device.
        rows, columns: of what is computed.
        bytes_: that it moves through DRAM, for each of its elements.
    """
    tile = kernel.spec.tile
    waves = rows * columns / (tile.rows * tile.columns) / machine.multiprocessors
    units = _issued(kernel)
    busy = max(waves * max(units.values()), by_bytes(machine, rows * columns * bytes_) * REACHED)
    return (FIXED + LATENCY + busy / REACHED) / machine.clock * 1e6


def by_bytes(machine: Machine, bytes_: float) -> float:
    """Cycles that DRAM takes to move bytes."""
    return bytes_ / (REACHED * machine.bandwidth) * machine.clock


def pointwise(machine: Machine, bytes_: float) -> float:
    """Microseconds of a launch that moves bytes and does little else."""
    return (FIXED + by_bytes(machine, bytes_)) / machine.clock * 1e6


def dense(machine: Machine, size: tuple[int, int, int]) -> float:
    """Microseconds of a dense product by the library: its best tile, split along the depth where that helps."""
    rows, columns, depth = size
    moved = 2 * (columns * depth + rows * depth + rows * columns)
    ways = []
    for tall, wide in ((256, 128), (128, 128), (128, 64), (64, 64)):
        tiles = -(-rows // tall) * -(-columns // wide)
        for parts in (1, 2, 3, 4, 8):
            waves = -(-tiles * parts // machine.multiprocessors)
            busy = tall * wide * depth / parts / (machine.rate * machine.library)
            ways.append(waves * (busy + 600 + 4 * tall + ADDING * (parts > 1)))
    return (FIXED + max(by_bytes(machine, moved) + 600, min(ways))) / machine.clock * 1e6


def _units(kernel: Kernel, machine: Machine) -> dict[str, float]:
    """Cycles that a step of a block takes of each unit of a multiprocessor."""
    loop, warps, tile = kernel.loop, kernel.warps, kernel.spec.tile
    products = [name for name in loop.instructions if re.match("HMMA|HGMMA", name)]
    work, tensor, reads = 0.0, 0.0, 0.0
    for name in products:
        adds, group, read = _product(name)
        work += adds * (1 if group else warps) * (warps / 4 if group else 1)
        speed = machine.rate * (1.0 if group else machine.synchronous)
        doubled = 2 if ".SP" in name else 1
        tensor += adds / doubled / speed * (warps / 4 if group else warps)
        reads += read * (warps / 4)
    steps = work / (tile.rows * tile.columns * tile.depth) if work else 1.0
    shared = (reads / 128 + 3.0 * loop.count(SHARED) * warps) / steps + sum(kernel.operands) / 128
    issued = {unit: cycles / steps for unit, cycles in _issued(kernel).items()}
    return issued | {"tensor": tensor / steps, "shared": shared}


def _issued(kernel: Kernel) -> dict[str, float]:
    """Cycles that the instructions of a block's main loop take to issue, and its integer instructions to run."""
    loop, warps = kernel.loop, kernel.warps
    return {"issue": len(loop.instructions) * warps / 4, "integer": 2.0 * loop.count(ALU) * warps / 4}


def _product(name: str) -> tuple[float, bool, float]:
    """Multiply-adds of a matrix product as if nothing was pruned, whether four warps compute it together, and the bytes
    of shared memory that it reads itself."""
    if name.startswith("HGMMA"):
        m, n, k = map(int, re.search(r"\.(\d+)x(\d+)x(\d+)", name).groups())  # type: ignore[union-attr]
        kept = k // 2 if ".SP" in name else k
        return m * n * k, True, 2.0 * (m * kept + n * k)
    return 16 * 8 * (32 if ".SP" in name else 16), False, 0.0


def _alone(kernel: Kernel, units: dict[str, float]) -> float:
    """Cycles of a step of one block that no other hides: what waits for the last one's result."""
    if isinstance(kernel.spec, SparseWgmmaLinear):
        return 200 + max(units["tensor"], units["shared"]) / 2  # one of two groups of warps
    waits = LATENCY if kernel.loop.named(r"LDG(\.|$)") else 60.0
    issued = waits + max(units["issue"], units["integer"])
    if kernel.overlaps:
        return max(issued, units["tensor"])
    return issued + (units["tensor"] if kernel.loop.named("HGMMA") else 0.0)
