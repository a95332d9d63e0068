"""Runs a test's function in several processes that share one gloo process group, and collects what each returns."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import multiprocessing

TIMEOUT = 3600 if os.environ.get("FXSPARSE_WHOLE_MATRIX") == "1" else 240
"""Seconds until a test of several processes counts as hung."""


def on_ranks(folder: Path, function: Callable[..., Any], *args: Any, ranks: int = 2) -> list[Any]:
    """The results of ``function(rank, *args)``, by rank.

    ``function`` stands in a module, so that the processes can import it. Its result is saved by ``torch.save``.
    ``folder`` is empty or new; it takes the processes' store and results.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_rank, args=(rank, ranks, folder, function, args)) for rank in range(ranks)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(TIMEOUT)
    finally:
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
    errors = [
        f"rank {rank}:\n{path.read_text()}" for rank in range(ranks) if (path := folder / f"{rank}.error").exists()
    ]
    if errors or hung:
        raise AssertionError("\n".join([*errors, *(f"rank {rank} hung" for rank in hung)]))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _rank(rank: int, ranks: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    status = 1
    try:
        store = torch.distributed.FileStore(str(folder / "store"), ranks)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        torch.save(function(rank, *args), folder / f"{rank}.pt")
        torch.distributed.barrier()
        status = 0
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
    finally:
        # No destructors: DistributedDataParallel's joins gloo's threads with Python's lock held, which they may need.
        os._exit(status)
