"""How Inductor calls C++ kernels: as external kernels with everything bound, and not through torch's dispatcher.

    fxsparse_3f2a = fxsparse_bind(4870677045470658, ('x', 'values', 'indices'), 4096, 4096, 0, 1.0)
    ...
    buf0 = empty_strided_cpu((s0, 4096), (4096, 1), torch.float32)
    fxsparse_3f2a(arg0_1, arg1_1, arg2_1, s0, 4096, out=buf0)

An operator that Inductor does not know is called through Python's and torch's boxes, which costs more than a small
product. Here it becomes a node with a buffer that Inductor plans, and the line above. Operators stay calls where the
C++ wrapper is asked for, where a size of the weight is not known, or where the library cannot be built.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.lowering import fallback_handler, register_lowering
from torch._inductor.utils import sympy_product
from torch._inductor.virtualized import V

from fxsparse.codegen.cpu import loaded
from fxsparse.codegen.cpu.spec import CPUSpec

_IMPORT = "from fxsparse.codegen.cpu.extern import bind as fxsparse_bind"


class ExternKernel(ir.ExternKernelOut):
    """A call of a bound kernel.

    Attributes:
        bound: what ``fxsparse_bind`` is called with.
    """

    bound: tuple[Any, ...] = ()

    def codegen(self, wrapper: PythonWrapperCodegen) -> None:
        wrapper.add_import_once(_IMPORT)
        wrapper.add_import_once(f"{self.python_kernel_name} = fxsparse_bind{self.bound}")
        super().codegen(wrapper)


@functools.cache
def register() -> None:
    """Lets Inductor call kernels so from now on, in this process."""
    for name in ("linear", "linear_with", "grad_input", "grad_values"):
        overload = getattr(torch.ops.fxsparse_cpu, name).default
        register_lowering(overload, type_promotion_kind=None)(functools.partial(_lower, overload))


def _lower(overload: torch._ops.OpOverload, *args: Any) -> Any:
    made = None if V.graph.cpp_wrapper or V.graph.aot_mode else _extern_kernel(overload, args)
    return fallback_handler(overload, add_to_fallback_set=False)(*args) if made is None else made


def _extern_kernel(overload: torch._ops.OpOverload, args: Sequence[Any]) -> ir.TensorBox | None:
    """The node of a call, None if it has to go through the dispatcher."""
    named = {argument.name: arg for argument, arg in zip(overload._schema.arguments, args, strict=True)}
    spec = loaded.by_id(named["kernel"]).spec
    tensors = {name: arg for name, arg in named.items() if isinstance(arg, ir.IRNode)}
    if "x" not in tensors:
        tensors = {"x": tensors.pop("dy"), **tensors}  # a kernel reads its input there
    sizes = _sizes(overload, tensors, spec)
    if sizes is None:
        return None
    in_features, out_features, result = sizes
    strides = []
    for name in ("x", "dy"):
        if name in tensors:
            tensors[name], stride = rows_input(tensors[name])
            strides.append(stride)
    tensors = {name: arg if name in ("x", "dy") else dense_input(arg) for name, arg in tensors.items()}
    rank = int(tensors["down"].get_size()[0]) if "down" in tensors else 0
    bound = (named["kernel"], tuple(tensors), in_features, out_features, rank, float(named.get("scale", 1.0)))
    x = tensors["x"]
    node = ExternKernel(
        ir.FixedLayout(x.get_device_or_error(), x.get_dtype(), result, ir.FlexibleLayout.contiguous_strides(result)),
        [*tensors.values()],
        (sympy_product(x.get_size()[:-1]), *strides),
        python_kernel_name=f"fxsparse_{hashlib.sha256(repr(bound).encode()).hexdigest()[:8]}",
    )
    node.bound = bound
    return ir.TensorBox.create(node)


def _sizes(
    overload: torch._ops.OpOverload, tensors: dict[str, ir.IRNode], spec: CPUSpec
) -> tuple[int, int, list[Any]] | None:
    """Sizes of the weight and of the result; None if the weight's are not known, or something does not fit."""
    x, (kept_rows, kept) = tensors["x"], (tensors["values"] if "values" in tensors else tensors["indices"]).get_size()
    *leading, columns = x.get_size()
    if overload is torch.ops.fxsparse_cpu.grad_values.default:
        kept_rows, kept = tensors["dy"].get_size()[-1], columns // spec.m * spec.n
    rows, values, columns = (_known(size) for size in (kept_rows, kept, columns))
    if rows is None or values is None or not leading or str(x.get_dtype()) != f"torch.{spec.dtype}":
        return None
    features = values // spec.n * spec.m
    if overload is torch.ops.fxsparse_cpu.grad_input.default:
        return (features, rows, [*leading, features]) if columns == rows else None
    if columns != features:
        return None
    if overload is torch.ops.fxsparse_cpu.grad_values.default:
        return features, rows, [rows, values]
    return features, rows, [*leading, rows // spec.shrink]


def _known(size: Any) -> int | None:
    """A size that is a number."""
    return int(size) if isinstance(size, (int, sympy.Integer)) else None


def rows_input(tensor: ir.IRNode) -> tuple[ir.IRNode, Any]:
    """A tensor whose leading dimensions are rows of one stride, its last dimension dense, and that stride."""
    node = ir.ExternKernel.realize_input(tensor)
    size = node.get_size()
    if isinstance(node.maybe_get_layout(), ir.FixedLayout) or isinstance(node, ir.ReinterpretView):
        stride, same = node.get_stride(), V.graph.sizevars.statically_known_equals
        steps = range(len(size) - 2)
        if same(stride[-1], 1) and all(same(stride[d], stride[d + 1] * size[d + 1]) for d in steps):
            return node, stride[-2]
    return ir.ExternKernel.require_contiguous(node), size[-1]


def dense_input(tensor: ir.IRNode) -> ir.IRNode:
    """A contiguous tensor."""
    return ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(tensor))
