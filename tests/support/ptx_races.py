"""Which accesses to memory are ordered: vector clocks of agents, and a record of the last accesses to every cell.

An agent is what acts on its own: a warp, the products that a warp has in flight, its asynchronous copies, or the copies
that complete on one barrier. A clock holds, for every agent, up to which of its ticks all is known to have happened. A
barrier hands over clocks. Two accesses to a cell of which one writes must be ordered:

    the tick of the earlier access  <=  the clock of the later one, at the earlier one's agent

Nothing is known here of the proxies that generic and asynchronous accesses go through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


class RaceError(RuntimeError):
    """An access that no barrier orders after an earlier one, or a read of what nobody wrote."""


@dataclass
class Agent:
    """Who accesses memory.

    Attributes:
        number: of its place in clocks.
        tick: of its next access.
        clock: what has happened before it.
        in_order: whether its accesses follow each other; those of copies and products in flight do not.
    """

    number: int
    tick: int
    clock: Array
    in_order: bool = True


class Shadow:
    """The last accesses to a memory.

    Args:
        size: bytes.
        agents: number of agents; 0 keeps no reads.
        first: number of the first of them.
        name: for messages.
        who: names an agent.
    """

    def __init__(self, size: int, agents: int, name: str, who: Callable[[int], str], first: int = 0, cell: int = 1):
        self.cell, cells = cell, -(-size // cell)
        self.writer = np.zeros(cells, np.int32)
        self.written = np.zeros(cells, np.int32)
        self.exists = np.zeros(cells, bool)
        self.reads = np.zeros((agents, cells), np.int32)
        self.name, self.who, self.first = name, who, first

    def read(self, agent: Agent, places: Array) -> None:
        """Records a read of bytes at some places, all at once."""
        cells = self._cells(places)
        if not self.exists[cells].all():
            where = cells[~self.exists[cells]][0] * self.cell
            raise RaceError(f"{self.who(agent.number)} reads {self.name} memory at {where:#x}, which nobody wrote")
        self._after_writes(agent, cells, "reads")
        if len(self.reads):
            self.reads[agent.number - self.first, cells] = agent.tick

    def write(self, agent: Agent, places: Array, changes: Array | None = None) -> None:
        """Records a write of bytes at some places. Where it ``changes`` nothing, another's write of the same is right
        too: compilers let all threads store what all of them know."""
        cells = self._cells(places)
        self._after_writes(agent, cells if changes is None else self._cells(places[changes]), "writes")
        if len(self.reads):
            known = agent.clock[self.first : self.first + len(self.reads), None]
            late = self.reads[:, cells] > known
            late[agent.number - self.first] = False
            if late.any():
                other, cell = (int(found[0]) for found in np.nonzero(late))
                raise RaceError(
                    f"{self.who(agent.number)} overwrites {self.name} memory at {cells[cell] * self.cell:#x}, which "
                    f"{self.who(other + self.first)} may still read: no barrier lies between"
                )
            self.reads[:, cells] = 0
        self.writer[cells], self.written[cells], self.exists[cells] = agent.number, agent.tick, True

    def settle(self) -> None:
        """Takes everything so far as having happened before what follows."""
        self.written[:] = 0

    def _after_writes(self, agent: Agent, cells: Array, verb: str) -> None:
        writer = self.writer[cells]
        late = self.written[cells] > agent.clock[writer]
        if agent.in_order:
            late &= writer != agent.number
        if late.any():
            cell, other = cells[late][0], int(writer[late][0])
            raise RaceError(
                f"{self.who(agent.number)} {verb} {self.name} memory at {cell * self.cell:#x}, which {self.who(other)} "
                "writes: no barrier lies between"
            )

    def _cells(self, places: Array) -> Array:
        return np.unique(places.reshape(-1) // self.cell)
