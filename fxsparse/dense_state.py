"""The way back to the original model: `dense_state_dict` gives a rewritten model's weights in the original's form.

| a weight ``w`` in the graph | in the graph's state                              | in `dense_state_dict`              |
|-----------------------------|---------------------------------------------------|------------------------------------|
| compressed N:M              | ``w_values``, ``w_indices``                       | ``w``, zero at pruned positions    |
| masked N:M                  | ``w``, ``w_mask``                                 | ``w`` times its mask               |
| double-pruned               | and ``w_column_mask``                             | the same                           |
| with a low-rank branch      | and ``w_down``, ``w_up``                          | the branch is added to ``w``       |

What no weight of the original can hold is refused: gates and masked dimensions, and a branch on a weight that something
else reads without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.errors import CheckpointError
from fxsparse.graph import live
from fxsparse.graph.graph_state import state_buffers
from fxsparse.graph.record import NAMES_KEY, TRACE_KEY, HeldWeight, record_of
from fxsparse.modules.held import PARTS
from fxsparse.modules.sites import module_sites
from fxsparse.ops.nm import Pattern, unpack
from fxsparse.passes.distill.distill import PATH as DISTILLATION
from fxsparse.passes.drop_layers import DropLayers
from fxsparse.passes.mux.multiplex import PATH as MULTIPLEXER
from fxsparse.passes.nm.low_rank import merged
from fxsparse.passes.structured.hard_concrete import Gated

_ADDED = (f"{MULTIPLEXER}.", f"{DISTILLATION}.")
"""Where passes put modules of their own, which the original lives without."""


@torch.no_grad()
def dense_state_dict(gm: nn.Module) -> dict[str, Tensor]:
    """A state dict with the keys of the original model and dense values; pruned positions are zero.

    It loads into the original model with ``load_state_dict``. Low-rank branches that the graph reads are added to
    their weight, which is then no longer sparse, so that the original model computes the same as the graph. What
    multiplexing and distillation added is left out; a multiplexed network's weights alone compute something else.
    Layers that were dropped have no keys, and materialised structures have their smaller sizes.

    Args:
        gm: a traced or rewritten graph module, or the module that `fxsparse.to_module` made of one; also wrapped by
            ``torch.compile`` or ``DistributedDataParallel``.

    Returns:
        a tensor for every key of the original's ``state_dict``; tied weights stand under all their names.

    Raises:
        CheckpointError: ``gm`` was never rewritten, or is sharded, or no weights of the original compute the same.
    """
    gm = fx.rewritten_of(gm, "fxsparse.dense_state_dict", whole=True, error=CheckpointError)
    _refuse_gates(gm)
    state = {name: tensor.detach() for name, tensor in graph_state(gm).items()}
    held = {weight.name: weight for weight in record_of(gm).weights if not weight.name.startswith(_ADDED)}
    dense = {name: state[name] for name in _originals(gm, state, held)}
    for weight in held.values():
        values = _dense(weight, state)
        dense.update((name, values) for name in weight.names)
    for name, transposed in _branches(gm).items():
        original = dense[name].t() if transposed else dense[name]
        total = merged(original, state[f"{name}_down"], state[f"{name}_up"])
        names = held[name].names if name in held else _names_of(gm, name)
        dense.update((alias, total.t().contiguous() if transposed else total) for alias in names)
    _refuse_shared_layers(gm, dense)
    return dense


def graph_state(gm: nn.Module) -> dict[str, Tensor]:
    """The state dict under the graph's names, also of a module form."""
    names = fx.meta_of(gm).get(NAMES_KEY, {})
    state: dict[str, Tensor] = {}
    for name, tensor in gm.state_dict().items():
        state.setdefault(names.get(name, name), tensor)
    for site in () if isinstance(gm, GraphModule) else module_sites(gm):
        if f"{site.form.name}{'_values' if site.compressed else ''}" not in state:
            raise CheckpointError(
                f"{site.path} was moved since fxsparse.to_module made it, as adapters do: unload them first "
                "(PEFT's unload()), or save the wrapped model as its library does"
            )
    return state


def _refuse_gates(gm: nn.Module) -> None:
    if live.sites(gm, Gated):
        raise CheckpointError(
            "gates and masked dimensions are values in the graph, which no weight of the original holds: take out what "
            'is closed first, fxsparse.rewrite(gm, "materialize"), or keep the graph with fxsparse.save'
        )


def _refuse_shared_layers(gm: nn.Module, dense: Mapping[str, Tensor]) -> None:
    """Refuses weights that the original would take although it computes layers that were dropped."""
    dropped = any(entry.rewritten and entry.name == DropLayers.name for entry in record_of(gm).entries)
    traced = getattr(fx.meta_of(gm).get(TRACE_KEY), "state", None)
    if dropped and traced and dense.keys() >= set(traced):
        raise CheckpointError(
            "the layers that were dropped share all weights with layers that stay, so the original would load this and "
            "compute all of them; keep the graph with fxsparse.save"
        )


def _originals(gm: nn.Module, state: Mapping[str, Tensor], held: Mapping[str, HeldWeight]) -> Iterator[str]:
    """The names of the state that are the original's; CheckpointError at a parameter that a pass made of it."""
    names = [name for weight in held.values() for name in weight.names]
    parts = {f"{name}_{part}" for name in names for part in PARTS} | state_buffers(gm)
    parts |= {name for name in state if _is_branch(name, state)}
    traced = getattr(fx.meta_of(gm).get(TRACE_KEY), "state", None)
    parameters = {name for name, _ in gm.named_parameters(remove_duplicate=False)}
    for name in state:
        if name in parts or name.startswith(_ADDED):
            continue
        if traced is None or name in traced:
            yield name
        elif name in parameters:
            raise CheckpointError(
                f"{name} is a parameter that a pass added, and no weight of the original holds it; keep the graph with "
                "fxsparse.save"
            )


def _is_branch(name: str, state: Mapping[str, Tensor]) -> bool:
    stem = name.removesuffix("_down").removesuffix("_up")
    return stem != name and f"{stem}_down" in state and f"{stem}_up" in state


def _dense(weight: HeldWeight, state: Mapping[str, Tensor]) -> Tensor:
    """A held weight in its original layout, with zeros at its pruned positions."""
    if weight.storage == "masked":
        mask = state[f"{weight.name}_mask"]
        return state[weight.name] * (mask.mT if weight.transposed else mask)
    pattern = Pattern.parse(weight.pattern)
    values, indices = state[f"{weight.name}_values"], state[f"{weight.name}_indices"]
    dense = unpack(values, indices, pattern, weight.in_features)
    return dense.mT.contiguous() if weight.transposed else dense


# --- low-rank branches ------------------------------------------------------------------------------------------------


def _branches(gm: nn.Module) -> dict[str, bool]:
    """The weights whose branch takes part, and whether each is stored ``[in, out]``."""
    if not isinstance(gm, GraphModule):
        sites = [site for site in module_sites(gm) if site.form.started]
        for site in sites:
            with_branch = {other.parameter_name for other in sites}
            _refuse_elsewhere(site.name, set(_names_of(gm, site.parameter_name)) - with_branch)
        return {site.form.name: site.form.transposed for site in sites}
    linears: dict[str, set[Node]] = {}
    transposed = {weight.name: weight.transposed for weight in record_of(gm).weights}
    for linear in fx.linears(gm):
        transposed[linear.name] = linear.transposed
        linears.setdefault(linear.name, set()).add(linear.node)
    reads = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    branches = {name: transposed[name] for name in sorted(transposed) if f"{name}_down" in reads}
    for name in branches.keys() & linears.keys():
        users = _users(gm, name) - linears[name]
        _refuse_elsewhere(name, {fx.stack_path(user) or user.name for user in users})
    return branches


def _refuse_elsewhere(name: str, elsewhere: set[str]) -> None:
    if elsewhere:
        raise CheckpointError(
            f"{name} has a low-rank branch, and {', '.join(sorted(elsewhere))} reads the same weight without it, so no "
            "weight of the original computes both: untie them before the rewrite, or keep the graph with fxsparse.save"
        )


def _names_of(gm: nn.Module, name: str) -> list[str]:
    """All names of a parameter."""
    return next((names for names in fx.parameter_names(gm).values() if name in names), [name])


def _users(gm: GraphModule, name: str) -> set[Node]:
    """The nodes that compute with a parameter, behind transposes and what keeps it from being trained."""
    pending, users = list(fx.reads(gm)[id(fx.attribute(gm, name))]), set()
    while pending:
        for user in pending.pop().users:
            if fx.is_transpose(user) or fx.read_of(user) is not user:
                pending.append(user)
            else:
                users.add(user)
    return users
