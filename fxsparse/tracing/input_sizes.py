"""Which inputs a captured graph takes: a free batch size, every other size as in the example.

``torch.export`` freezes a batch of 1 without a word, since a size of 1 cannot be told from a broadcast, and freezes any
batch whose size the model's Python asks for. And a captured graph given a smaller size may broadcast in silence. Each
is found here.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import sympy
import torch
from torch import SymInt, Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx import _pytree as fx_pytree
from torch.utils import _pytree as pytree

from fxsparse import graph as fx
from fxsparse.errors import TraceError
from fxsparse.graph.partial import dependent_outputs, input_names, input_nodes
from fxsparse.graph.training_form import CONDITIONS_KEY, prepare_without
from fxsparse.tracing.export import Inputs, left_as_it_was, quote_guard, tensors, where_batch_was_fixed

ANY_LENGTH_KEY = "fxsparse_any_length"
"""In ``gm.meta``: whether the caller asked for free lengths, which includes 1."""
DEFAULTS_KEY = "fxsparse_default_inputs"
"""In ``gm.meta``: what the model's ``forward`` takes by default, by name."""

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
        mode = detect_fake_mode([*module.parameters()]) or FakeTensorMode(allow_non_fake_inputs=True)
        with left_as_it_was(module), mode, torch.no_grad():
            module.eval()
            fake = functools.partial(mode.from_tensor, static_shapes=True)
            args, kwargs = pytree.tree_map_only(Tensor, fake, example)
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
def check_inputs(gm: GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword inputs of a call, without those that are None and were not captured, and with constants that the
    model would take by default.

    Raises:
        TraceError: an input is not what ``gm`` was captured for: another size, another constant, one that was not
            captured, or one that the graph cannot do without.
    """
    names = input_names(gm)
    if len(args) > len(names) or set(names[: len(args)]) & kwargs.keys():
        return dict(kwargs)  # forward says so
    kwargs = _fitted(gm, args, kwargs)
    values = dict(zip(names, args, strict=False)) | kwargs
    if values.keys() == set(names):
        _check_values(gm, names, values)
        return kwargs
    absent = [name for name in names if name not in values]
    _check_values(gm, names, {**values, **dict.fromkeys(absent)}, absent)
    return kwargs


def _fitted(gm: GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword inputs, as `check_inputs` returns them; those that the graph can do without are left out."""
    names, nodes = input_names(gm), input_nodes(gm.graph)
    more = [name for name, value in kwargs.items() if name not in names and value is not None]
    if more:
        raise TraceError(
            f"the graph was captured with {', '.join(names)}, and does not know {', '.join(more)}; trace or rewrite "
            f"the model with an example that has {'it' if len(more) == 1 else 'them'}: "
            f"kwargs={{**batch, {more[0]!r}: ...}}"
        )

    def captured(name: str) -> Any:
        return [node.meta.get("val") for node in nodes[name]]

    fitted = {name: value for name, value in kwargs.items() if name in names}
    fitted = {name: value for name, value in fitted.items() if value is not None or not _takes_tensor(captured(name))}
    defaults = gm.meta.get(DEFAULTS_KEY, {})
    fitted |= {
        name: defaults[name]
        for name in names[len(args) :]
        if name not in fitted and name in defaults and captured(name) == [defaults[name]]
    }
    absent = tuple(name for name in names[len(args) :] if name not in fitted)
    if absent and not prepare_without(gm, absent):
        outputs = ", ".join(dependent_outputs(gm.graph, absent)[:4])
        depends = f" (output {outputs} depends on it)" if outputs else ""
        raise TraceError(
            f"the graph was captured with {', '.join(names)}, and {', '.join(absent)} is missing{depends}; for such "
            "calls trace or rewrite the model with an example without it"
        )
    return fitted


def _takes_tensor(captured: list[Any]) -> bool:
    return len(captured) == 1 and isinstance(captured[0], Tensor)


def _check_values(gm: GraphModule, names: list[str], values: Mapping[str, Any], absent: Collection[str] = ()) -> None:
    """TraceError where a value is not what ``gm`` was captured for, but for inputs that are left out."""
    spec = gm._in_spec
    positional, named = spec.children() if callable(getattr(spec, "children", None)) else spec.children_specs
    arranged = [values[name] for name in names[: positional.num_children]], {key: values[key] for key in named.context}
    leaves = fx_pytree.tree_flatten_spec(arranged, spec)
    sizes: dict[sympy.Basic, int | SymInt] = {}
    shortest = 1 if gm.meta.get(ANY_LENGTH_KEY) else 2
    left_out = {node for name in absent for node in input_nodes(gm.graph)[name]}
    for node, leaf in zip(gm.graph.find_nodes(op="placeholder"), leaves, strict=False):
        expected = node.meta.get("val")
        if node in left_out:
            continue
        if not isinstance(expected, Tensor) or not isinstance(leaf, Tensor):
            if isinstance(expected, Tensor) or isinstance(leaf, Tensor) or leaf != expected:
                raise TraceError(f"{node.name} is {leaf!r}, but {expected!r} was captured; trace the model with that")
        elif not _fits(leaf.shape, expected.shape, shortest):
            raise TraceError(
                f"{node.name} has sizes {tuple(leaf.shape)}, but the graph takes "
                f"({', '.join(map(str, expected.shape))}); trace the model with an example of those sizes"
                f"{_advice(leaf, expected)}"
            )
        else:
            sizes |= {s.node.expr: n for s, n in zip(expected.shape, leaf.shape, strict=True) if _is_free(s)}
    for condition in gm.meta.get(CONDITIONS_KEY, ()):
        holds = condition.expression.subs(sizes)
        if holds == sympy.false:
            raise TraceError(f"a size is outside what was captured; {condition}")
        if holds != sympy.true:  # an export with free sizes, which the program is to check in its turn
            environment = next(size.node.shape_env for size in sizes.values() if isinstance(size, SymInt))
            torch._check(environment.create_symboolnode(holds))


def _advice(given: Tensor, captured: Tensor) -> str:
    """What else lets a graph take another length."""
    differs = given.dim() == captured.dim() > 1 and given.shape[1] != 1 and not _is_free(captured.shape[1])
    return ", or with dynamic_sequence=True" if differs and _fits(given.shape[:1], captured.shape[:1]) else ""


def _fits(sizes: torch.Size, captured: torch.Size, shortest: int = 2) -> bool:
    """Whether a graph captured with the second sizes takes the first; a length of 1 may mean a broadcast, and is not
    taken unless the caller asked for every length."""
    if len(sizes) != len(captured):
        return False
    return all(
        given >= shortest or not dimension
        if _is_free(expected)
        else given == expected  # comparing a symbol would fix it
        for dimension, (given, expected) in enumerate(zip(sizes, captured, strict=True))
    )
