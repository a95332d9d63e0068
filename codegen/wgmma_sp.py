"""Hopper's instruction for sparse tensor cores, and how its operands lie in shared memory, as Gluon source.

``wgmma.mma_async.sp`` (sm_90) lets a group of four warps multiply 64 compressed rows of W by 8 to 256 rows of x, both
read from shared memory, where TMA has put them. Triton has no operation for it; inline assembly calls it:

    W      64 rows x 32 columns, 2 of 4 kept: 16 values a row. A row of a step (64 columns) is 64 bytes, swizzled by 64
    x      rows x 32 columns. A row of a step is 128 bytes, swizzled by 128
    E      one word a thread, read by the first instruction of a step in its selector 0 and by the second in its
           selector 1 (``metadata.py`` packs it)
    up     of a low-rank branch, 64 rows x 16 columns, whole; 32 columns fill the place of W's kept values of a step
    sums   float32, register 4j + 2h + p of lane 4g + t of warp v: row 16v + g + 8h of W, row 8j + 2t + p of x

Descriptors of shared memory, layouts and the order of the words follow the PTX ISA, sections on ``wgmma``. Gluon has no
name for the address of a buffer, so the assembly adds the buffers' offsets to the symbol ``global_smem``:
:func:`offsets` says where Triton puts them, and :func:`copied_to` reads from the compiled kernel where it did.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

FEATURES = 128
"""Rows of W in a tile: 64 for each of the two groups of warps that multiply."""
STEP = 64
"""Columns of W in a step."""
W_STEP, E_STEP = FEATURES * STEP, FEATURES * STEP // 8
"""Bytes of a step's kept values and of their metadata."""
_SWIZZLE_128, _SWIZZLE_64 = 1, 2


@dataclass(frozen=True)
class Ring:
    """The buffers that a step's operands are copied to, ``stages`` of them, for ``tokens`` rows of x."""

    tokens: int
    stages: int

    @property
    def x_step(self) -> int:
        """Bytes of the rows of x in a step."""
        return self.tokens * STEP * 2

    @property
    def step(self) -> int:
        """Bytes of a step."""
        return W_STEP + self.x_step + E_STEP

    def offsets(self) -> tuple[int, int]:
        """Where W and x lie in shared memory: the larger first, among equals W."""
        w, x = self.stages * W_STEP, self.stages * self.x_step
        return (0, w) if w >= x else (x, 0)

    def instructions(self, dtype: str) -> str:
        """A step, as source of a string.

        Operands: ``tokens / 2`` results; as often the metadata word; as often twice the stage plus which half of W's
        rows; the accumulator, tied to the results.
        """
        count, kind = self.tokens // 2, "bf16" if dtype == "bfloat16" else "f16"
        sums = ", ".join(f"${i}" for i in range(count))
        opcode = f"wgmma.mma_async.sp.sync.aligned.m64n{self.tokens}k32.f32.{kind}.{kind}"
        products = [
            f"{opcode} {{{sums}}}, dw, dx, ${count}, 0, p, 1, 1, 0, 0;",
            "add.s64 dw, dw, 2; add.s64 dx, dx, 4;",
            f"{opcode} {{{sums}}}, dw, dx, ${count}, 1, p, 1, 1, 0, 0;",
        ]
        return self._assembly(f"${2 * count}", products)

    def constraints(self) -> str:
        return self._constraints(2)

    def dense_instructions(self, dtype: str) -> str:
        """A step of 32 columns of a dense operand in the place of W, as source of a string.

        Operands: those of a step, without the metadata.
        """
        count, kind = self.tokens // 2, "bf16" if dtype == "bfloat16" else "f16"
        opcode = f"wgmma.mma_async.sync.aligned.m64n{self.tokens}k16.f32.{kind}.{kind}"
        product = f"{opcode} {{{', '.join(f'${i}' for i in range(count))}}}, dw, dx, p, 1, 1, 0, 0;"
        return self._assembly(f"${count}", [product, "add.s64 dw, dw, 2; add.s64 dx, dx, 2;", product])

    def dense_constraints(self) -> str:
        return self._constraints(1)

    def _constraints(self, inputs: int) -> str:
        count = self.tokens // 2
        return ",".join(["=f"] * count + ["r"] * (inputs * count) + [str(i) for i in range(count)])

    def _assembly(self, half: str, products: list[str]) -> str:
        """Products of a step, between what finds their operands and what waits for them."""
        w_place, x_place = self.offsets()
        lines = [
            "{",
            ".reg .b32 base, stage, w, x; .reg .b64 dw, dx; .reg .pred p;",
            "setp.eq.u32 p, 0, 0;",
            "mov.u32 base, global_smem;",
            f"mad.lo.u32 w, {half}, {W_STEP // 2}, base; add.u32 w, w, {w_place};",
            f"shr.u32 stage, {half}, 1; mad.lo.u32 x, stage, {self.x_step}, base; add.u32 x, x, {x_place};",
            "shr.u32 w, w, 4; and.b32 w, w, 0x3fff; shr.u32 x, x, 4; and.b32 x, x, 0x3fff;",
            "cvt.u64.u32 dw, w; cvt.u64.u32 dx, x;",
            f"or.b64 dw, dw, {_descriptor(_SWIZZLE_64, row_bytes=64):#x};",
            f"or.b64 dx, dx, {_descriptor(_SWIZZLE_128, row_bytes=128):#x};",
            "wgmma.fence.sync.aligned;",
            *products,
            "wgmma.commit_group.sync.aligned;",
            # Across pieces of assembly the compiler serialises what is in flight; the other group of warps hides it.
            "wgmma.wait_group.sync.aligned 0;",
            "}",
        ]
        return "\n".join(f'    "{line}\\n"' for line in lines)


def _descriptor(swizzle: int, row_bytes: int) -> int:
    """A descriptor of shared memory without its address: groups of 8 rows, one after the other."""
    return swizzle << 62 | (8 * row_bytes >> 4) << 32 | 1 << 16


_WRITTEN = re.compile(r"^\s*(mov|add|sub|shl)\.\w+\s+(%r\d+),\s*([^;]+);", re.M)
_COPY = re.compile(r"cp\.async\.bulk\.tensor\.\S+\s+\[(%r\d+)\],\s*\[\S+,\s*\{[^}]*\}\],\s*\[%r\d+\]")


def copied_to(ptx: str) -> list[int]:
    """Offsets in shared memory that a compiled kernel's TMA copies of the first step write to, in program order.

    A register counts as what its first definition makes it where the stage is 0: what is not a sum of constants and of
    ``global_smem`` is 0 then.
    """
    first: dict[str, tuple[str, list[str]]] = {}
    for match in _WRITTEN.finditer(ptx[ptx.index(".entry") :]):
        first.setdefault(match[2], (match[1], [part.strip() for part in match[3].split(",")]))

    def constant(text: str) -> int:
        if text.lstrip("-").isdigit():
            return int(text)
        if text not in first:
            return 0
        kind, (left, *rest) = first[text]
        value, other = constant(left), constant(rest[0]) if rest else 0
        return {"mov": value, "add": value + other, "sub": value - other, "shl": value << max(other, 0)}[kind]

    return [constant(match[1]) for match in _COPY.finditer(ptx)]
