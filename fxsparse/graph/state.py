"""Reads, sets and deletes the parameters and buffers of a graph module, and copies modules that share them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxsparse.graph.sharded import is_fully_sharded, unsharded_class


def module_path(name: str) -> str:
    """The module part of a parameter's full name: ``a.b.weight`` -> ``a.b``."""
    return name.rpartition(".")[0]


def meta_of(model: nn.Module) -> dict[str, Any]:
    """What is noted of a graph module, or of the module that `fxsparse.to_module` made of one."""
    meta: dict[str, Any] = vars(model)["meta"]
    return meta


def attribute(gm: nn.Module, name: str) -> Any:
    """The object with this dotted name, a parameter also where a module reads something else under its name.

    Raises:
        AttributeError: there is none.
    """
    owner: Any = gm
    *path, leaf = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    parameter = vars(owner).get("_parameters", {}).get(leaf)
    return getattr(owner, leaf) if parameter is None else parameter


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name; tied ones under all their names."""
    return dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))


def parameter_names(gm: nn.Module) -> dict[int, list[str]]:
    """All names of every parameter, by its identity; a tied parameter has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in gm.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def reads(gm: GraphModule) -> dict[int, list[Node]]:
    """The ``get_attr`` nodes that read each parameter or buffer, under any of its names, by the tensor's identity."""
    nodes: dict[int, list[Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            tensor = attribute(gm, str(node.target))
            if isinstance(tensor, Tensor):
                nodes.setdefault(id(tensor), []).append(node)
    return nodes


def set_parameter(gm: nn.Module, name: str, tensor: Tensor, *, requires_grad: bool = True) -> nn.Parameter:
    """Registers ``tensor`` as the parameter called ``name``, on the submodule that owns the name."""
    parameter = nn.Parameter(tensor, requires_grad=requires_grad)
    owner, leaf = _owner(gm, name)
    owner.register_parameter(leaf, parameter)
    return parameter


def replace_parameter(gm: nn.Module, names: Collection[str], tensor: Tensor) -> nn.Parameter:
    """Registers ``tensor`` in the place of the parameter that has all these names."""
    parameter = nn.Parameter(tensor, requires_grad=attribute(gm, next(iter(names))).requires_grad)
    for name in names:
        owner, leaf = _owner(gm, name)
        owner.register_parameter(leaf, parameter)
    return parameter


def put_first(module: nn.Module, leaf: str) -> None:
    """Makes a parameter the first of its module, as a weight is before its bias; `set_parameter` makes it the last."""
    parameter = module._parameters.pop(leaf)
    module._parameters = {leaf: parameter, **module._parameters}


def set_buffer(gm: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Registers ``tensor`` as the persistent buffer called ``name``, on the submodule that owns the name."""
    owner, leaf = _owner(gm, name)
    owner.register_buffer(leaf, tensor)
    return tensor


def adopt(gm: nn.Module, path: str, module: nn.Module) -> None:
    """Registers the parameters and buffers of ``module`` under ``path``, in a tree of plain modules like its own."""
    for name, child in [("", module), *((name, child) for name, child in module.named_modules() if name)]:
        owner, _, leaf = f"{path}.{name}".rstrip(".").rpartition(".")
        twin = nn.Module()
        twin.training = gm.training
        twin._parameters.update(child._parameters)
        twin._buffers.update(child._buffers)
        (gm.get_submodule(owner) if owner else gm).add_module(leaf, twin)


def delete(gm: nn.Module, name: str) -> None:
    """Removes the parameter or buffer called ``name``."""
    owner, leaf = _owner(gm, name)
    delattr(owner, leaf)


def delete_state(gm: nn.Module, names: Collection[str]) -> None:
    """Removes the parameters and buffers called ``names``; names that do not exist are ignored."""
    present = [
        name for name, _ in (*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False))
    ]
    for name in present:
        owner, leaf = _owner(gm, name)
        if name in names and (leaf in owner._parameters or leaf in owner._buffers):  # one module may have two paths
            delete(gm, name)


def shell(module: nn.Module) -> nn.Module:
    """An empty module for the tensors of ``module``. A LayerNorm stays one by its type, by which training loops know
    that its weight does not decay."""
    if not isinstance(module, nn.LayerNorm):
        return nn.Module()
    twin = nn.LayerNorm(module.normalized_shape, module.eps, elementwise_affine=False)
    twin.elementwise_affine = module.elementwise_affine
    return twin


def _owner(gm: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return (gm.get_submodule(path) if path else gm), leaf


class SharedByCopies(dict[Any, Any]):
    """Answers in a graph module's meta that hold for whatever they are asked by, not for the module as it is now.

    Copies of the module share them, and a saved module has none.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedByCopies:
        return self

    def __reduce__(self) -> Any:
        return SharedByCopies, ()


def copy_sharing_state(gm: GraphModule) -> GraphModule:
    """A copy with a new graph and module tree, and the same parameters and buffers."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*gm.parameters(), *gm.buffers())}
    if is_fully_sharded(gm):  # its hooks gather and shard the original, and hold what cannot be copied
        for module in gm.modules():
            shared |= {id(item): OrderedDict() for item in vars(module).values() if isinstance(item, OrderedDict)}
    with unsharded_class(gm):
        return copy.deepcopy(gm, shared)


def copy_tree(source: nn.Module, target: nn.Module, memo: dict[int, Any]) -> None:
    """Copies the modules, parameters, buffers and flags of ``source`` to ``target``, in the same order.

    Tensors are copied by ``copy.deepcopy`` with ``memo``. Modules that ``target`` already has stay and are filled in.
    """
    done: dict[int, nn.Module] = {}

    def visit(module: nn.Module, twin: nn.Module) -> nn.Module:
        done[id(module)] = twin
        twin.training = module.training
        twin._parameters = copy.deepcopy(module._parameters, memo)
        twin._buffers = copy.deepcopy(module._buffers, memo)
        twin._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
        present, twin._modules = twin._modules, {}
        for name, child in module._modules.items():
            if child is None or id(child) in done:
                twin._modules[name] = None if child is None else done[id(child)]
            else:
                made = present.get(name)
                twin._modules[name] = visit(child, shell(child) if made is None or type(made) is nn.Module else made)
        return twin

    visit(source, target)


def state_read(gm: GraphModule) -> set[str]:
    """Names of the parameters and buffers that the graph reads, with all names of a tied tensor."""
    used = {id(attribute(gm, str(node.target))) for node in gm.graph.nodes if node.op == "get_attr"}
    named = [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]
    return {name for name, tensor in named if id(tensor) in used}
