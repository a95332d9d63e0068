"""A block of threads in the PTX emulator: its shared memory, its barriers, and the turns of its warps.

Warps run one after the other, each until it has to wait. If all wait for what none will do, that is a deadlock, and the
error says where each of them waits. Barriers hand over the clocks of `ptx_races`. TMA copies land at once, but count as
landed only for those who waited for their barrier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.support.ptx_races import Agent, Array, Shadow

SHARED = 232448
REGISTERS = 65536
BARRIERS = 64
KINDS = 3  # of agents of a warp: itself, its products and its copies in flight


class DeadlockError(RuntimeError):
    """All warps wait."""


@dataclass(frozen=True)
class Wait:
    """What a warp waits for."""

    text: str
    ready: Callable[[], bool]


@dataclass
class Meeting:
    """A barrier that warps meet at."""

    arrived: list[Any] = field(default_factory=list)
    turn: int = 0
    clock: Array | None = None


@dataclass
class Counted:
    """A barrier in shared memory (``mbarrier``): a phase ends when so many have arrived and all bytes have landed."""

    count: int
    pending: int
    agent: Agent
    bytes: int = 0
    phase: int = 0
    gathered: Array | None = None
    released: Array | None = None


@dataclass(frozen=True)
class Descriptor:
    """A tensor as TMA knows it: sizes and strides in elements, the last dimension first in coordinates."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    itemsize: int
    swizzle: int

    @property
    def parameters(self) -> list[Any]:
        """It as parameters of a kernel: the map, which is the object itself, then sizes and strides."""
        return [self, *self.shape, *self.strides]


class Block:
    """One block.

    Args:
        warps: number of warps.
        first: number of its first agent.
        agents: of all blocks that clocks tell apart.
        cell: bytes of shared memory that are told apart.
    """

    def __init__(self, warps: int, first: int, agents: int, cell: int = 1):
        self.warps, self.first, self.agents = warps, first, agents
        self.shared = np.zeros(SHARED, np.uint8)
        self.shadow = Shadow(SHARED, agents_of(warps), "shared", self.who, first, cell)
        self.meetings: dict[int, Meeting] = {}
        self.counted: dict[int, Counted] = {}
        per_thread = REGISTERS // (warps * 32) // 8 * 8
        self.pool = per_thread * warps * 32
        self.registers = [per_thread] * warps

    def who(self, number: int) -> str:
        local = number - self.first
        if not 0 <= local < agents_of(self.warps):
            return f"another block's agent {number}"
        if local >= KINDS * self.warps:
            return f"the copies of barrier {local - KINDS * self.warps}"
        kind, warp = divmod(local, self.warps)
        return (f"warp {warp}", f"warp {warp}'s products in flight", f"warp {warp}'s copies in flight")[kind]

    def agent(self, kind: int, warp: int) -> Agent:
        """Of a warp: itself (0), its products (1), its copies (2)."""
        return self._agent(kind * self.warps + warp)

    def _agent(self, local: int) -> Agent:
        return Agent(self.first + local, 1, np.zeros(self.agents, np.int64), in_order=local < self.warps)

    def run(self, warps: Sequence[Iterator[Wait]], order: Sequence[int]) -> None:
        """Runs warps in turn until all have ended."""
        waits: dict[int, Wait | None] = dict.fromkeys(order)
        while waits:
            moved = False
            for number in list(waits):
                wait = waits[number]
                if wait is not None and not wait.ready():
                    continue
                moved = True
                waits[number] = following = next(warps[number], None)
                if following is None:
                    del waits[number]
            if not moved:
                lines = "; ".join(f"warp {number} at {wait.text}" for number, wait in sorted(waits.items()) if wait)
                raise DeadlockError(f"no warp can go on: {lines}")

    # --- barriers -----------------------------------------------------------------------------------------------------

    def meet(self, agent: Agent, barrier: int, threads: int) -> Wait | None:
        """``bar.sync``: a warp waits until so many threads have come."""
        meeting = self.meetings.setdefault(barrier, Meeting())
        turn = meeting.turn
        meeting.arrived.append(agent)
        if 32 * len(meeting.arrived) == threads:
            clock = np.maximum.reduce([other.clock for other in meeting.arrived])
            for other in meeting.arrived:
                clock[other.number] = max(clock[other.number], other.tick)
            for other in meeting.arrived:
                np.copyto(other.clock, clock)
                other.tick += 1
            self.meetings[barrier] = Meeting(turn=turn + 1)
            return None
        text = f"barrier {barrier}, {len(meeting.arrived)} of {threads // 32} warps there"
        return Wait(text, lambda: self.meetings[barrier].turn != turn)

    def make(self, address: int, count: int) -> None:
        """``mbarrier.init``."""
        number = len(self.counted) if address not in self.counted else list(self.counted).index(address)
        self.counted[address] = Counted(count, count, self._agent(KINDS * self.warps + number))

    def arrive(self, agent: Agent, address: int, count: int, expected: int = 0) -> None:
        """``mbarrier.arrive``: hands a clock over, and announces bytes that copies will bring."""
        barrier = self._barrier(address)
        barrier.pending -= count
        if barrier.pending < 0:
            raise RuntimeError(f"more arrivals at the barrier at {address:#x} than its {barrier.count}")
        barrier.bytes += expected
        clock = agent.clock.copy()
        clock[agent.number] = agent.tick
        agent.tick += 1
        self._gather(barrier, clock)

    def wait(self, agent: Agent, address: int, parity: int) -> Wait | None:
        """``mbarrier.try_wait.parity``, again and again: until the phase of that parity has ended."""
        barrier = self._barrier(address)
        if barrier.phase % 2 != parity:
            return None
        text = f"the barrier at {address:#x}, phase {barrier.phase}, for parity {parity}"
        return Wait(
            f"{text} ({barrier.pending} arrivals and {barrier.bytes} bytes missing)",
            lambda: barrier.phase % 2 != parity,
        )

    def acquire(self, agent: Agent, address: int) -> None:
        """Takes over the clock of the last phase that ended."""
        released = self._barrier(address).released
        if released is not None:
            np.maximum(agent.clock, released, out=agent.clock)

    def _barrier(self, address: int) -> Counted:
        if address not in self.counted:
            raise RuntimeError(f"no barrier was made at {address:#x}")
        return self.counted[address]

    def _gather(self, barrier: Counted, clock: Array) -> None:
        barrier.gathered = clock if barrier.gathered is None else np.maximum(barrier.gathered, clock)
        if barrier.pending == 0 and barrier.bytes == 0:
            barrier.released, barrier.gathered = barrier.gathered, None
            barrier.pending = barrier.count
            barrier.phase += 1

    def resize(self, warp: int, count: int) -> Wait | None:
        """``setmaxnreg``: gives registers back, or waits until there are enough."""

        def fits() -> bool:
            return 32 * (sum(self.registers) - self.registers[warp] + count) <= self.pool

        if not fits():
            return Wait(f"setmaxnreg {count}", fits)
        self.registers[warp] = count
        return None

    # --- TMA ----------------------------------------------------------------------------------------------------------

    def load(
        self, memory: Any, agent: Agent, what: Descriptor, coordinates: Sequence[int], target: int, address: int
    ) -> None:
        """Copies a box into shared memory; what lies outside of the tensor is 0."""
        barrier, first = self._barrier(address), coordinates[::-1]
        copier = barrier.agent
        np.copyto(copier.clock, agent.clock)
        copier.clock[agent.number] = agent.tick
        copier.tick += 1
        index = np.indices(what.box).reshape(len(what.box), -1).T + np.array(first)
        inside = ((index >= 0) & (index < np.array(what.shape))).all(1)
        offsets = (index @ np.array(what.strides)) * what.itemsize
        within = np.arange(what.itemsize)
        data = np.zeros((len(index), what.itemsize), np.uint8)
        data[inside] = memory.fetch(copier, what.address + offsets[inside, None] + within)
        places = swizzled(target + np.arange(data.size), what.swizzle)
        if what.box[-1] * what.itemsize != (what.swizzle or what.box[-1] * what.itemsize):
            raise NotImplementedError("a box whose rows are not as wide as the swizzle")
        self.shadow.write(copier, places)
        self.shared[places] = data.reshape(-1)
        barrier.bytes -= data.size
        clock = copier.clock.copy()
        clock[copier.number] = copier.tick
        self._gather(barrier, clock)


def agents_of(warps: int) -> int:
    return KINDS * warps + BARRIERS


def swizzled(address: Array, width: int) -> Array:
    """Addresses in shared memory whose pieces of 16 bytes are swapped within lines of 128."""
    return address ^ (((address >> 7) & max(width // 16 - 1, 0)) << 4)
