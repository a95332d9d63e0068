"""Attentions of a Hugging Face model whose query heads lost different partners.

Two things about heads are in no weight's shape. Where the groups of grouped queries lost different numbers of heads, it
is which key each query head reads; and where a position bias is shared by all layers (T5's), it is which of its heads
are an attention's own. Both are chosen at the call of the attention function, so keys and values are cached as few as
they are, and the shared bias stays whole for the layers after.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.analysis.probing import nearest

aten = torch.ops.aten

Heads = dict[str, dict[str, list[int]]]
"""By the path of an attention: ``keys``, the key head of each query head; ``bias``, its heads of a position bias."""

_SDPA = aten.scaled_dot_product_attention.default
_FUNCTION = "fxsparse_heads"


def attention_calls(gm: GraphModule) -> list[Node]:
    """The calls of ``scaled_dot_product_attention``, in order of execution."""
    return list(gm.graph.find_nodes(op="call_function", target=_SDPA))


def heads_of(gm: GraphModule, model: nn.Module, before: Mapping[str, Mapping[str, list[int]]]) -> Heads:
    """What each attention of a graph chooses of its keys and its position bias, numbered as in its module.

    Args:
        gm: the graph.
        model: what it was traced from.
        before: what that chose.
    """
    found: Heads = {}
    for sdpa in attention_calls(gm):
        path = fx.stack_path(sdpa)
        keys, bias = _keys(gm, sdpa), _chosen(gm, _operand(sdpa, 3, "attn_mask"), -3)
        inherited = before.get(path, {}).get("bias")
        if inherited is not None:
            bias = inherited if bias is None else [inherited[head] for head in bias]
        if bias is None and _passes_bias(model, path):
            bias = list(range(fx.value(sdpa).shape[1]))  # the bias that is passed along is the same for all heads
        chosen = {kind: index for kind, index in (("keys", keys), ("bias", bias)) if index is not None}
        if chosen:
            found[path] = chosen
    return found


def choose_heads(model: nn.Module, heads: Mapping[str, Mapping[str, list[int]]]) -> None:
    """Lets the attentions of ``model`` choose as `heads_of` says, in place; others are left as they are."""
    if not heads:
        return
    from transformers import AttentionInterface

    AttentionInterface.register(_FUNCTION, _attention)
    for path, chosen in heads.items():
        module: Any = model.get_submodule(path)
        device = next(module.parameters()).device
        for kind, index in chosen.items():
            module.register_buffer(f"{kind}_of_heads", torch.tensor(index, device=device), persistent=False)
        # The configuration of the model still says which function runs and what masks it is given.
        module.config_of_model = module.config
        module.config = copy.deepcopy(module.config)
        module.config._attn_implementation = _FUNCTION


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The model's attention function on chosen keys ``[batch, heads, tokens, head size]`` and a chosen bias."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    index = getattr(module, "keys_of_heads", None)
    if index is not None:
        key, value = key.index_select(1, index), value.index_select(1, index)
    bias = options.get("position_bias")
    if bias is not None and hasattr(module, "bias_of_heads"):
        options["position_bias"] = bias.index_select(1, module.bias_of_heads)
    # Eager functions are their modules' own; SDPA takes the masks that they are given.
    name = module.config_of_model._attn_implementation
    function = ALL_ATTENTION_FUNCTIONS.get(name) or ALL_ATTENTION_FUNCTIONS["sdpa"]
    result: tuple[Tensor, Tensor | None] = function(module, query, key, value, attention_mask, **options)
    return result


def _passes_bias(model: nn.Module, path: str) -> bool:
    return "position_bias" in inspect.signature(model.get_submodule(path).forward).parameters


def _operand(sdpa: Node, place: int, name: str) -> Any:
    return sdpa.args[place] if len(sdpa.args) > place else sdpa.kwargs.get(name)


def _chosen(gm: GraphModule, node: Any, axis: int) -> list[int] | None:
    """What an ``index_select`` by a buffer takes along an axis; None where the node is none."""
    if not isinstance(node, Node) or node.target is not aten.index_select.default:
        return None
    dim, index = node.args[1:]
    if not isinstance(index, Node) or index.op != "get_attr" or dim != axis % fx.value(node).dim():
        return None
    numbers: list[int] = fx.attribute(gm, str(index.target)).tolist()
    return numbers


def _keys(gm: GraphModule, sdpa: Node) -> list[int] | None:
    """The key head of every query head, where that is not simply its group's."""
    key = sdpa.args[1]
    index = _chosen(gm, key, 1)
    if index is None:
        return None
    assert isinstance(key, Node) and isinstance(key.args[0], Node)
    linears = {linear.node: linear for linear in fx.linears(gm)}
    total, size = fx.value(key.args[0]).shape[1], fx.value(key).shape[-1]
    own = sum(linears[source].out_features for source in nearest(key, linears)) // size
    if not own or total % own:
        return index
    # Where capture had repeated the keys for all heads of their group, several numbers mean the same one.
    index = [head * own // total for head in index]
    even = len(index) % own == 0 and index == [head // (len(index) // own) for head in range(len(index))]
    return None if even else index
