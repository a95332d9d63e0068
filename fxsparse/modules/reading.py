"""Modules whose own code reads a weight that is held in another form, such as ``nn.MultiheadAttention`` and experts.

Such a module does not call a linear: it hands its weight to a function. It stays what it is, and an attribute in the
weight's place computes the dense weight on every read. That saves memory and keeps the zeros, but no multiplication.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.modules.dense_view import DenseView
from fxsparse.modules.held import Form, Held, describe, register


class Reading(Held):
    """Mixed into the class of a module by `read_by`."""

    read_class: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _made_again, (self.read_class, tuple(self.forms)), self.__getstate__()

    def extra_repr(self) -> str:
        words = [
            f"{leaf}: {describe(form, double_pruned=self.part(leaf, 'column_mask') is not None)}"
            for leaf, form in self.forms.items()
        ]
        return "; ".join(filter(None, [self.read_class.extra_repr(self), *words]))


def read_by(module: nn.Module, leaf: str, form: Form, tensors: Mapping[str, Tensor | None]) -> None:
    """Lets ``module`` hold its parameter ``leaf`` in another form and read it dense; in place.

    Args:
        module: any module that reads ``self.<leaf>``.
        leaf: name of the parameter, which goes, or stays as the dense one beside a mask or a branch.
        form: any.
        tensors: what holds the weight, by name.
    """
    delattr(module, leaf)
    register(module, tensors)
    base: Any
    base, forms = (module.read_class, module.forms) if isinstance(module, Reading) else (type(module), {})
    vars(module)["forms"] = {**forms, leaf: form}
    module.__class__ = _reading(base, (*forms, leaf))


@functools.cache
def _reading(base: Any, leaves: tuple[str, ...]) -> Any:
    attributes = {leaf: property(functools.partial(_read, leaf=leaf)) for leaf in leaves}
    return type(base.__name__, (Reading, base), {**attributes, "read_class": base, "__module__": base.__module__})


def _read(module: Reading, leaf: str) -> Tensor:
    dense = module.dense(leaf)
    return dense if torch.compiler.is_compiling() else DenseView.of(dense, module.forms[leaf].name)


def _made_again(base: Any, leaves: tuple[str, ...]) -> Any:
    kind = _reading(base, leaves)
    return kind.__new__(kind)
