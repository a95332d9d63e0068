"""Specs: frozen descriptions that kernels are generated from, with their tiles and their arguments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

from fxsparse.errors import OptionError
from fxsparse.ops.nm import WITH_KERNELS

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
"""Element types a kernel can be made for, and Triton's short names of them."""


@dataclass(frozen=True)
class Tile:
    """The part of the output that one program computes, and how.

    Attributes:
        rows, columns: of the output tile.
        depth: of one step along the reduced dimension.
        warps: of 32 threads, a program.
        stages: steps whose loads are in flight at once.
        group: tiles of rows visited together before the next tile of columns, so that operands stay in the L2 cache.
    """

    rows: int
    columns: int
    depth: int
    warps: int = 4
    stages: int = 3
    group: int = 8

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "depth", "warps"):
            size = getattr(self, name)
            if size < 1 or size & (size - 1):
                raise OptionError(f"{name}={size} of a tile must be a power of two")
        if self.stages < 1 or self.group < 1:
            raise OptionError(f"stages={self.stages} and group={self.group} of a tile must be at least 1")

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.depth} {self.warps} warps {self.stages} stages"


@dataclass(frozen=True)
class Argument:
    """A parameter of a kernel: its name and Triton type, such as ``*bf16``, ``i32`` or ``fp32``."""

    name: str
    type: str


@dataclass(frozen=True)
class Spec(ABC):
    """Everything a generated kernel depends on; equal specs give the same source.

    Attributes:
        dtype: element type of the operands and the result; products accumulate in float32.
        tile: the shape of the work.
    """

    gluon: ClassVar[bool] = False
    relies_on_ptx: ClassVar[bool] = False  # whether `check` has something to look for

    dtype: str
    tile: Tile

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise OptionError(f"no kernel for {self.dtype}; there are kernels for {', '.join(DTYPES)}")

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the kernel function, as profilers show it."""

    @property
    @abstractmethod
    def arguments(self) -> tuple[Argument, ...]:
        """Its parameters, in order."""

    @abstractmethod
    def render(self) -> str:
        """Its source."""

    def types(self) -> dict[str, str]:
        """The types of its parameters by name, as the compiler takes them."""
        return {argument.name: argument.type for argument in self.arguments}

    def check(self, ptx: str) -> None:
        """Raises RuntimeError if a compiled kernel is not what the spec relies on."""
        return

    @property
    def short_dtype(self) -> str:
        return DTYPES[self.dtype]

    @property
    def pointer(self) -> str:
        """Triton type of a tensor of the spec's dtype."""
        return f"*{self.short_dtype}"

    @property
    def bits(self) -> int:
        """Bits of an element."""
        return 32 if self.dtype == "float32" else 16

    def describe(self) -> str:
        """The spec as readable lines, for the header of the source."""
        return "\n".join(f"    {field.name} = {getattr(self, field.name)}" for field in fields(self))


@dataclass(frozen=True)
class NMSpec(Spec):
    """A spec of a kernel on an N:M weight.

    Attributes:
        n, m: n of every m consecutive weights of a row are kept.
    """

    n: int
    m: int

    PATTERNS: ClassVar[tuple[tuple[int, int], ...]] = WITH_KERNELS

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.n, self.m) not in self.PATTERNS:
            known = ", ".join(f"{n}:{m}" for n, m in self.PATTERNS)
            raise OptionError(f"no kernel for pattern {self.n}:{self.m}; there are kernels for {known}")

    def require_depth(self) -> None:
        """Refuses steps that Triton 3.6 compiles to wrong code.

        It gives a thread of a tensor core operand 8 adjacent elements of the reduced dimension because the operand is
        made from bytes, and where 4 threads of 8 elements exceed the step it reads some elements twice.
        """
        if self.tile.depth < 32:
            raise OptionError(f"tile {self.tile} of a product with a compressed weight needs a depth of at least 32")

    @property
    def index_bits(self) -> int:
        """Bits of one packed index."""
        return 2 if self.m <= 4 else 4
