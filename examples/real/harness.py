"""What the programs in examples/real share: options, results that survive a kill, and tables.

Each program measures cells, such as one way of training with one seed. A cell is written to a JSON file as soon as it
is known, so a run that was stopped goes on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fxsparse

Cell = dict[str, Any]
LIBRARIES = ("torch", "transformers", "peft", "torch-pruning", "numpy")


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every program has."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--quick", action="store_true", help="one seed and few steps: five minutes on two cores")
    result.add_argument("--tiny", action="store_true", help="a handful of steps, to see that everything runs")
    result.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2, with --quick 0")
    result.add_argument("--threads", type=int, default=torch.get_num_threads())
    result.add_argument("--out", type=Path, default=Path("out/real"))
    return result


def parse(options: argparse.ArgumentParser) -> argparse.Namespace:
    args = options.parse_args()
    args.quick = args.quick or args.tiny
    args.seeds = args.seeds or ([0] if args.quick else [0, 1, 2])
    torch.set_num_threads(args.threads)
    return args


class Results:
    """The cells of one program, in ``<out>/<name>.json`` with device, versions and command.

    Args:
        name: of the program and its variant.
        args: the program's options.
        settings: what decides the numbers; cells of other settings are not taken over.
    """

    def __init__(self, name: str, args: argparse.Namespace, settings: Cell) -> None:
        self.name = name + ("-tiny" if args.tiny else "-quick" if args.quick else "")
        self.path = args.out / f"{self.name}.json"
        self.settings: Cell = json.loads(json.dumps(settings))
        stored = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.cells: dict[str, Cell] = stored["cells"] if stored.get("settings") == self.settings else {}

    def cell(self, key: str, measure: Callable[[], Cell]) -> Cell:
        """The cell of a key, from the file or measured now and written to it."""
        if key not in self.cells:
            begin, load = time.perf_counter(), os.getloadavg()[0]
            print(f"{self.name}: {key} ...", flush=True)
            found = json.loads(json.dumps(measure()))
            found |= {
                "took_s": round(time.perf_counter() - begin, 1),
                "load": [round(load, 1), round(os.getloadavg()[0], 1)],
            }
            self.cells[key] = found
            self.write()
            shown = {name: value for name, value in found.items() if isinstance(value, int | float | str)}
            print(f"{self.name}: {key}: {shown}", flush=True)
        return self.cells[key]

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        text = json.dumps({"about": about(), "settings": self.settings, "cells": self.cells}, indent=1)
        part.write_text(text + "\n")
        os.replace(part, self.path)

    def finish(self, text: str) -> None:
        """Prints the tables and writes them beside the cells."""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        loads = [value for cell in self.cells.values() for value in cell["load"]]
        facts = about()
        head = (
            f"{facts['device']}, {facts['threads']} thread(s), load {min(loads)} to {max(loads)}; "
            f"{', '.join(f'{name} {version}' for name, version in facts['versions'].items())}; "
            f"`{facts['command']}`\n\n{settings}\n\n"
        )
        self.path.with_suffix(".md").write_text(head + text + "\n")
        print(f"\n{text}\n\n{self.path.with_suffix('.md')}")


def about() -> Cell:
    """Device, versions and command of this run."""
    versions = {"fxsparse": fxsparse.__version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    spec = sys.modules["__main__"].__spec__
    module = spec.name if spec is not None else Path(sys.argv[0]).stem
    given = [word for place, word in enumerate(sys.argv) if place and "--out" not in sys.argv[place - 1 : place + 1]]
    return {
        "device": processor(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "command": f"python -m {module} {shlex.join(given)}".strip(),
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def processor() -> str:
    """The processor's name and the widest vectors it has."""
    facts = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in facts.splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and standard deviation, such as ``81.3 ± 0.4``; one value stands alone."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown; the first column is text, the others numbers."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(item) for item in line) + " |" for line in lines)


def in_turn(calls: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call; the calls take turns, so that a busy machine slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + warmup):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratio(mine: Sequence[float], its: Sequence[float]) -> float:
    """The median of the ratios turn by turn."""
    return statistics.median(one / other for one, other in zip(mine, its, strict=True))


def figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 4.5)) -> Any:
    """A figure and its axes, that draws to a file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams |= {"svg.hashsalt": "fxsparse", "svg.fonttype": "none"}  # text stays text
    return plt.subplots(rows, columns, figsize=size, layout="constrained")
