"""Removes the parameters that a rewrite dropped from an optimizer, and knows optimizers that work on matrices."""

from __future__ import annotations

import re

import torch
from torch import nn


def forget_dropped(optimizer: torch.optim.Optimizer, before: nn.Module, after: nn.Module) -> int:
    """Removes from ``optimizer`` the parameters of ``before`` that ``after`` no longer has, and their state.

    Parameters of both keep their moments and step counts, so training continues with them; parameters of neither are
    left alone. Parameter groups stay even when they become empty, because learning-rate schedulers count them. New
    parameters of ``after`` are not added: pass them to ``optimizer.add_param_group``.

    Args:
        optimizer: any torch optimizer.
        before: the graph module or model from which the optimizer was built.
        after: the rewritten graph module.

    Returns:
        the number of parameters removed.
    """
    remaining = {id(parameter) for parameter in after.parameters()}
    dropped = {id(parameter) for parameter in before.parameters()} - remaining
    removed = 0
    for group in optimizer.param_groups:
        removed += sum(id(parameter) in dropped for parameter in group["params"])
        group["params"][:] = [parameter for parameter in group["params"] if id(parameter) not in dropped]
    for parameter in [parameter for parameter in optimizer.state if id(parameter) in dropped]:
        del optimizer.state[parameter]
    return removed


_ON_MATRICES = re.compile(r"muon|shampoo|soap|dion|kron|psgd|galore", re.IGNORECASE)


def works_on_matrices(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer's step of one element depends on its row and column, as Muon's and Shampoo's do.

    It is told by the names of its classes, because nothing else tells it.
    """
    return any(_ON_MATRICES.search(kind.__name__) for kind in type(optimizer).__mro__)
