"""Launches of an operator, replayed: all that Python finds out on a first call is kept but for the tensors' addresses.

    y = replay(x, values, indices, bias)

A launch through Python chooses a tile, builds a spec and asks Triton which of its compiled kernels fits the arguments;
on the host that takes longer than a small product on the device. It depends only on sizes, strides, dtypes and whether
addresses are multiples of 16. So a first call for each of those runs as ever and notes what it launched; where each
argument lies inside a tensor of the call or inside its result, later calls hand the same numbers and the new addresses
to the compiled kernel; descriptors for TMA are made for them, and memory for a depth in parts is asked for again. Calls
that launch on a copy of their own, or in float32, whose precision is a setting, run as ever. Compiled graphs call
operators so (`fxsparse.backend.replays`).
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxsparse.codegen import autotune, fused_ops
from fxsparse.codegen.loaded import Kernel, Launched, launched
from fxsparse.codegen.operators import KERNELS
from fxsparse.codegen.split import workspace, workspaces
from fxsparse.ops.operator import OPERATORS

Template = tuple[Any, ...]
"""An operator's arguments, with ``("tensor", i)`` or ``("tensors", i, j)`` where those of a call belong."""

_ALIGNMENT = 16


@functools.cache
def bind(name: str, template: Template, varying: tuple[int, ...]) -> Replay:
    """The operator ``fxsparse::name`` as a function of its tensors alone.

    Args:
        name: of the operator.
        template: its arguments.
        varying: the tensors whose sizes or strides may be others in another call.
    """
    operator = OPERATORS.get(name)
    compute = KERNELS[operator] if operator is not None else getattr(fused_ops, name)._init_fn
    return Replay(compute, template, varying)


@dataclass(frozen=True)
class _Launch:
    """A launch.

    Attributes:
        kernel: that is launched.
        run: launches it.
        arguments: all of them.
        addresses: of those that are, or describe, memory: the place, the tensor and the distance from its first byte.
            Tensors are those of the call, the result, and workspaces.
        descriptors: places of those that describe it.
    """

    kernel: Kernel
    run: Callable[..., object]
    arguments: tuple[Any, ...]
    addresses: tuple[tuple[int, int, int], ...]
    descriptors: tuple[int, ...]


class _At:
    """An address where Triton expects a tensor."""

    def __init__(self, address: int):
        self.address = address

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True)
class _Recording:
    """What a call launched, how its result is made, and what it asked workspaces for."""

    launches: tuple[_Launch, ...]
    result: Callable[[], Tensor]
    workspaces: tuple[tuple[Any, ...], ...]


class Replay:
    """An operator of ``compute`` with all arguments bound but the tensors."""

    def __init__(self, compute: Callable[..., Tensor], template: Template, varying: tuple[int, ...]):
        self.compute, self.template, self.varying = compute, template, varying
        self.known: dict[Any, _Recording | None] = {}

    def __call__(self, *tensors: Tensor) -> Tensor:
        key: list[Any] = [autotune.changes()]
        for place in self.varying:
            tensor = tensors[place]
            key += tensor.shape, tensor.stride()
        bits, addresses = 0, []
        for tensor in tensors:
            address = tensor.data_ptr()
            addresses.append(address)
            bits |= address
        if bits % _ALIGNMENT:
            key += [address % _ALIGNMENT for address in addresses]
        recording = self.known.get(tuple(key), self)
        if recording is None:
            return self.compute(*self._arguments(tensors))
        if not isinstance(recording, _Recording):
            with launched() as seen, workspaces() as asked:
                made = self.compute(*self._arguments(tensors))
            self.known[tuple(key)] = _recording(seen, asked, tensors, made)
            return made
        result = recording.result()
        addresses.append(result.data_ptr())
        scratch = [tensor for wanted in recording.workspaces for tensor in workspace(*wanted)]
        addresses += [tensor.data_ptr() for tensor in scratch]
        for launch in recording.launches:
            arguments = list(launch.arguments)
            for place, source, offset in launch.addresses:
                arguments[place] = addresses[source] + offset
            for place in launch.descriptors:
                described = copy.copy(launch.arguments[place])
                described.base = _At(arguments[place])
                arguments[place] = described
            launch.kernel.count()
            launch.run(*arguments)
        return result

    def _arguments(self, tensors: Sequence[Tensor]) -> list[Any]:
        def of(part: Any) -> Any:
            kind, *places = part if isinstance(part, tuple) else (None,)
            if kind == "tensor":
                return tensors[places[0]]
            return list(tensors[slice(*places)]) if kind == "tensors" else part

        return [of(part) for part in self.template]


def _recording(
    seen: Sequence[Launched], asked: Sequence[Any], tensors: Sequence[Tensor], result: Tensor
) -> _Recording | None:
    """What can be replayed; None where something cannot."""
    scratch = [tensor for both, _ in asked for tensor in both]
    spans = [_span(tensor) for tensor in (*tensors, result, *scratch)]
    if not seen or not result.is_contiguous() or _overlap(spans):
        return None
    if any(tensor.dtype == torch.float32 for tensor in (*tensors, result)):
        return None
    launches = [_launch(each, spans) for each in seen]
    if any(launch is None for launch in launches):
        return None
    guards: Any = torch._C._dynamo.guards
    make = guards._empty_strided_cuda if result.is_cuda else guards._empty_strided_cpu
    every = tuple(launch for launch in launches if launch is not None)
    make_result = functools.partial(make, tuple(result.shape), result.stride(), result.dtype)
    return _Recording(every, make_result, tuple(wanted for _, wanted in asked))


def _launch(seen: Launched, spans: Sequence[tuple[int, int]]) -> _Launch | None:
    if not hasattr(seen.compiled, "__getitem__"):
        return None
    arguments, addresses, descriptors = list(seen.arguments), [], []
    for place, argument in enumerate(arguments):
        tensor = argument if isinstance(argument, Tensor) else getattr(argument, "base", None)
        if isinstance(tensor, Tensor):
            start, end = _span(tensor)
            owners = [number for number, (first, last) in enumerate(spans) if first <= start and end <= last]
            if len(owners) != 1:
                return None
            addresses.append((place, owners[0], start - spans[owners[0]][0]))
            descriptors += [] if tensor is argument else [place]
        elif not isinstance(argument, (int, float)):
            return None
    arguments = [None if isinstance(argument, Tensor) else argument for argument in arguments]
    for place in descriptors:  # which keeps no tensor alive
        arguments[place] = copy.copy(arguments[place])
        arguments[place].base = None
    run = seen.compiled[(*seen.grid, 1, 1)[:3]]
    return _Launch(seen.kernel, run, tuple(arguments), tuple(addresses), tuple(descriptors))


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor and the one after its last."""
    steps = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start, reach = tensor.data_ptr(), sum(steps) + 1 if tensor.numel() else 0
    return start, start + reach * tensor.element_size()


def _overlap(spans: Sequence[tuple[int, int]]) -> bool:
    """Whether two tensors share memory, so that it is not clear which of them a launch was given."""
    ordered = sorted(span for span in spans if span[0] < span[1])
    return any(second[0] < first[1] for first, second in itertools.pairwise(ordered))
