"""From a model to a training-IR graph.

The training IR is the pre-dispatch ATen graph of ``torch.export``, made usable for rewriting and training: the parameters are
the model's own, ``train()`` and ``eval()`` work, assertions and other noise of capture are gone, and attention that is causal
says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from fxsparse import graph as fx
from fxsparse.causal import restore_is_causal
from fxsparse.training_flags import bind_training_flags

META_KEY = "fxsparse_trace"


@dataclass(frozen=True)
class Trace:
    """How a graph module was captured; kept in ``gm.meta["fxsparse_trace"]``.

    Attributes:
        inputs: name and example sizes of every tensor input.
        notes: what a reader of the graph should know, such as "captured in evaluation mode because ...".
    """

    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    notes: tuple[str, ...] = ()


def trace(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None, *, dynamic_batch: bool = True
) -> GraphModule:
    """Captures ``model`` as a training-IR graph.

    Args:
        model: any module that ``torch.export`` can follow; left exactly as it was.
        args: example positional inputs.
        kwargs: example keyword inputs. The graph takes the same arguments.
        dynamic_batch: let dimension 0 of every tensor input vary; every other size stays that of the example.

    Returns:
        a graph module with the model's own Parameter objects under their original names. ``train()`` and ``eval()`` work.

    Raises:
        TraceError: the model cannot be captured; the message quotes the line that stopped it.
    """
    example = pytree.tree_map_only(Tensor, _own_copy, (tuple(args), dict(kwargs or {})))
    with _left_as_it_was(model):
        for module in model.modules():
            module.training = True
        program = _export(model, *example, dynamic_batch)
    gm = _assemble(model, program)
    inputs = tuple(
        (node.name, tuple(_sizes(node)))
        for node in gm.graph.find_nodes(op="placeholder")
        if isinstance(node.meta.get("val"), Tensor)
    )
    gm.meta[META_KEY] = Trace(inputs)
    return gm


def _own_copy(tensor: Tensor) -> Tensor:
    """Two arguments that are one tensor (``labels=input_ids``) would be captured as one input."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _sizes(node: Node) -> Iterator[int]:
    for size in node.meta["val"].shape:
        yield size if isinstance(size, int) else size.node.hint


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_batch: bool) -> ExportedProgram:
    shapes = ShapesCollection()
    if dynamic_batch:
        for tensor in pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.dim():
                shapes[tensor] = {0: Dim.AUTO}
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    config = getattr(model, "config", None)
    settings = dict(vars(config)) if hasattr(config, "__dict__") else None
    devices = sorted({tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}, key=str)
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, training in flags:
            module.training = training
        if settings is not None:
            vars(config).clear()
            vars(config).update(settings)


def _assemble(model: nn.Module, program: ExportedProgram) -> GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = program.module(check_guards=False)
    gm = GraphModule(nn.Module(), Graph(), type(model).__name__)
    mirror = _mirror(model, {})
    for kept in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"):
        setattr(gm, kept, getattr(mirror, kept))
    for node in exported.graph.find_nodes(op="get_attr"):
        _adopt(gm, str(node.target), fx.attribute(exported, str(node.target)))
    gm.graph = exported.graph
    for node in list(gm.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            gm.graph.erase_node(node)
    bind_training_flags(gm)
    restore_is_causal(gm)
    gm.graph.lint()
    gm.recompile()
    return gm


def _mirror(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """A bare tree of modules with the same names, flags, parameters and buffers."""
    if id(module) not in done:
        copy = done[id(module)] = nn.Module()
        copy.training = module.training
        copy._parameters.update(module._parameters)
        copy._buffers.update(module._buffers)
        copy._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
        for name, child in module._modules.items():
            copy._modules[name] = None if child is None else _mirror(child, done)
    return done[id(module)]


def _adopt(gm: GraphModule, name: str, item: Any) -> None:
    """Gives ``gm`` a constant or a region that capture made, unless the model's own tree has it."""
    try:
        fx.attribute(gm, name)
    except AttributeError:
        path, _, leaf = name.rpartition(".")
        owner = gm.get_submodule(path)
        if isinstance(item, Tensor):
            owner.register_buffer(leaf, item, persistent=False)
        else:
            setattr(owner, leaf, item)
