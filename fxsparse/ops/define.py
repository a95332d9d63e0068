"""Registering operators with torch, and their kernels; and the checks of their arguments.

Operators are made with ``torch.library.custom_op``, opaque to autograd and export, because the body of a ``triton_op``
is traced wherever it runs, while these may launch any kernel. A compiler that should see inside inlines their
references below the gradients defined here (``fxsparse.backend.inductor``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._ops import OpOverload
from torch.utils.flop_counter import register_flop_formula

from fxsparse.errors import RewriteError
from fxsparse.ops import flops
from fxsparse.ops.nm import Pattern
from fxsparse.ops.operator import OPERATORS, Operator

_AUTOCAST_KEYS = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}
_library = torch.library.Library("fxsparse", "FRAGMENT")
_definitions: dict[str, CustomOpDef] = {}
_kernels: set[tuple[str, str]] = set()


def define(operator: Operator) -> Operator:
    """Registers an operator with torch and in the table of operators."""
    name = operator.name
    definition = torch.library.custom_op(
        f"fxsparse::{name}",
        _checked(operator, operator.reference),
        mutates_args=(),
        schema=f"({operator.schema}) -> Tensor",
    )

    @definition.register_fake
    def _(*args: Any) -> Tensor:
        like, shape = operator.output(name, *args)
        return like.new_empty(shape)

    definition.register_autograd(operator.backward or _no_second_derivative(name), setup_context=operator.save)
    for device_type, key in _AUTOCAST_KEYS.items():
        autocast = _autocast(operator.overload, device_type, casts=operator.backward is not None)
        _library.impl(name, autocast, key.name)

    @register_flop_formula(operator.overload.overloadpacket, get_raw=True)
    def _(*args: Any, out_val: Any, **kwargs: Any) -> int:
        return flops.total(operator.flops, out_val, args, kwargs)

    _definitions[name] = definition
    OPERATORS[name] = operator
    return operator


def decompositions() -> dict[OpOverload, Callable[..., Tensor]]:
    """Operator to reference, in the form that ``run_decompositions``, ``make_fx`` and AOTAutograd take."""
    return {operator.overload: operator.reference for operator in OPERATORS.values()}


def implement(
    op: Operator, device_type: str, *, declared: bool = True
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorates what an operator is to run on a device instead of its reference: ``@implement(nm_linear, "cuda")``.

    The function takes the operator's arguments, checked, and returns a new contiguous tensor. One that is not
    ``declared`` is no kernel to :func:`has_kernel`: it may run the reference itself.
    """

    def register(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if declared:
            declare_kernel(op.name, device_type)
        _definitions[op.name].register_kernel(device_type)(_checked(op, kernel))
        return kernel

    return register


def declare_kernel(name: str, device_type: str) -> None:
    """Says that an operator which was not made with :func:`define` has a kernel for a device."""
    _kernels.add((name, device_type))


def has_kernel(name: str, device_type: str) -> bool:
    """Whether an operator runs anything but its reference on a device."""
    return (name, device_type) in _kernels


def _checked(operator: Operator, kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def checked(*args: Any) -> Tensor:
        operator.output(operator.name, *args)
        return kernel(*args)

    return checked


def _no_second_derivative(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor) -> None:
        raise RewriteError(
            "is a gradient and cannot be derived once more. Call backward() without create_graph=True, or take second "
            "derivatives of the dense model (fxsparse.dense_state_dict gives its weights)",
            site=f"fxsparse::{name}",
        )

    return backward


def _autocast(op: OpOverload, device_type: str, *, casts: bool) -> Callable[..., Tensor]:
    """What an operator does where autocast is on: as a product of dense matrices does, with autocast off inside.

    Written out because ``register_autocast`` fixes one dtype. A gradient keeps the dtype of its forward pass.
    """
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    keys = keys | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)

    def cast(arg: Any) -> Any:
        eligible = isinstance(arg, Tensor) and arg.is_floating_point() and arg.device.type == device_type
        return arg.to(torch.get_autocast_dtype(device_type)) if eligible and arg.dtype != torch.float64 else arg

    def kernel(*args: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*map(cast, args) if casts else args)

    return kernel


class Check:
    """Checks the arguments of a call.

    Args:
        name: of the operator, for the messages.
        like: the tensor whose device all share, and whose dtype those share that hold real numbers.

    Raises:
        RewriteError: says which argument is wrong and what was expected; so does every method.
    """

    def __init__(self, name: str, like: Tensor):
        self.name, self.like = name, like
        self.require(like.dim() > 0, "its input is a scalar, expected [*, features]")
        self.require(like.is_floating_point(), f"its input is {like.dtype}, not a real floating-point type")

    def require(self, condition: bool, message: str) -> None:
        if not condition:
            raise RewriteError(message, site=f"fxsparse::{self.name}")

    def matrix(self, argument: str, tensor: Tensor) -> None:
        self.require(tensor.dim() == 2, f"{argument} is {list(tensor.shape)}, expected a matrix")

    def tensor(
        self, argument: str, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype | None = None
    ) -> None:
        """An argument, which may be absent, has a shape, a dtype (``like``'s unless given) and ``like``'s device."""
        if tensor is None:
            return
        dtype, device = dtype or self.like.dtype, self.like.device
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype or tensor.device != device:
            self.require(
                False,
                f"{argument} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, "
                f"expected {dtype} {list(shape)} on {device}",
            )

    def compressed(
        self,
        rows: int,
        in_features: int,
        values: Tensor | None,
        indices: Tensor,
        column_mask: Tensor | None,
        pattern: Pattern,
    ) -> None:
        """The parts of a compressed weight ``[rows, in_features]``."""
        if in_features % pattern.m:
            self.require(False, f"{in_features} columns are not a multiple of {pattern.m}, as {pattern} needs")
        kept = pattern.kept(in_features)
        self.tensor("values", values, (rows, kept))
        self.tensor("indices", indices, (rows, pattern.index_bytes(in_features)), torch.uint8)
        self.tensor("column_mask", column_mask, (rows, -(-kept // 8)), torch.uint8)

    def masked(
        self, shape: Sequence[int], weight: Tensor | None, mask: Tensor | None, column_mask: Tensor | None
    ) -> None:
        """A dense weight ``shape`` and its masks."""
        self.tensor("weight", weight, shape)
        self.tensor("mask", mask, shape, torch.bool)
        self.tensor("column_mask", column_mask, shape, torch.bool)
