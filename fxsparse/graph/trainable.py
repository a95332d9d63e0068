"""Chooses which tensors a graph trains; it reads the others through ``detach``, so their gradients are not computed.

Every inserted ``detach`` is marked. The mark allows removing it again, and lets `fxsparse.graph.read_of` see the weight
of a linear through it. A ``detach`` in the model's own code has no mark and is left alone.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxsparse import graph as fx


def trainable(gm: GraphModule) -> tuple[str, ...]:
    """Names of the tensors that can be trained, one name for each tensor.

    These are the parameters that the graph reads and that require a gradient or were frozen by `set_trained`.
    Parameters that the caller froze are not among them.
    """
    names = fx.parameter_names(gm)
    return tuple(
        names[key][0]
        for key, nodes in fx.reads(gm).items()
        if key in names and (gm.get_parameter(names[key][0]).requires_grad or any(map(_frozen, nodes)))
    )


def trained(gm: GraphModule) -> tuple[str, ...]:
    """Names of the tensors that are trained, one name for each tensor."""
    reads, names = fx.reads(gm), fx.parameter_names(gm)
    frozen = {names[key][0] for key, nodes in reads.items() if key in names and any(map(_frozen, nodes))}
    return tuple(name for name in trainable(gm) if name not in frozen)


def set_trained(gm: GraphModule, chosen: Collection[str]) -> None:
    """Trains exactly the tensors named in ``chosen`` among the `trainable` ones; recompile the graph afterwards.

    Only the graph changes; the caller sets ``requires_grad`` of the parameters.
    """
    wanted = {id(gm.get_parameter(name)) for name in chosen}
    candidates = {id(gm.get_parameter(name)) for name in trainable(gm)}
    for key, nodes in fx.reads(gm).items():
        if key in candidates:
            for node in nodes:
                _attach(node) if key in wanted else _detach(node)


def fully_trained(gm: GraphModule) -> GraphModule:
    """A copy that trains every `trainable` tensor; it shares the parameters and has copies of the buffers."""
    copy = fx.copy_sharing_state(gm)
    set_trained(copy, trainable(copy))
    twins: dict[int, torch.Tensor] = {}
    for module in copy.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = twins.setdefault(id(buffer), buffer.clone())
    copy.recompile()
    return copy


def own_parameter(gm: GraphModule, name: str, *, requires_grad: bool) -> None:
    """Replaces the parameter called ``name``, under all its names, by a new one with the same memory.

    Setting ``requires_grad`` of the new one does not affect the model from which the graph was made.
    """
    shared = gm.get_parameter(name)
    parameter = nn.Parameter(shared.detach(), requires_grad=requires_grad)
    for alias in fx.parameter_names(gm)[id(shared)]:
        path, _, leaf = alias.rpartition(".")
        gm.get_submodule(path).register_parameter(leaf, parameter)


def _frozen(read: Node) -> bool:
    return any(fx.FROZEN in user.meta for user in read.users)


def _attach(read: Node) -> None:
    for user in list(read.users):
        if fx.FROZEN in user.meta:
            fx.replace(user, read)


def _detach(read: Node) -> None:
    if _frozen(read):
        return
    with read.graph.inserting_after(read):
        detached = read.graph.call_function(torch.ops.aten.detach.default, (read,))
    detached.meta = {**read.meta, "val": fx.value(read).detach(), fx.FROZEN: True}
    read.replace_all_uses_with(detached, delete_user_cb=lambda user: user is not detached)
