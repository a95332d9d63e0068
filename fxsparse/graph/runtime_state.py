"""State that belongs to weights and reaches compiled graphs as further inputs at run time: masks, compressed copies.

Parameters are plain inputs of a compiled graph. After a graph break one compiled graph serves several identical
layers, so a mask baked in at compile time would silently be that of the wrong layer. A compiled graph therefore asks,
on every call, for the state of the weights it was actually given; the state is found by the weight's identity and
goes when the weight goes.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_lock = threading.RLock()
_table: dict[tuple[int, ...], _Entry] = {}


@dataclass(frozen=True)
class State:
    """A tensor that follows from weights, computed once for every weight and kept: a static mask.

    Attributes:
        rule: computes it from the sources.
        sources: what the rule is given, in order: the place of a weight among the weights, or a state of its own.
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
    """States of one group of weights, in the order a graph takes them."""

    states: tuple[State, ...]

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.states)

    def __hash__(self) -> int:  # asked on every call of a compiled graph
        return self._hash

    def get(self, entry: _Entry, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        found = entry.groups.get(self)
        if found is None or found[0].device != weights[0].device:
            found = self._compute(entry, weights)
        return found

    def _compute(self, entry: _Entry, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with _lock, torch.no_grad():
            plain = [weight.detach() for weight in weights]
            for state in self.states:
                state.compute(plain, entry.known)
            device = weights[0].device  # a model that moved takes its masks along
            entry.known = {state: tensor.to(device) for state, tensor in entry.known.items()}
            entry.groups[self] = tuple(entry.known[state] for state in self.states)
            return entry.groups[self]


@dataclass(frozen=True)
class FollowedStates:
    """States of frozen tensors that follow their contents: recomputed when one was written to.

    Attributes:
        rule: gives the states of the tensors, or None where their contents no longer allow them.

    Writes through ``.data`` or an alias outside torch leave no trace: :func:`invalidate`.
    """

    rule: Callable[..., tuple[Tensor, ...] | None]

    def get(self, entry: _Entry, weights: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        if any(weight.is_inference() for weight in weights):  # such a tensor has no version to follow
            return None
        stamp = tuple((weight._version, weight.data_ptr(), weight.device) for weight in weights)
        found = entry.followed.get(self)
        if found is None or found[0] != stamp:
            with _lock, torch.no_grad():
                found = entry.followed[self] = (stamp, self.rule(*(weight.detach() for weight in weights)))
        return found[1]


class _Entry:
    """What is known about one group of weights."""

    __slots__ = ("followed", "groups", "known", "references")

    def __init__(self, weights: Sequence[Tensor], key: tuple[int, ...]):
        def forget(_: Any, table: dict[tuple[int, ...], _Entry] = _table) -> None:
            if table.get(key) is self:
                del table[key]

        self.references = tuple(weakref.ref(weight, forget) for weight in weights)
        self.known: dict[State, Tensor] = {}
        self.groups: dict[StaticStates, tuple[Tensor, ...]] = {}
        self.followed: dict[FollowedStates, tuple[Any, tuple[Tensor, ...] | None]] = {}

    def is_of(self, weights: Sequence[Tensor]) -> bool:
        return all(reference() is weight for reference, weight in zip(self.references, weights, strict=True))


def _entry_of(weights: Sequence[Tensor]) -> _Entry:
    key = tuple(map(id, weights))
    entry = _table.get(key)
    if entry is None or not entry.is_of(weights):
        with _lock:
            entry = _table[key] = _Entry(weights, key)
    return entry


@dataclass(frozen=True)
class Constants:
    """Tensors that follow from no weight: every call gets the same."""

    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class Slot:
    """Further inputs of a compiled graph: states of the weights at some of its positions.

    Attributes:
        positions: where the weights are among the graph's own inputs.
        states: what is asked for them.
        names: of the inputs, in the order of the states.
    """

    positions: tuple[int, ...]
    states: StaticStates | FollowedStates | Constants
    names: tuple[str, ...]

    def get(self, args: Sequence[Any]) -> tuple[Tensor, ...] | None:
        """The tensors for a call with ``args``, or None where the weights no longer allow them."""
        if isinstance(self.states, Constants):
            return self.states.tensors
        weights = [args[position] for position in self.positions]
        return self.states.get(_entry_of(weights), weights)


def invalidate(model: torch.nn.Module) -> None:
    """Forgets compressed and expanded copies of a model's weights: call it after writes behind autograd's back.

    In-place operations, ``load_state_dict`` and replaced parameters are noticed without it; writes through ``.data``,
    NumPy or DLPack are not.
    """
    weights = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    with _lock:
        for key, entry in list(_table.items()):
            if weights & set(key):
                entry.followed.clear()
