"""A sample of the matrix of orders, small enough for every run: 150 pairs and five orders of three methods.

All of them train beside their oracle, or are refused with advice that is followed; a sixth is checked in every way.

It is another one every day, so that the days together cover the matrix, and a failure names the seed that repeats it:
``FXSPARSE_TEST_SEED=739584 pytest tests/passes/test_matrix.py``. ``python -m tests.support.matrix`` runs all of it.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

from tests.support import matrix, orders

SEED = int(os.environ.get("FXSPARSE_TEST_SEED") or os.environ["FXSPARSE_TEST_DAY"])
PAIRS = 150
THOROUGH = 5
"""Pairs of a family that are also rewritten in steps, saved and loaded."""
EXPORTED, COMPILED = orders.FAMILIES[SEED % 4], orders.FAMILIES[(SEED + 1) % 4]
"""Whose plain models are traced anew, and of whom one order is compiled; T5, which takes longest, only in the whole."""


def _check(cells: list[matrix.Key], *, compiled: int = 0) -> None:
    """Cells of one family, which share its traced model; the first right ones are compiled too."""
    for number, (name, order) in enumerate(cells):
        thorough = number < THOROUGH
        backend = "aot_eager" if compiled else None
        try:
            exported = thorough and name == EXPORTED
            result = orders.cell(name, order, backend=backend, exported=exported, thorough=thorough)
        except Exception as error:
            raise AssertionError(f"{name}: {', '.join(order)} (FXSPARSE_TEST_SEED={SEED})") from error
        compiled -= compiled > 0 and result.symbol != "R"


@pytest.mark.parametrize("family", orders.FAMILIES)
def test_orders_are_right_or_refused_with_an_order_that_is(family: str) -> None:
    pairs = [cell for cell in matrix.sample(matrix.pairs(), PAIRS, SEED) if cell[0] == family]
    _check(pairs, compiled=int(family == COMPILED))
    _check([cell for cell in matrix.sample(matrix.triples(), len(orders.FAMILIES), SEED) if cell[0] == family])


def test_the_sample_is_stratified() -> None:
    cells = matrix.sample(matrix.pairs(), PAIRS, SEED)
    assert len(set(cells)) == PAIRS
    assert set(Counter(name for name, _ in cells).values()) == {PAIRS // len(orders.FAMILIES)}
    for place in (0, 1):
        counts = [sum(order[place] == variant for _, order in cells) for variant in orders.VARIANTS]
        assert max(counts) - min(counts) <= 1
