"""Static states of weights that a part of a model was compiled with, registered with the whole model.

Passes may run on one of Dynamo's graphs and not on a whole model: where Dynamo breaks it, or where it is called with a
cache of keys and values. The masks that they choose then must last as long as the weights which they were chosen from,
and be those of every other graph of the model. So each is a buffer of ``model._fxsparse`` (`graph.added_state`) under
the name that it has in the graph: the first graph that needs it computes it there, all others find it. What takes a
whole rewritten model (`fxsparse.save`) gets one that is traced with the arguments of a call, and has these states.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fxsparse.backend.compiled import Origin
from fxsparse.backend.whole_model import arguments_given, holds_cache, traced_and_rewritten
from fxsparse.conversion.folders import save_readably
from fxsparse.errors import RewriteError
from fxsparse.graph.added_state import NAME, AddedState, added_state_of, attach_state
from fxsparse.graph.dynamo import names_in
from fxsparse.graph.runtime_state import Entry, Slot, StaticStates
from fxsparse.graph.state import attribute
from fxsparse.graph.wrapped import unwrapped_module
from fxsparse.tracing.export import Inputs

if TYPE_CHECKING:
    from fxsparse.passes.pipeline import Pipeline


@dataclass(frozen=True)
class RegisteredStates:
    """States of one group of weights that are buffers of the model which the weights belong to.

    Attributes:
        states: computes those that are not registered yet.
        names: of the states in the graph.
        weights: names of the weights that the graph was compiled with.
        passes: the text of the passes.
        pipeline: the passes themselves.
    """

    states: StaticStates
    names: tuple[str, ...]
    weights: tuple[str, ...]
    passes: str
    pipeline: Pipeline = field(compare=False)

    def get(self, entry: Entry, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        held = entry.registered.get(self)
        if held is None or not held.is_current():
            held = self._register(entry, weights)
        return self.states.get(entry, weights) if held is None else held.tensors

    def _register(self, entry: Entry, weights: Sequence[Tensor]) -> _Held | None:
        """Finds the states with the model, or computes and registers them; None if the weights have no names."""
        model = unwrapped_module(Origin.of_current_call().module)  # a DistributedDataParallel shares its model's state
        names = self._names_in(model, weights)
        if model is None or names is None:
            return None
        state = added_state_of(model)
        if state is None or state.graph is None:
            state = attach_state(model)
            save_readably(model)
            state.check_passes(self.passes)
            note_example(state, self.pipeline)
            missing = [at for at, name in enumerate(names) if state.find(name) is None]
            computed = self.states.get(entry, weights) if missing else ()
            for at in missing:
                state.register(names[at], computed[at])
        state.check_passes(self.passes)
        absent = [name for name in names if state.find(name) is None]
        if absent:
            raise RewriteError(
                "the model was rewritten as a whole, and this call, of which the passes see a part, needs a state that "
                "it does not have; call it as it was called first (use_cache=False, no graph breaks)",
                site=absent[0],
            )
        held = entry.registered[self] = _Held.of(model, state, names)
        return held

    def _names_in(self, model: nn.Module | None, weights: Sequence[Tensor]) -> tuple[str, ...] | None:
        """The names of the states of these weights: another layer's, where one graph serves several."""
        known = names_in(model)
        if any(id(weight) not in known for weight in weights):
            return None
        now = dict(zip(self.weights, (known[id(weight)] for weight in weights), strict=True))
        return tuple(_renamed(name, now) for name in self.names)


def note_example(state: AddedState, pipeline: Pipeline) -> None:
    """Keeps the arguments of the call that is running, with which the model can be traced as a whole."""
    example = arguments_given() if state.whole is None else None
    if example is not None and not holds_cache(example):
        example = pytree.tree_map_only(Tensor, Tensor.detach, example)
        state.whole = functools.partial(_whole, pipeline, example)


def _whole(pipeline: Pipeline, example: Inputs, model: nn.Module) -> GraphModule:
    """The graph of ``model`` after the passes, with the states that its parts have now."""
    graph = traced_and_rewritten(model, pipeline, *example)
    state = added_state_of(model)
    for name, buffer in state.named_buffers() if state is not None else ():
        attribute(graph, name).copy_(buffer)
    return graph


def _renamed(name: str, weights: dict[str, str]) -> str:
    old = max((weight for weight in weights if name.startswith(weight)), key=len, default=None)
    return name if old is None else weights[old] + name.removeprefix(old)


@dataclass(frozen=True)
class _Held:
    """Registered states, and the places where they are registered, which every call looks at."""

    model: weakref.ref[nn.Module]
    state: weakref.ref[AddedState]
    places: tuple[tuple[dict[str, Tensor | None], str], ...]
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, model: nn.Module, state: AddedState, names: Sequence[str]) -> _Held:
        owners = [(state.get_submodule(path)._buffers, leaf) for path, _, leaf in (n.rpartition(".") for n in names)]
        tensors = [owner[leaf] for owner, leaf in owners]
        return cls(weakref.ref(model), weakref.ref(state), tuple(owners), tuple(tensors))  # type: ignore[arg-type]

    def is_current(self) -> bool:
        """Whether the model has not been moved, loaded into, or rid of what was added to it."""
        model, state = self.model(), self.state()
        if model is None or state is None or model._modules.get(NAME) is not state:
            return False
        return all(owner.get(leaf) is tensor for (owner, leaf), tensor in zip(self.places, self.tensors, strict=True))


def registered(slot: Slot, names: Mapping[int, str], pipeline: Pipeline) -> Slot:
    """``slot`` with its states registered with the model, where they are static ones of weights.

    Args:
        slot: extra inputs of a graph on which passes ran.
        names: of the parameters and buffers among the graph's inputs, by position.
        pipeline: the passes.
    """
    if not isinstance(slot.states, StaticStates):
        return slot
    weights = tuple(names[position] for position in slot.positions)
    return replace(slot, states=RegisteredStates(slot.states, slot.names, weights, str(pipeline), pipeline))
