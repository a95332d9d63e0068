"""A sample of the matrix of orders, the same in every run; ``python -m tests.support.matrix`` runs all of it."""

from __future__ import annotations

import pytest

from tests.support import matrix, orders

SAMPLE, PARTS = 150, 10
_SIZE = SAMPLE // PARTS


@pytest.mark.parametrize("part", range(PARTS))
def test_two_passes_are_right_or_refused_with_an_order_that_is(part: int) -> None:
    """Cells of one family, which share its traced model; the first of some is compiled too."""
    own = matrix.sample(matrix.pairs(), SAMPLE, seed=0)[part * _SIZE : (part + 1) * _SIZE]
    assert len({name for name, _ in own}) == 1
    right = 0
    for name, order in own:
        result = orders.cell(name, order, backend="aot_eager" if part % 4 == 0 and not right else None)
        right += result.symbol != "R"
    assert right > 4


@pytest.mark.parametrize("cell", matrix.sample(matrix.triples(), 5, seed=1), ids=lambda cell: ",".join(cell[1]))
def test_three_methods_are_right_or_refused_with_an_order_that_is(cell: matrix.Key) -> None:
    orders.cell(*cell)


def test_the_sample_is_stratified() -> None:
    cells = matrix.sample(matrix.pairs(), SAMPLE, seed=0)
    assert len(set(cells)) == SAMPLE
    for name in orders.FAMILIES:
        for place in (0, 1):
            counts = [sum(c[0] == name and c[1][place] == variant for c in cells) for variant in orders.VARIANTS]
            assert sum(counts) == SAMPLE // len(orders.FAMILIES) and max(counts) - min(counts) <= 1
