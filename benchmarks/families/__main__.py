"""The census of transformers.

python -m benchmarks.families                            runs what has no result yet, and writes docs/families.md
python -m benchmarks.families census.jsonl --only bert   some families, results in this file
python -m benchmarks.families --again wrong crash        what had these results, once more
python -m benchmarks.families --list                     the families
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported


def main() -> None:
    from benchmarks.families import page, running
    from benchmarks.families.cells import ALL
    from benchmarks.families.tiny import classes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, default=Path("families.jsonl"), help="one line for each cell")
    parser.add_argument("--only", nargs="*", help="families")
    parser.add_argument("--columns", nargs="*", default=list(ALL), choices=ALL, metavar="COLUMN", help="|".join(ALL))
    parser.add_argument("--again", nargs="*", default=[], help="states whose cells run again")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=180, help="limit of a cell")
    parser.add_argument("--memory", type=int, default=8, help="limit of a process, GiB")
    parser.add_argument("--page", type=Path, default=page.PAGE)
    parser.add_argument("--list", action="store_true", help="only say which families there are")
    parser.add_argument("--write", action="store_true", help="only write the page, of the results that there are")
    args = parser.parse_args()
    names = args.only or list(classes())
    if args.list:
        print("\n".join(names))
        return
    if not args.write:
        limits = (args.workers, args.seconds, args.memory)
        running.complete(names, args.columns, args.results, *limits, args.again)
    if args.write or not args.only:
        args.page.write_text(page.page(running.read(args.results)))
        print(f"wrote {args.page}")


if __name__ == "__main__":
    main()
