"""When tracing two functions gives the same graph: what the result of a trace depends on, as something hashable.

    the function   its code, defaults, closure and the globals it reads, other functions alike
    the operands   dtype, device, symbolic sizes and strides, and which of them share memory
    the setting    default dtype and autocast; nothing is kept under a mode of the caller's own

Only plain values can be compared: numbers, text, dtypes, operators, functions, and tuples, lists and dictionaries of
them. Anything else, such as a module, a tensor or an object with attributes that may change, makes `Unknown`, and the
function is traced anew.
"""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Node
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fxsparse.graph.values import value

# Modules whose functions, classes and attributes stay as they are.
_FIXED = ("torch", "math", "operator", "functools", "itertools", "collections", "builtins", "typing", "_operator")
_OURS = __name__.partition(".")[0]
_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Flag:
    """A training flag among the inputs of a function, by its full name, such as ``encoder.training``."""

    name: str


class Unknown(Exception):
    """Why a function cannot be compared with another."""


def key_of(fn: Callable[..., Any], leaves: Sequence[Any]) -> tuple[Any, ...] | None:
    """Equal for functions and flat inputs that trace to the same graph; None where that cannot be said.

    Args:
        fn: the function.
        leaves: nodes, flags and constants. Flags are told apart, not named.
    """
    if _get_current_dispatch_mode_stack() or torch.overrides._get_current_function_mode_stack():
        return None
    try:
        return (_function(fn, frozenset()), _operands(leaves), _setting())
    except Unknown:
        return None


def _setting() -> tuple[Any, ...]:
    autocast = [
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in _DEVICES
        if torch.amp.is_autocast_available(device)
    ]
    return (torch.get_default_dtype(), *autocast)


# --- operands ---------------------------------------------------------------------------------------------------------


def _operands(leaves: Sequence[Any]) -> tuple[Any, ...]:
    nodes: dict[Node, int] = {}
    flags: dict[Flag, int] = {}
    memory: dict[int, int] = {}
    keys: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Node):
            keys.append(("node", nodes.setdefault(leaf, len(nodes)), _value(value(leaf), memory)))
        elif isinstance(leaf, Flag):
            keys.append(("flag", flags.setdefault(leaf, len(flags))))
        else:
            keys.append(_plain(leaf, frozenset()))
    return tuple(keys)


def _value(example: Any, memory: dict[int, int]) -> Any:
    if isinstance(example, Tensor):
        if example.layout != torch.strided:
            raise Unknown
        storage = memory.setdefault(example.untyped_storage()._cdata, len(memory))
        sizes = (*example.shape, *example.stride(), example.storage_offset())
        of_tensor = (type(example), example.dtype, example.device, example.requires_grad, example.dim(), storage)
        return (*of_tensor, tuple(map(_size, sizes)))
    if isinstance(example, SymInt):
        return ("size", _size(example))
    return _plain(example, frozenset())


def _size(size: int | SymInt) -> Any:
    return size.node.expr if isinstance(size, SymInt) else size


# --- functions and constants ------------------------------------------------------------------------------------------


def _function(fn: Any, seen: frozenset[Any]) -> Any:
    if isinstance(fn, functools.partial):
        return ("partial", _function(fn.func, seen), _plain(fn.args, seen), _plain(fn.keywords, seen))
    if not isinstance(fn, types.FunctionType):
        return _plain(fn, seen)
    if fn in seen:
        return ("again", fn.__code__)
    seen = seen | {fn}
    return (
        "function",
        fn.__code__,
        _plain(fn.__defaults__, seen),
        _plain(fn.__kwdefaults__, seen),
        tuple(_cell(cell, seen) for cell in fn.__closure__ or ()),
        tuple((name, _plain(fn.__globals__[name], seen)) for name in _names(fn.__code__) if name in fn.__globals__),
    )


def _names(code: types.CodeType) -> Iterable[str]:
    """The globals and attributes that a function names, and the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _cell(cell: types.CellType, seen: frozenset[Any]) -> Any:
    try:
        return _plain(cell.cell_contents, seen)
    except ValueError as error:  # not yet assigned
        raise Unknown from error


def _plain(item: Any, seen: frozenset[Any]) -> Any:
    """A constant, told apart from others of equal value and another type."""
    if item is None or isinstance(item, (bool, int, float, complex, str, bytes, enum.Enum)):
        return (type(item), repr(item) if isinstance(item, (float, complex)) else item)
    if isinstance(item, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return item
    if isinstance(item, (tuple, list)) and type(item) in (tuple, list, torch.Size):
        return (type(item), tuple(_plain(each, seen) for each in item))
    if type(item) is dict:
        return (dict, tuple((_plain(key, seen), _plain(each, seen)) for key, each in item.items()))
    if isinstance(item, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return item
    if isinstance(item, functools.partial) or (isinstance(item, types.FunctionType) and not _is_fixed(item)):
        return _function(item, seen)
    if isinstance(item, (types.FunctionType, types.BuiltinFunctionType, type, types.ModuleType)) and _is_fixed(item):
        return ("fixed", item)
    raise Unknown


def _is_fixed(item: Any) -> bool:
    """Whether a function, class or module is one of those that stay as they are."""
    if getattr(item, "__closure__", None):
        return False
    name = item.__name__ if isinstance(item, types.ModuleType) else getattr(item, "__module__", None)
    return isinstance(name, str) and name.partition(".")[0] in (*_FIXED, _OURS)
