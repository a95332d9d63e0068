"""Which inputs a captured graph takes: a free batch size, every other size as in the example.

``torch.export`` freezes a batch of 1 without a word, since a size of 1 cannot be told from a broadcast, and freezes any
batch whose size the model's Python asks for. And a captured graph given a smaller size may broadcast in silence. Each
is found here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import sympy
import torch
from torch import SymInt, Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx import _pytree as fx_pytree
from torch.utils import _pytree as pytree

from fxsparse import graph as fx
from fxsparse.errors import TraceError
from fxsparse.tracing.export import Inputs, left_as_it_was, quote_guard, tensors, where_batch_was_fixed

CONDITIONS_KEY = "fxsparse_size_conditions"

_INSTEAD = "give an example of at least two rows, or dynamic_batch=False"


@dataclass(frozen=True)
class SizeCondition:
    """What a size had to be for the model's Python to take the branch that was captured.

    Attributes:
        expression: over the symbols of the graph's sizes.
        where: the line of the model, quoted.
    """

    expression: sympy.Basic
    where: str

    def __str__(self) -> str:
        return f"the graph is the model where {self.expression}{self.where}"


def size_conditions(gm: GraphModule) -> tuple[SizeCondition, ...]:
    """The conditions under which ``gm`` is the model, but for those that only torch's own code asked about."""
    environment = fx.fake_mode(gm).shape_env
    found: dict[str, SizeCondition] = {}
    for guard in environment.guards if environment else ():
        where = quote_guard(guard)
        expression = guard.expr.xreplace(environment.replacements) if where and environment else guard.expr
        if where and expression.free_symbols:
            found[f"{expression}{where}"] = SizeCondition(expression, where)
    return tuple(found.values())


def with_two_rows(model: nn.Module, example: Inputs) -> Inputs:
    """``example``, repeated along dimension 0 where every input has one row."""
    rows = [tensor.shape[0] for tensor in tensors(example) if tensor.dim()]
    if not rows or rows[0] != 1:
        return example
    if any(count != 1 for count in rows):
        raise TraceError(
            f"{type(model).__name__}: the first example input has one row and others have {max(rows)}; a batch of 1 is "
            f"captured as the only batch size; {_INSTEAD}"
        )
    return pytree.tree_map_only(Tensor, _repeat, example)


def _repeat(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor]) if tensor.dim() else tensor


def _is_free(size: int | SymInt) -> TypeGuard[SymInt]:
    return isinstance(size, SymInt) and bool(size.node.expr.free_symbols)


def tensor_inputs(gm: GraphModule) -> list[Node]:
    """The placeholders of ``gm`` that are tensors."""
    return [node for node in gm.graph.find_nodes(op="placeholder") if isinstance(node.meta.get("val"), Tensor)]


def check_batch_is_free(model: nn.Module, gm: GraphModule, example: Inputs) -> list[str]:
    """Notes on inputs whose dimension 0 is fixed; TraceError where that is so for all that the model reads."""
    inputs, fixed = _read_inputs(gm, 0), _fixed(gm, 0)
    if inputs and len(fixed) == len(inputs):
        with left_as_it_was(model):
            where = where_batch_was_fixed(model, example)
        raise TraceError(
            f"{type(model).__name__}: the model works at batch size {fx.value(fixed[0]).shape[0]} only{where}\n"
            "Write sizes as x.shape[0] or -1, or trace with dynamic_batch=False."
        )
    return fixed_dimensions(gm, 0)


def fixed_dimensions(gm: GraphModule, dimension: int) -> list[str]:
    """Notes on the inputs that the graph reads and whose ``dimension`` is that of the example."""
    return [
        f"{node.name}: dimension {dimension} stays {fx.value(node).shape[dimension]}" for node in _fixed(gm, dimension)
    ]


def _read_inputs(gm: GraphModule, dimension: int) -> list[Node]:
    return [node for node in tensor_inputs(gm) if node.users and fx.value(node).dim() > dimension]


def _fixed(gm: GraphModule, dimension: int) -> list[Node]:
    return [node for node in _read_inputs(gm, dimension) if not _is_free(fx.value(node).shape[dimension])]


def check_one_row(model: nn.Module, gm: GraphModule, example: Inputs) -> None:
    """TraceError where the model does something else with one row (``squeeze``) than the graph captured with two."""
    name, shapes = type(model).__name__, []
    for module in (model, gm):
        with left_as_it_was(module), FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            module.eval()
            args, kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, example)
            try:
                shapes.append([tuple(tensor.shape) for tensor in tensors(module(*args, **kwargs))])
            except Exception as error:
                raise TraceError(f"{name} does not run with one row, {_INSTEAD}: {error}") from error
    if shapes[0] != shapes[1]:
        raise TraceError(
            f"{name}: with one row the model returns sizes {shapes[0]}, the graph captured with two rows {shapes[1]}; "
            f"{_INSTEAD}"
        )


@torch._dynamo.disable
def check_inputs(gm: GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """TraceError where an input is not what ``gm`` was captured for: another size, or another constant."""
    names = [name for name in gm.graph._codegen.pytree_info.orig_args if name != "self"]  # type: ignore[attr-defined]
    values = dict(zip(names, args, strict=False)) | dict(kwargs)
    if len(args) > len(names) or values.keys() != set(names):
        return  # missing or unexpected arguments: forward says so
    spec = gm._in_spec
    positional, named = spec.children() if callable(getattr(spec, "children", None)) else spec.children_specs
    arranged = [values[name] for name in names[: positional.num_children]], {key: values[key] for key in named.context}
    leaves = fx_pytree.tree_flatten_spec(arranged, spec)
    sizes: dict[sympy.Basic, int] = {}
    for node, leaf in zip(gm.graph.find_nodes(op="placeholder"), leaves, strict=False):
        expected = node.meta.get("val")
        if not isinstance(expected, Tensor) or not isinstance(leaf, Tensor):
            if isinstance(expected, Tensor) or isinstance(leaf, Tensor) or leaf != expected:
                raise TraceError(f"{node.name} is {leaf!r}, but {expected!r} was captured; trace the model with that")
        elif not _fits(leaf.shape, expected.shape):
            raise TraceError(
                f"{node.name} has sizes {tuple(leaf.shape)}, but the graph takes "
                f"({', '.join(map(str, expected.shape))}); trace the model with an example of those sizes"
            )
        else:
            sizes |= {s.node.expr: n for s, n in zip(expected.shape, leaf.shape, strict=True) if _is_free(s)}
    for condition in gm.meta.get(CONDITIONS_KEY, ()):
        if condition.expression.subs(sizes) == sympy.false:
            raise TraceError(f"a size is outside what was captured; {condition}")


def _fits(sizes: torch.Size, captured: torch.Size) -> bool:
    """Whether a graph captured with the second sizes takes the first; a length of 1 may mean a broadcast."""
    if len(sizes) != len(captured):
        return False
    return all(
        given > 1 or not dimension if _is_free(expected) else given == expected  # comparing a symbol would fix it
        for dimension, (given, expected) in enumerate(zip(sizes, captured, strict=True))
    )
