"""One thread at a time: capturing, rewriting and compiling a model change state of torch that all threads share.

The lock is the one that Dynamo holds while it compiles, because the backend runs passes inside of that: with a lock of
our own, a thread that compiles and one that captures could wait for each other for ever.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch import nn
from torch._dynamo.convert_frame import compile_lock

P = ParamSpec("P")
R = TypeVar("R")


def exclusive(function: Callable[P, R]) -> Callable[P, R]:
    """A function that waits while another thread captures, rewrites or compiles."""

    @functools.wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        with compile_lock:
            return function(*args, **kwargs)

    return alone


@contextlib.contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """Leaves the global random state, of the CPU and of the devices of ``model``, as it was before."""
    tensors = (*model.parameters(), *model.buffers())
    with torch.random.fork_rng(sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})):
        yield
