"""What every test gets: a seed, one thread, no compiled graphs of other tests, and no GPU tests without a GPU.

The suite runs in one process for each core, eight at most, and takes slow tests in turn (`tests.support.sampling`); a
file, a test or a choice by ``-k`` runs whole, in this process.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from datetime import date
from pathlib import Path

# Read when torch is first imported. One thread each, because workers use all cores; and Inductor believes what the
# processor says of its vector instructions, where asking a compiler takes longer than compiling most tests' kernels.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import pytest
import torch

from tests.support import sampling


def is_chosen(config: pytest.Config) -> bool:
    """Whether the tests were chosen: a file, a test, or by name."""
    return bool(config.option.keyword) or any(".py" in arg for arg in config.args)


def pytest_configure() -> None:
    os.environ.setdefault("FXSPARSE_TEST_DAY", str(date.today().toordinal()))  # workers that start later have it too


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Starting workers takes longer than most single files do."""
    return 0 if is_chosen(config) else min(8, len(os.sched_getaffinity(0)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not is_chosen(config) and not config.option.markexpr and os.environ.get("FXSPARSE_TEST_ALL") != "1":
        day = int(os.environ["FXSPARSE_TEST_DAY"])
        taken = sampling.taken([item.nodeid for item in items], day, sampling.read())
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in taken])
        items[:] = [item for item in items if item.nodeid in taken]
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Modules and tests stay: looking for garbage among them again and again takes a twentieth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def own_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty table of measured times, of a GPU that every machine can name."""
    from fxsparse.lowering import timings

    monkeypatch.setenv("FXSPARSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA Test")
    timings.forget()
    yield
    timings.forget()


@pytest.fixture
def plain_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring takes references as they are: what Inductor makes of them takes long to compile."""
    monkeypatch.setattr(
        "fxsparse.lowering.candidates.as_inductor_compiles", lambda function, args: lambda: function(*args)
    )


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """Compiled graphs of one test must not count as recompiles of the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
