"""Which tests a run of the whole suite takes: every quick one, and the slow ones in turn, other ones each day.

``tests/durations.json`` holds the seconds that a case of each slow test takes, on average over its cases. Cases of a
test take turns, so each of them runs once in as many days as `period` says. ``FXSPARSE_TEST_ALL=1`` takes everything,
and so does naming a file or a test, or choosing by ``-k`` or ``-m``. The table is written anew from such a run:

    FXSPARSE_TEST_ALL=1 pytest --junitxml=times.xml && python -m tests.support.sampling times.xml
"""

from __future__ import annotations

import collections
import json
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

TABLE = Path(__file__).parents[1] / "durations.json"
SLOW = 1.2
"""Seconds of a case from which on its test is in the table."""
ROOT = "tests/"
SAMPLES = ("passes/test_matrix.py", "test_fuzz.py", "test_families.py")
"""Files that are samples themselves, other ones each day: they always run."""


def period(seconds: float) -> int:
    """In how many days a case of a test that takes so long runs once."""
    return next((days for limit, days in ((SLOW, 1), (2, 4), (4, 6), (10, 8)) if seconds < limit), 12)


def test_of(case: str) -> str:
    """The test that a case, ``tests/test_a.py::test_b[c]``, belongs to, as the table names it."""
    return case.partition("[")[0].removeprefix(ROOT)


def taken(cases: Iterable[str], day: int, seconds: dict[str, float]) -> set[str]:
    """The cases that run on a day, in the order in which they were collected."""
    count: collections.Counter[str] = collections.Counter()
    chosen = set()
    for case in cases:
        test = test_of(case)
        turn = zlib.crc32(test.encode()) + count[test] + day  # tests of one case each do not all run on the same day
        count[test] += 1
        if turn % period(seconds.get(test, 0)) == 0:
            chosen.add(case)
    return chosen


def read() -> dict[str, float]:
    """Seconds of a case, by test."""
    table: dict[str, float] = json.loads(TABLE.read_text())
    return table


def averages(report: Path) -> dict[str, float]:
    """The same of every test in a report in JUnit's format."""
    times = collections.defaultdict(list)
    for case in ElementTree.parse(report).iter("testcase"):
        if case.get("classname") and case.find("skipped") is None:
            path = str(case.get("classname")).replace(".", "/") + ".py"
            times[test_of(f"{path}::{case.get('name')}")].append(float(case.get("time", 0)))
    return {test: sum(each) / len(each) for test, each in times.items()}


def main() -> None:
    times = averages(Path(sys.argv[1]))
    slow = {test: round(s, 1) for test, s in times.items() if s >= SLOW and not test.startswith(SAMPLES)}
    TABLE.write_text(json.dumps(slow, indent=0, sort_keys=True) + "\n")
    print(f"{TABLE}: {len(slow)} tests")


if __name__ == "__main__":
    main()
