"""Runs the ``interpreted_*`` files in Triton's interpreter, which has to be chosen before Triton is imported."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import triton

# Triton 3.6 takes loop bounds from arrays of one element in a way that numpy 2.4 no longer allows.
_LOOPS_FAIL = triton.__version__.startswith("3.6.") and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4)


@pytest.mark.skipif(_LOOPS_FAIL, reason="the interpreter of Triton 3.6 needs numpy < 2.4")
@pytest.mark.parametrize("file", ["interpreted_kernels.py", "interpreted_backend.py"])
def test_in_the_interpreter(tmp_path, file):
    seed = str(random.SystemRandom().randrange(1 << 30))
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "FXSPARSE_CACHE_DIR": str(tmp_path),
        "FXSPARSE_TEST_SEED": seed,
    }
    worker = Path(__file__).with_name(file)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(worker)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=worker.parents[2])
    assert run.returncode == 0, f"FXSPARSE_TEST_SEED={seed}\n{run.stdout[-8000:]}\n{run.stderr[-2000:]}"
    assert " passed" in run.stdout
