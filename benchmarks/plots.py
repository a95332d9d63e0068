"""The plots of the README and the documentation, drawn from the tables of ``benchmarks/RESULTS.md``.

python -m benchmarks.plots

Nothing is measured here: every number is read from the table that stands below the command that measured it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
FOLDER = ROOT / "docs" / "plots"


def table(command: str, text: str | None = None) -> list[list[str]]:
    """The rows of the table below a command, cells as text; the first row is the heading."""
    text = RESULTS.read_text() if text is None else text
    _, found, rest = text.partition(f"`{command}")
    if not found:
        raise SystemExit(f"{RESULTS} has no table of {command}")
    block = re.search(r"```\n(.*?)```", rest, re.DOTALL)
    assert block is not None
    return [re.split(r"\s{2,}", line.strip()) for line in block[1].splitlines() if line.strip()]


def number(cell: str) -> float:
    return float(cell.rstrip("%x s").replace(",", ""))


def greentrainer() -> list[tuple[str, float, float]]:
    """FLOPs and time of a training step over those of a full one, by rho."""
    rows = table("python -m benchmarks.greentrainer_step")[1:]
    return [(row[0], number(row[1]), number(row[2])) for row in rows]


def cofi() -> list[tuple[float, float, float]]:
    """Sparsity in percent, accuracy and speed-up."""
    rows = table("python examples/prune_cofi.py")[1:]
    return [(0.0 if row[0] == "whole" else number(row[0]), number(row[2]), number(row[-2])) for row in rows]


def prumux() -> list[tuple[int, float, float, float]]:
    """N, s, accuracy and throughput."""
    rows = table("python examples/prumux_classify.py")[1:]
    return [(int(row[0]), number(row[1]), number(row[2]), number(row[3])) for row in rows]


def multiplexing() -> list[tuple[str, float, float]]:
    """Throughput over the plain model's, and what FLOPs promise."""
    rows = table("python -m benchmarks.multiplex --members 1 2 5 10")[1:]
    return [(row[0], number(row[3]), number(row[5])) for row in rows]


def draw(folder: Path = FOLDER) -> list[Path]:
    """Draws every plot and returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fxsparse"
    folder.mkdir(parents=True, exist_ok=True)
    drawings = {"greentrainer": _greentrainer, "cofi": _cofi, "prumux": _prumux, "multiplexing": _multiplexing}
    return [_figure(folder / f"{name}.png", drawing) for name, drawing in drawings.items()]


def _figure(path: Path, drawing: Any) -> Path:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.4, 3.4), layout="constrained")
    drawing(axes)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _promise(axes: Any, values: Sequence[float], label: str) -> None:
    axes.plot([min(values), max(values)], [min(values), max(values)], "--", color="0.5", label=label)


def _greentrainer(axes: Any) -> None:
    points = greentrainer()
    _promise(axes, [flops for _, flops, _ in points], "time = FLOPs")
    axes.plot([flops for _, flops, _ in points], [time for *_, time in points], "o", label="measured")
    for name, flops, time in points:
        axes.annotate(name, (flops, time), textcoords="offset points", xytext=(6, -10), fontsize=8)
    axes.set(xlabel="FLOPs of a step / all tensors", ylabel="time of a step / all tensors")
    axes.legend()


def _cofi(axes: Any) -> None:
    points = cofi()
    axes.plot([speed for *_, speed in points], [accuracy for _, accuracy, _ in points], "o-")
    for sparsity, accuracy, speed in points:
        axes.annotate(f"{sparsity:g} %", (speed, accuracy), textcoords="offset points", xytext=(4, 5), fontsize=8)
    axes.set(xlabel="speed-up of inference", ylabel="accuracy, %", xscale="log", ylim=(70, 85))


def _prumux(axes: Any) -> None:
    points = prumux()
    for members in sorted({members for members, *_ in points}):
        own = [(throughput, accuracy) for n, _, accuracy, throughput in points if n == members]
        axes.plot(*zip(*own, strict=True), "o-", label=f"N = {members}")
    axes.set(xlabel="throughput / plain", ylabel="accuracy, %", xscale="log")
    axes.legend(fontsize=8)


def _multiplexing(axes: Any) -> None:
    points = multiplexing()
    _promise(axes, [promise for *_, promise in points], "throughput = promise of FLOPs")
    axes.plot([promise for *_, promise in points], [reached for _, reached, _ in points], "o", label="measured")
    axes.set(xlabel="FLOPs promise", ylabel="throughput / plain")
    axes.legend()


if __name__ == "__main__":
    print(*(path.relative_to(ROOT) for path in draw()), sep="\n")
