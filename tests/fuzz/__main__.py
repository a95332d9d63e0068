"""``python -m tests.fuzz --cases 10000 [--seed N]``: many random cases, shrunk where one fails, and a summary.

Cases are drawn in runs of a hundred. What a run draws follows from ``--seed`` and its number: a failure is found again
with ``--seed N --first RUN --cases 100``. Its smallest form is printed as the line that a named test is written with.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.fuzz.runs import KINDS, Report, run

SIZE = 100
"""Cases of a run."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--kind", choices=KINDS, default="models")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--no-shrink", action="store_true", help="print a failing case as it was drawn")
    options = parser.parse_args()
    report, start = Report(), time.monotonic()
    for number in range(options.first, options.first - (-options.cases // SIZE)):
        known = len(report.failures)
        run(options.kind, number, options.seed, SIZE, report, shrink=not options.no_shrink)
        for error, where in list(report.failures.items())[known:]:
            print(f"FAILED {error}\n  {where}", file=sys.stderr)
        done, seconds = sum(report.outcomes.values()), time.monotonic() - start
        print(
            f"run {number}: {done} cases in {seconds:.0f} s, {len(report.failures)} failures",
            file=sys.stderr,
            flush=True,
        )
    print(report)
    return bool(report.failures)


if __name__ == "__main__":
    sys.exit(main())
