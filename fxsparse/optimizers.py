"""What becomes of an optimizer when a rewrite takes parameters away."""

from __future__ import annotations

import torch
from torch import nn


def forget_dropped(optimizer: torch.optim.Optimizer, before: nn.Module, after: nn.Module) -> int:
    """Removes from ``optimizer`` the parameters that ``before`` has and ``after`` has no more, with their state.

    Parameters that both have keep their moments and step counts, so a training goes on with the state it gathered;
    parameters of neither are left alone. Groups stay, also empty ones, because learning-rate schedulers count them.
    Parameters that only ``after`` has are added by ``optimizer.add_param_group``.

    Args:
        optimizer: any torch optimizer.
        before: the graph module or model it was built from.
        after: what a rewrite made of it.

    Returns:
        how many parameters left the optimizer.
    """
    kept = {id(parameter) for parameter in after.parameters()}
    dropped = {id(parameter) for parameter in before.parameters()} - kept
    removed = 0
    for group in optimizer.param_groups:
        removed += sum(id(parameter) in dropped for parameter in group["params"])
        group["params"][:] = [parameter for parameter in group["params"] if id(parameter) not in dropped]
    for parameter in [parameter for parameter in optimizer.state if id(parameter) in dropped]:
        del optimizer.state[parameter]
    return removed
