"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a program of their own.

Only with ``FXSPARSE_TEST_EVERY_KERNEL``, because such builds take long.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from fxsparse.codegen.cpu import build, instruction_sets
from fxsparse.codegen.cpu.spec import NMGradInput, NMGradValues, NMLinear

FLAGS = ("-std=c++20", "-O1", "-g1", "-ffp-contract=fast", "-Wno-psabi", "-pthread")
CHECKS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def compiler() -> list[str]:
    try:
        return build.compiler()
    except build.BuildError as error:
        pytest.skip(str(error))


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)


@pytest.mark.skipif(not os.environ.get("FXSPARSE_TEST_EVERY_KERNEL"), reason="FXSPARSE_TEST_EVERY_KERNEL is not set")
def test_kernels_under_sanitizers(tmp_path):
    cxx = compiler()
    (tmp_path / "empty.cpp").write_text("int main() {}\n")
    tried = run(*cxx, *CHECKS, tmp_path / "empty.cpp", "-o", tmp_path / "empty")
    if tried.returncode or run(tmp_path / "empty").returncode:
        pytest.skip("the compiler has no sanitizers that run here")
    one = instruction_sets.available()[0]
    objects = []
    for name, kind in (("linear", NMLinear), ("grad_input", NMGradInput), ("grad_values", NMGradValues)):
        source, target = tmp_path / f"{name}.cpp", tmp_path / f"{name}.o"
        source.write_text(kind("float32", 2, 4, one).render())
        built = run(*cxx, *FLAGS, *CHECKS, *one.flags, f"-Dfxsparse_kernel={name}", "-c", source, "-o", target)
        assert not built.returncode, built.stderr
        objects.append(target)
    program = tmp_path / "program"
    built = run(*cxx, *FLAGS, *CHECKS, Path(__file__).parent / "sanitized.cpp", *objects, "-o", program)
    assert not built.returncode, built.stderr
    done = run(program)
    assert done.returncode == 0 and done.stdout == "right\n", done.stdout + done.stderr
