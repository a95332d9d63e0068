"""Taking hidden dimensions out of a stream: every parameter that has them becomes smaller, each once.

Inputs of the model that carry the stream are narrowed where they enter, and outputs are filled up with zeros, so that
the model keeps its interface.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.analysis.axes import losses_of_stream, lost_of
from fxsparse.analysis.residual_streams import Stream
from fxsparse.passes.structured.slicing import follow

aten = torch.ops.aten


def narrow(gm: GraphModule, stream: Stream, keep: Tensor) -> None:
    """Leaves some hidden dimensions of a stream.

    Args:
        gm: the graph; parameters and buffers are replaced, never written to.
        stream: of `fxsparse.analysis.residual_streams`, found in ``gm`` as it is.
        keep: bool ``[stream.size]``, at least one.

    Raises:
        RewriteError: a constant of the graph does not follow.
    """
    leaving = [node for node in stream.nodes if any(user.op == "output" for user in node.users)]
    lost = losses_of_stream(stream, keep)
    changed = _narrow_state(gm, stream, keep)
    first = next(node for node in gm.graph.nodes if node.op == "call_function")
    entering = [(node, axes) for node, axes in stream.nodes.items() if node.op == "placeholder"]
    if entering:
        kept = _index(gm, f"{stream.path}.hidden_kept", keep.nonzero().flatten(), before=first)
        for node, axes in entering:
            chosen = _selected(gm, node, axes[-1], kept, before=first)
            node.replace_all_uses_with(chosen, delete_user_cb=functools.partial(operator.is_not, chosen))
            changed.append(chosen)
    follow(gm, lost, changed, stream.path)
    if leaving:
        _widen(gm, leaving, stream, keep)


def _narrow_state(gm: GraphModule, stream: Stream, keep: Tensor) -> list[Node]:
    """Narrows the parameters and buffers of a stream, each once, and gives the nodes that read them."""
    names = fx.parameter_names(gm)
    done: dict[int, Tensor] = {}
    reads = [(node, axes) for node, axes in stream.nodes.items() if node.op == "get_attr"]
    for node, axes in reads:
        old = fx.attribute(gm, str(node.target))
        if id(old) not in done:
            done[id(old)] = new = _narrowed(old, axes, keep)
            for name in names.get(id(old), (str(node.target),)):
                _set(gm, name, new)
            done[id(new)] = new  # what the other nodes of a tied tensor read by now
        node.meta = {**node.meta, "val": fx.fake_mode(gm).from_tensor(done[id(old)].detach(), static_shapes=True)}
    return [node for node, _ in reads]


def _narrowed(old: Tensor, axes: tuple[int, ...], keep: Tensor) -> Tensor:
    new = old.detach()
    for axis in axes:
        stays = lost_of(keep, old.shape[axis]) == 0
        new = new.index_select(axis, stays.nonzero().flatten().to(old.device))
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def _set(gm: GraphModule, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner: Any = gm.get_submodule(path)
    if isinstance(tensor, nn.Parameter):
        owner._parameters[leaf] = tensor
    else:
        owner._buffers[leaf] = tensor


def _index(gm: GraphModule, name: str, index: Tensor, *, before: Node) -> Node:
    read = fx.insert_buffer(gm, name, index, before=before)
    read.meta.pop("nn_module_stack", None)  # outside of the blocks, as the model's own inputs and outputs are
    return read


def _selected(gm: GraphModule, node: Node, axis: int, read: Node, *, before: Node) -> Node:
    chosen = fx.insert_call(gm, aten.index_select.default, (node, axis, read), like=before)
    chosen.meta.pop("nn_module_stack", None)
    return chosen


def _widen(gm: GraphModule, leaving: list[Node], stream: Stream, keep: Tensor) -> None:
    """Fills the dimensions of outputs that are gone with zeros."""
    output = gm.graph.output_node()
    places = torch.where(keep, keep.cumsum(0) - 1, int(keep.sum()))
    read = _index(gm, f"{stream.path}.hidden_places", places, before=output)
    for node in leaving:
        axis = stream.nodes[node][-1]
        one = fx.insert_call(gm, aten.slice.Tensor, (node, axis, 0, 1), like=output)
        zero = fx.insert_call(gm, aten.zeros_like.default, (one,), like=output)
        padded = fx.insert_call(gm, aten.cat.default, ([node, zero], axis), like=output)
        output.replace_input_with(node, _selected(gm, padded, axis, read, before=output))
