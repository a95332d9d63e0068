"""State of a graph that training changes, such as whether branches take part, as part of the module's ``state_dict``.

A pass whose graph changes while it trains registers a vector of flags, a persistent buffer of the root, and a function
that brings the graph into the state that the flags say. Whoever writes the buffer changes the graph, be it
``load_state_dict`` or a copy in place (averaged models, distributed checkpoints): `follow` looks at its version.

    Schedule:  edits the graph, `note` writes the flags
    loading:   writes the flags, `follow` edits the graph    on load, before the next call, and before the graph is read
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.graph.state import meta_of

STATES = "fxsparse_graph_states"
_SEEN = "_fxsparse_seen"
Earlier = Callable[[Mapping[str, Tensor]], Collection[str] | None]


@dataclass(frozen=True)
class GraphState:
    """A vector of flags and what they mean.

    Attributes:
        names: of the flags, in the order of the buffer.
        on: the names of the flags with which the graph agrees now.
        enter: edits the graph so that it agrees with the names of the flags that are set.
        earlier: reads the names of the set flags from a state dict of an earlier version, which holds no flags; None if
            that does not tell.
    """

    names: tuple[str, ...]
    on: frozenset[str]
    enter: Callable[[Any, frozenset[str]], None]
    earlier: Earlier | None = None


class _Seen(dict[str, tuple[Tensor, int]]):
    """The buffers that were read and their versions; a copy of the module has read none of its own."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Seen:
        return _Seen()

    def __reduce__(self) -> Any:
        return _Seen, ()


def register_state(
    gm: nn.Module,
    buffer: str,
    names: Iterable[str],
    on: Iterable[str],
    enter: Callable[[Any, frozenset[str]], None],
    earlier: Earlier | None = None,
) -> None:
    """Registers the flags called ``names`` as ``buffer``, those in ``on`` set, in the place of an earlier one."""
    state = GraphState(tuple(names), frozenset(on), enter, earlier)
    device = next((parameter.device for parameter in gm.parameters()), None)
    flags = torch.tensor([name in state.on for name in state.names], dtype=torch.bool, device=device)
    gm.register_buffer(buffer, flags)
    meta_of(gm)[STATES] = {**meta_of(gm).get(STATES, {}), buffer: state}


def end_state(gm: nn.Module, buffer: str) -> None:
    """Takes flags away whose pass has no part in the graph any more; nothing if there are none."""
    states = meta_of(gm).get(STATES, {})
    if buffer in states:
        meta_of(gm)[STATES] = {name: state for name, state in states.items() if name != buffer}
        delattr(gm, buffer)


def state_buffers(gm: nn.Module) -> frozenset[str]:
    """The names of the buffers that hold flags."""
    return frozenset(meta_of(gm).get(STATES, ()))


def note(gm: nn.Module, buffer: str, on: Collection[str]) -> None:
    """Writes the flags after the graph was changed; nothing if the graph has no such flags."""
    state = meta_of(gm).get(STATES, {}).get(buffer)
    if state is not None:
        flags = gm.get_buffer(buffer)
        with torch.no_grad():
            flags.copy_(torch.tensor([name in on for name in state.names]))
        meta_of(gm)[STATES] = {**meta_of(gm)[STATES], buffer: replace(state, on=frozenset(on) & frozenset(state.names))}


def with_vectors(gm: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict, those that version 0.1.0 held as scalars as vectors of one."""
    ones = {name for name, parameter in gm.named_parameters() if parameter.shape == (1,)}
    return {name: tensor.view(1) if name in ones and not tensor.dim() else tensor for name, tensor in tensors.items()}


def infer(gm: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Writes the flags that a state dict of an earlier version lacks, as far as it tells them."""
    for buffer, state in meta_of(gm).get(STATES, {}).items():
        on = state.earlier(state_dict) if state.earlier is not None and buffer not in state_dict else None
        if on is not None:
            with torch.no_grad():
                gm.get_buffer(buffer).copy_(torch.tensor([name in on for name in state.names]))


@torch._dynamo.disable
def follow(gm: nn.Module) -> None:
    """Brings the graph into the state that its flags say, if one of their buffers was written since the last call."""
    seen = vars(gm).setdefault(_SEEN, _Seen())
    for buffer, state in meta_of(gm).get(STATES, {}).items():
        flags = gm._buffers[buffer]
        if type(flags) is not Tensor or flags.is_meta or flags.is_inference():
            continue  # a stand-in during capture holds no values
        last = seen.get(buffer)
        if last is not None and last[0] is flags and last[1] == flags._version:
            continue
        seen[buffer] = flags, flags._version
        on = frozenset(name for name, is_set in zip(state.names, flags.tolist(), strict=True) if is_set)
        if on != state.on:
            meta_of(gm)[STATES] = {**meta_of(gm)[STATES], buffer: replace(state, on=on)}
            state.enter(gm, on)
