"""Pieces of source that several kernels share, and the template language that puts them together.

A template is source with ``$name`` in the places that depend on the spec (:func:`fill`). ``module`` makes a whole file
of a kernel. The functions below it give pieces: the order of tiles, a step of a product, and for N:M weights the packed
indices and the decompression of a tile. An index is 2 bits (m <= 4) or 4 bits (m = 8); the n indices of a group are a
word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from fxsparse.codegen.spec import Argument, NMSpec, Spec

_WHOLE_LINE = re.compile(r"^( *)\$(\w+)$")
_INLINE = re.compile(r"\$(\w+)")


def fill(template: str, **parts: str) -> str:
    """A template with every ``$name`` replaced.

    A name alone on its line takes a block of lines, indented as the name is; the line goes where the block is empty.
    """
    lines = []
    for line in template.strip("\n").split("\n"):
        block = _WHOLE_LINE.match(line)
        if block is None:
            lines.append(_INLINE.sub(lambda name: parts[name[1]], line))
        elif parts[block[2]]:
            lines += [(block[1] + inner).rstrip() for inner in parts[block[2]].strip("\n").split("\n")]
    return "\n".join(lines)


_MODULE = '''
"""$title

$text

Made by fxsparse.codegen from
$spec
"""

import triton
import triton.language as tl

$interpreted
$constants


$functions


@triton.jit
def $name(
    $parameters
):
    $body
'''

_INTERPRETED = """
# Triton's interpreter multiplies 16-bit floats wrongly, so there operands are widened.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""


def module(
    spec: Spec, *, title: str, text: str, constants: Mapping[str, int], functions: Iterable[str], body: str
) -> str:
    """A whole source file."""
    return (
        fill(
            _MODULE,
            title=title,
            text=text,
            spec=spec.describe(),
            interpreted=_INTERPRETED,
            constants="\n".join(f"{name} = tl.constexpr({value})" for name, value in constants.items()),
            functions="\n\n\n".join(function.strip("\n") for function in functions if function),
            name=spec.name,
            parameters=parameters(spec.arguments),
            body=body,
        )
        + "\n"
    )


def parameters(arguments: Iterable[Argument]) -> str:
    """Parameters of a kernel, a line each."""
    return "\n".join(f"{argument.name},  # {argument.type}" for argument in arguments)


def optional(condition: bool, text: str) -> str:
    """A piece that only some kernels have."""
    return text if condition else ""


# --- dense tiles ------------------------------------------------------------------------------------------------------


def order(rows: str, columns: str, group: int) -> str:
    """Which tile a program computes."""
    return f"""
@triton.jit
def program_tile(rows, columns):
    # {group} tiles of rows at a time, so that what a wave of programs reads stays in the L2 cache
    program = tl.program_id(0)
    row_tiles = tl.cdiv(rows, {rows})
    column_tiles = tl.cdiv(columns, {columns})
    group = program // ({group} * column_tiles)
    height = tl.minimum(row_tiles - group * {group}, {group})
    inside = program % ({group} * column_tiles)
    return group * {group} + inside % height, inside // height
"""


def multiply(spec: Spec, precision: str) -> str:
    """A step of a product, accumulated in float32."""
    exact = f', input_precision="{precision}"' if spec.dtype == "float32" else ""
    return f"""
@triton.jit
def multiply(left, right, accumulator):
    if INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, accumulator{exact})
"""


# --- N:M tiles --------------------------------------------------------------------------------------------------------


def join(planes: list[str]) -> str:
    """Interleaves tensors into one more dimension (of size 2 a level), so that a reshape puts them in order."""
    if len(planes) == 1:
        return planes[0]
    return f"tl.join({join(planes[0::2])}, {join(planes[1::2])})"


def unpack_words(name: str, bits: int) -> tuple[int, str]:
    """How words of ``bits`` bits, one a group, come out of bytes ``[N_TILE, bytes]``.

    Returns:
        words a byte (0 where a word is two bytes) and the expression of the words ``[N_TILE, GROUPS]``.
    """
    if bits == 16:
        return 0, f"low_byte | ({name} << 8)"
    count = 8 // bits
    pieces = [f"({name} >> {bits * i}) & {2**bits - 1}" if i else f"{name} & {2**bits - 1}" for i in range(count)]
    return count, name if count == 1 else f"tl.reshape({join(pieces)}, (N_TILE, GROUPS))"


def load_words(pointer: str, name: str, bits: int, *, inside: str = "", ends: bool) -> str:
    """Lines that load one word a group, zero beyond the end.

    Args:
        pointer: of the packed bytes; its row stride is ``<pointer>_stride``.
        name: what the words are to be called.
        bits: of a word.
        inside: broadcastable condition that a row exists, where rows end.
        ends: whether groups end.
    """
    count, words = unpack_words(name, bits)
    per_tile = "GROUPS * 2" if bits == 16 else "GROUPS" if count == 1 else f"GROUPS // {count}"
    first = "group * 2" if bits == 16 else "group" if count == 1 else f"group // {count}"
    row_bytes = "groups * 2" if bits == 16 else "groups" if count == 1 else f"(groups + {count - 1}) // {count}"
    mask = conditions(inside, f"(byte < {row_bytes})[None, :]" if ends else "")
    lines = [
        f"byte = {first} + tl.arange(0, {per_tile})",
        f"{name} = tl.load({pointer} + rows[:, None] * {pointer}_stride + byte[None, :]{mask}).to(tl.int32)",
    ]
    if bits == 16:
        lines.append(f"low_byte, {name} = tl.split(tl.reshape({name}, (N_TILE, GROUPS, 2)))")
    return "\n".join([*lines, f"{name} = {words}"] if words != name else lines)


def conditions(*given: str) -> str:
    """The mask of a load under the conditions that are not empty."""
    mask = " & ".join(condition for condition in given if condition)
    return f", mask={mask}, other=0" if mask else ""


def planes(tile: str, count: int, prefix: str, shape: str = "N_TILE, GROUPS") -> str:
    """Lines that take ``tile``, groups of ``count`` elements, apart into tensors ``<prefix>0, <prefix>1, ...``."""
    if count == 1:
        return f"{prefix}0 = tl.reshape({tile}, ({shape}))"
    lines, level = [], 1
    twos = ", 2" * (count.bit_length() - 1)
    parts = [(f"tl.reshape({tile}, ({shape}{twos}))", 0)]
    while level < count:
        following = []
        for part, first in parts:
            names = [
                f"{prefix}{offset}" if level * 2 == count else f"{prefix}_{offset}_{level * 2}"
                for offset in (first, first + level)
            ]
            lines.append(f"{', '.join(names)} = tl.split({part})")
            following += [(names[0], first), (names[1], first + level)]
        parts, level = following, level * 2
    return "\n".join(lines)


def position(spec: NMSpec, kept: int) -> str:
    """The place of a kept value inside its group, out of the group's index word."""
    shift, mask = spec.index_bits * kept, 2**spec.index_bits - 1
    return f"(index >> {shift}) & {mask}" if shift else f"index & {mask}"


def _expand(spec: NMSpec) -> str:
    """Lines that shift every kept value to its place in words of 64 bits, and cut those into the dense tile."""
    bits, word = spec.bits, min(64, spec.m * spec.bits)
    slots = word // bits
    lines, dense = [], []
    for j in range(spec.n):
        slot = f"p{j}" if slots == spec.m else f"(p{j} % {slots})"
        lines.append(f"p{j} = {position(spec, j)}")
        lines.append(f"s{j} = v{j}.to(tl.uint{word}) << ({slot} * {bits}).to(tl.uint{word})")
    for w in range(spec.m // slots):
        terms = []
        for j in range(spec.n):
            lowest, highest = j // slots, (spec.m - spec.n + j) // slots  # kept positions ascend
            if lowest == highest == w:
                terms.append(f"s{j}")
            elif lowest <= w <= highest:
                terms.append(f"tl.where(p{j} // {slots} == {w}, s{j}, 0)")
        lines.append(f"w{w} = {' | '.join(terms)}")
        halves = [f"w{w}"]
        if word == 64:
            lines += [f"low{w} = w{w}.to(tl.uint32)", f"high{w} = (w{w} >> 32).to(tl.uint32)"]
            halves = [f"low{w}", f"high{w}"]
        for half in halves:
            dense += [half] if bits == 32 else [f"{half}.to(tl.uint16)", f"({half} >> 16).to(tl.uint16)"]
    lines += [f"d{i} = {plane}" for i, plane in enumerate(dense)]
    lines.append(f"dense = {join([f'd{i}' for i in range(spec.m)])}")
    return "\n".join(lines)


_WEIGHT_TILE = '''
@triton.jit
def weight_tile(
    values,
    indices,
    $column_parameters
    rows,
    $inside_parameter
    group,
    $groups_parameter
    values_stride,
    indices_stride,
):
    """Rows of the weight, from one group on: a dense tile [N_TILE, GROUPS * $m]."""
    kept = group * $n + tl.arange(0, GROUPS * $n)
    tile = tl.load(values + rows[:, None] * values_stride + kept[None, :]$mask)
    tile = tile.to(tl.uint$bits, bitcast=True)
    $load_index
    $split
    $column
    $expand
    return tl.reshape(dense, (N_TILE, GROUPS * $m)).to(tl.$dtype, bitcast=True)
'''


def weight_tile(spec: NMSpec, *, column_mask: bool = False, rows_end: bool = False, groups_end: bool) -> str:
    """Decompression in registers: each kept value, as an integer, is shifted to its place in a word of 64 bits.

    Args:
        column_mask: values whose bit is 0 count as zero: the tile is of W^{R,C}.
        rows_end: rows that are not ``inside`` are zero.
        groups_end: groups from ``groups`` on are zero.
    """
    inside = optional(rows_end, "inside[:, None]")
    column = ""
    if column_mask:
        loads = load_words("column_mask", "survives", spec.n, inside=inside, ends=groups_end)
        bits = [f"((survives >> {j}) & 1) != 0" if j else "(survives & 1) != 0" for j in range(spec.n)]
        column = "\n".join([loads, *(f"v{j} = tl.where({bit}, v{j}, 0)" for j, bit in enumerate(bits))])
    return fill(
        _WEIGHT_TILE,
        n=str(spec.n),
        m=str(spec.m),
        bits=str(spec.bits),
        dtype=spec.dtype,
        column_parameters=optional(column_mask, "column_mask,\ncolumn_mask_stride,"),
        inside_parameter=optional(rows_end, "inside,"),
        groups_parameter=optional(groups_end, "groups,"),
        mask=conditions(inside, optional(groups_end, f"(kept < groups * {spec.n})[None, :]")),
        load_index=load_words("indices", "index", spec.n * spec.index_bits, inside=inside, ends=groups_end),
        split=planes("tile", spec.n, "v"),
        column=column,
        expand=_expand(spec),
    )
