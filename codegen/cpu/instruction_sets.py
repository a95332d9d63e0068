"""The instruction sets that kernels are made for, and which of them this processor has.

    avx512_bf16   16 floats a vector, and instructions that expand and multiply 16-bit numbers (Zen 4, Sapphire Rapids)
    avx512        16 floats a vector (Skylake-X, Ice Lake)
    avx2          8 floats a vector and fused multiply-add (Haswell, Zen 1 and later)
    portable      8 floats a vector, as extensions of GCC and Clang write them: any processor, ARM among them

torch reports the processor's capabilities, as Inductor reads them too. ``FXSPARSE_CPU`` names one to be
used instead, or ``none`` for no kernels at all.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fxsparse.errors import OptionError


@dataclass(frozen=True)
class InstructionSet:
    """An instruction set.

    Attributes:
        name: of those above.
        lanes: floats of a vector.
        registers: vectors that the processor holds.
        flags: of GCC and Clang.
        needs: capabilities, as ``torch.cpu.get_capabilities`` names them.
    """

    name: str
    lanes: int
    registers: int
    flags: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


_AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
_AVX512_FLAGS = (*_AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
_AVX2_NEEDS = ("avx2", "fma3", "f16c", "bmi2")
_AVX512_NEEDS = (*_AVX2_NEEDS, "avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")

AVX512_BF16 = InstructionSet(
    "avx512_bf16",
    16,
    32,
    (*_AVX512_FLAGS, "-mavx512vbmi", "-mavx512vbmi2", "-mavx512bf16"),
    (*_AVX512_NEEDS, "avx512_vbmi", "avx512_vbmi2", "avx512_bf16"),
)
AVX512 = InstructionSet("avx512", 16, 32, _AVX512_FLAGS, _AVX512_NEEDS)
AVX2 = InstructionSet("avx2", 8, 16, _AVX2_FLAGS, _AVX2_NEEDS)
PORTABLE = InstructionSet("portable", 8, 16)

NONE = "none"
"""What ``FXSPARSE_CPU`` says where no kernels are wanted."""

ALL = (AVX512_BF16, AVX512, AVX2, PORTABLE)
"""From the fastest on."""


def available(capabilities: Mapping[str, object] | None = None) -> tuple[InstructionSet, ...]:
    """The instruction sets of a processor with these capabilities, this one unless given; the fastest first."""
    reported = _reported() if capabilities is None else capabilities
    return tuple(one for one in ALL if all(reported.get(need) for need in one.needs))


def chosen() -> InstructionSet:
    """The instruction set that kernels are made for: the fastest, or the one that ``FXSPARSE_CPU`` names.

    Raises:
        OptionError: it names none, or one that this processor does not have.
    """
    return _chosen(os.environ.get("FXSPARSE_CPU", ""))


@functools.cache
def _chosen(name: str) -> InstructionSet:
    sets = available()
    if not name or name == NONE:
        return sets[0]
    for one in sets:
        if one.name == name:
            return one
    known = ", ".join(map(str, sets))
    raise OptionError(f"FXSPARSE_CPU={name!r} is not an instruction set of this processor; it has {known}")


@functools.cache
def processor() -> str:
    """This machine's processor, as the system names it."""
    try:
        with open("/proc/cpuinfo") as file:
            fields = [line.partition(":") for line in file.read().partition("\n\n")[0].splitlines()]
    except OSError:
        return platform.processor() or platform.machine()
    known = {name.strip(): value.strip() for name, _, value in fields}
    parts = [known.get("model name", platform.machine())]
    parts += [f"{name} {known[name]}" for name in ("cpu family", "model") if name in known]
    return " ".join(parts)


@functools.cache
def _reported() -> Mapping[str, object]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return {}
    capabilities: Mapping[str, object] = torch.cpu.get_capabilities()
    return capabilities
