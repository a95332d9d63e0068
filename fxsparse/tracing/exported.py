"""Lets ``torch.export`` run a graph module as a call of it runs.

A module that holds a graph module calls it, and `TracedModule.__call__` checks the inputs. One that is exported itself
is not called but interpreted, on the values of the call in the order they were written, whatever their names. So the
names are noted where the call is bound to the signature, and used where the interpreter asks the graph for its inputs.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx.graph import _PyTreeCodeGen

from fxsparse.graph.training_form import check_exported
from fxsparse.tracing.input_sizes import check_inputs


class _Signature(inspect.Signature):
    """A signature that notes, together with all that are made of it, the names of the inputs of the last call."""

    calls: list[tuple[str, ...]] | None = None

    def bind(self, /, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        bound = super().bind(*args, **kwargs)
        if self.calls is not None:
            self.calls[:] = [(*list(self.parameters)[: len(args)], *kwargs)]
        return bound

    def replace(self, **changes: Any) -> Any:
        new = super().replace(**changes)
        new.calls = self.calls
        return new


class _Inputs(_PyTreeCodeGen):
    """The code of a graph module, which puts the inputs of an export in order and checks them."""

    def __init__(self, pytree_info: Any, owner: GraphModule, calls: list[tuple[str, ...]]):
        super().__init__(pytree_info)
        self.owner, self.calls = weakref.ref(owner), calls

    def process_inputs(self, *inputs: Any) -> Any:
        gm = self.owner()
        if gm is not None and torch.compiler.is_exporting():
            check_exported(gm)
            inputs = self._in_order(gm, inputs)
        return super().process_inputs(*inputs)

    def _in_order(self, gm: GraphModule, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        (written,) = self.calls or [()]
        if len(written) != len(inputs):
            return inputs
        values = dict(zip(written, inputs, strict=True))
        check_inputs(gm, (), values)
        positional, named = self.pytree_info.in_spec.children()
        names = [name for name in self.pytree_info.orig_args if name != "self"][: positional.num_children]
        return tuple(values[name] for name in (*names, *named.context))


def follow_interpreter(gm: GraphModule) -> None:
    """Gives ``gm``, whose code was just made, a signature and a codegen that work together."""
    forward: Any = type(gm).forward
    signature = _Signature(list(forward.__signature__.parameters.values()))
    signature.calls = []
    forward.__signature__ = signature
    codegen = gm.graph._codegen
    if isinstance(codegen, _PyTreeCodeGen):
        gm.graph._codegen = _Inputs(codegen.pytree_info, gm, signature.calls)
