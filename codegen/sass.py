"""The machine code of a compiled kernel: its main loop, and what its instructions are.

The main loop is the one where matrix products are most of the instructions, or where there are none the longest; of a
kernel without loops it is all of it. A loop is what lies between a branch and the earlier label that it goes to.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from fxsparse.codegen.aot import disassemble

PRODUCTS, ALU, SHARED, GLOBAL, OTHER = "products", "integer", "shared", "global", "other"
CLASSES = {
    PRODUCTS: r"HMMA|HGMMA|IMMA|DMMA",
    ALU: r"LOP3|PLOP3|SHF|PRMT|SEL|ISETP|IADD|VIADD|LEA|IMNMX|VIMNMX|BFE|BFI|I2F|F2I|I2I|POPC|FLO|IABS|SGXT",
    SHARED: r"LDS|STS|LDSM|STSM|ATOMS",
    GLOBAL: r"LDG|STG|LDGSTS|UTMALDG|ATOMG|RED|LD\b|ST\b",
}
"""Instructions by class, by the beginnings of their names; all others are ``other``."""

_LABEL = re.compile(r"^\s*(\.L_x?_?\w+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_TARGET = re.compile(r"`\((\.L_x?_?\w+)\)")


@dataclass(frozen=True)
class Loop:
    """The instructions of a loop, by name."""

    instructions: tuple[str, ...]

    def count(self, kind: str) -> int:
        """How many are of a class."""
        return self.by_class()[kind]

    def by_class(self) -> Counter[str]:
        return Counter(map(class_of, self.instructions))

    def named(self, pattern: str) -> int:
        """How many names begin so."""
        return sum(re.match(pattern, name) is not None for name in self.instructions)


def class_of(name: str) -> str:
    return next((kind for kind, pattern in CLASSES.items() if re.match(pattern, name)), OTHER)


def main_loop(compiled: Any) -> Loop:
    """The main loop of a kernel of `aot.compile_for`."""
    names, loops = _parse(disassemble(compiled))
    # A branch to itself is what the assembler ends kernels with.
    bodies = [Loop(tuple(names[first : last + 1])) for first, last in loops if first < last]
    return max(bodies, key=_importance, default=Loop(tuple(names)))


def _importance(loop: Loop) -> tuple[float, int]:
    length = len(loop.instructions)
    return loop.count(PRODUCTS) / length, length


def _parse(assembly: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Names of instructions in order, and the first and the last of each loop."""
    names: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in assembly.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(names)
        elif found := _INSTRUCTION.search(line):
            target = _TARGET.search(found[2]) if found[1].startswith("BRA") else None
            if target and target[1] in labels:
                loops.append((labels[target[1]], len(names)))
            names.append(found[1])
    return names, loops
