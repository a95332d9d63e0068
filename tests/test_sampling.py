"""The sample that a run of the whole suite takes."""

from __future__ import annotations

from pathlib import Path

from tests.support import sampling

CASES = ["tests/test_a.py::test_quick", *(f"tests/test_a.py::test_slow[{name}]" for name in "abcdefghijkl")]
SECONDS = {"test_a.py::test_slow": 20.0}


def test_quick_tests_always_run_and_every_slow_case_runs_once_in_twelve_days() -> None:
    days = [sampling.taken(CASES, day, SECONDS) for day in range(100, 112)]
    assert all(CASES[0] in day for day in days)
    assert all(sum(case in day for day in days) == 1 for case in CASES[1:])
    assert all(len(day) == 2 for day in days)  # and not all on the same day


def test_a_test_without_a_time_always_runs() -> None:
    assert sampling.taken(CASES, 1, {}) == set(CASES)


def test_times_are_read_from_a_report(tmp_path: Path) -> None:
    report = tmp_path / "times.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.ops.test_a" name="test_b[c]" time="1.0"/>'
        '<testcase classname="tests.ops.test_a" name="test_b[d]" time="4.0"/>'
        '<testcase classname="tests.ops.test_a" name="test_b[e]" time="0"><skipped/></testcase>'
        "</testsuite></testsuites>"
    )
    assert sampling.averages(report) == {"ops/test_a.py::test_b": 2.5}


def test_the_table_names_tests_that_exist() -> None:
    root = Path(sampling.__file__).parents[1]
    names = {test: (root / test.partition("::")[0]).read_text() for test in sampling.read()}
    assert [test for test, text in names.items() if f"def {test.partition('::')[2]}(" not in text] == []
