"""State of weights (masks, compressed copies) that compiled graphs take as extra inputs at run time.

    call(args) -> Slot.get(args) -> weights = args[positions] -> _table[ids of the weights] -> Entry -> extra inputs

Parameters are plain inputs of a compiled graph. After a graph break one compiled graph serves several identical layers,
so a mask fixed at compile time would silently belong to the wrong layer. Each call therefore looks up the state of the
weights that it is called with, by their identity. The state is dropped together with the weight.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

_lock = threading.RLock()
_table: dict[tuple[int, ...], Entry] = {}


@dataclass(frozen=True)
class State:
    """A tensor computed from weights once and then stored, such as a static mask.

    Attributes:
        rule: computes the tensor from the sources.
        sources: the arguments of the rule: a weight, as its place among the weights, or another state.
    """

    rule: Callable[..., Tensor]
    sources: tuple[int | State, ...]

    def compute(self, weights: Sequence[Tensor], known: dict[State, Tensor]) -> Tensor:
        if self not in known:
            values = [weights[item] if isinstance(item, int) else item.compute(weights, known) for item in self.sources]
            known[self] = self.rule(*values)
        return known[self]


@dataclass(frozen=True)
class StaticStates:
    """States of one group of weights, in the order of the graph's extra inputs."""

    states: tuple[State, ...]

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.states)

    def __hash__(self) -> int:  # needed on every call of a compiled graph, so it is cached
        return self._hash

    def get(self, entry: Entry, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        tensors = entry.groups.get(self)
        if tensors is None or tensors[0].device != weights[0].device:
            tensors = self._compute(entry, weights)
        return tensors

    def _compute(self, entry: Entry, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with _lock, torch.no_grad():
            plain = [weight.detach() for weight in weights]
            for state in self.states:
                state.compute(plain, entry.known)
            device = weights[0].device  # a model that moves to another device takes its masks along
            entry.known = {state: tensor.to(device) for state, tensor in entry.known.items()}
            entry.groups[self] = tuple(entry.known[state] for state in self.states)
            return entry.groups[self]


@dataclass(frozen=True)
class FollowedStates:
    """States of frozen tensors, recomputed after a write to one of the tensors.

    Attributes:
        rule: computes the states of the tensors; returns None if their new contents no longer fit, for example no
            longer satisfy an N:M pattern.

    Writes through ``.data`` or an alias outside torch cannot be detected; call :func:`invalidate` after them.
    """

    rule: Callable[..., tuple[Tensor, ...] | None]

    def get(self, entry: Entry, weights: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        if any(weight.is_inference() for weight in weights):  # an inference tensor has no version counter
            return None
        stamp = tuple((weight._version, weight.data_ptr(), weight.device) for weight in weights)
        stamped = entry.followed.get(self)
        if stamped is None or stamped[0] != stamp:
            with _lock, torch.no_grad():
                stamped = entry.followed[self] = (stamp, self.rule(*(weight.detach() for weight in weights)))
        return stamped[1]


class Entry:
    """The states computed so far for one group of weights.

    Attributes:
        references: to the weights.
        known: static states.
        groups: the same, by what asks for them together.
        followed: states that follow their weights, with the stamp of the weights.
        registered: where static states are registered with a model, by what asks for them.
    """

    __slots__ = ("followed", "groups", "known", "references", "registered")

    def __init__(self, weights: Sequence[Tensor], key: tuple[int, ...]):
        def forget(_: Any, table: dict[tuple[int, ...], Entry] = _table) -> None:
            if table.get(key) is self:
                del table[key]

        self.references = tuple(weakref.ref(weight, forget) for weight in weights)
        self.known: dict[State, Tensor] = {}
        self.groups: dict[StaticStates, tuple[Tensor, ...]] = {}
        self.followed: dict[FollowedStates, tuple[Any, tuple[Tensor, ...] | None]] = {}
        self.registered: dict[Any, Any] = {}

    def is_of(self, weights: Sequence[Tensor]) -> bool:
        return all(reference() is weight for reference, weight in zip(self.references, weights, strict=True))


def _entry_of(weights: Sequence[Tensor]) -> Entry:
    key = tuple(map(id, weights))
    entry = _table.get(key)
    if entry is None or not entry.is_of(weights):
        with _lock:
            entry = _table[key] = Entry(weights, key)
    return entry


@dataclass(frozen=True)
class Constants:
    """Tensors that depend on no weight, the same for every call."""

    tensors: tuple[Tensor, ...]


class States(Protocol):
    """Computes or finds the states of one group of weights."""

    def get(self, entry: Entry, weights: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """The states, or None if the contents of the weights no longer fit."""


@dataclass(frozen=True)
class Slot:
    """Extra inputs of a compiled graph that hold the states of one group of weights.

    Attributes:
        positions: the positions of the weights among Dynamo's inputs of the graph.
        states: computes the states of the weights.
        names: the names of the extra inputs, in the order of the states.
    """

    positions: tuple[int, ...]
    states: States | Constants
    names: tuple[str, ...]

    def get(self, args: Sequence[Any]) -> tuple[Tensor, ...] | None:
        """The extra inputs for a call with ``args``, or None if the contents of the weights no longer fit."""
        if isinstance(self.states, Constants):
            return self.states.tensors
        weights = [args[position] for position in self.positions]
        return self.states.get(_entry_of(weights), weights)


def invalidate(model: torch.nn.Module) -> None:
    """Drops the compressed and expanded copies of a model's weights; call it after writes that torch cannot see.

    Those are writes through ``.data``, NumPy or DLPack. In-place operations, ``load_state_dict`` and replaced
    parameters are noticed without it.
    """
    with _lock:
        for key in _keys_of(model):
            _table[key].followed.clear()


def forget_states(model: torch.nn.Module) -> None:
    """Drops all states of a model's weights, so that masks are chosen anew when a compiled graph next needs them."""
    with _lock:
        for key in _keys_of(model):
            del _table[key]


def _keys_of(model: torch.nn.Module) -> list[tuple[int, ...]]:
    weights = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    return [key for key in _table if weights & set(key)]
