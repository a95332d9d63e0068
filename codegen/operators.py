"""Puts launches of kernels behind the ``fxsparse::`` operators on CUDA devices, where Triton is installed.

Each file of `fxsparse.codegen.kernels` registers its own launch with :func:`kernel_of`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from fxsparse.codegen.launching import unsupported
from fxsparse.ops.define import implement
from fxsparse.ops.operator import Operator

Launch = TypeVar("Launch", bound=Callable[..., Tensor])

HAS_TRITON = importlib.util.find_spec("triton") is not None

KERNELS: dict[Operator, Callable[..., Tensor]] = {}
"""What an operator runs on a GPU: its kernel, or its reference for a dtype or pattern that has none (float64, 2:16)."""

_launches: dict[str, Callable[..., Tensor]] = {}


def kernel_of(op: Operator) -> Callable[[Launch], Launch]:
    """Decorates the launch that an operator runs on CUDA devices: ``@kernel_of(ops.nm_linear)``.

    The launch takes the operator's arguments, and perhaps keyword arguments of its own. The dtype of the first
    argument, and the pattern if there are arguments ``n`` and ``m``, decide whether there is a kernel.
    """
    names = [argument.name for argument in op.overload._schema.arguments]
    pattern = [names.index("n"), names.index("m")] if "m" in names else []

    def register(launch: Launch) -> Launch:
        def run(*args: Any) -> Tensor:
            missing = unsupported(args[0].dtype, *(args[place] for place in pattern))
            return (launch if missing is None else op.reference)(*args)

        KERNELS[op] = run
        _launches[op.name] = launch
        if HAS_TRITON:
            implement(op, "cuda")(run)
        return launch

    return register


def launch_of(name: str) -> Callable[..., Tensor]:
    """The launch that was registered for the operator of a name, with its keyword arguments, such as ``plan``."""
    return _launches[name]
