"""Capturing modules that draw random numbers in training alone, such as stochastic depth, in both modes at once.

    y = lerp(evaluated, trained, 1.0 * training)

Training and evaluation of such a module are different operators, which no flag of an operator switches. So it runs
twice in a capture, as it evaluates and as it trains, and the mode chooses: at a weight of 0 or 1 ``lerp`` is exactly
one of the two. In training the random numbers are those that the module draws itself; in evaluation they are drawn too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def may_run_twice(module: nn.Module) -> bool:
    """Whether nothing but its result tells that a module ran: it has neither weights nor statistics."""
    return not any(True for _ in (*module.parameters(), *module.buffers()))


@contextmanager
def in_both_modes(model: nn.Module, kinds: Collection[type[nn.Module]], unfit: set[type[nn.Module]]) -> Iterator[None]:
    """Lets the modules of some types compute what they do in training and in evaluation, and the mode choose.

    Args:
        model: holds the modules.
        kinds: the types.
        unfit: takes the types whose results differ in more than values: such a module computes what its mode does.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if type(module) in kinds:
                stack.enter_context(mock.patch.object(module, "forward", _both(module, unfit)))
        yield


def _both(module: nn.Module, unfit: set[type[nn.Module]]) -> Callable[..., Any]:
    forward = module.forward

    @functools.wraps(forward)
    def both(*args: Any, **kwargs: Any) -> Any:
        evaluated, trained = (_in_mode(module, mode, forward, args, kwargs) for mode in (False, True))
        leaves, spec = pytree.tree_flatten(trained)
        others, other_spec = pytree.tree_flatten(evaluated)
        if spec != other_spec or not all(map(_alike, leaves, others)):
            unfit.add(type(module))
            return trained if module.training else evaluated
        weight = 1.0 if module.training else 0.0
        chosen = [
            leaf if leaf is other or not isinstance(leaf, Tensor) else torch.lerp(other, leaf, weight)
            for leaf, other in zip(leaves, others, strict=True)
        ]
        return pytree.tree_unflatten(chosen, spec)

    return both


def _in_mode(module: nn.Module, training: bool, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    flags = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in flags:
            part.training = training
        return forward(*args, **kwargs)
    finally:
        for part, before in flags:
            part.training = before


def _alike(one: Any, other: Any) -> bool:
    """Whether ``lerp`` can choose between two results, or there is nothing to choose."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other) and bool(one == other)
    return one is other or (one.is_floating_point() and one.shape == other.shape and one.dtype == other.dtype)
