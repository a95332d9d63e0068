"""How long ``import fxsparse`` takes beside ``import torch``, in processor time of a fresh process.

    python -m benchmarks.import_time [--rounds 10]

Every round starts one Python for each, in turn; the user and system time of the whole process counts, so that a busy
machine changes little. One round before them fills the caches of files and bytecode.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

from benchmarks.timing import environment

RIVALS = ("torch", "fxsparse", "fxsparse.passes", "fxsparse.backend")


def seconds_to_import(module: str) -> float:
    """Processor time, user and system, of a Python that imports a module and ends."""
    before = os.times()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {module: [] for module in RIVALS}
    for turn in range(rounds + 1):
        for module, times in seconds.items():
            taken = seconds_to_import(module)
            if turn:
                times.append(taken)
    print(f"{environment()}, medians of {rounds}")
    for module, times in seconds.items():
        middle = statistics.median(times)
        print(f"import {module:<20}{middle:6.2f} s{middle / statistics.median(seconds['torch']):8.2f}")


if __name__ == "__main__":
    main()
