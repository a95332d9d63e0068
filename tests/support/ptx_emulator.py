"""Runs the PTX that Triton emits for a matrix product, on numpy, so that kernels can be checked without a GPU.

A block of threads runs warp by warp: a warp goes on until its next barrier, then the next warp runs. So a kernel that
lacks a barrier reads what another warp has not written yet, or has overwritten already. Asynchronous copies land as
late as they may, when the thread that issued them waits for them. Not modelled: instructions it does not know and
threads of a warp that branch differently, which raise, and timing.

Semantics follow NVIDIA's PTX ISA: fragments of ``mma.m16n8k16`` and ``mma.sp.m16n8k32``, ``ldmatrix``, ``cp.async``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

LANES = 32
_BASE = 1 << 20  # address of the first byte of memory: null pointers and small offsets are caught
_LANE = np.arange(LANES)
_G, _T = _LANE >> 2, _LANE & 3

U64 = np.uint64
Array = np.ndarray


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
        self.used = 0

    def put(self, array: Array) -> int:
        """Copies an array in and returns its address, a multiple of 256."""
        raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        start = self.used
        self.bytes[start : start + raw.size] = raw
        self.used = -(-(start + raw.size) // 256) * 256
        return _BASE + start

    def get(self, address: int, dtype: type, shape: Sequence[int]) -> Array:
        """A copy of the array at an address."""
        start, size = address - _BASE, int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.bytes[start : start + size].view(dtype).reshape(shape).copy()


class Program:
    """A parsed kernel."""

    def __init__(self, ptx: str):
        body = ptx[ptx.index(".entry") :]
        body = re.sub(r"//[^\n]*", "", body[body.index("\n{") + 2 : body.index("\n}")])
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
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
        self, memory: Memory, params: Sequence[int], block: tuple[int, int, int], warps: int, order: int = 1
    ) -> None:
        """Runs one block.

        Args:
            memory: that pointers among ``params`` point into.
            params: arguments, in order.
            block: its number.
            warps: of the block.
            order: 1 runs warps from the first to the last, -1 the other way round.
        """
        shared = np.zeros(232448, np.uint8)
        running = [Warp(self, memory, shared, params, block, i).run() for i in range(warps)]
        while running:
            waiting = [next(warp, False) for warp in running[::order]]
            if any(waiting) and not all(waiting):
                raise RuntimeError("some warps wait at a barrier that others never reach")
            running = running if all(waiting) else []


def _parse(statement: str) -> Instruction:
    match = re.match(r"(?:@(!?)(%\w+)\s+)?(\S+)\s*(.*)$", statement, re.S)
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
    shared: Array
    params: Sequence[int]
    block: tuple[int, int, int]
    number: int
    registers: dict[str, Array] = field(default_factory=dict)
    copies: list[tuple[Array, Array, Array]] = field(default_factory=list)
    groups: list[list[tuple[Array, Array, Array]]] = field(default_factory=list)

    def run(self) -> Iterator[bool]:
        """Runs to the end; yields True at every barrier."""
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
            elif kind in ("ret", "exit"):
                return
            elif kind in ("bar", "barrier"):
                yield True
            else:
                self._execute(kind, instruction)

    # --- operands ---

    def _active(self, instruction: Instruction) -> Array:
        if not instruction.predicate:
            return np.ones(LANES, bool)
        return self.registers[instruction.predicate].astype(bool) ^ instruction.negated

    def _value(self, text: str) -> Array:
        if text in self.registers:
            return self.registers[text]
        if text == "%tid.x":
            return (_LANE + LANES * self.number).astype(U64)
        if text.startswith("%ctaid."):
            return np.full(LANES, self.block["xyz".index(text[-1])], U64)
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
        source, base = (self.shared, 0) if place == "shared" else (self.memory.bytes, _BASE)
        out = np.zeros((LANES, size), np.uint8)
        where = (address[:, None] - base + np.arange(size))[active]
        _check(where, len(source), place)
        out[active] = source[where]
        return out

    def _write(self, place: str, address: Array, data: Array, active: Array) -> None:
        target, base = (self.shared, 0) if place == "shared" else (self.memory.bytes, _BASE)
        where = (address[:, None] - base + np.arange(data.shape[1]))[active]
        _check(where, len(target), place)
        target[where] = data[active]

    def _load_store(self, instruction: Instruction, parts: list[str], active: Array) -> None:
        place = "shared" if "shared" in parts else "global"
        count = next((int(part[1:]) for part in parts if re.fullmatch(r"v\d", part)), 1)
        size = int(re.sub(r"\D", "", parts[-1])) // 8
        if parts[0] == "ld":
            raw = self._read(place, self._address(instruction.args[1]), count * size, active)
            for i, name in enumerate(_names(instruction.args[0])):
                self._set(name, _integer(raw[:, i * size : (i + 1) * size]), active)
        else:
            words = [_bytes(self._value(name), size) for name in _names(instruction.args[1])]
            self._write(place, self._address(instruction.args[0]), np.concatenate(words, 1), active)

    def _copy(self, instruction: Instruction, active: Array) -> None:
        """``cp.async``: a group of copies becomes visible when its thread waits for it."""
        opcode, args = instruction.opcode, instruction.args
        if "commit_group" in opcode:
            self.groups.append(self.copies)
            self.copies = []
        elif "wait" in opcode:
            pending = int(args[0]) if args else 0
            while len(self.groups) > pending:
                for address, data, lanes in self.groups.pop(0):
                    self._write("shared", address, data, lanes)
        else:
            size = int(args[2], 0)
            present = active & (self._value(args[3]) > 0) if len(args) > 3 else active
            data = self._read("global", self._address(args[1]), size, present)
            self.copies.append((self._address(args[0]), data, active))

    def _ldmatrix(self, instruction: Instruction, active: Array) -> None:
        addresses, names = self._address(instruction.args[1]), _names(instruction.args[0])
        for i, name in enumerate(names):
            where = addresses[8 * i : 8 * i + 8, None] + np.arange(16)
            _check(where, len(self.shared), "shared")
            matrix = self.shared[where].view(np.uint16)
            if ".trans" in instruction.opcode:
                matrix = matrix.T
            low, high = matrix[_G, 2 * _T].astype(U64), matrix[_G, 2 * _T + 1].astype(U64)
            self._set(name, low | high << U64(16), active)

    def _stmatrix(self, instruction: Instruction) -> None:
        addresses = self._address(instruction.args[0])
        for i, name in enumerate(_names(instruction.args[1])):
            matrix = _bytes(self._value(name), 4).reshape(8, 16).view(np.uint16)
            if ".trans" in instruction.opcode:
                matrix = np.ascontiguousarray(matrix.T)
            where = addresses[8 * i : 8 * i + 8, None] + np.arange(16)
            _check(where, len(self.shared), "shared")
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
        a, b, c = (np.stack([self._value(name) for name in _names(arg)], 1) for arg in instruction.args[1:4])
        left = np.zeros((16, 16), np.float32)
        for i in range(8):
            left[_G + 8 * (i // 2 % 2), 2 * _T + i % 2 + 8 * (i // 4)] = _half(a[:, i // 2], i % 2, halves)
        depth = 32 if sparse else 16
        right = np.zeros((depth, 8), np.float32)
        for i in range(depth // 4):
            right[2 * _T + i % 2 + 8 * (i // 2), _G] = _half(b[:, i // 2], i % 2, halves)
        if sparse:
            left = _expand(left, self._value(instruction.args[4]), int(instruction.args[5], 0))
        product = left @ right
        for i, name in enumerate(_names(instruction.args[0])):
            total = product[_G + 8 * (i // 2), 2 * _T + i % 2] + _float(c[:, i])
            self._set(name, _raw(total), active)

    def _mma_tf32(self, instruction: Instruction, active: Array) -> None:
        """19 bits of every operand count; the hardware cuts the rest off."""
        a, b, c = ([_float(self._value(name)) for name in _names(arg)] for arg in instruction.args[1:4])
        left, right = np.zeros((16, 8), np.float32), np.zeros((8, 8), np.float32)
        for i in range(4):
            left[_G + 8 * (i % 2), _T + 4 * (i // 2)] = _float(_raw(a[i]) & U64(0xFFFFE000))
        for i in range(2):
            right[_T + 4 * i, _G] = _float(_raw(b[i]) & U64(0xFFFFE000))
        product = left @ right
        for i, name in enumerate(_names(instruction.args[0])):
            self._set(name, _raw(product[_G + 8 * (i // 2), 2 * _T + i % 2] + c[i]), active)

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
        elif kind == "ldmatrix":
            self._ldmatrix(instruction, active)
        elif kind == "stmatrix":
            self._stmatrix(instruction)
        elif kind == "mma":
            self._mma(instruction, active)
        elif kind == "mov" and (args[0].startswith("{") or args[1].startswith("{")):
            self._move_parts(parts, args, active)
        elif kind == "shfl":
            lanes = {"idx": 0, "bfly": _LANE}[parts[2]] ^ self._value(args[2]).astype(int)
            if int(args[3], 0) != LANES - 1 or "|" in args[0]:
                raise NotImplementedError(str(instruction))
            self._set(args[0], self._value(args[1])[lanes % LANES], active)
        elif kind == "cvt":
            self._set(args[0], _convert(instruction.opcode, parts, [self._value(arg) for arg in args[1:]]), active)
        else:
            self._set(args[0], _compute(instruction.opcode, parts, [self._value(arg) for arg in args[1:]]), active)

    def _move_parts(self, parts: list[str], args: Sequence[str], active: Array) -> None:
        names = _names(args[0] if args[0].startswith("{") else args[1])
        size = int(parts[-1][1:]) // len(names)
        mask = U64(2**size - 1)
        if args[0].startswith("{"):
            whole = self._value(args[1])
            for i, name in enumerate(names):
                self._set(name, (whole >> U64(size * i)) & mask, active)
        else:
            pieces = [(self._value(name) & mask) << U64(size * i) for i, name in enumerate(names)]
            self._set(args[0], np.bitwise_or.reduce(pieces), active)


# --- numbers ----------------------------------------------------------------------------------------------------------


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.strip("{} ").split(",")]


def _check(where: Array, size: int, place: str) -> None:
    if where.size and (where.min() < 0 or where.max() >= size):
        raise IndexError(f"access outside {place} memory, byte {where.min()}..{where.max()} of {size}")


def _integer(raw: Array) -> Array:
    shifts = 8 * np.arange(raw.shape[1], dtype=U64)
    return np.bitwise_or.reduce(raw.astype(U64) << shifts, axis=1)


def _bytes(value: Array, size: int) -> Array:
    shifts = 8 * np.arange(size, dtype=U64)
    return ((value[:, None] >> shifts) & U64(255)).astype(np.uint8)


def _signed(value: Array, bits: int) -> Array:
    if bits == 64:
        return value.astype(np.int64)
    low = (value & U64(2**bits - 1)).astype(np.int64)
    return (low ^ (1 << (bits - 1))) - (1 << (bits - 1))


def _float(value: Array) -> Array:
    return (value & U64(0xFFFFFFFF)).astype(np.uint32).view(np.float32)


def _raw(value: Array) -> Array:
    return np.asarray(value, np.float32).view(np.uint32).astype(U64)


def _half(word: Array, which: int, kind: str) -> Array:
    """One of the two 16-bit floats of a word."""
    bits = ((word >> U64(16 * which)) & U64(0xFFFF)).astype(np.uint16)
    return bits.view(np.float16).astype(np.float32) if kind == "f16" else _float(bits.astype(U64) << U64(16))


def _to_half(value: Array, kind: str) -> Array:
    if kind == "f16":
        return value.astype(np.float16).view(np.uint16).astype(U64)
    raw = value.view(np.uint32).astype(U64)
    return (raw + U64(0x7FFF) + ((raw >> U64(16)) & U64(1))) >> U64(16)


def _expand(kept: Array, metadata: Array, selector: int) -> Array:
    """The dense left operand ``[16, 32]`` of a sparse product; lanes 4g + 2 selector and the next hold its words."""
    dense = np.zeros((16, 32), np.float32)
    for row in range(16):
        for group in range(8):
            word = int(metadata[4 * (row % 8) + 2 * selector + group // 4]) >> (16 * (row // 8))
            nibble = word >> (4 * (group % 4)) & 15
            first, second = nibble & 3, nibble >> 2
            if first >= second:
                raise ValueError("metadata is not in order")
            dense[row, 4 * group + first] = kept[row, 2 * group]
            dense[row, 4 * group + second] = kept[row, 2 * group + 1]
    return dense


def _convert(opcode: str, parts: list[str], args: list[Array]) -> Array:
    target, origin = parts[-2], parts[-1]
    if target in ("bf16x2", "f16x2"):
        kind = target[:-2]
        return _to_half(_float(args[1]), kind) | _to_half(_float(args[0]), kind) << U64(16)
    if target in ("bf16", "f16") and origin == "f32":
        return _to_half(_float(args[0]), target)
    if target == "f32" and origin in ("bf16", "f16"):
        return _raw(_half(args[0], 0, origin))
    if target[0] == "f" or origin[0] == "f":
        raise NotImplementedError(opcode)
    bits = int(origin[1:])
    value = _signed(args[0], bits).astype(U64) if origin[0] == "s" else args[0] & U64(2**bits - 1)
    return value & U64(2 ** int(target[1:]) - 1)


_FLOAT: dict[str, Callable[..., Array]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "abs": np.abs,
    "min": np.fmin,
    "max": np.fmax,
    "ex2": np.exp2,
}
_COMPARE: dict[str, Callable[..., Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_LOGIC: dict[str, Callable[..., Array]] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def _compute(opcode: str, parts: list[str], args: list[Array]) -> Array:
    kind, type_ = parts[0], parts[-1]
    if type_ == "pred":
        return ~args[0] if kind == "not" else _LOGIC[kind](*args)
    if kind == "setp":
        return _compare(parts[1], type_, args)
    if kind == "selp":
        return np.where(args[2], args[0], args[1])
    if type_ == "f32" and kind in _FLOAT:
        with np.errstate(all="ignore"):
            return _raw(_FLOAT[kind](*map(_float, args)))
    bits, signed = int(type_[1:]), type_[0] == "s"
    mask = U64(2**bits - 1)
    with np.errstate(over="ignore"):
        return _integer_result(opcode, parts, kind, args, bits, signed) & (U64(2**64 - 1) if "wide" in parts else mask)


def _compare(relation: str, type_: str, args: list[Array]) -> Array:
    if type_ == "f32":
        left, right = map(_float, args)
        if relation in ("num", "nan"):
            return (np.isnan(left) | np.isnan(right)) == (relation == "nan")
        if relation.endswith("u") and len(relation) == 3:  # also true where one is not a number
            return _COMPARE[relation[:2]](left, right) | np.isnan(left) | np.isnan(right)
        return _COMPARE[relation](left, right)
    bits = int(type_[1:])
    if type_[0] == "s":
        return _COMPARE[relation](_signed(args[0], bits), _signed(args[1], bits))
    mask = U64(2**bits - 1)
    return _COMPARE[relation](args[0] & mask, args[1] & mask)


def _integer_result(opcode: str, parts: list[str], kind: str, args: list[Array], bits: int, signed: bool) -> Array:
    def read(value: Array) -> Array:
        return _signed(value, bits) if signed else value & U64(2**bits - 1)

    if kind == "mov":
        return args[0]
    if kind in _LOGIC:
        return _LOGIC[kind](*args)
    if kind == "not":
        return ~args[0]
    if kind == "popc":
        return sum((read(args[0]) >> U64(i)) & U64(1) for i in range(bits))
    if kind == "neg":
        return U64(0) - args[0]
    if kind == "add":
        return args[0] + args[1]
    if kind == "sub":
        return args[0] - args[1]
    if kind in ("mul", "mad"):
        if "hi" in parts and bits == 32:
            product = (read(args[0]) * read(args[1]) >> np.array(32, read(args[0]).dtype)).astype(U64)
        elif "wide" in parts:
            product = (read(args[0]) * read(args[1])).astype(U64)
        elif "lo" in parts:
            product = args[0] * args[1]
        else:
            raise NotImplementedError(opcode)
        return product + args[2] if kind == "mad" else product
    if kind in ("div", "rem"):
        left, right = read(args[0]), read(args[1])
        quotient = np.abs(left) // np.abs(right) * np.sign(left) * np.sign(right) if signed else left // right
        return (quotient if kind == "div" else left - quotient * right).astype(U64)
    if kind in ("min", "max"):
        return (np.minimum if kind == "min" else np.maximum)(read(args[0]), read(args[1])).astype(U64)
    if kind in ("shl", "shr"):
        count = np.minimum(args[1] & U64(0xFFFFFFFF), U64(63))
        if kind == "shl":
            return np.where(count >= bits, U64(0), args[0] << count)
        if signed:
            return (_signed(args[0], bits) >> np.minimum(count, U64(bits - 1)).astype(np.int64)).astype(U64)
        return np.where(count >= bits, U64(0), read(args[0]) >> count)
    if kind == "bfe":
        width = args[2] & U64(255)
        value = (args[0] & U64(2**bits - 1)) >> args[1] & ((U64(1) << width) - U64(1))
        return _signed(value, int(width[0])).astype(U64) if signed else value
    if kind == "bfi":
        field_ = ((U64(1) << args[3]) - U64(1)) << args[2]
        return (args[1] & ~field_) | (args[0] << args[2] & field_)
    if kind == "lop3":
        table = int(args[3][0])
        chosen = [
            np.bitwise_and.reduce([args[j] if case >> (2 - j) & 1 else ~args[j] for j in range(3)])
            for case in range(8)
            if table >> case & 1
        ]
        return np.bitwise_or.reduce([np.zeros(LANES, U64), *chosen])
    if kind == "prmt":
        pool = np.stack([args[i // 4] >> U64(8 * (i % 4)) & U64(255) for i in range(8)])
        picked = [pool[(args[2] >> U64(4 * i) & U64(7)).astype(int), _LANE] << U64(8 * i) for i in range(4)]
        return np.bitwise_or.reduce(picked)
    raise NotImplementedError(opcode)
