"""The numbers of a training, by optimizer step: what a `Schedule` keeps, and a plot of it.

A history is small whatever the length of the training: it holds the first step, the last one and at most `LONGEST`
points between them at equal distances. Which tensors are trained is kept whenever it changes.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fxsparse.errors import OptionError

LONGEST = 256
STEP = "step"
LOSS = "loss"


class History:
    """Numbers by optimizer step, counted from 1.

    Args:
        total_steps: optimizer steps of the whole training.

    Attributes:
        points: one mapping for each step that was kept, from ``step`` and the names of `Schedule.values` to numbers,
            with ``loss`` where `Schedule.step` was given it.
        trained: the names of the trained tensors, by the step from which on they were; empty unless a pass chooses
            them.
    """

    def __init__(self, total_steps: int):
        self._every = max(1, -(-total_steps // LONGEST))
        self._total_steps = total_steps
        self.points: list[dict[str, float]] = []
        self.trained: dict[int, tuple[str, ...]] = {}

    def due(self, step: int) -> bool:
        """Whether the numbers of a step are kept; reading them may wait for the device."""
        return step in (1, self._total_steps) or step % self._every == 0

    def add(self, step: int, values: Mapping[str, float], loss: Any = None) -> None:
        """Keeps the numbers of a step."""
        last = {} if loss is None else {LOSS: float(loss.detach() if hasattr(loss, "detach") else loss)}
        self.points.append({STEP: step, **last, **values})

    def chose(self, step: int, names: Collection[str]) -> None:
        """Notes the tensors that are trained from a step on, if they are others than before."""
        now = tuple(sorted(names))
        if not self.trained or next(reversed(self.trained.values())) != now:
            self.trained[step] = now

    def series(self) -> dict[str, list[tuple[int, float]]]:
        """The steps and values of every number, by name."""
        found: dict[str, list[tuple[int, float]]] = {}
        for point in self.points:
            for name, value in point.items():
                if name != STEP:
                    found.setdefault(name, []).append((int(point[STEP]), value))
        return found

    def to_json(self) -> str:
        """The history as text."""
        return json.dumps({"points": self.points, "trained": list(self.trained.items())})

    def load_json(self, text: str) -> None:
        """Takes the history that `to_json` gave in the place of this one."""
        data = json.loads(text)
        self.points = data["points"]
        self.trained = {step: tuple(names) for step, names in data["trained"]}


def plot_history(subject: Any, path: str | os.PathLike[str] | None = None) -> Any:
    """Draws a training: the loss, what passes varied, and which tensors were trained.

    Needs matplotlib (``pip install fxsparse[plots]``).

    Args:
        subject: a `Schedule`, or its ``history``.
        path: where the figure is written, in the format of its suffix; nowhere by default.

    Returns:
        the figure, which notebooks show.

    Raises:
        OptionError: no step was kept yet.
    """
    history = getattr(subject, "history", subject)
    if not isinstance(history, History) or not history.points:
        raise OptionError("there is no history to plot: give a Schedule whose step() was called, or its history")
    series = history.series()
    count = len(series) + bool(history.trained)
    figure = _figure(7, 1 + 1.5 * max(1, count))
    axes = figure.subplots(max(1, count), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, points) in zip(axes, series.items(), strict=False):
        axis.plot(*zip(*points, strict=True), marker="." if len(points) < 40 else "")
        axis.set_ylabel(name, rotation=0, horizontalalignment="right")
        axis.grid(alpha=0.3)
    if history.trained:
        _plot_trained(axes[-1], history)
    axes[-1].set_xlabel("optimizer step")
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return figure


def _figure(width: float, height: float) -> Any:
    """A figure that notebooks show, without pyplot and what it does to a process."""
    from matplotlib.figure import Figure

    class Shown(Figure):
        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png", dpi=100)
            return file.getvalue()

    return Shown(figsize=(width, height), layout="constrained")


def _plot_trained(axis: Any, history: History) -> None:
    """A row for every tensor that was ever trained, drawn while it is."""
    names = sorted({name for chosen in history.trained.values() for name in chosen})
    rows = {name: row for row, name in enumerate(names)}
    starts = [*history.trained, int(history.points[-1][STEP]) + 1]
    for begin, end, chosen in zip(starts, starts[1:], history.trained.values(), strict=False):
        axis.hlines([rows[name] for name in chosen], begin, max(end, begin + 1), linewidth=2)
    axis.set_ylabel(f"trained tensors\n(of {len(names)} ever trained)", rotation=0, horizontalalignment="right")
    axis.set_yticks([])
