"""Epilogues: a bias and a chain of pointwise steps that a kernel applies to a product before it stores the result.

Everything is computed in float32:

gelu(t) = t (1 + erf(t / sqrt 2)) / 2        gelu_tanh(t) = t (1 + tanh(sqrt(2/pi) (t + 0.044715 t^3))) / 2
silu(t) = t / (1 + exp(-t))                  relu, tanh;  mul and add take a further tensor of the result's shape
gated_silu and the like, only first: of each pair of columns, silu(first) * second (GLU variants, arXiv 2002.05202)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fxsparse.codegen.spec import Argument
from fxsparse.errors import OptionError

_EXPRESSIONS = {
    "gelu": f"0.5 * t * (1 + $lang.erf(t * {math.sqrt(0.5)!r}))",
    # 1 + tanh(u) = 2 - 2 / (exp(2u) + 1), which neither overflows nor needs a tanh
    "gelu_tanh": f"t * (1 - 1 / ($lang.exp({2 * math.sqrt(2 / math.pi)!r} * (t + 0.044715 * t * t * t)) + 1))",
    "relu": "$lang.where(t < 0, 0.0, t)",  # a NaN stays one
    "silu": "t / (1 + $lang.exp(-t))",
    "tanh": "1 - 2 / ($lang.exp(2 * t) + 1)",
}
_OPERATORS = {"mul": "*", "add": "+"}
GATED = "gated_"
"""Begins the name of a step that makes one column of two."""


@dataclass(frozen=True)
class Epilogue:
    """Steps after a product.

    Attributes:
        bias: add a vector along the columns first.
        steps: names among gelu, gelu_tanh, relu, silu, tanh, mul, add; each mul and add takes one more tensor. The
            first may be one of the others after ``gated_``.
    """

    bias: bool = False
    steps: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for step in self.steps[bool(self.gate) :]:
            if step not in _EXPRESSIONS and step not in _OPERATORS:
                known = ", ".join([*_EXPRESSIONS, *_OPERATORS])
                raise OptionError(f"no epilogue step {step!r}; there are {known}")

    def __str__(self) -> str:
        return " -> ".join([*(["bias"] if self.bias else []), *self.steps]) or "none"

    @property
    def gate(self) -> str:
        """The function of the gate where pairs of columns become one, else nothing."""
        name = self.steps[0].removeprefix(GATED) if self.steps and self.steps[0].startswith(GATED) else ""
        return name if name in _EXPRESSIONS else ""

    @property
    def operands(self) -> int:
        """Tensors that the steps take."""
        return sum(step in _OPERATORS for step in self.steps)

    def arguments(self, pointer: str) -> tuple[Argument, ...]:
        """Its parameters: the bias, then each tensor, then the tensors' row strides."""
        names = [f"operand{i}" for i in range(self.operands)]
        return (
            *((Argument("bias", pointer),) if self.bias else ()),
            *(Argument(name, pointer) for name in names),
            *(Argument(f"{name}_stride", "i32") for name in names),
        )

    def formula(self, product: str) -> str:
        """The math, for a person: ``gelu(x W^T + bias)``."""
        text, operand = product + (" + bias" if self.bias else ""), 0
        compound = self.bias
        for step in self.steps:
            if step in _OPERATORS:
                left = f"({text})" if compound and step == "mul" else text
                text, compound = f"{left} {_OPERATORS[step]} operand{operand}", True
                operand += 1
            else:
                text, compound = f"{step}({text})", False
        return text

    def lines(
        self, *, lang: str = "tl", column: str, offset: str, mask: str, column_mask: str, gating: str = ""
    ) -> str:
        """Statements that turn ``t``, a float32 tile of the product, into the result.

        Args:
            lang: name of the language module.
            column: broadcastable column numbers of the tile.
            offset: rows of the tile, broadcastable, int64; times a row stride plus ``column`` it addresses an element.
            mask, column_mask: what of the tile and of its columns exists.
            gating: statements that part pairs of columns into ``t`` and ``other``, and then give the above for half of
                the columns; a kernel without cannot gate.

        Raises:
            OptionError: the kernel cannot gate.
        """
        lines, operand = [], 0
        if self.bias:
            lines.append(f"t += {lang}.load(bias + {column}, mask={column_mask}, other=0.0).to({lang}.float32)")
        if self.gate:
            if not gating:
                raise OptionError(f"this kernel has no step {self.steps[0]!r}")
            lines += [gating, f"t = {_EXPRESSIONS[self.gate].replace('$lang', lang)}", "t = t * other"]
        for step in self.steps[bool(self.gate) :]:
            if step in _OPERATORS:
                place = f"operand{operand} + {offset} * operand{operand}_stride + {column}"
                lines.append(
                    f"t = t {_OPERATORS[step]} {lang}.load({place}, mask={mask}, other=0.0).to({lang}.float32)"
                )
                operand += 1
            else:
                lines.append(f"t = {_EXPRESSIONS[step].replace('$lang', lang)}")
        return "\n".join(lines)
