"""Letting an exported graph switch between training and evaluation.

Capture bakes the ``training`` flag of every dropout and batch norm into the graph as a constant. Here each of these constants
becomes a read of the ``training`` attribute of the module that the node came from, so that ``train()`` and ``eval()`` work,
eagerly and under ``torch.compile``, which guards on the attribute.
"""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

aten = torch.ops.aten

_DROPOUTS: dict[Any, int] = {
    aten.dropout.default: 2,
    aten.alpha_dropout.default: 2,
    aten.feature_dropout.default: 2,
    aten.feature_alpha_dropout.default: 2,
    aten.native_dropout.default: 2,
    aten.rrelu.default: 3,
    aten.rrelu_.default: 3,
    aten.dropout_.default: 2,
    aten.alpha_dropout_.default: 2,
    aten.feature_dropout_.default: 2,
    aten.feature_alpha_dropout_.default: 2,
}
"""Position of the flag; running statistics play no part."""

_NORMS: dict[Any, int] = {aten.batch_norm.default: 5, aten.instance_norm.default: 5}
"""Position of the flag; argument 3 is the running mean, and without one the flag is always set."""

_SDPA = aten.scaled_dot_product_attention.default
_SDPA_DROPOUT = 4


def bind_training_flags(gm: GraphModule) -> int:
    """Replaces the baked training flags of ``gm``, captured in training mode, by reads of ``<module>.training``.

    Regions that run in a submodule of their own (``wrap_with_autocast``) read flags that live in that submodule, at the same
    path, so that ``train()`` and ``eval()`` reach them too.

    Returns:
        the number of flags replaced.
    """
    count = _bind(gm, gm)
    for child in gm.children():
        if isinstance(child, GraphModule):
            count += _bind(child, gm)
            child.recompile()
    return count


def _bind(gm: GraphModule, root: GraphModule) -> int:
    flags: dict[str, Node] = {}
    count = 0

    def flag(node: Node) -> Node:
        path = scope(node)
        if path not in flags:
            _ensure_module(gm, path, root)
            with gm.graph.inserting_before(node):
                read = gm.graph.create_node("get_attr", f"{path}.training" if path else "training")
            read.meta["val"] = True
            read.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
            flags[path] = read
        return flags[path]

    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if _is_batch_count(node):
            node.update_arg(1, flag(node))  # adds one in training, nothing in evaluation
        elif node.target in _DROPOUTS and _argument(node, _DROPOUTS[node.target], "train", "training") is True:
            _set_argument(node, _DROPOUTS[node.target], ("train", "training"), flag(node))
        elif node.target in _NORMS and node.args[3] is not None and node.args[5] is True:
            node.update_arg(5, flag(node))
        elif node.target is _SDPA and _argument(node, _SDPA_DROPOUT, "dropout_p"):
            probability = _argument(node, _SDPA_DROPOUT, "dropout_p")
            training = flag(node)
            with gm.graph.inserting_before(node):
                scaled = gm.graph.call_function(operator.mul, (probability, training))
            scaled.meta["val"] = probability
            scaled.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
            _set_argument(node, _SDPA_DROPOUT, ("dropout_p",), scaled)
        else:
            continue
        count += 1
    return count


def scope(node: Node) -> str:
    """Path of the module ``node`` came from; an empty string for the model itself."""
    stack = node.meta.get("nn_module_stack")
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    return re.sub(r"@\d+", "", path)  # a module called again has a numbered path


def _is_batch_count(node: Node) -> bool:
    if node.target is not aten.add_.Tensor or node.args[1] != 1 or isinstance(node.args[1], Node):
        return False
    counter = node.args[0]
    return (
        isinstance(counter, Node) and counter.op == "get_attr" and str(counter.target).endswith("num_batches_tracked")
    )


def _ensure_module(gm: GraphModule, path: str, root: nn.Module) -> None:
    """A region's own graph module has no tree of the model: it gets bare modules that only hold flags."""
    owner: nn.Module = gm
    original: nn.Module = root
    for part in path.split(".") if path else []:
        original = getattr(original, part)
        if not hasattr(owner, part):
            holder = nn.Module()
            holder.training = original.training
            owner.add_module(part, holder)
        owner = getattr(owner, part)


def _argument(node: Node, position: int, *names: str) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), None)


def _set_argument(node: Node, position: int, names: tuple[str, ...], new: Node) -> None:
    if len(node.args) > position:
        node.update_arg(position, new)
    else:
        node.update_kwarg(next(name for name in names if name in node.kwargs), new)
