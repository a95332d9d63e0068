"""Which tensors a graph trains: the others are read through ``detach``, so that their gradients are never computed.

A detached read is marked, so that it can be undone, and so that readers of a linear's weight find it all the same
(`fxsparse.graph.read_of`). A ``detach`` that the model itself wrote is left alone.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxsparse import graph as fx


def trainable(gm: GraphModule) -> tuple[str, ...]:
    """Names of the tensors that can be trained, one for each: parameters that the graph reads and that require a
    gradient or were frozen by `set_trained`. Those that the caller froze before stay frozen."""
    names = fx.parameter_names(gm)
    return tuple(
        names[key][0]
        for key, nodes in fx.reads(gm).items()
        if key in names and (gm.get_parameter(names[key][0]).requires_grad or any(map(_frozen, nodes)))
    )


def trained(gm: GraphModule) -> tuple[str, ...]:
    """Names of the tensors that are trained, one for each."""
    reads, names = fx.reads(gm), fx.parameter_names(gm)
    frozen = {names[key][0] for key, nodes in reads.items() if key in names and any(map(_frozen, nodes))}
    return tuple(name for name in trainable(gm) if name not in frozen)


def set_trained(gm: GraphModule, chosen: Collection[str]) -> None:
    """Lets the graph train exactly the tensors called ``chosen`` among the `trainable` ones; recompile it after.

    Only the graph changes: the parameters' ``requires_grad`` is the caller's to set.
    """
    wanted = {id(gm.get_parameter(name)) for name in chosen}
    candidates = {id(gm.get_parameter(name)) for name in trainable(gm)}
    for key, nodes in fx.reads(gm).items():
        if key in candidates:
            for node in nodes:
                _attach(node) if key in wanted else _detach(node)


def fully_trained(gm: GraphModule) -> GraphModule:
    """A copy that shares parameters and trains every `trainable` tensor; its buffers are its own."""
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
    """Puts a parameter of the graph's own, with the same memory, in the place of the one called ``name``, under all its
    names: whether it requires a gradient is then no matter of the model that the graph was made from."""
    old = gm.get_parameter(name)
    own = nn.Parameter(old.detach(), requires_grad=requires_grad)
    for alias in fx.parameter_names(gm)[id(old)]:
        path, _, leaf = alias.rpartition(".")
        gm.get_submodule(path).register_parameter(leaf, own)


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
