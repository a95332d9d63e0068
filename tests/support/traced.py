"""Families traced once for all tests: capturing costs more than most of what is tested on the result."""

from __future__ import annotations

import copy
import functools

from torch.fx import GraphModule

import fxsparse
from tests.support.families import FAMILIES, Family


@functools.cache
def _traced(name: str) -> tuple[Family, GraphModule]:
    family = FAMILIES[name]()
    return family, fxsparse.trace(family.model, kwargs=family.make_batch(batch=4))


def traced(name: str) -> tuple[Family, GraphModule]:
    """A family of its own and its traced graph module, which share their parameters as after ``fxsparse.trace``."""
    family, gm = _traced(name)
    model, gm = copy.deepcopy((family.model, gm))
    return Family(model, family.make_batch, family.causal), gm
