"""The matrix of the census as ``docs/families.md``."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.families.cells import ALL, PASSES, STATES
from benchmarks.families.running import BUILD, Key, Line

PAGE = Path(__file__).parents[2] / "docs" / "families.md"

HEAD = """# The census of transformers

The families of transformers {version} that general rules make tiny (two layers, 32 features), under the passes: traced,
rewritten, trained for two steps beside a model in plain torch that composes the same, evaluated at another batch size,
saved and loaded. `python -m benchmarks.families` runs it and writes this page; the test suite runs a sample, another
one every day.

- `=`: {ok}; `~` where no such model has been written.
- `14/15`: {partial}; so many of so many.
- `R` and a number: {refused}, listed [below](#refusals).
- `X`: {wrong}. `!`: {crash}. `?`: {silent}.
- empty: not run.

{counts}

| column | passes | families | ok or partial |
|---|---|---|---|
"""

MORE = """
The first column is the time of tracing, with outputs and gradients compared to the model's. `save` loads a file into a
model that is traced anew. The folders are those of `save_pretrained`, read by `from_pretrained` and, where they are
ordinary checkpoints, by transformers alone. Of several lists of layers the first one is multiplexed. `compile` is the
bare `torch.compile(model, backend="fxsparse")`. Results stay until they are made again: cells may be of different
states of the library.
"""


def page(results: dict[Key, Line], version: str | None = None) -> str:
    """The page, of the results that there are."""
    return "\n".join(_lines(results, version or _version())) + "\n"


def _version() -> str:
    import transformers

    return str(transformers.__version__)


def _lines(results: dict[Key, Line], version: str) -> Iterator[str]:
    built = {name: line for (name, column), line in sorted(results.items()) if column == BUILD}
    families = [name for name, line in built.items() if line["state"] == "ok"]
    cells = [line for line in results.values() if line["column"] != BUILD]
    whole = sum(all((name, column) in results for column in ALL) for name in families)
    yield HEAD.format(version=version, counts=_counts(len(families), whole, cells), **STATES).rstrip()
    yield from _columns(cells)
    yield MORE
    numbers = _numbers(cells)
    yield "| family | class | " + " | ".join(ALL) + " |"
    yield "|---" * (len(ALL) + 2) + "|"
    for name in families:
        row = [_shown(results.get((name, column)), numbers) for column in ALL]
        yield f"| {name} | {built[name]['class']} | " + " | ".join(row) + " |"
    yield "\n## Refusals\n"
    yield from _table(("", "reason", "cells", "for example"), _refusals(cells, numbers))
    for state, title in (("wrong", "Wrong"), ("crash", "Crashes"), ("silent", "Silent")):
        found = [(line["family"], line["column"], _plain(line["detail"])) for line in cells if line["state"] == state]
        if found:
            yield f"\n## {title}\n"
            yield from _table(("family", "column", "what happened"), sorted(found))
    yield "\n## Skipped\n\nThe reasons of sites that were skipped.\n"
    yield from _table(("reason", "cells", "for example"), _skips(cells))
    yield "\n## Not built\n\nThese families need more than general rules.\n"
    yield from _table(
        ("family", "why"), [(n, _plain(line["detail"])) for n, line in built.items() if line["state"] == "no"]
    )


def _columns(cells: list[Line]) -> Iterator[str]:
    """Of each column its passes, on how many families it ran, and on how many of these the passes did."""
    for name in ALL:
        states = [line["state"] for line in cells if line["column"] == name]
        done = sum(state in ("ok", "partial") for state in states)
        passes = f"`{PASSES[name]}`" if name in PASSES else ""
        yield f"| {name} | {passes} | {len(states)} | {done} |"


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield "| " + " | ".join(heads) + " |"
    yield "|---" * len(heads) + "|"
    yield from ("| " + " | ".join(row) + " |" for row in rows)


def _counts(families: int, whole: int, cells: list[Line]) -> str:
    found = collections.Counter(line["state"] for line in cells)
    share = (found["ok"] + found["partial"]) / max(1, len(cells))
    told = ", ".join(f"{found[state]} {state}" for state in STATES)
    ran = f"{families} families, {whole} of them under every column"
    return f"{ran}; {len(cells)} cells: {told}; {share:.1%} are ok or partial."


def _shown(line: Line | None, numbers: dict[str, int]) -> str:
    if line is None:
        return ""
    if line["state"] == "refused":
        return f"R{numbers[reason_of(line)]}"
    sign = {"wrong": "X", "crash": "!", "silent": "?"}.get(line["state"])
    if sign is not None:
        return sign
    if "trace_seconds" in line:
        return f"{line['trace_seconds']:.1f} s"
    sign = "=" if line["oracle"] else "~"
    return "{}/{}".format(*line["counts"]) if line["state"] == "partial" and line["counts"] else sign


def reason_of(line: Line) -> str:
    """A refusal's or a skip's reason without what depends on the family."""
    text = _plain(line["detail"])
    text = re.sub(r"\b\w+(\.\w+)+(, \w+(\.\w+)+)*(, \.\.\.)?", "…", text)
    text = re.sub(r"\b[A-Z]\w+(For|Model|LMHead)\w*", "this class", text)
    return re.sub(r"(\b|(?<=_))\d[\d,]*\b", "N", text)


def _plain(text: str) -> str:
    """Text for a table, without where things are on the machine that ran it."""
    text = re.sub(r"\S*/site-packages/|/tmp/\w+/?|/\S*/(?=(fxsparse|passes)/)", "", re.sub(r"\s+", " ", text))
    return text.replace("|", "/").replace("<", "&lt;").strip()[:400]


def _numbers(cells: list[Line]) -> dict[str, int]:
    counted = collections.Counter(reason_of(line) for line in cells if line["state"] == "refused")
    return {reason: number for number, (reason, _) in enumerate(counted.most_common(), 1)}


def _refusals(cells: list[Line], numbers: dict[str, int]) -> Iterator[tuple[str, ...]]:
    refused = [line for line in cells if line["state"] == "refused"]
    for reason, number in numbers.items():
        same = [line for line in refused if reason_of(line) == reason]
        yield f"R{number}", reason, str(len(same)), f"{same[0]['family']}, {same[0]['column']}"


def _skips(cells: list[Line]) -> Iterator[tuple[str, ...]]:
    found: dict[str, list[Line]] = {}
    for line in cells:
        if line["state"] == "partial":
            for reason in line["detail"].split("; "):
                found.setdefault(reason_of({"detail": reason}), []).append(line)
    for reason, lines in sorted(found.items(), key=lambda item: -len(item[1])):
        yield reason, str(len(lines)), f"{lines[0]['family']}, {lines[0]['column']}"
