"""An optimizer of a dense model goes on with the compressed values that took the places of its weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.conversion.in_place import in_place
from fxsparse.modules.sites import ModuleSite, module_sites
from fxsparse.ops.nm import gather_kept


def follow_weights(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Gives an optimizer the compressed values in the places of the dense weights that it holds, with their state.

    State of a weight's shape (momentum, both moments of Adam) is taken at the positions that are kept; a number (the
    step) stays. Any other state, as Adafactor keeps of rows and columns, cannot go on: that of the weight starts anew,
    with a warning. Nothing happens to an optimizer that holds none of these weights.

    Args:
        optimizer: built before the weights of the model took another form.
        model: after it; what wraps it is looked through.
    """
    noted = in_place(model)
    if noted is None:
        return
    sites = {site.name: site for site in module_sites(model)}
    lost: list[str] = []
    for group in optimizer.param_groups:
        for position, dense in enumerate(group["params"]):
            site = sites.get(noted.replaced.get(dense, ""))
            if site is None:
                continue
            values = site["values"]
            group["params"][position] = values
            state = optimizer.state.pop(dense, None)
            kept = None if state is None else _kept(state, dense, site)
            if kept is not None:
                optimizer.state[values] = kept
            elif state:
                lost.append(site.name)
    if lost:
        warnings.warn(
            f"the state that {type(optimizer).__name__} keeps of {lost[0]} ({len(lost)} in all) is not of the weight's "
            "shape and cannot follow it into compressed form: it starts anew",
            stacklevel=2,
        )


def _kept(state: Mapping[str, Any], dense: Tensor, site: ModuleSite) -> dict[str, Any] | None:
    """The state of a dense weight as that of its kept values; None if some of it cannot be."""
    kept: dict[str, Any] = {}
    for key, item in state.items():
        if isinstance(item, Tensor) and item.numel() != 1:
            if item.shape != dense.shape or not item.is_floating_point():
                return None
            rows = item.mT if site.form.transposed else item
            item = gather_kept(rows, site["indices"].to(item.device), site.pattern)
        elif isinstance(item, (list, tuple, Mapping)):
            return None
        kept[key] = item
    return kept
