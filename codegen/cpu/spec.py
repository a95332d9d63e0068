"""What a C++ kernel is made from: a frozen spec that renders to one readable file.

    NMLinear          y = steps(x W^T + scale (x down^T) up^T + bias)    few tokens and many
    NMGradInput       dx = dy W^{R,C}, or dy W^R without a column mask
    NMGradValues      dv = dy^T x at the kept positions

Bias and low-rank branch are arguments that may be absent, so one build serves a layer with and without.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import ClassVar

from fxsparse.codegen.cpu import common, expand, few, grad_input, grad_values, lanes, panels
from fxsparse.codegen.cpu.instruction_sets import InstructionSet
from fxsparse.codegen.epilogue import GATED, Epilogue
from fxsparse.errors import OptionError
from fxsparse.ops.nm import WITH_KERNELS

DTYPES = ("float32", "bfloat16", "float16")
"""Element types a kernel can be made for."""


@dataclass(frozen=True)
class Tile:
    """How the work of a call is cut; one build serves all.

    Attributes:
        few: most tokens that are not worth a transposition.
        vectors: of tokens in a panel, 2, 4 or 8.
        rows: of the weight whose sums over a panel a thread holds, a multiple of 64.
    """

    few: int = 20
    vectors: int = 8
    rows: int = 512

    def __post_init__(self) -> None:
        if self.vectors not in (2, 4, 8):
            raise OptionError(f"vectors={self.vectors} of a tile must be 2, 4 or 8")
        if not 64 <= self.rows <= panels.MOST_ROWS or self.rows % 64:
            raise OptionError(f"rows={self.rows} of a tile must be a multiple of 64, at most {panels.MOST_ROWS}")
        if self.few < 0:
            raise OptionError(f"few={self.few} of a tile is a number of tokens")

    def __str__(self) -> str:
        return f"{self.few}/{self.vectors}/{self.rows}"

    @classmethod
    def parse(cls, text: str) -> Tile:
        """Reads what ``str`` wrote."""
        return cls(*map(int, text.split("/")))


def default_tile(dtype: str, instruction_set: InstructionSet) -> Tile:
    """The tile that is taken unless another is given: measured on Sapphire Rapids and Zen 3."""
    if uses_pairs(instruction_set, dtype):
        return Tile(few=48)
    return Tile(few=24) if instruction_set.lanes == 16 else Tile()


def uses_pairs(instruction_set: InstructionSet, dtype: str) -> bool:
    """Whether pairs of 16-bit numbers are multiplied by one instruction."""
    return instruction_set.name == "avx512_bf16" and dtype == "bfloat16"


@dataclass(frozen=True)
class CPUSpec(ABC):
    """Everything a C++ kernel depends on; equal specs give the same source.

    Attributes:
        dtype: element type of the operands and the result; sums are float32.
        n, m: n of every m consecutive weights of a row are kept.
        instruction_set: that the source is written for.
    """

    kind: ClassVar[str]

    dtype: str
    n: int
    m: int
    instruction_set: InstructionSet

    def __post_init__(self) -> None:
        if (reason := unsupported(self.dtype, self.n, self.m)) is not None:
            raise OptionError(reason)

    @property
    def name(self) -> str:
        """Of its file, before the hash."""
        return f"{self.kind}_{self.n}_{self.m}_{self.dtype}_{self.instruction_set}"

    @property
    def index_bits(self) -> int:
        """Bits of one packed index."""
        return index_bits(self.m)

    @property
    def shrink(self) -> int:
        """Columns of the product for one of the result."""
        return 1

    @property
    def pairs(self) -> bool:
        """Whether pairs of 16-bit numbers are multiplied by one instruction."""
        return uses_pairs(self.instruction_set, self.dtype)

    @abstractmethod
    def body(self) -> str:
        """The functions of this kernel, ``int run(const Call&)`` last."""

    def render(self) -> str:
        """Its source."""
        parts = (
            lanes.COMMON,
            common.CALL,
            "namespace {",
            lanes.lanes(self.instruction_set),
            lanes.elements(self.instruction_set, self.dtype),
            common.weight(self.n, self.m, self.index_bits),
            common.THREADS,
            self.body(),
            "}  // namespace",
            'extern "C" __attribute__((visibility("default"))) int fxsparse_kernel(const Call* call) {\n'
            "  return call->tokens && call->out && call->in ? run(*call) : empty(*call);\n}",
        )
        text = "\n\n".join(part.strip("\n") for part in parts)
        return f"/* {self.title}\n\n{self.text}\n\nMade by fxsparse.codegen.cpu from\n{self.describe()}\n*/\n\n" + (
            lanes.header(self.instruction_set) + "\n" + text + "\n"
        )

    @property
    @abstractmethod
    def title(self) -> str:
        """The product, for the head of the source."""

    @property
    @abstractmethod
    def text(self) -> str:
        """How it is computed, for the head of the source."""

    def describe(self) -> str:
        """The spec as readable lines."""
        return "\n".join(f"    {one.name} = {getattr(self, one.name)}" for one in fields(self))

    def id(self, tile: Tile) -> int:
        """A number that stands for the spec and a tile, the same in every process."""
        return int.from_bytes(hashlib.sha256(f"{tile}\n{self.render()}".encode()).digest()[:7], "big")


@dataclass(frozen=True)
class NMLinear(CPUSpec):
    """y = steps(x W^T + scale (x down^T) up^T + bias).

    Attributes:
        epilogue: its steps; a bias is added where a call has one, whatever it says.
    """

    kind: ClassVar[str] = "nm_linear"

    epilogue: Epilogue = field(default_factory=Epilogue)

    def __post_init__(self) -> None:
        super().__post_init__()
        common.check_epilogue(self.epilogue)

    @property
    def title(self) -> str:
        product = Epilogue(True, self.epilogue.steps).formula("x W^T + scale (x down^T) up^T")
        return f"y = {product}, W {self.n}:{self.m}."

    @property
    def text(self) -> str:
        return f"{few.__doc__}\n{few.way(self.instruction_set).__doc__}\n{panels.__doc__}".rstrip()

    @property
    def shrink(self) -> int:
        """Columns of the product for one of the result."""
        return 2 if self.epilogue.steps and self.epilogue.steps[0].startswith(GATED) else 1

    def body(self) -> str:
        some = few.few(self.instruction_set, self.dtype, self.n, self.m)
        many = panels.panels(self.dtype, pairs=self.pairs)
        return "\n".join((common.finish(self.epilogue, "sums"), some, many, _LINEAR))


@dataclass(frozen=True)
class NMGradInput(CPUSpec):
    """dx = dy W^{R,C}, or dy W^R without a column mask."""

    kind: ClassVar[str] = "nm_linear_grad_input"

    @property
    def title(self) -> str:
        return f"dx = dy W, W {self.n}:{self.m}."

    @property
    def text(self) -> str:
        return str(grad_input.__doc__).rstrip()

    def body(self) -> str:
        return "\n".join(
            (
                common.finish(Epilogue(), "sums"),
                panels.panels(self.dtype, pairs=self.pairs),
                expand.steps(self.instruction_set, self.dtype, self.n, self.m),
                grad_input.grad_input(self.instruction_set),
            )
        )


@dataclass(frozen=True)
class NMGradValues(CPUSpec):
    """dv = dy^T x at the kept positions."""

    kind: ClassVar[str] = "nm_linear_grad_values"

    @property
    def title(self) -> str:
        return f"dv = dy^T x where W, {self.n}:{self.m}, keeps its weights."

    @property
    def text(self) -> str:
        return str(grad_values.__doc__).rstrip()

    def body(self) -> str:
        return panels.make_panel(pairs=self.pairs) + grad_values.grad_values(self.dtype)


_LINEAR = """
int run(const Call& call) {
  if (call.tokens <= call.few) return few_tokens(call);
  const Gather weight{static_cast<const element*>(call.values), call.indices, static_cast<const element*>(call.up),
                      call.in, call.rank, kept_of(call.in), BUNDLE, index_bytes(call.in), BUNDLE_BYTES};
  return panel_product(call, weight, static_cast<const element*>(call.x), call.x_stride, call.in, call.out);
}

// the product of no columns is the epilogue of zeros
int empty(const Call& call) { return call.tokens && call.out ? few_tokens(call) : 0; }
"""


def index_bits(m: int) -> int:
    """Bits of one packed index inside a group of ``m``."""
    return 2 if m <= 4 else 4


def unsupported(dtype: str, n: int, m: int) -> str | None:
    """Why no kernel can be made for a dtype and pattern, None if one can."""
    if dtype not in DTYPES:
        return f"there are kernels for {', '.join(DTYPES)}, not for {dtype}"
    if (n, m) not in WITH_KERNELS:
        return f"there are kernels for {', '.join(f'{a}:{b}' for a, b in WITH_KERNELS)}, not for {n}:{m}"
    return None
