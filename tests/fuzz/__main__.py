"""``python -m tests.fuzz --cases 10000 [--seed N]``: many random cases, shrunk where one fails, and a summary.

Cases are drawn in runs of a hundred. A run's seed follows from ``--seed`` and its number, so a failure is found again
with ``--seed N --first RUN --cases 100``; its smallest form is printed as the line that a test is written with.
"""

from __future__ import annotations

import argparse
import collections
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz import cases, texts

RUN = 100
KINDS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "models": (cases.cases, cases.check),
    "texts": (texts.texts, texts.check),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the first run of a hundred cases")
    parser.add_argument("--kind", choices=KINDS, default="models")
    parser.add_argument("--no-shrink", action="store_true")
    given_options = parser.parse_args()
    outcomes: collections.Counter[tuple[str, str]] = collections.Counter()
    failures: dict[str, str] = {}
    start = time.monotonic()
    runs = -(-given_options.cases // RUN)
    for run in range(given_options.first, given_options.first + runs):
        _run(given_options, run, outcomes, failures)
        done = sum(outcomes.values())
        seconds = time.monotonic() - start
        print(f"run {run}: {done} cases in {seconds:.0f} s, {len(failures)} failures", file=sys.stderr, flush=True)
    _summary(outcomes, failures)
    return bool(failures)


def _run(options: Any, run: int, outcomes: collections.Counter[tuple[str, str]], failures: dict[str, str]) -> None:
    strategy, check = KINDS[options.kind]
    last: list[Any] = []

    @seed(options.seed * 1_000_003 + run)
    @settings(
        max_examples=RUN,
        database=None,
        deadline=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate] if options.no_shrink else [Phase.generate, Phase.shrink],
    )
    @given(strategy())
    def one(case: Any) -> None:
        last[:] = [case]
        outcome = check(case)
        outcomes[outcome.kind, outcome.detail] += 1

    try:
        one()
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        key = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        failures.setdefault(key, f"run {run}, {place.filename}:{place.lineno}\n    {last[0]!r}")
        print(f"FAILED {key}\n  {failures[key]}", flush=True)


def _summary(outcomes: collections.Counter[tuple[str, str]], failures: dict[str, str]) -> None:
    kinds: collections.Counter[str] = collections.Counter()
    for (kind, _), count in outcomes.items():
        kinds[kind] += count
    print("\n" + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) + f", {len(failures)} failures")
    for (kind, detail), count in outcomes.most_common():
        print(f"{count:7} {kind}: {detail}")
    for key, where in failures.items():
        print(f"FAILED {key}\n  {where}")


if __name__ == "__main__":
    sys.exit(main())
