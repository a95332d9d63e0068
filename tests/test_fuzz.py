"""A sample of random cases of every kind, other ones each day; ``python -m tests.fuzz`` draws many.

``FXSPARSE_TEST_DAY`` repeats a day's cases. A failure shows the smallest case, as `tests.fuzz` prints it.
"""

from __future__ import annotations

import os

import pytest

from tests.fuzz import runs

CASES = {"models": 28, "texts": 160, "checkpoints": 50, "caches": 62}


@pytest.mark.parametrize("kind", CASES)
def test_a_sample_of_random_cases(kind: str) -> None:
    report = runs.Report()
    runs.run(kind, 0, int(os.environ["FXSPARSE_TEST_DAY"]), CASES[kind], report)
    assert not report.failures, str(report)
    assert sum(report.outcomes.values()) == CASES[kind]
    assert set(CASES) == set(runs.KINDS)
