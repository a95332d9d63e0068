"""The modules of a tree that hold weights in another form, as plain data, and putting such modules in again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse import typed
from fxsparse.graph.state import put_first
from fxsparse.modules.held import PARTS, Form, Held
from fxsparse.modules.linears import LINEARS, Product
from fxsparse.modules.reading import read_by

Specs = dict[str, dict[str, Any]]
"""By path: the ``forms`` by weight, which weights have a ``column_mask``, and the path that each is ``tied`` to."""


@dataclass(frozen=True)
class Spec:
    """The types of a module's plain data."""

    forms: dict[str, Form]
    column_mask: list[str]
    tied: dict[str, str]


def specs_of(model: nn.Module) -> Specs:
    """The modules of ``model`` that hold weights in another form, as plain data."""
    specs: Specs = {}
    first: dict[int, str] = {}
    for path, module in model.named_modules():
        if not isinstance(module, Held):
            continue
        tied = {}
        for leaf in module.forms:
            parameter = module.part(leaf, "values")
            parameter = module._parameters.get(leaf) if parameter is None else parameter
            earlier = first.setdefault(id(parameter), path)
            if earlier != path:
                tied[leaf] = earlier
        specs[path] = {
            "forms": {leaf: form.as_data() for leaf, form in module.forms.items()},
            "column_mask": [leaf for leaf in module.forms if module.part(leaf, "column_mask") is not None],
            "tied": tied,
        }
    return specs


def dense_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes that the state dict of ``model`` has where every weight is dense and without a branch."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Held):
            for leaf, form in module.forms.items():
                name = f"{path}.{leaf}".lstrip(".")
                for part in PARTS:
                    shapes.pop(f"{name}_{part}", None)
                shapes[name] = form.dense_shape
    return shapes


def put_in(model: nn.Module, specs: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Puts the modules of `specs_of` into a tree with dense weights; their values are undefined until they are loaded.

    Returns:
        the root, which is another module if it is a linear itself.
    """
    for path, spec in specs.items():
        for leaf, data in spec["forms"].items():
            form, owner = typed.read(Form, data, f"{path}.{leaf}"), model.get_submodule(path)
            held = _empty(form, leaf, owner, leaf in spec["column_mask"])
            if leaf in spec["tied"]:
                other: Any = model.get_submodule(spec["tied"][leaf])
                held = {name: other._parameters.get(name, other._buffers.get(name)) for name in held}
            model = place(model, owner, leaf, form, held)
    return model


def _empty(form: Form, leaf: str, owner: nn.Module, double_pruned: bool) -> dict[str, Tensor | None]:
    weight = owner._parameters[leaf]
    assert weight is not None
    shapes = list(form.shapes(leaf))
    if double_pruned:
        shapes.append((f"{leaf}_column_mask", *form.column_mask()))
    return {
        name: nn.Parameter(weight.new_empty(shape), weight.requires_grad)
        if dtype is None
        else torch.empty(shape, dtype=dtype, device=weight.device)
        for name, shape, dtype in shapes
    }


def place(model: nn.Module, owner: nn.Module, leaf: str, form: Form, held: Mapping[str, Tensor | None]) -> nn.Module:
    """Lets ``owner``, a part of ``model``, hold a weight in another form; returns the root."""
    kind = linear_kind(owner, leaf, form)
    if kind is None:
        read_by(owner, leaf, form, held)
        return model
    product = kind(form, {"bias": owner._parameters.get("bias"), **held})
    # Hooks, the mode and whatever a library noted on the module go with its place.
    own = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "forms"}
    vars(product).update({name: item for name, item in vars(owner).items() if name not in own})
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is owner:
                parent._modules[key] = product
    return product if owner is model else model


def take_out(model: nn.Module) -> None:
    """Makes plain modules of those that hold weights in another form; in place, their weights are without values."""
    for module in [module for module in model.modules() if isinstance(module, Held)]:
        forms = vars(module).pop("forms")
        for leaf, form in reversed(forms.items()):
            for part in PARTS:
                module._parameters.pop(f"{leaf}_{part}", None)
                module._buffers.pop(f"{leaf}_{part}", None)
            weight = nn.Parameter(torch.empty(form.dense_shape, device="meta"))
            module._parameters[leaf] = module._parameters.get(leaf, weight)
            put_first(module, leaf)
        kinds: Any = type(module).__mro__
        module.__class__ = next(kind for kind in kinds if not issubclass(kind, Held) and kind not in Held.__mro__)


def linear_kind(owner: nn.Module, leaf: str, form: Form) -> type[Product] | None:
    """The class that takes the place of ``owner``; None if it is no plain linear."""
    if leaf != "weight" or "forward" in vars(owner):
        return None
    if isinstance(owner, nn.Linear) and type(owner).forward is nn.Linear.forward:
        return LINEARS[form.storage]
    if type(owner).__name__ == "Conv1D" and form.transposed:
        from fxsparse.modules.conv1d import CONV1D, Conv1D

        return CONV1D[form.storage] if type(owner).forward is Conv1D.forward else None
    return None
