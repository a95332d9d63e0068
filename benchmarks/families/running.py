"""Families in processes of their own, and results line by line.

A process has torch and transformers imported before it is forked, works on one family, and sends each result when it
has it. One that dies or takes longer than the limit on a cell leaves that cell as a crash, and another goes on with the
next.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import resource
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Key = tuple[str, str]
"""A family and a column."""
Line = dict[str, Any]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["benchmarks.families.cells"])
BUILD = "model"
"""The column that says whether there is a tiny model, and of what class."""


def work(name: str, columns: Sequence[str], memory: int, pipe: Connection) -> None:
    """Runs cells of a family and sends each; the process."""
    resource.setrlimit(resource.RLIMIT_DATA, (memory << 30, memory << 30))
    import torch
    import transformers

    from benchmarks.families.cells import Bench, cell
    from benchmarks.families.tiny import NotTiny

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    bench = Bench(name)
    try:
        family = bench.family
    except NotTiny as reason:
        pipe.send({"family": name, "column": BUILD, "state": "no", "detail": str(reason)})
        return
    about = {"class": type(family.model).__name__, "inputs": list(family.batch()), "labels": family.labels}
    pipe.send({"family": name, "column": BUILD, "state": "ok", **about})
    for column in columns:
        line = {"family": name, "column": column, **dataclasses.asdict(cell(bench, column))}
        pipe.send({**line, "trace_seconds": round(bench.trace_seconds, 2)} if column == "trace" else line)


def lines_of(name: str, columns: Sequence[str], seconds: float, memory: int) -> Iterator[Line]:
    """The results of a family as they come."""
    left = list(columns)
    while left:
        mine, theirs = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=work, args=(name, left, memory, theirs))
        process.start()
        theirs.close()
        for line in _received(mine, seconds):
            yield line
            if line["column"] == BUILD and line["state"] == "no":
                left = []
            left = [column for column in left if column != line["column"]]
        process.kill()
        process.join()
        if left:
            detail = f"no result: the process ended with {process.exitcode}, or took more than {seconds:.0f} s"
            yield {"family": name, "column": left.pop(0), "state": "crash", "detail": detail, "seconds": seconds}


def _received(pipe: Connection, seconds: float) -> Iterator[Line]:
    while pipe.poll(seconds):
        try:
            yield pipe.recv()
        except EOFError:
            return


def read(path: Path) -> dict[Key, Line]:
    """The results in a file; later lines replace earlier ones."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {(line["family"], line["column"]): line for line in map(json.loads, lines)}


def missing(name: str, columns: Iterable[str], results: dict[Key, Line], again: Iterable[str]) -> list[str]:
    """The columns of a family that have no result, or one of the states that run again."""
    built = results.get((name, BUILD), {})
    if built.get("state") == "no" and "no" not in again:
        return []
    return [c for c in columns if results.get((name, c), {"state": None})["state"] in (None, *again)]


def complete(
    names: Sequence[str],
    columns: Sequence[str],
    path: Path,
    workers: int,
    seconds: float,
    memory: int,
    again: list[str],
) -> None:
    """Runs what has no result, a family in each worker, and adds the results to the file."""
    results = read(path)
    tasks = [(name, missing(name, columns, results, again)) for name in names]
    tasks = [(name, left) for name, left in tasks if left]
    with path.open("a") as file, ThreadPoolExecutor(workers) as pool:

        def run(number: int, name: str, left: list[str]) -> None:
            start = time.perf_counter()
            for line in lines_of(name, left, seconds, memory):
                file.write(json.dumps(line) + "\n")
                file.flush()
                if line["state"] not in ("ok", "partial"):
                    print(f"    {name}, {line['column']}: {line['state']}: {line['detail'][:300]}", flush=True)
            print(f"{number}/{len(tasks)}  {name}  {time.perf_counter() - start:.0f} s", flush=True)

        for future in [pool.submit(run, number, *task) for number, task in enumerate(tasks, 1)]:
            future.result()
