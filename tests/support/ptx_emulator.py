"""Runs the PTX that Triton emits for a matrix product, on numpy, so that kernels can be checked without a GPU.

Warps of a block run in turn, each until it has to wait (`ptx_block`). Every access to memory is checked against all
others: one that no barrier orders after another warp's is an error, whatever the turns were, and so are a read of what
nobody wrote and a deadlock (`ptx_races`). Asynchronous copies of ``cp.async`` land as late as they may, when the thread
that issued them waits for them. Not modelled: instructions it does not know and threads of a warp that branch
differently, which raise; timing; and fences between generic and asynchronous accesses.

Semantics follow NVIDIA's PTX ISA: fragments of ``mma.m16n8k16``, ``mma.sp.m16n8k32`` and ``wgmma.sp.m64nNk32``,
``ldmatrix``, ``cp.async``, TMA, ``mbarrier``, ``setmaxnreg``. Blocks run one after the other; what one leaves for
another must be ordered by atomic operations.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.support.ptx_block import Block, Descriptor, Wait, agents_of, swizzled
from tests.support.ptx_numbers import (
    LANE,
    LANES,
    U64,
    Array,
    as_bytes,
    as_float,
    as_half,
    as_integer,
    as_raw,
    as_signed,
    check,
    compute,
    convert,
    expand,
    parts_of,
)
from tests.support.ptx_races import Agent, Shadow

_BASE = 1 << 20  # address of the first byte of memory: null pointers and small offsets are caught
_MAPS = 1 << 30  # address of the first parameter, which a tensor map may be
_G, _T = LANE >> 2, LANE & 3


@dataclass(frozen=True)
class Instruction:
    opcode: str
    args: tuple[str, ...]
    predicate: str = ""
    negated: bool = False


class Memory:
    """Device memory of a fixed size."""

    def __init__(self, size: int):
        self.bytes = np.zeros(size, np.uint8)
        self.shadow = Shadow(size, 0, "global", lambda number: f"agent {number}")
        self.clocks: dict[int, Array] = {}  # of what those left who added to an address
        self.used = 0

    def put(self, array: Array, *, written: bool = True) -> int:
        """Copies an array in and returns its address, a multiple of 256. One that is not ``written`` is for kernels to
        write before they read it."""
        data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        start = self.used
        self.bytes[start : start + data.size] = data
        self.shadow.exists[start : start + data.size] = written
        self.used = -(-(start + data.size) // 256) * 256
        return _BASE + start

    def get(self, address: int, dtype: type, shape: Sequence[int]) -> Array:
        """A copy of the array at an address."""
        start, size = address - _BASE, int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.bytes[start : start + size].view(dtype).reshape(shape).copy()

    def fetch(self, agent: Agent, addresses: Array) -> Array:
        """Bytes at some addresses."""
        where = addresses - _BASE
        check(where, len(self.bytes), "global")
        self.shadow.read(agent, where)
        return self.bytes[where]

    def store(self, agent: Agent, addresses: Array, data: Array) -> None:
        where = addresses - _BASE
        check(where, len(self.bytes), "global")
        self.shadow.write(agent, where, self.bytes[where] != data)
        self.bytes[where] = data

    def add(self, agent: Agent, address: int, value: int) -> int:
        """An atomic addition of 32 bits that acquires and releases; returns what was there."""
        where = address - _BASE
        cell, clock = self.bytes[where : where + 4].view(np.uint32), self.clocks.get(where)
        old = int(cell[0])
        cell[0] = (old + value) & 0xFFFFFFFF
        if clock is not None:
            np.maximum(agent.clock, clock, out=agent.clock)
        self.clocks[where] = agent.clock.copy()
        self.clocks[where][agent.number] = agent.tick
        agent.tick += 1
        return old


class Program:
    """A parsed kernel."""

    def __init__(self, ptx: str):
        body = ptx[ptx.index(".entry") :]
        threads = re.search(r"\.reqntid (\d+)", body)
        self.warps = int(threads[1]) // LANES if threads else 0  # of a block, those that the compiler adds included
        body = _inside(re.sub(r"//[^\n]*", "", body))
        self.cell = 1 if re.search(r"st\.shared\S*\.[bsu]8\b", body) else 2  # bytes that warps write on their own
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        targets = re.compile(r"(\$?[\w$]+):\s*\.branchtargets([^;]*);")
        self.tables = {one[1]: [name.strip() for name in one[2].split(",")] for one in targets.finditer(body)}
        body = targets.sub("", body)
        for line in body.split("\n"):
            text = line.strip()
            label = re.fullmatch(r"(\$?[\w$]+):", text)
            if label:
                self.labels[label[1]] = len(self.instructions)
            elif text and not text.startswith("."):
                self._statements(text)

    def _statements(self, text: str) -> None:
        # braces that open a scope of inline assembly stand alone or before a statement
        for part in text.split(";"):
            statement = re.sub(r"^(?:[{}]\s*)+(?![^{]*\}\s*,)", "", part.strip()).strip()
            if statement and not statement.startswith("."):
                self.instructions.append(_parse(statement))

    def run(
        self,
        memory: Memory,
        params: Sequence[Any],
        block: tuple[int, int, int],
        warps: int,
        order: int | Sequence[int] = 1,
    ) -> None:
        """Runs one block of a grid that is told to have no other.

        Args:
            memory: that pointers among ``params`` point into.
            params: arguments, in order; a :class:`Descriptor` takes as many as it has ``parameters``.
            block: its number.
            warps: of the block, those that a kernel adds to its own included.
            order: 1 runs warps from the first to the last, -1 the other way round; or their numbers.
        """
        self._run_block(memory, params, block, (1, 1, 1), warps, order, Block(warps, 0, agents_of(warps), self.cell))

    def launch(
        self,
        memory: Memory,
        params: Sequence[Any],
        grid: tuple[int, ...],
        warps: int,
        order: int | Sequence[int] = 1,
        blocks: Sequence[int] | None = None,
    ) -> None:
        """Runs all blocks of a grid, perhaps in an order of their own."""
        sizes = (*grid, 1, 1)[:3]
        numbers = [tuple(reversed(n)) for n in itertools.product(*(range(size) for size in reversed(sizes)))]
        talks = any(one.opcode.startswith(("atom", "red")) for one in self.instructions)
        each = agents_of(warps)
        memory.shadow.settle()
        memory.clocks.clear()
        for number in range(len(numbers)) if blocks is None else blocks:
            first, every = (number * each, len(numbers) * each) if talks else (0, each)
            if not talks:
                memory.shadow.settle()
            self._run_block(memory, params, numbers[number], sizes, warps, order, Block(warps, first, every, self.cell))

    def _run_block(
        self,
        memory: Memory,
        params: Sequence[Any],
        block: tuple[int, ...],
        grid: tuple[int, ...],
        warps: int,
        order: int | Sequence[int],
        state: Block,
    ) -> None:
        flat = [one for param in params for one in (param.parameters if isinstance(param, Descriptor) else [param])]
        running = [Warp(self, memory, flat, block, grid, i, state).run() for i in range(warps)]
        state.run(running, list(range(warps))[::order] if isinstance(order, int) else order)


def _inside(text: str) -> str:
    """What the first pair of braces holds."""
    depth, start = 0, text.index("{") + 1
    for brace in re.finditer(r"[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start : brace.start()]
    raise ValueError("a brace is not closed")


def _parse(statement: str) -> Instruction:
    match = re.match(r"(?:@(!?)(%?\w+)\s+)?(\S+)\s*(.*)$", statement, re.S)
    if match is None:
        raise ValueError(statement)
    args, depth, current = [], 0, ""
    for character in match[4]:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            args.append(current.strip())
            current = ""
        else:
            current += character
    if current.strip():
        args.append(current.strip())
    return Instruction(match[3], tuple(args), match[2] or "", match[1] == "!")


@dataclass
class Warp:
    """32 threads in lock step; a register holds 64 bits a lane, a predicate a bool."""

    program: Program
    memory: Memory
    params: Sequence[Any]
    block: tuple[int, ...]
    grid: tuple[int, ...]
    number: int
    state: Block
    registers: dict[str, Array] = field(default_factory=dict)
    copies: list[tuple[Array, Array, Array]] = field(default_factory=list)
    groups: list[list[tuple[Array, Array, Array]]] = field(default_factory=list)
    in_flight: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.agent, self.products, self.copier = (self.state.agent(kind, self.number) for kind in range(3))
        self.products.clock = self.copier.clock = self.agent.clock
        self.shared = self.state.shared

    def run(self) -> Iterator[Wait]:
        """Runs to the end; yields what it waits for."""
        position = 0
        while position < len(self.program.instructions):
            instruction = self.program.instructions[position]
            position += 1
            kind = instruction.opcode.split(".")[0]
            if kind == "bra":
                taken = self._active(instruction)
                if taken.any() and not taken.all():
                    raise RuntimeError(f"threads of a warp part at {instruction}")
                if taken.all():
                    position = self.program.labels[instruction.args[0]]
            elif kind == "brx":
                where = self._value(instruction.args[0])
                position = self.program.labels[self.program.tables[instruction.args[1]][_one(where)]]
            elif kind in ("ret", "exit"):
                return
            else:
                yield from self._step(kind, instruction)

    def _step(self, kind: str, instruction: Instruction) -> Iterator[Wait]:
        """Runs an instruction that may have to wait."""
        opcode, args = instruction.opcode, instruction.args
        if kind in ("bar", "barrier") and ".warp." not in opcode:
            threads = int(args[1]) if len(args) > 1 else 32 * self.state.warps
            wait = self.state.meet(self.agent, int(args[0]), threads)
            if wait is not None:
                yield wait
        elif "try_wait" in opcode:
            address, parity = _one(self._address(args[1])), _one(self._value(args[2]))
            wait = self.state.wait(self.agent, address, parity)
            if wait is not None:
                yield wait
            self.state.acquire(self.agent, address)
            self._set(args[0], np.ones(LANES, bool), np.ones(LANES, bool))
        elif kind == "setmaxnreg":
            while (wait := self.state.resize(self.number, int(args[0]))) is not None:
                yield wait
        else:
            self._execute(kind, instruction)

    # --- operands ---

    def _active(self, instruction: Instruction) -> Array:
        if not instruction.predicate:
            return np.ones(LANES, bool)
        return self.registers[instruction.predicate].astype(bool) ^ instruction.negated

    def _value(self, text: str) -> Array:
        if text in self.registers:
            if text in self.in_flight:
                raise RuntimeError(f"warp {self.number} reads {text}, which a product in flight writes")
            return self.registers[text]
        if text == "%tid.x":
            return (LANE + LANES * self.number).astype(U64)
        if text.startswith("%ctaid."):
            return np.full(LANES, self.block["xyz".index(text[-1])], U64)
        if text.startswith("%nctaid."):
            return np.full(LANES, self.grid["xyz".index(text[-1])], U64)
        if "_param_" in text:
            return np.full(LANES, _MAPS + int(text.rpartition("_")[2]), U64)
        if text == "global_smem":
            return np.zeros(LANES, U64)
        if re.fullmatch(r"-?\d+", text):
            return np.full(LANES, int(text) & (2**64 - 1), U64)
        if re.fullmatch(r"0[xX][0-9a-fA-F]+U?", text):
            return np.full(LANES, int(text.rstrip("U"), 16), U64)
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            return np.full(LANES, int(text[2:], 16), U64)
        if text in ("true", "false"):
            return np.full(LANES, text == "true")
        if re.fullmatch(r"%(?:r|rd|rs)\d+", text):  # never written: the compiler leaves undefined what it does not use
            return np.full(LANES, 0xA5A5A5A5A5A5A5A5, U64)
        raise ValueError(f"operand {text}")

    def _set(self, name: str, value: Array, active: Array) -> None:
        if name == "_":
            return
        old = self.registers.get(name)
        self.registers[name] = value if old is None or active.all() else np.where(active, value, old)

    def _address(self, text: str) -> Array:
        match = re.fullmatch(r"\[\s*(\S+?)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        if match is None:
            raise ValueError(text)
        return self._value(match[1]).astype(np.int64) + int(match[2] or 0)

    # --- memory ---

    def _read(self, place: str, address: Array, size: int, active: Array) -> Array:
        """Bytes ``[lanes, size]``; zero for inactive lanes."""
        out = np.zeros((LANES, size), np.uint8)
        where = (address[:, None] + np.arange(size))[active]
        if where.size:
            out[active] = self.memory.fetch(self.agent, where) if place == "global" else self._fetch(self.agent, where)
        return out

    def _fetch(self, agent: Agent, where: Array) -> Array:
        """Bytes of shared memory."""
        check(where, len(self.shared), "shared")
        self.state.shadow.read(agent, where)
        return self.shared[where]

    def _write(self, place: str, address: Array, data: Array, active: Array) -> None:
        where = (address[:, None] + np.arange(data.shape[1]))[active]
        if where.size and place == "global":
            self.memory.store(self.agent, where, data[active])
        elif where.size:
            check(where, len(self.shared), "shared")
            self.state.shadow.write(self.agent, where, self.shared[where] != data[active])
            self.shared[where] = data[active]

    def _load_store(self, instruction: Instruction, parts: list[str], active: Array) -> None:
        place = "shared" if any(part.startswith("shared") for part in parts) else "global"
        count = next((int(part[1:]) for part in parts if re.fullmatch(r"v\d", part)), 1)
        size = int(re.sub(r"\D", "", parts[-1])) // 8
        if parts[0] == "ld":
            raw = self._read(place, self._address(instruction.args[1]), count * size, active)
            for i, name in enumerate(parts_of(instruction.args[0])):
                self._set(name, as_integer(raw[:, i * size : (i + 1) * size]), active)
        else:
            words = [as_bytes(self._value(name), size) for name in parts_of(instruction.args[1])]
            self._write(place, self._address(instruction.args[0]), np.concatenate(words, 1), active)

    def _copy(self, instruction: Instruction, active: Array) -> None:
        """``cp.async``: a group of copies becomes visible when its thread waits for it."""
        opcode, args = instruction.opcode, instruction.args
        if "bulk.tensor" in opcode:
            self._tma(args, active)
        elif "commit_group" in opcode:
            self.groups.append(self.copies)
            self.copies = []
            self.copier.tick += 1
        elif "wait" in opcode:
            pending = int(args[0]) if args else 0
            while len(self.groups) > pending:
                for where, data, lanes in self.groups.pop(0):
                    self.shared[where[lanes]] = data[lanes]
            self.agent.clock[self.copier.number] = self.copier.tick - 1 - len(self.groups)
        else:
            size = int(args[2], 0)
            present = active & (self._value(args[3]) > 0) if len(args) > 3 else active
            data = self._read("global", self._address(args[1]), size, present)
            where = self._address(args[0])[:, None] + np.arange(size)
            if active.any():
                check(where[active], len(self.shared), "shared")
                self.state.shadow.write(self.copier, where[active])
            self.copies.append((where, data, active))

    def _tma(self, args: Sequence[str], active: Array) -> None:
        if not active.any():
            return
        if active.sum() != 1:
            raise RuntimeError("more than one thread issues a TMA copy")
        lane = int(np.argmax(active))
        tensor, coordinates = re.fullmatch(r"\[\s*(\S+),\s*\{(.*)\}\s*\]", args[1]).groups()  # type: ignore[union-attr]
        what = self.params[int(self._value(tensor)[lane]) - _MAPS]
        first = [int(as_signed(self._value(name), 32)[lane]) for name in parts_of(coordinates)]
        places = (int(self._address(args[place])[lane]) for place in (0, 2))
        self.state.load(self.memory, self.agent, what, first, *places)

    def _ldmatrix(self, instruction: Instruction, active: Array) -> None:
        addresses, names = self._address(instruction.args[1]), parts_of(instruction.args[0])
        for i, name in enumerate(names):
            where = addresses[8 * i : 8 * i + 8, None] + np.arange(16)
            matrix = self._fetch(self.agent, where).view(np.uint16)
            if ".trans" in instruction.opcode:
                matrix = matrix.T
            low, high = matrix[_G, 2 * _T].astype(U64), matrix[_G, 2 * _T + 1].astype(U64)
            self._set(name, low | high << U64(16), active)

    def _stmatrix(self, instruction: Instruction) -> None:
        addresses = self._address(instruction.args[0])
        for i, name in enumerate(parts_of(instruction.args[1])):
            matrix = as_bytes(self._value(name), 4).reshape(8, 16).view(np.uint16)
            if ".trans" in instruction.opcode:
                matrix = np.ascontiguousarray(matrix.T)
            where = addresses[8 * i : 8 * i + 8, None] + np.arange(16)
            check(where, len(self.shared), "shared")
            self.state.shadow.write(self.agent, where)
            self.shared[where] = matrix.view(np.uint8)

    # --- matrix products ---

    def _mma(self, instruction: Instruction, active: Array) -> None:
        if "m16n8k8.row.col.f32.tf32.tf32.f32" in instruction.opcode:
            self._mma_tf32(instruction, active)
            return
        sparse = instruction.opcode.startswith("mma.sp")
        expected = "m16n8k32" if sparse else "m16n8k16"
        halves = "bf16" if ".bf16.bf16." in instruction.opcode else "f16"
        if expected not in instruction.opcode or f".f32.{halves}.{halves}.f32" not in instruction.opcode:
            raise NotImplementedError(instruction.opcode)
        a, b, c = (np.stack([self._value(name) for name in parts_of(arg)], 1) for arg in instruction.args[1:4])
        left = np.zeros((16, 16), np.float32)
        for i in range(8):
            left[_G + 8 * (i // 2 % 2), 2 * _T + i % 2 + 8 * (i // 4)] = as_half(a[:, i // 2], i % 2, halves)
        depth = 32 if sparse else 16
        right = np.zeros((depth, 8), np.float32)
        for i in range(depth // 4):
            right[2 * _T + i % 2 + 8 * (i // 2), _G] = as_half(b[:, i // 2], i % 2, halves)
        if sparse:
            left = expand(left, self._value(instruction.args[4]), int(instruction.args[5], 0))
        product = left @ right
        for i, name in enumerate(parts_of(instruction.args[0])):
            total = product[_G + 8 * (i // 2), 2 * _T + i % 2] + as_float(c[:, i])
            self._set(name, as_raw(total), active)

    def _mma_tf32(self, instruction: Instruction, active: Array) -> None:
        """19 bits of every operand count; the hardware cuts the rest off."""
        a, b, c = ([as_float(self._value(name)) for name in parts_of(arg)] for arg in instruction.args[1:4])
        left, right = np.zeros((16, 8), np.float32), np.zeros((8, 8), np.float32)
        for i in range(4):
            left[_G + 8 * (i % 2), _T + 4 * (i // 2)] = as_float(as_raw(a[i]) & U64(0xFFFFE000))
        for i in range(2):
            right[_T + 4 * i, _G] = as_float(as_raw(b[i]) & U64(0xFFFFE000))
        product = left @ right
        for i, name in enumerate(parts_of(instruction.args[0])):
            self._set(name, as_raw(product[_G + 8 * (i // 2), 2 * _T + i % 2] + c[i]), active)

    def _wgmma(self, opcode: str, args: Sequence[str]) -> None:
        """``wgmma``: each of four warps computes the 16 rows that are its part of 64."""
        if "commit_group" in opcode:
            self.products.tick += 1
        elif "wait_group" in opcode:
            done = self.products.tick - 1 - int(args[0])
            self.agent.clock[self.products.number] = done
            self.in_flight = {name: group for name, group in self.in_flight.items() if group > done}
        elif "mma_async" in opcode:
            shape = re.search(r"\.m64n(\d+)k(16|32)\.f32\.(bf16|f16)\.", opcode)
            sparse = "mma_async.sp" in opcode
            if shape is None or (shape[2] == "32") != sparse or [int(arg) for arg in args[-4:]] != [1, 1, 0, 0]:
                raise NotImplementedError(f"{opcode} {args}")
            rows, depth, kind, sums = int(shape[1]), int(shape[2]), shape[3], parts_of(args[0])
            w = self._operand(_one(self._value(args[1])), 64, 16, kind)[16 * (self.number % 4) :][:16]
            x = self._operand(_one(self._value(args[2])), rows, depth, kind)
            product = (expand(w, self._value(args[3]), int(args[4])) if sparse else w) @ x.T
            scale = self._value(args[-5]).astype(bool)
            for i, name in enumerate(sums):
                old = np.where(scale, as_float(self.registers[name]), np.float32(0))
                new = old + product[_G + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * _T + i % 2]
                self.registers[name] = as_raw(new)
                self.in_flight[name] = self.products.tick
        elif "fence" not in opcode:
            raise NotImplementedError(opcode)

    def _operand(self, descriptor: int, rows: int, columns: int, kind: str) -> Array:
        """Rows of 16-bit elements in shared memory, through a descriptor."""
        start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
        width = {1: 128, 2: 64, 3: 32}[descriptor >> 62]
        row = np.arange(rows)[:, None]
        where = swizzled(start + row // 8 * stride + row % 8 * width + np.arange(2 * columns), width)
        words = self._fetch(self.products, where).view(np.uint16).astype(U64)
        return as_half(words, 0, kind)

    # --- everything else ---

    def _execute(self, kind: str, instruction: Instruction) -> None:
        active, parts, args = self._active(instruction), instruction.opcode.split("."), instruction.args
        if kind == "ld" and parts[1] == "param":
            number = int(re.search(r"param_(\d+)", args[1])[1])  # type: ignore[index]
            self._set(args[0], np.full(LANES, self.params[number] & (2**64 - 1), U64), active)
        elif kind in ("ld", "st"):
            self._load_store(instruction, parts, active)
        elif kind == "cp":
            self._copy(instruction, active)
        elif kind == "wgmma":
            self._wgmma(instruction.opcode, args)
        elif kind == "mbarrier":
            self._mbarrier(instruction.opcode, args, active)
        elif kind == "atom":
            self._atomic(instruction.opcode, args, active)
        elif kind == "elect":
            self._set(args[0].partition("|")[2], LANE == 0, active)
        elif kind in ("fence", "membar", "bar", "nanosleep", "griddepcontrol"):
            return
        elif kind == "cvta":
            self._set(args[0], self._value(args[1]), active)
        elif kind == "ldmatrix":
            self._ldmatrix(instruction, active)
        elif kind == "stmatrix":
            self._stmatrix(instruction)
        elif kind == "mma":
            self._mma(instruction, active)
        elif kind == "mov" and (args[0].startswith("{") or args[1].startswith("{")):
            self._move_parts(parts, args, active)
        elif kind == "shfl":
            lanes = {"idx": 0, "bfly": LANE}[parts[2]] ^ self._value(args[2]).astype(int)
            if int(args[3], 0) != LANES - 1 or "|" in args[0]:
                raise NotImplementedError(str(instruction))
            self._set(args[0], self._value(args[1])[lanes % LANES], active)
        elif kind == "cvt":
            self._set(args[0], convert(instruction.opcode, parts, [self._value(arg) for arg in args[1:]]), active)
        else:
            self._set(args[0], compute(instruction.opcode, parts, [self._value(arg) for arg in args[1:]]), active)

    def _move_parts(self, parts: list[str], args: Sequence[str], active: Array) -> None:
        names = parts_of(args[0] if args[0].startswith("{") else args[1])
        size = int(parts[-1][1:]) // len(names)
        mask = U64(2**size - 1)
        if args[0].startswith("{"):
            whole = self._value(args[1])
            for i, name in enumerate(names):
                self._set(name, (whole >> U64(size * i)) & mask, active)
        else:
            pieces = [(self._value(name) & mask) << U64(size * i) for i, name in enumerate(names)]
            self._set(args[0], np.bitwise_or.reduce(pieces), active)

    def _mbarrier(self, opcode: str, args: Sequence[str], active: Array) -> None:
        if not active.any():
            return
        lane = int(np.argmax(active))
        if ".init" in opcode:
            self.state.make(int(self._address(args[0])[lane]), int(self._value(args[1])[lane]))
            return
        if ".arrive" not in opcode:
            raise NotImplementedError(opcode)
        address, number = int(self._address(args[1])[lane]), int(self._value(args[2])[lane]) if len(args) > 2 else 1
        expected = number if "expect_tx" in opcode else 0
        self.state.arrive(self.agent, address, int(active.sum()) * (1 if expected else number), expected)

    def _atomic(self, opcode: str, args: Sequence[str], active: Array) -> None:
        if ".add." not in opcode or opcode.split(".")[-1] not in ("u32", "s32"):
            raise NotImplementedError(opcode)
        for lane in np.flatnonzero(active):
            old = self.memory.add(self.agent, int(self._address(args[1])[lane]), int(self._value(args[2])[lane]))
            self._set(args[0], np.full(LANES, old, U64), lane == LANE)


def _one(value: Array) -> int:
    """What all threads of a warp have."""
    if (value != value[0]).any():
        raise RuntimeError("threads of a warp differ where they must not")
    return int(value[0])
