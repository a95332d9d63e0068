"""Numbers in the PTX emulator: registers as arrays of 64 bits a lane, and what instructions compute of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

LANES = 32
LANE = np.arange(LANES)
U64 = np.uint64
Array = np.ndarray


def parts_of(text: str) -> list[str]:
    return [name.strip() for name in text.strip("{} ").split(",")]


def check(where: Array, size: int, place: str) -> None:
    if where.size and (where.min() < 0 or where.max() >= size):
        raise IndexError(f"access outside {place} memory, byte {where.min()}..{where.max()} of {size}")


def as_integer(raw: Array) -> Array:
    shifts = 8 * np.arange(raw.shape[1], dtype=U64)
    return np.bitwise_or.reduce(raw.astype(U64) << shifts, axis=1)


def as_bytes(value: Array, size: int) -> Array:
    shifts = 8 * np.arange(size, dtype=U64)
    return ((value[:, None] >> shifts) & U64(255)).astype(np.uint8)


def as_signed(value: Array, bits: int) -> Array:
    if bits == 64:
        return value.astype(np.int64)
    low = (value & U64(2**bits - 1)).astype(np.int64)
    return (low ^ (1 << (bits - 1))) - (1 << (bits - 1))


def as_float(value: Array) -> Array:
    return (value & U64(0xFFFFFFFF)).astype(np.uint32).view(np.float32)


def as_raw(value: Array) -> Array:
    return np.asarray(value, np.float32).view(np.uint32).astype(U64)


def as_half(word: Array, which: int, kind: str) -> Array:
    """One of the two 16-bit floats of a word."""
    bits = ((word >> U64(16 * which)) & U64(0xFFFF)).astype(np.uint16)
    return bits.view(np.float16).astype(np.float32) if kind == "f16" else as_float(bits.astype(U64) << U64(16))


def to_half(value: Array, kind: str) -> Array:
    if kind == "f16":
        return value.astype(np.float16).view(np.uint16).astype(U64)
    raw = value.view(np.uint32).astype(U64)
    return (raw + U64(0x7FFF) + ((raw >> U64(16)) & U64(1))) >> U64(16)


def expand(kept: Array, metadata: Array, selector: int) -> Array:
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


def convert(opcode: str, parts: list[str], args: list[Array]) -> Array:
    target, origin = parts[-2], parts[-1]
    if target in ("bf16x2", "f16x2"):
        kind = target[:-2]
        return to_half(as_float(args[1]), kind) | to_half(as_float(args[0]), kind) << U64(16)
    if target in ("bf16", "f16") and origin == "f32":
        return to_half(as_float(args[0]), target)
    if target == "f32" and origin in ("bf16", "f16"):
        return as_raw(as_half(args[0], 0, origin))
    if target[0] == "f" or origin[0] == "f":
        raise NotImplementedError(opcode)
    bits = int(origin[1:])
    value = as_signed(args[0], bits).astype(U64) if origin[0] == "s" else args[0] & U64(2**bits - 1)
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


def compute(opcode: str, parts: list[str], args: list[Array]) -> Array:
    kind, type_ = parts[0], parts[-1]
    if type_ == "pred":
        return ~args[0] if kind == "not" else _LOGIC[kind](*args)
    if kind == "setp":
        return _compare(parts[1], type_, args)
    if kind == "selp":
        return np.where(args[2], args[0], args[1])
    if type_ == "f32" and kind in _FLOAT:
        with np.errstate(all="ignore"):
            return as_raw(_FLOAT[kind](*map(as_float, args)))
    bits, signed = int(type_[1:]), type_[0] == "s"
    mask = U64(2**bits - 1)
    with np.errstate(over="ignore"):
        return _integer_result(opcode, parts, kind, args, bits, signed) & (U64(2**64 - 1) if "wide" in parts else mask)


def _compare(relation: str, type_: str, args: list[Array]) -> Array:
    if type_ == "f32":
        left, right = map(as_float, args)
        if relation in ("num", "nan"):
            return (np.isnan(left) | np.isnan(right)) == (relation == "nan")
        if relation.endswith("u") and len(relation) == 3:  # also true where one is not a number
            return _COMPARE[relation[:2]](left, right) | np.isnan(left) | np.isnan(right)
        return _COMPARE[relation](left, right)
    bits = int(type_[1:])
    if type_[0] == "s":
        return _COMPARE[relation](as_signed(args[0], bits), as_signed(args[1], bits))
    mask = U64(2**bits - 1)
    return _COMPARE[relation](args[0] & mask, args[1] & mask)


def _integer_result(opcode: str, parts: list[str], kind: str, args: list[Array], bits: int, signed: bool) -> Array:
    def read(value: Array) -> Array:
        return as_signed(value, bits) if signed else value & U64(2**bits - 1)

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
            return (as_signed(args[0], bits) >> np.minimum(count, U64(bits - 1)).astype(np.int64)).astype(U64)
        return np.where(count >= bits, U64(0), read(args[0]) >> count)
    if kind == "bfe":
        width = args[2] & U64(255)
        value = (args[0] & U64(2**bits - 1)) >> args[1] & ((U64(1) << width) - U64(1))
        return as_signed(value, int(width[0])).astype(U64) if signed else value
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
        picked = [pool[(args[2] >> U64(4 * i) & U64(7)).astype(int), LANE] << U64(8 * i) for i in range(4)]
        return np.bitwise_or.reduce(picked)
    raise NotImplementedError(opcode)
