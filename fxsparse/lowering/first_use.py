"""Measuring products on their first use, as long as a graph has time for it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable

from fxsparse.lowering import estimates, measure, timings
from fxsparse.lowering.choose import undecided
from fxsparse.lowering.pins import Pins
from fxsparse.lowering.sites import Site
from fxsparse.ops.operator import SPARSE_WGMMA

ASKED_FOR = (SPARSE_WGMMA,)
"""Measured only by `fxsparse.tune`: no GPU has run it yet, its warps wait for each other, and what hangs on a first use
would hang the program of somebody who asked for nothing."""


class FirstUse:
    """Measures what a choice would gain by: products with a kernel that nobody pinned and nobody measured.

    Args:
        pins: what the user said.
        seconds: for one graph.

    Attributes:
        failures: why some could not be measured.
    """

    def __init__(self, pins: Pins, seconds: float):
        self.pins, self.failures = pins, list[str]()
        self._until = time.monotonic() + seconds

    def measure_all(self, sites: Iterable[Site]) -> None:
        """Measures the products of a graph, first those that it spends the most time in; equal ones once."""
        spent, alike = defaultdict[str, float](float), dict[str, Site]()
        for site in sites:
            if site.problem is not None:
                key = timings.key(site.problem)
                alike.setdefault(key, site)
                spent[key] += estimates.effort(site.problem)
        for key in sorted(spent, key=spent.__getitem__, reverse=True):
            self.measure(alike[key])

    def measure(self, site: Site) -> None:
        problem, is_pinned = site.problem, self.pins.of_gradient(site.op).name is not None
        if problem is None or is_pinned or time.monotonic() >= self._until or not undecided(site):
            return
        reference = not site.in_memory
        result = measure.measure(
            problem, site.device, until=self._until, compile_reference=reference, exclude=ASKED_FOR
        )
        if not result.milliseconds:
            self.failures.append(str(result))
