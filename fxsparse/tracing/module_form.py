"""Carries on what is known of weights in another form when the modules that hold them are traced again.

A module that `fxsparse.to_module` made may be traced and rewritten further, perhaps inside adapters. Its graph then
calls the operators of its modules, and passes and checkpoints must know of them what they knew of the first graph:

    record    the passes that ran, and the form of each weight, under its name as it is now
    live      low-rank branches
    states    whether these have started
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.graph import live
from fxsparse.graph.graph_state import STATES, register_state
from fxsparse.graph.record import META_KEY, HeldWeight, Record, record_of
from fxsparse.modules.sites import STARTED, ModuleSite, module_sites
from fxsparse.version import __version__


def carry_on(model: nn.Module, gm: GraphModule, notes: tuple[str, ...]) -> None:
    """Gives the graph of ``model`` the record of the module form in it, if there is one."""
    form = fx.module_form_of(model)
    if form is None:
        return
    before, sites = record_of(form), list(module_sites(model))
    now = {site.form.name: site.name for site in sites}
    now |= {f"{old}_{part}": f"{new}_{part}" for old, new in list(now.items()) for part in ("down", "up")}
    weights = tuple(_held(gm, before, sites))
    gm.meta[META_KEY] = Record(before.entries, weights, (*before.notes, *notes), __version__)
    for site in fx.meta_of(form).get(live.KEY, ()):
        live.enter(gm, site.renamed(lambda name: now.get(name, name)))
    state = fx.meta_of(form).get(STATES, {}).get(STARTED)
    if state is not None:
        flags = next(name for name, _ in gm.named_buffers() if name.rpartition(".")[2] == STARTED)
        fx.delete(gm, flags)
        on = [now[name] for name in state.names if name in state.on]
        register_state(gm, STARTED, [now[name] for name in state.names], on, state.enter)


def _held(gm: GraphModule, before: Record, sites: list[ModuleSite]) -> Iterator[HeldWeight]:
    """The N:M weights that modules hold, under the name that the graph reads each by."""
    aliases, recorded = fx.parameter_names(gm), {weight.name: weight for weight in before.weights}
    done: set[str] = set()
    for site in sites:
        if not site.form.m:
            continue
        parameter = fx.attribute(gm, site.parameter_name)
        names = tuple(name.removesuffix("_values") for name in aliases[id(parameter)])
        if names[0] not in done:
            done.add(names[0])
            yield replace(recorded[site.form.name], name=names[0], names=names)
