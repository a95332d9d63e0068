"""Auto-PruMUX predicts the best (N, s) to train from a few measured points (PruMUX, ACL Findings 2023, section 4).

    zeta(N, s) = f_T(N, s) * g(f_A(N, s)),    g(a) = 1 if a >= threshold else 0;    the best point is argmax zeta

N inputs share one forward pass, and a share s of the encoder is pruned. The accuracy model f_A is piecewise bilinear,

    f_A(N, s) = k00 + k01 s + k10 N + k11 N s    in each cell of the measured points,

and equals the measurement at every measured point. The paper measures a full grid. Here a cell is the smallest box
around (N, s) with all corners measured, so any set of points works. The paper's throughput model f_T is a table
measured on one task and used for all others. Here the gaps of such a table are filled by the same interpolation, of
log throughput over (log N, s), which is exact if throughput is a power of N. A point outside every cell is
extrapolated from the nearby points, and its estimate is marked as extrapolated.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np

from fxsparse.errors import OptionError

Point = tuple[int, float]
"""(N, s)."""

_COLUMNS = {
    "members": ("members", "n"),
    "sparsity": ("sparsity", "s"),
    "accuracy": ("accuracy",),
    "throughput": ("throughput",),
}
_STEP = 0.05  # spacing of the sparsities predicted by default, as in the paper


@dataclass(frozen=True)
class Estimate:
    """An estimated accuracy or throughput at a point.

    Attributes:
        value: accuracy or throughput, in the unit of the measurements.
        basis: the measured points used for it.
        extrapolated: whether the point lies outside every cell of measured points.
    """

    value: float
    basis: tuple[Point, ...]
    extrapolated: bool

    @property
    def measured(self) -> bool:
        """Whether the point itself was measured."""
        return len(self.basis) == 1 and not self.extrapolated


@dataclass(frozen=True)
class Prediction:
    """A candidate (N, s) that reaches the accuracy threshold.

    Attributes:
        members: N.
        sparsity: s.
        accuracy, throughput: the estimates of the two models.
        reason: its throughput relative to the best candidate's, its accuracy, and the source of both, in words.
    """

    members: int
    sparsity: float
    accuracy: Estimate
    throughput: Estimate
    reason: str

    @property
    def point(self) -> Point:
        return self.members, self.sparsity

    @property
    def extrapolated(self) -> bool:
        return self.accuracy.extrapolated or self.throughput.extrapolated

    def __str__(self) -> str:
        return f"N={self.members}, s={self.sparsity:g}: {self.reason}"


@dataclass(frozen=True)
class LeftOut:
    """A measured point and its prediction from the other measured points.

    Attributes:
        point: (N, s).
        measured: the measurement.
        predicted: the estimate of a model fitted without this point.
    """

    point: Point
    measured: float
    predicted: Estimate

    @property
    def error(self) -> float:
        """Predicted minus measured."""
        return self.predicted.value - self.measured


class Surface:
    """An interpolation of measured points, bilinear in the smallest measured box around a point, exact at its corners.

    Args:
        values: the measurements by (N, s).
        scale: maps N to the coordinate in which the surface is linear.

    Raises:
        OptionError: ``values`` is empty.
    """

    def __init__(self, values: Mapping[Point, float], scale: Callable[[float], float] = float):
        if not values:
            raise OptionError("nothing was measured", site="autoprumux")
        self.values, self.scale = dict(values), scale
        axes = np.array([(scale(n), s) for n, s in self.values])
        self._spread = np.maximum(np.ptp(axes, axis=0), 1e-12)

    def __call__(self, members: float, sparsity: float) -> Estimate:
        box = self._box(members, sparsity)
        if box is None:
            return self._extrapolate(members, sparsity)
        (n0, n1), (s0, s1) = box
        across = _fraction(self.scale(members), self.scale(n0), self.scale(n1))
        along = _fraction(sparsity, s0, s1)
        corners = {(n0, s0): (1 - across) * (1 - along)}
        for corner, weight in (((n1, s0), across * (1 - along)), ((n0, s1), (1 - across) * along)):
            corners[corner] = corners.get(corner, 0.0) + weight
        corners[n1, s1] = corners.get((n1, s1), 0.0) + across * along
        value = sum(weight * self.values[corner] for corner, weight in corners.items())
        return Estimate(float(value), tuple(corners), extrapolated=False)

    def _box(self, members: float, sparsity: float) -> tuple[tuple[int, int], tuple[float, float]] | None:
        """The smallest box around the point with all corners measured; it may be a segment or a single point."""
        counts = _around(members, {n for n, _ in self.values})
        shares = _around(sparsity, {s for _, s in self.values})
        boxes = [(n, s) for n in counts for s in shares if all((a, b) in self.values for a in n for b in s)]
        return min(boxes, key=self._size, default=None)

    def _size(self, box: tuple[tuple[int, int], tuple[float, float]]) -> float:
        (n0, n1), (s0, s1) = box
        return float(np.dot((self.scale(n1) - self.scale(n0), s1 - s0), 1 / self._spread))

    def _extrapolate(self, members: float, sparsity: float) -> Estimate:
        """Fits the bilinear form by least squares, near points weighted most; too few points get fewer terms."""
        points = list(self.values)
        offsets = np.array([(self.scale(n) - self.scale(members), s - sparsity) for n, s in points]) / self._spread
        values = np.array([self.values[point] for point in points])
        weights = 1 / np.square(offsets).sum(axis=1)
        one, x, y = np.ones(len(points)), offsets[:, 0], offsets[:, 1]
        for terms in ((one, x, y, x * y), (one, x, y), (one, x), (one, y), (one,)):
            design = np.stack(terms, axis=1)
            if np.linalg.matrix_rank(design, tol=1e-9) == len(terms):
                break
        solution = np.linalg.lstsq(design * weights[:, None], values * weights, rcond=None)[0]
        return Estimate(float(solution[0]), tuple(points), extrapolated=True)


def _multiples(step: float) -> list[float]:
    """Those below 1."""
    return [round(step * count, 10) for count in range(math.ceil(round(1 / step, 10)))]


def _around(at: float, known: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Pairs (low, high) of known coordinates that enclose ``at``; low and high may be equal."""
    return [(low, high) for low, high in combinations_with_replacement(sorted(known), 2) if low <= at <= high]


def _fraction(at: float, low: float, high: float) -> float:
    return 0.0 if high == low else (at - low) / (high - low)


class AutoPruMUX:
    """Predicts the best (N, s) from measured points; build it with :meth:`fit`.

    Attributes:
        accuracy: f_A, which maps (N, s) to an :class:`Estimate`.
        baseline: the accuracy of the plain model, (1, 0), from which a loss budget is subtracted.
    """

    def __init__(
        self, accuracies: Mapping[Point, float], throughputs: Mapping[Point, float], baseline: float | None = None
    ):
        self.accuracies, self.throughputs = dict(accuracies), dict(throughputs)
        self.accuracy = Surface(self.accuracies)
        self._log_throughput = Surface({point: math.log(v) for point, v in self.throughputs.items()}, math.log)
        self.baseline = self.accuracies.get((1, 0.0)) if baseline is None else baseline

    @classmethod
    def fit(
        cls,
        table: str | os.PathLike[str] | Mapping[Point, Any],
        *,
        throughput: Mapping[Point, float] | None = None,
        baseline: float | None = None,
    ) -> AutoPruMUX:
        """Fits both models to measurements.

        Args:
            table: a CSV file with columns N (or members), s (or sparsity), accuracy and throughput; accuracy or
                throughput of a row may be empty. Or a mapping from (N, s) to (accuracy, throughput), to a mapping with
                these names, or to the accuracy alone. Accuracy is in any unit, throughput in inputs per second or
                relative to anything.
            throughput: throughputs by (N, s) measured on another task; the paper finds these good enough.
            baseline: the accuracy of the plain model; by default the one measured at (1, 0).

        Raises:
            OptionError: a number is missing or out of range; the message names the row.
        """
        rows = _read_csv(Path(table)) if isinstance(table, (str, os.PathLike)) else _read_mapping(table)
        accuracies: dict[Point, float] = {}
        throughputs: dict[Point, float] = {}
        for row, (members, sparsity, accuracy, speed) in rows:
            point = _point(members, sparsity, row)
            if point in accuracies or point in throughputs:
                raise OptionError(f"N={point[0]}, s={point[1]:g} is given twice", site=row)
            if accuracy is not None:
                accuracies[point] = _number(accuracy, "accuracy", row)
            if speed is not None:
                throughputs[point] = _number(speed, "throughput", row)
        for key, speed in (throughput or {}).items():
            throughputs[_point(*key, f"throughput[{key}]")] = _number(speed, "throughput", f"throughput[{key}]")
        for key, speed in throughputs.items():
            if speed <= 0:
                raise OptionError(f"the throughput of N={key[0]}, s={key[1]:g} is {speed:g}, not positive")
        if not accuracies or not throughputs:
            missing = "accuracy" if not accuracies else "throughput"
            raise OptionError(f"no {missing} was measured; the table needs some of each", site="autoprumux")
        return cls(accuracies, throughputs, baseline)

    def throughput(self, members: float, sparsity: float) -> Estimate:
        """f_T, in the unit of the measurements."""
        estimate = self._log_throughput(members, sparsity)
        return Estimate(math.exp(estimate.value), estimate.basis, estimate.extrapolated)

    def candidates(self, *, step: float | None = None, members: Iterable[int] | None = None) -> list[Point]:
        """The points (N, s) to choose from; none but measured ones needs extrapolation.

        By default those of the paper: every measured point, and between the measured s > 0 of every measured N > 1 each
        multiple of 0.05. Its 24 measurements, N in {1, 2, 5, 10} times s in {0, .6, .7, .8, .9, .95}, give 33: the 24,
        and s in {.65, .75, .85} for three N.

        Args:
            step: a denser grid: the measured points and every multiple of this, also for N = 1 and below the least
                measured s > 0.
            members: the N of a denser grid, which need not be measured; with a step of 0.05 unless given.

        Raises:
            OptionError: the step is not in (0, 1).
        """
        measured = set(self.accuracies) & set(self.throughputs)
        if step is None and members is None:
            return sorted(measured | self._paper_grid())
        step = _STEP if step is None else step
        if isinstance(step, bool) or not 0 < step < 1:
            raise OptionError(f"step={step} is the spacing of sparsities, in (0, 1)", site="autoprumux")
        chosen = {n for n, _ in self.accuracies} if members is None else set(members)
        points = {_point(n, s, f"members={n}") for n in chosen for s in _multiples(step)}
        return sorted(measured | {point for point in points if not self._extrapolates(*point)})

    def _paper_grid(self) -> set[Point]:
        points: set[Point] = set()
        for members in {n for n, _ in self.accuracies if n > 1}:
            pruned = [s for n, s in self.accuracies if n == members and s > 0]
            points.update((members, s) for s in _multiples(_STEP) if pruned and min(pruned) <= s <= max(pruned))
        return {point for point in points if not self._extrapolates(*point)}

    def _extrapolates(self, members: int, sparsity: float) -> bool:
        return self.accuracy(members, sparsity).extrapolated or self.throughput(members, sparsity).extrapolated

    def predict(
        self,
        *,
        threshold: float | None = None,
        loss_budget: float | None = None,
        candidates: Iterable[Point] | None = None,
        top: int = 3,
    ) -> list[Prediction]:
        """The candidates with the largest zeta, the best first.

        Args:
            threshold: the lowest acceptable accuracy.
            loss_budget: instead of a threshold, the acceptable loss against the baseline, in points of accuracy.
            candidates: the points (N, s) to choose from; by default the paper's (`candidates` gives denser ones).
            top: the largest number of predictions to return.

        Raises:
            OptionError: both or neither of threshold and loss budget are given, the baseline is unknown, or no
                candidate reaches the threshold; the message then names the nearest candidate.
        """
        if (threshold is None) == (loss_budget is None):
            raise OptionError("give threshold or loss_budget, one of them", site="autoprumux")
        if threshold is None:
            if self.baseline is None:
                raise OptionError("a loss budget needs the accuracy at N=1, s=0: measure it or give baseline=")
            threshold = self.baseline - float(loss_budget or 0)
        chosen = self.candidates() if candidates is None else [_point(n, s, f"({n}, {s})") for n, s in candidates]
        pool = [(point, self.accuracy(*point), self.throughput(*point)) for point in chosen]
        eligible = [item for item in pool if item[1].value >= threshold - 1e-9]
        if not eligible:
            (members, sparsity), nearest, _ = max(pool, key=lambda item: item[1].value)
            raise OptionError(
                f"no candidate reaches the accuracy {threshold:g}; the best, N={members}, s={sparsity:g}, is predicted "
                f"{nearest.value:.2f}",
                site="autoprumux",
            )
        eligible.sort(key=lambda item: (-item[2].value, -item[1].value))
        return [
            Prediction(*point, accuracy, speed, _reason(place, accuracy, speed, threshold, eligible[0][2].value))
            for place, (point, accuracy, speed) in enumerate(eligible[:top])
        ]

    def leave_one_out(self) -> dict[str, list[LeftOut]]:
        """Predicts each measured point from the others; the keys are ``accuracy`` and ``throughput``.

        A point at the edge of the measured ones is extrapolated from the others; ``predicted.extrapolated`` says so.
        The paper asks for an accuracy error below 1.5 points and a throughput error below 20 %.
        """
        return {
            "accuracy": [_left_out(self.accuracies, point) for point in _others_remain(self.accuracies)],
            "throughput": [
                _left_out(self.throughputs, point, logarithmic=True) for point in _others_remain(self.throughputs)
            ],
        }

    def frontier(self, candidates: Iterable[Point] | None = None) -> list[tuple[Point, float, float]]:
        """The candidates that no other beats in both measures, fastest last: ((N, s), accuracy, throughput)."""
        points = self.candidates() if candidates is None else candidates
        pool = [(point, self.accuracy(*point).value, self.throughput(*point).value) for point in points]
        pool.sort(key=lambda item: (-item[2], -item[1]))
        best, frontier = -math.inf, []
        for item in pool:
            if item[1] > best:
                frontier.append(item)
                best = item[1]
        return frontier[::-1]

    def plot(self, path: str | os.PathLike[str], *, title: str = "") -> None:
        """Draws accuracy over throughput: the measured points by kind, the predictions between them, and the frontier.

        Needs matplotlib (``pip install fxsparse[plots]``).
        """
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        measured = sorted(set(self.accuracies) & set(self.throughputs))
        for color, (kind, belongs) in enumerate(_KINDS.items()):
            points = [point for point in measured if belongs(*point)]
            if points:
                axes.plot(
                    [self.throughputs[p] for p in points], [self.accuracies[p] for p in points], "o",
                    color=f"C{color}", label=kind,
                )  # fmt: skip
            for point in points:
                axes.annotate(
                    f"{point[0]}, {point[1]:g}", (self.throughputs[point], self.accuracies[point]), fontsize=7,
                    xytext=(4, 3), textcoords="offset points",
                )  # fmt: skip
        between = [point for point in self.candidates(step=_STEP) if point not in measured]
        if between:
            speeds = [self.throughput(*point).value for point in between]
            axes.plot(speeds, [self.accuracy(*p).value for p in between], ".", color="0.7", label="predicted")
        frontier = self.frontier()
        axes.plot([item[2] for item in frontier], [item[1] for item in frontier], "k--", linewidth=1, label="frontier")
        axes.set(xlabel="throughput", ylabel="accuracy", xscale="log", title=title or "labels are N, s")
        axes.grid(alpha=0.3)
        axes.legend()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)


_KINDS: dict[str, Callable[[int, float], bool]] = {
    "plain": lambda members, sparsity: members == 1 and sparsity == 0,
    "pruned": lambda members, sparsity: members == 1 and sparsity > 0,
    "multiplexed": lambda members, sparsity: members > 1 and sparsity == 0,
    "PruMUX": lambda members, sparsity: members > 1 and sparsity > 0,
}


def _reason(place: int, accuracy: Estimate, speed: Estimate, threshold: float, best: float) -> str:
    rank = "the largest throughput" if place == 0 else f"{speed.value / best:.2f} of the best's throughput"
    reached = f"accuracy {accuracy.value:.2f} reaches {threshold:.2f}"
    return f"{rank}, {speed.value:.4g} ({_source(speed)}); {reached} ({_source(accuracy)})"


def _source(estimate: Estimate) -> str:
    if estimate.measured:
        return "measured"
    if estimate.extrapolated:
        return "extrapolated: outside what was measured"
    return "between " + ", ".join(f"({n}, {s:g})" for n, s in estimate.basis)


def _others_remain(values: Mapping[Point, float]) -> list[Point]:
    return list(values) if len(values) > 1 else []


def _left_out(values: Mapping[Point, float], point: Point, logarithmic: bool = False) -> LeftOut:
    others = {other: value for other, value in values.items() if other != point}
    if not logarithmic:
        return LeftOut(point, values[point], Surface(others)(*point))
    estimate = Surface({other: math.log(value) for other, value in others.items()}, math.log)(*point)
    return LeftOut(point, values[point], Estimate(math.exp(estimate.value), estimate.basis, estimate.extrapolated))


# --- tables -----------------------------------------------------------------------------------------------------------

_Row = tuple[str, tuple[Any, Any, Any, Any]]  # the row's name for errors; N, s, accuracy, throughput


def _read_csv(path: Path) -> list[_Row]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        headers = {name.strip().lower(): name for name in reader.fieldnames or ()}
        columns = {}
        for column, names in _COLUMNS.items():
            columns[column] = next((headers[name] for name in names if name in headers), None)
            if columns[column] is None and column in ("members", "sparsity"):
                raise OptionError(f"has no column {' or '.join(names)}, only {', '.join(headers)}", site=str(path))
        return [
            (f"{path}, line {reader.line_num}", tuple(_cell(row, columns[column]) for column in _COLUMNS))  # type: ignore[misc]
            for row in reader
        ]


def _cell(row: Mapping[str, str | None], column: str | None) -> str | None:
    text = row[column] if column is not None else None
    return text.strip() or None if text is not None else None


def _read_mapping(table: Mapping[Point, Any]) -> list[_Row]:
    rows: list[_Row] = []
    for key, entry in table.items():
        if isinstance(entry, Mapping):
            accuracy, speed = entry.get("accuracy"), entry.get("throughput")
        elif isinstance(entry, (tuple, list)):
            accuracy, speed = entry
        else:
            accuracy, speed = entry, None
        rows.append((f"table[{key}]", (*key, accuracy, speed)))
    return rows


def _point(members: Any, sparsity: Any, row: str) -> Point:
    count, share = _number(members, "N", row), _number(sparsity, "s", row)
    if count < 1 or count != int(count):
        raise OptionError(f"N is {count:g}, not a positive whole number", site=row)
    if not 0 <= share < 1:
        raise OptionError(f"s is {share:g}, not in [0, 1)", site=row)
    return int(count), round(share, 10)


def _number(text: Any, name: str, row: str) -> float:
    try:
        number = float(text)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise OptionError(f"{name} is {text!r}, not a number", site=row)
    return number
