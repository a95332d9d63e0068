"""The matrix of orders: every ordered pair of the variants on every family, and all triples of the recipes.

    python -m tests.support.matrix                    runs what has no result yet, and writes docs/orders.md
    python -m tests.support.matrix --only opt bert    some families
    python -m tests.support.matrix --pairs            without the triples

Results are kept line by line in a file, so a run that stops goes on with the next cell. A cell that is neither equal
nor refused with advice that works is an error: it is printed at the end and run again the next time. One in
`COMPILED` cells also trains under ``torch.compile``. The page is written once every cell has a result.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import multiprocessing
import random
import re
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "orders.md"
COMPILED = 12
"""One in so many cells is compiled too."""

Order = tuple[str, ...]
Key = tuple[str, Order]
"""A family and an order of variants."""


def pairs() -> list[Key]:
    from tests.support.orders import FAMILIES, VARIANTS

    return [(name, pair) for name in FAMILIES for pair in itertools.product(VARIANTS, repeat=2)]


def triples() -> list[Key]:
    """Three whole methods after one another."""
    from tests.support.orders import FAMILIES, RECIPES

    orders = [tuple(itertools.chain(*(RECIPES[r] for r in three))) for three in itertools.permutations(RECIPES, 3)]
    return [(name, order) for name in FAMILIES for order in orders]


def sample(cells: Sequence[Key], count: int, seed: int) -> list[Key]:
    """As many cells of every family, in which every variant comes first, and every one last, about equally often."""
    draw = random.Random(seed)
    families = list(dict.fromkeys(name for name, _ in cells))
    chosen: list[Key] = []
    used: dict[tuple[int, str], int] = {}
    for name in families:
        own = [cell for cell in cells if cell[0] == name]
        for _ in range(count // len(families)):
            cell = min(own, key=lambda c: (used.get((0, c[1][0]), 0) + used.get((1, c[1][-1]), 0), draw.random()))
            own.remove(cell)
            chosen.append(cell)
            for place in ((0, cell[1][0]), (1, cell[1][-1])):
                used[place] = used.get(place, 0) + 1
    return chosen


def is_compiled(cell: Key) -> bool:
    return zlib.crc32(str(cell).encode()) % COMPILED == 0


# --- running ----------------------------------------------------------------------------------------------------------


def run(cell: Key) -> dict[str, Any]:
    """One line of the file of results; its seconds are of one core."""
    import torch

    from tests.support import orders

    torch.set_num_threads(1)
    name, variants = cell
    start = time.process_time()  # which does not depend on what else the machine does
    line: dict[str, Any] = {"family": name, "order": list(variants)}
    try:
        result = orders.cell(name, variants, backend="aot_eager" if is_compiled(cell) else None)
        line |= {"symbol": result.symbol, "reason": result.reason, "advice": result.order}
    except Exception as error:  # whatever it is, the cell is wrong
        line |= {"symbol": "X", "reason": f"{type(error).__name__}: {error}", "advice": ""}
    return {**line, "seconds": round(time.process_time() - start, 2)}


def read(path: Path) -> dict[Key, dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    results = [json.loads(line) for line in lines]
    return {(line["family"], tuple(line["order"])): line for line in results}


def missing(cells: Iterable[Key], path: Path) -> list[Key]:
    done = {key for key, line in read(path).items() if line["symbol"] != "X"}
    return [cell for cell in cells if cell not in done]


def complete(cells: Sequence[Key], path: Path, workers: int) -> None:
    """Runs the cells that have no result."""
    left = missing(cells, path)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool, path.open("a") as file:
        for number, future in enumerate(as_completed([pool.submit(run, cell) for cell in left]), 1):
            line = future.result()
            file.write(json.dumps(line) + "\n")
            file.flush()
            wrong = f"  {line['reason'][:300]}" if line["symbol"] == "X" else ""
            where = f"{line['family']}: {', '.join(line['order'])}"
            print(f"{number}/{len(left)}  {line['seconds']:5.1f} s  {line['symbol']}  {where}{wrong}", flush=True)


# --- the page ---------------------------------------------------------------------------------------------------------


def reason_of(line: dict[str, Any]) -> str:
    """A refusal's reason without what depends on the family: module paths, and examples in parentheses."""
    text = re.sub(r" \([^()]*\)", "", line["reason"])
    text = re.sub(r"\b\w+(\.\w+)+(, \w+(\.\w+)+)*(, \.\.\.)?", "these layers", text)
    return text.replace(" these layers:", "")


def page(results: dict[Key, dict[str, Any]]) -> str:
    from tests.support.orders import FAMILIES, RECIPES, VARIANTS

    refusals = list(dict.fromkeys((reason_of(r), r["advice"]) for r in results.values() if r["symbol"] == "R"))
    number = {refusal: at for at, refusal in enumerate(refusals, 1)}

    def shown(key: Key) -> str:
        line = results[key]
        return str(number[reason_of(line), line["advice"]]) if line["symbol"] == "R" else line["symbol"]

    def lines() -> Iterator[str]:
        minutes = round(sum(line["seconds"] for line in results.values()) / 60)
        sizes = {"pairs": len(pairs()), "triples": len(triples()), "compiled": COMPILED}
        yield HEAD.format(**sizes, counts=_counts(results), minutes=minutes)
        yield "| variant | passes |\n|---|---|"
        yield from (f"| {name} | `{_text(name)}` |" for name in VARIANTS)
        for name in FAMILIES:
            yield f"\n## {name}\n\n| first \\ second | " + " | ".join(VARIANTS) + " |"
            yield "|---" * (len(VARIANTS) + 1) + "|"
            for first in VARIANTS:
                row = [shown((name, (first, second))) for second in VARIANTS]
                yield f"| **{first}** | " + " | ".join(row) + " |"
        yield "\n## Refusals\n\n| | reason | executed instead |\n|---|---|---|"
        for (reason, order), at in number.items():
            yield f"| {at} | {reason.replace('|', '/')} | {f'`{order}`' if order else ''} |"
        yield THREE + "; ".join(f"`{name}` is {', '.join(variants)}" for name, variants in RECIPES.items()) + ".\n"
        yield "| methods | " + " | ".join(FAMILIES) + " |\n" + "|---" * (len(FAMILIES) + 1) + "|"
        for three in itertools.permutations(RECIPES, 3):
            order = tuple(itertools.chain(*(RECIPES[recipe] for recipe in three)))
            yield f"| {', '.join(three)} | " + " | ".join(shown((name, order)) for name in FAMILIES) + " |"

    return "\n".join(lines()) + "\n"


def _counts(results: dict[Key, dict[str, Any]]) -> str:
    """How many cells are what."""
    told = {"=": "equal", "~": "equal without a model to compare with", "R": "refused with advice that works"}

    def of(cells: Iterable[Key]) -> str:
        found = collections.Counter(results[cell]["symbol"] for cell in cells)
        return ", ".join(f"{found[symbol]} {text}" for symbol, text in told.items())

    return f"Of the pairs {of(pairs())}; of the triples {of(triples())}; none is wrong."


def _text(variant: str) -> str:
    from tests.support.orders import VARIANTS

    item = VARIANTS[variant]
    return f"{VARIANTS[item.needs].text},{item.text}" if item.needs else item.text


HEAD = """# Orders of passes

Every ordered pair of seventeen variants of passes on five families, {pairs} orders, and {triples} orders of three whole
methods. Rows are first, columns second. What a variant needs runs before it, where it has not run.

- `=`: four training steps, evaluation and every parameter equal those of a model in plain torch that composes both
  methods.
- `~`: the same without such a model, which multiplexing has for BERT and OPT.
- a number: refused before anything happens, for a reason listed [below](#refusals). The order that the refusal
  recommends, or the option that it asks for, was rewritten, trained and evaluated in the same way. It names the passes
  up to the one that is refused; the rest follow in their order.

Each order that is not refused also gives the same graph and state when its passes run one by one, and the same outputs
after saving, loading and so replaying it. Where the first pass leaves a plain model (layers, materialize, end-distill),
the second gives the same on that model, exported with `to_module` and traced anew. One order in {compiled} was also
trained under `torch.compile`. `python -m tests.support.matrix` runs all of them and writes this page; the test suite
runs a sample, another one every day. All of them took {minutes} minutes of one core.

{counts}
"""

THREE = """
## Three methods

A method is all its passes: """


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("orders.jsonl"))
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--only", nargs="*", help="families")
    parser.add_argument("--pairs", action="store_true", help="no triples")
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    every = pairs() if args.pairs else [*pairs(), *triples()]
    complete([cell for cell in every if not args.only or cell[0] in args.only], args.results, args.workers)
    results = read(args.results)
    wrong = [line for line in results.values() if line["symbol"] == "X"]
    for line in wrong:
        print(f"{line['family']}: {', '.join(line['order'])}: {line['reason']}", file=sys.stderr)
    if not wrong and not missing([*pairs(), *triples()], args.results):
        args.page.write_text(page(results))
        print(f"wrote {args.page}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
