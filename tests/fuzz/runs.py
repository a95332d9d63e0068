"""Runs of random cases: what is drawn, by which seed, and what became of it."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz import caches, cases, checkpoints, texts


@dataclass(frozen=True)
class Kind:
    """How cases are drawn, and what checks one: it returns what became of the case and more about it, or raises.

    Attributes:
        drawn: draws a case, or a list of them.
        check: checks one.
        together: how many are drawn at once.
    """

    drawn: Callable[[], Any]
    check: Callable[[Any], tuple[str, str]]
    together: int = 1


KINDS = {
    "models": Kind(cases.cases, cases.check, together=cases.PIPELINES),
    "texts": Kind(texts.texts, texts.check),
    "checkpoints": Kind(checkpoints.damages, checkpoints.check),
    "caches": Kind(caches.damages, caches.check),
}


@dataclass
class Report:
    """What became of cases.

    Attributes:
        outcomes: how often what became of one.
        failures: for each error, where it arose and the smallest case that raises it.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        kinds: Counter[str] = Counter()
        for (kind, _), count in self.outcomes.items():
            kinds[kind] += count
        told = [f"{count} {kind}" for kind, count in kinds.most_common()]
        lines = [", ".join([*told, f"{len(self.failures)} failures"])]
        lines += [f"{count:7} {kind}: {more}" for (kind, more), count in self.outcomes.most_common() if more]
        return "\n".join([*lines, *(f"FAILED {error}\n  {where}" for error, where in self.failures.items())])


def run(kind: str, number: int, first_seed: int, count: int, report: Report, *, shrink: bool = True) -> None:
    """Draws and checks ``count`` cases; equal arguments draw equal cases. A failure is shrunk and ends the run."""
    tried = KINDS[kind]
    last: list[Any] = []

    @seed(first_seed * 1_000_003 + number)
    @settings(
        max_examples=count // tried.together,
        database=None,
        deadline=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
    )
    @given(tried.drawn())
    def some(drawn: Any) -> None:
        for case in drawn if tried.together > 1 else [drawn]:
            last[:] = [case]
            report.outcomes[tried.check(case)] += 1

    try:
        some()
    except Exception as error:
        place = next(reversed(traceback.extract_tb(error.__traceback__)))
        first_line = str(error).partition("\n")[0][:300]
        where = f"run {number}, {place.filename}:{place.lineno}\n    {last[0]!r}"
        report.failures.setdefault(f"{type(error).__name__}: {first_line}", where)
