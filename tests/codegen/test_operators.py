"""Kernels behind the operators: which are registered, and what runs where there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fxsparse.codegen import kernels, operators, tiles
from fxsparse.ops import nm_linear
from fxsparse.ops.nm import Pattern, nm_mask, pack


def test_every_file_of_a_kernel_is_imported() -> None:
    files = {path.stem for path in Path(kernels.__path__[0]).glob("*.py")} - {"__init__"}
    assert {name for name in files if hasattr(getattr(kernels, name), name)} == files
    # whose tiles have parts for warps, and are not by regime
    own = {"sparse_tensor_core_linear", "sparse_wgmma_linear"}
    assert files - own <= tiles.SHIPPED.keys()


@pytest.mark.parametrize(("dtype", "pattern"), [(torch.float64, Pattern(2, 4)), (torch.float32, Pattern(2, 16))])
def test_the_reference_runs_without_a_kernel(dtype: torch.dtype, pattern: Pattern) -> None:
    weight, x = torch.randn(24, 32, dtype=dtype), torch.randn(5, 32, dtype=dtype)
    mask = nm_mask(weight.abs(), pattern)
    args = (x, *pack(weight, mask, pattern), None, None, pattern.n, pattern.m)
    torch.testing.assert_close(operators.KERNELS[nm_linear.nm_linear](*args), x @ (weight * mask).t())


def test_a_machine_without_triton_runs_references() -> None:
    code = """
import sys
sys.modules["triton"] = None
from fxsparse.codegen import fused_ops, operators
from fxsparse.codegen.kernels.nm_linear import NMLinear
from fxsparse.codegen.tiles import SHIPPED
from fxsparse.ops.define import has_kernel
assert NMLinear("bfloat16", SHIPPED["nm_linear"]["large"], 2, 4).render()
assert not has_kernel("nm_linear", "cuda") and not has_kernel("nm_linear_epilogue", "cuda")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
