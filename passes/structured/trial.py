"""Whether what gates may close can be taken out afterwards, found out before they are trained: on a copy of the graph,
one unit of every kind of sublayer is materialised, and one whole sublayer of every kind."""

from __future__ import annotations

import re

from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.errors import RewriteError
from fxsparse.graph import live
from fxsparse.graph.record import record_of
from fxsparse.graph.state import SharedByCopies
from fxsparse.passes.base import outcome
from fxsparse.passes.pipeline import structure_only
from fxsparse.passes.structured.hard_concrete import Gated, gate_names, mask_name
from fxsparse.passes.structured.materialize import Materialize, channels_at_a_time
from fxsparse.text import ranges

_KNOWN = "fxsparse_trials"


def check_removable(gm: GraphModule, pass_name: str, multiple: int = 1) -> None:
    """Refuses gates that ``materialize`` could not follow.

    Args:
        gm: the graph, with its gates.
        pass_name: of the pass that put them in, for the message.
        multiple: how many hidden dimensions and channels go at a time.

    Raises:
        RewriteError: what they close cannot be taken out.
    """
    if structure_only(gm):
        return
    known = gm.meta.setdefault(_KNOWN, SharedByCopies())
    key = (record_of(gm).text, multiple, tuple(live.sites(gm, Gated)))
    if key not in known:
        known[key] = _first_failure(gm, multiple)
    if known[key] is not None:
        unit, failure = known[key]
        raise RewriteError(
            f"materialize could not take out what these gates close ({failure}): leave {unit} out of units=[...], or "
            "this sublayer out by layers=[...]",
            pass_name=pass_name,
        )


def _first_failure(gm: GraphModule, multiple: int) -> tuple[str, str] | None:
    """The units that cannot go, and why."""
    layers = {site.path: (site.layer, 1) for site in live.sites(gm, Gated) if site.layer}
    for closed in (_units(gm, multiple), layers):
        one_of_each = {re.sub(r"\d+", "N", path): gate for path, gate in reversed(closed.items())}
        if one_of_each:
            counts = {name: len(gm.get_buffer(mask_name(name))) for name in gate_names(gm)}
            first = dict(one_of_each.values())
            kept = {name: ranges(range(first.get(name, 0), count)) for name, count in counts.items()}
            try:
                outcome(Materialize(kept), fx.copy_sharing_state(gm))
            except RewriteError as error:
                gate = closed.get(error.site or "", (".hidden_gate", 0))[0]
                return gate.rpartition(".")[2].removesuffix("_gate"), str(error)
    return None


def _units(gm: GraphModule, multiple: int) -> dict[str, tuple[str, int]]:
    """By path, a gate and the first of its units that stays: a group of heads, or so many dimensions, go."""
    closed: dict[str, tuple[str, int]] = {}
    for name in gate_names(gm):
        if name.endswith(".hidden_gate") and len(gm.get_buffer(mask_name(name))) > multiple:
            closed[name] = (name, multiple)
    for site in live.sites(gm, Gated):
        together = site.count // site.groups if 1 < site.groups < site.count else channels_at_a_time(gm, site)
        if site.units and site.count > together:
            closed[site.path] = (site.units, together)
    return closed
