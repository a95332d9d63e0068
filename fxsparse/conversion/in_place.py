"""A rewritten graph's form of weights, put into the model that was traced, and taken out of it again.

`to_module` leaves the model alone and returns another. Here the model itself takes the modules that hold weights in
another form, so that its dense weights are freed and whoever has a reference to it goes on with it:

    compress_in_place    Linear(weight)  ->  CompressedLinear(weight_values, weight_indices), and the graph's notes
    restore_in_place     CompressedLinear  ->  Linear(weight), zero where pruned, with its branch added

Everything that can be refused is refused before the model is touched. The model notes what it was in an `InPlace`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils.weak import WeakIdKeyDictionary

from fxsparse import graph as fx
from fxsparse.conversion.convert import acting_passes, to_module
from fxsparse.conversion.notes import note, remove_notes
from fxsparse.conversion.weights import hold, weights_of
from fxsparse.errors import RewriteError
from fxsparse.graph.added_state import read_of_model, set_aside
from fxsparse.graph.record import record_of
from fxsparse.modules.sites import module_sites
from fxsparse.modules.spec import take_out

IN_PLACE = "fxsparse_in_place"
"""In the model's meta: its `InPlace`."""

INSTEAD = (
    'weights="compressed" puts weights in another form into the model itself, and can change nothing else; call '
    "sparse = fxsparse.rewrite(model, passes, kwargs=batch), then module = fxsparse.to_module(sparse, model) where its "
    "passes allow that, and compile the result"
)


class Replaced(WeakIdKeyDictionary):
    """Dense parameters that something else may still hold, an optimizer, and the names of their weights.

    A copy of the model has replaced none.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Replaced:
        return Replaced()

    def __reduce__(self) -> Any:
        return Replaced, ()


@dataclass(frozen=True)
class InPlace:
    """What a model was before its weights took another form.

    Attributes:
        passes: the text of the passes.
        asked: ``requires_grad`` of its parameters, by name.
        replaced: the dense parameters that are no longer its own.
    """

    passes: str
    asked: dict[str, bool]
    replaced: Replaced


def in_place(model: Any) -> InPlace | None:
    """What ``model``, or the module form in what wraps it, was before; None if `compress_in_place` made none of it."""
    form = fx.module_form_of(model)
    return None if form is None else fx.meta_of(form).get(IN_PLACE)


def compress_in_place(gm: GraphModule, model: nn.Module, passes: str) -> None:
    """Gives ``model`` the weights of ``gm`` in the form that ``gm`` holds them in.

    Args:
        gm: the rewritten graph of ``model``, whose other parameters and buffers the two share.
        model: the model that was traced; it is changed.
        passes: the text of the passes.

    Raises:
        RewriteError: no module can hold what a pass did, or it did more than that. The model is as it was.
    """
    with set_aside(model):
        _check(gm, model)
        dense = dict(model.named_parameters(remove_duplicate=False))
        asked = {name: parameter.requires_grad for name, parameter in dense.items()}
        read_of_model(gm, model)
        for weight in weights_of(gm):
            hold(model, gm, weight, {})
        note(model, gm, None, {})
    replaced = Replaced()
    for site in module_sites(model):
        if site.compressed:
            replaced[dense[site.name]] = site.name
    fx.meta_of(model)[IN_PLACE] = InPlace(passes, asked, replaced)


def restore_in_place(model: nn.Module) -> None:
    """Makes the weights of ``model`` dense again, as they were trained, and takes out what passes added.

    Args:
        model: one that `compress_in_place` changed, or a copy of it.
    """
    asked = fx.meta_of(model)[IN_PLACE].asked
    with torch.no_grad(), torch.inference_mode(False):
        dense = list(_dense_again(model, asked))
    take_out(model)
    for module, leaf, parameter in dense:
        module._parameters[leaf] = parameter  # in its place: an optimizer's state goes by their order
    remove_notes(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(asked.get(name, parameter.requires_grad))


def _dense_again(model: nn.Module, asked: dict[str, bool]) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """The module, attribute and dense parameter of every weight in another form; tied ones are one parameter."""
    made: dict[int, nn.Parameter] = {}
    for site in module_sites(model):
        held = fx.attribute(model, site.parameter_name)
        if id(held) not in made:
            weight = site.module.dense(site.leaf).contiguous()
            if site.compressed:
                made[id(held)] = nn.Parameter(weight, asked.get(site.name, held.requires_grad))
            else:  # a dense weight beside its branch stays the parameter that it is
                made[id(held)] = held.copy_(weight)
        yield site.module, site.leaf, made[id(held)]


# --- what is refused --------------------------------------------------------------------------------------------------


def _check(gm: GraphModule, model: nn.Module) -> None:
    weights = weights_of(gm)
    if any("." not in name for weight in weights for name in weight.names):
        raise RewriteError(f"the model itself is a linear, in whose place another would stand; {INSTEAD}")
    changed = _changed(gm, model, {name for weight in weights for name in weight.names})
    if changed is not None:
        raise RewriteError(f"it changes {changed} of the model; {INSTEAD}", pass_name=_who_changed(gm))
    try:
        # A trial on a copy without values of its own, which is compared with the graph.
        module: Any = to_module(gm, model)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
        for item in acting_passes(gm):
            if item.needs_schedule:  # what a schedule of modules refuses is refused now
                list(item.schedule(module, optimizer, 1000))
    except RewriteError as error:
        told = RewriteError(f"{error}; {INSTEAD}")
        told.pass_name, told.site = error.pass_name, error.site
        raise told from error


def _changed(gm: GraphModule, model: nn.Module, in_other_form: set[str]) -> str | None:
    """The first tensor of the model's state that the graph does not read as it is, in the same memory."""
    tensors = fx.tensors_of(gm)
    names: dict[int, list[str]] = {}
    for name, tensor in fx.tensors_of(model).items():
        names.setdefault(id(tensor), []).append(name)
    for name, tensor in model.state_dict(keep_vars=True).items():
        twins = [tensors[alias] for alias in names.get(id(tensor), ()) if alias in tensors]
        alike = any(twin.shape == tensor.shape and twin.data_ptr() == tensor.data_ptr() for twin in twins)
        if name not in in_other_form and id(tensor) in names and not alike:
            return name
    return None


def _who_changed(gm: GraphModule) -> str:
    """The last pass that changed the number of parameters at a site which is no weight in another form."""
    held = {fx.module_path(name) for weight in weights_of(gm) for name in weight.names}
    entries = record_of(gm).entries
    for entry in reversed(entries):  # sites of earlier passes may be gone
        elsewhere = any(change.site not in held for change in entry.rewritten)
        if entry.before.parameters != entry.after.parameters and elsewhere:
            return entry.name
    return entries[-1].name
