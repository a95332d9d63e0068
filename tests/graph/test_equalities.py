"""Which equalities of sizes are assumptions."""

from __future__ import annotations

import pytest
import sympy
from torch.utils._sympy.functions import FloorDiv, Mod

from fxsparse.graph.resize import _is_identity

S, T = sympy.Symbol("s", integer=True, positive=True), sympy.Symbol("t", integer=True, positive=True)


@pytest.mark.parametrize(
    ("left", "always"),
    [
        (Mod(2 * S + 2, S + 1), True),
        (Mod(32 * FloorDiv(S, 80) + 16, 16 * FloorDiv(S, 80) + 8), True),
        (Mod(S, 4), False),
        (Mod(2 * S * T, 3 * S), False),
    ],
)
def test_an_equality_that_always_holds_is_no_assumption(left: sympy.Expr, always: bool) -> None:
    assert _is_identity(sympy.Eq(left, 0, evaluate=False)) == always
