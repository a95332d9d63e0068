"""Evaluates the symbolic sizes of a graph at concrete sizes.

The caller names sizes by input, and every symbol of the graph gets a number:

| the caller says | meaning |
|---|---|
| ``input_ids=(8, 128)`` | the input ``input_ids`` is ``[8, 128]`` |
| ``input_ids=(8, None)`` | the second dimension keeps its traced size |
| ``input_ids=tensor`` | the input has the shape of the tensor |
| ``s43=8`` | the symbol ``s43`` is 8 |

An unnamed symbol keeps its traced size, unless it is the same dimension of another input as a named symbol and has the
same traced size: then it takes the named size. Tracing gives the batch dimensions of ``input_ids`` and ``labels`` two
symbols, and this rule keeps them equal.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule

from fxsparse.cost.formulas import Operand, Size
from fxsparse.errors import OptionError


def expression(size: Any) -> Size:
    """A dimension of a fake tensor as an integer or a sympy expression."""
    expr = size.node.expr if isinstance(size, torch.SymInt) else size
    return int(expr) if getattr(expr, "is_number", True) else expr


class Sizes:
    """A number for every symbol of a graph.

    Args:
        gm: a training-IR graph module.
        sizes: sizes by input, see the module docstring; by default those of the traced example.

    Raises:
        OptionError: the graph has no such input or symbol, the number of dimensions is wrong, or a static dimension
            would need another size.
    """

    def __init__(self, gm: GraphModule, sizes: Mapping[str, Any] | None = None):
        inputs = {
            str(node.target): node.meta["val"].shape
            for node in gm.graph.nodes
            if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor)
        }
        traced: dict[sympy.Symbol, int] = {}
        places: dict[sympy.Symbol, list[int]] = {}
        for shape in inputs.values():
            for position, size in enumerate(shape):
                if isinstance(size, torch.SymInt) and (bound := _solve(size.node.expr, int(size.node.hint))):
                    symbol, number = bound
                    traced.setdefault(symbol, number)
                    places.setdefault(symbol, []).append(position)

        named: dict[sympy.Symbol, int] = {}
        symbols = {str(symbol): symbol for symbol in traced}
        flags = {str(node.target) for node in gm.graph.nodes if node.op == "placeholder"} - set(inputs)
        for name, wanted in (sizes or {}).items():
            if name in flags:
                continue
            if name in inputs:
                _bind(name, inputs[name], getattr(wanted, "shape", wanted), named)
            elif name in symbols:
                _assign(named, symbols[name], int(wanted), name)
            else:
                raise OptionError(
                    f"no input and no size of that name{suggest(name, [*inputs, *symbols])}; "
                    f"inputs: {', '.join(inputs) or 'none'}; symbols: {', '.join(symbols) or 'none'}",
                    site=name,
                )
        self._values = {symbol: named.get(symbol, _followed(symbol, named, traced, places)) for symbol in traced}
        self._known: dict[Any, int] = {}

    @property
    def values(self) -> dict[str, int]:
        """The size of every symbol."""
        return {str(symbol): size for symbol, size in self._values.items()}

    def number(self, size: Any) -> int:
        """A dimension of a fake tensor as a number."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        return self.evaluate(size.node.expr)

    def evaluate(self, size: Size) -> int:
        """A size expression as a number."""
        if isinstance(size, int):
            return size
        if size not in self._known:
            number = sympy.sympify(size.xreplace(self._values))
            if not number.is_Integer:
                unknown = ", ".join(sorted(map(str, number.free_symbols)))
                raise OptionError(
                    f"the size {size} depends on data ({unknown}); FLOPs of such a graph cannot be counted"
                )
            self._known[size] = int(number)
        return self._known[size]

    def operand(self, value: Tensor) -> Operand:
        """The operand of a fake tensor, with its shape in numbers."""
        return Operand(tuple(map(self.number, value.shape)), value.dtype)


def _bind(name: str, shape: Iterable[Any], sizes: Any, named: dict[sympy.Symbol, int]) -> None:
    shape = tuple(shape)
    wanted = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    if len(wanted) != len(shape):
        raise OptionError(f"has {len(shape)} dimensions, {len(wanted)} sizes were given", site=name)
    for position, (size, number) in enumerate(zip(map(expression, shape), wanted, strict=True)):
        if number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise OptionError(f"the size of dimension {position} must be a positive integer, not {number!r}", site=name)
        if isinstance(size, int):
            if size != number:
                raise OptionError(
                    f"dimension {position} was traced with the fixed size {size}; {number} needs a trace of that size"
                    + (", or one with dynamic_sequence=True" if position == 1 else ""),
                    site=name,
                )
        elif bound := _solve(size, number):
            _assign(named, *bound, f"{name}, dimension {position}")
        else:
            raise OptionError(f"dimension {position} is {size} and cannot be {number}", site=name)


def _solve(size: sympy.Expr, number: int) -> tuple[sympy.Symbol, int] | None:
    """The only symbol of ``size`` and its integer value for which ``size`` equals ``number``; None if there is none."""
    if isinstance(size, sympy.Symbol):
        return size, number
    if len(size.free_symbols) != 1:
        return None
    (symbol,) = size.free_symbols
    solutions = [solution for solution in sympy.solve(size - number, symbol) if solution.is_Integer]
    return (symbol, int(solutions[0])) if len(solutions) == 1 else None


def _assign(named: dict[sympy.Symbol, int], symbol: sympy.Symbol, number: int, site: str) -> None:
    if named.setdefault(symbol, number) != number:
        raise OptionError(f"{number} contradicts the size {named[symbol]} given for {symbol} elsewhere", site=site)


def _followed(
    symbol: sympy.Symbol,
    named: dict[sympy.Symbol, int],
    traced: dict[sympy.Symbol, int],
    places: dict[sympy.Symbol, list[int]],
) -> int:
    leaders = {
        number
        for leader, number in named.items()
        if traced[leader] == traced[symbol] and set(places[leader]) & set(places[symbol])
    }
    return leaders.pop() if len(leaders) == 1 else traced[symbol]


def suggest(name: str, known: Iterable[str]) -> str:
    """``, did you mean ...?`` if a known name is close to ``name``, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=2, cutoff=0.5)
    return f", did you mean {' or '.join(close)}?" if close else ""


class Symbolic:
    """Reads a graph's sizes as sympy expressions instead of numbers."""

    def number(self, size: Any) -> Size:
        return expression(size)

    def operand(self, value: Tensor) -> Operand:
        return Operand(tuple(map(expression, value.shape)), value.dtype)
