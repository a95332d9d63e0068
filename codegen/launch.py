"""The kernels behind the operators.

Each function allocates its result, launches on the current stream and returns without waiting, so it can be captured in
a CUDA graph. Leading dimensions of an input are flattened to rows and restored. :func:`unsupported` says why a call has
no kernel; the functions raise OptionError then.
"""

from __future__ import annotations

import torch

from fxsparse.codegen.launch_gather import gather_linear, gather_linear_grad_input, gather_linear_grad_weight
from fxsparse.codegen.launch_multiplex import demux_linear, mux
from fxsparse.codegen.launch_nm import (
    nm_linear,
    nm_linear_grad_input,
    nm_linear_grad_values,
    nm_linear_low_rank,
    nm_prune,
)
from fxsparse.codegen.launch_sparse import sparse_tensor_core_grad_input, sparse_tensor_core_linear
from fxsparse.codegen.launching import dtype_name
from fxsparse.codegen.spec import DTYPES, NMSpec

__all__ = [
    "demux_linear",
    "gather_linear",
    "gather_linear_grad_input",
    "gather_linear_grad_weight",
    "mux",
    "nm_linear",
    "nm_linear_grad_input",
    "nm_linear_grad_values",
    "nm_linear_low_rank",
    "nm_prune",
    "sparse_tensor_core_grad_input",
    "sparse_tensor_core_linear",
    "unsupported",
]


def unsupported(dtype: torch.dtype, n: int | None = None, m: int | None = None) -> str | None:
    """Why there is no kernel for a dtype and pattern; None where there is one."""
    if dtype_name(dtype) not in DTYPES:
        return f"there are kernels for {', '.join(DTYPES)}, not for {dtype_name(dtype)}"
    if n is not None and (n, m) not in NMSpec.PATTERNS:
        return f"there are kernels for {', '.join(f'{a}:{b}' for a, b in NMSpec.PATTERNS)}, not for {n}:{m}"
    return None
