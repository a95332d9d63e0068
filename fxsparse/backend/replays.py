"""How Inductor calls our operators on a GPU: as functions that replay their launches (`fxsparse.codegen.replay`).

    fxsparse_3f2a = fxsparse_bind_launches('nm_linear', (('tensor', 0), ('tensor', 1), ..., None, 2, 4), (0,))
    ...
    buf0 = fxsparse_3f2a(arg0_1, arg1_1, arg2_1)

Operators stay calls through torch's dispatcher where the C++ wrapper is asked for.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.lowering import fallback_handler, register_lowering
from torch._inductor.virtualized import V

from fxsparse.backend.extern_kernels import dense_input, rows_input
from fxsparse.codegen.fused_ops import INSTRUCTIONS
from fxsparse.codegen.operators import KERNELS

DEVICES = {"cuda"}
"""Device types whose operators are called so."""

_IMPORT = "from fxsparse.codegen.replay import bind as fxsparse_bind_launches"


class Replayed(ir.ExternKernelAlloc):
    """A call of a bound operator.

    Attributes:
        bound: what ``bind`` is called with.
    """

    bound: tuple[Any, ...] = ()

    def codegen(self, wrapper: PythonWrapperCodegen) -> None:
        wrapper.add_import_once(_IMPORT)
        wrapper.add_import_once(f"{self.python_kernel_name} = fxsparse_bind_launches{self.bound}")
        super().codegen(wrapper)


@functools.cache
def register() -> None:
    """Lets Inductor call operators so from now on, in this process."""
    names = [*(operator.name for operator in KERNELS), "nm_linear_epilogue", *INSTRUCTIONS]
    for name in names:
        overload = getattr(torch.ops.fxsparse, name).default
        register_lowering(overload, type_promotion_kind=None)(functools.partial(_lower, overload, name))


def _lower(overload: torch._ops.OpOverload, name: str, *args: Any) -> Any:
    result = V.graph.current_node.meta["val"]
    if V.graph.cpp_wrapper or V.graph.aot_mode or result.device.type not in DEVICES:
        return fallback_handler(overload, add_to_fallback_set=False)(*args)
    tensors: list[ir.IRNode] = []
    template: list[Any] = []
    for arg in args:
        if isinstance(arg, (list, tuple)):
            template.append(("tensors", len(tensors), len(tensors) + len(arg)))
            tensors += map(_input, arg)
        elif isinstance(arg, ir.IRNode):
            template.append(("tensor", len(tensors)))
            tensors.append(_input(arg))
        else:
            template.append(arg)
    varying = tuple(place for place, tensor in enumerate(tensors) if not _is_fixed(tensor))
    bound = (name, tuple(template), varying)
    node = Replayed(
        ir.FallbackKernel.tensor_to_layout(result),
        tensors,
        python_kernel_name=f"fxsparse_{hashlib.sha256(repr(bound).encode()).hexdigest()[:8]}",
    )
    node.bound = bound
    return ir.TensorBox.create(node)


def _is_fixed(tensor: ir.IRNode) -> bool:
    """Whether its sizes and strides are numbers."""
    return all(isinstance(number, (int, sympy.Integer)) for number in (*tensor.get_size(), *tensor.get_stride()))


def _input(tensor: Any) -> ir.IRNode:
    return rows_input(tensor)[0] if len(tensor.get_size()) > 1 else dense_input(tensor)
