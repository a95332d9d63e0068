"""Lets the attentions of a Hugging Face model select key heads and heads of a position bias by index.

The shapes of pruned weights leave two facts about heads open. If the groups of grouped queries lost different numbers
of heads, the key head of each query head is unknown. If all layers share one position bias (T5), the bias heads that
belong to one attention are unknown. Both indices are applied when the attention function is called. The cache therefore
holds only the key and value heads that exist, and the shared bias stays whole for later layers.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.errors import CheckpointError

aten = torch.ops.aten

Chosen = Mapping[str, list[int] | int]
"""``keys``, the key head of each query head; ``bias``, the bias head of each; numbers that a module stores, by name."""
Heads = dict[str, dict[str, list[int] | int]]
"""What is chosen for modules, by path."""

_SDPA = aten.scaled_dot_product_attention.default
_LAYOUTS = (
    aten.reshape.default,
    aten.view.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.transpose.int,
    aten.to.dtype,
)
_FUNCTION = "fxsparse_heads"
_CONFIG = "config."


def attention_calls(gm: GraphModule) -> list[Node]:
    """The calls of ``scaled_dot_product_attention``, in order of execution."""
    return list(gm.graph.find_nodes(op="call_function", target=_SDPA))


def heads_of(gm: GraphModule, model: nn.Module, before: Mapping[str, Chosen]) -> Heads:
    """The key heads and bias heads that each attention of a graph selects, numbered as in its module.

    Args:
        gm: the graph.
        model: the model from which it was traced.
        before: the heads that the attentions of ``model`` select.
    """
    heads = _numbers_before(gm, before)
    for sdpa in attention_calls(gm):
        path = fx.stack_path(sdpa)
        keys, bias = _keys(gm, sdpa), _chosen(gm, _operand(sdpa, 3, "attn_mask"), -3)
        inherited = before.get(path, {}).get("bias")
        if isinstance(inherited, list):
            bias = inherited if bias is None else [inherited[head] for head in bias]
        if bias is None and _passes_bias(model, path):
            bias = list(range(fx.value(sdpa).shape[1]))  # a bias without an index is the same for every head
        chosen: dict[str, list[int] | int] = {}
        chosen |= {kind: index for kind, index in (("keys", keys), ("bias", bias)) if index is not None}
        if chosen:
            heads.setdefault(path, {}).update(chosen)
    for product in gm.graph.find_nodes(op="call_function", target=aten.matmul.default):  # of an eager attention
        keys = _keys(gm, product)
        if keys is not None:
            heads.setdefault(fx.stack_path(product), {}).setdefault("keys", keys)
    return heads


def _numbers_before(gm: GraphModule, before: Mapping[str, Chosen]) -> Heads:
    """The numbers of the modules that the graph still has."""
    names = [name for name, _ in gm.named_parameters(remove_duplicate=False)]
    numbers: Heads = {}
    for path, chosen in before.items():
        own: dict[str, list[int] | int] = {name: number for name, number in chosen.items() if isinstance(number, int)}
        if own and any(name.startswith(f"{path}.") for name in names):
            numbers[path] = own
    return numbers


def choose_heads(model: nn.Module, heads: Mapping[str, Chosen]) -> None:
    """Lets the attentions of ``model`` that are named in ``heads``, see `heads_of`, select these heads, and modules
    store these numbers; in place.

    Raises:
        CheckpointError: a module stores no number under such a name.
    """
    _set_numbers(model, heads)
    indexed = {
        path: {kind: index for kind, index in chosen.items() if not isinstance(index, int)}
        for path, chosen in heads.items()
    }
    indexed = {path: chosen for path, chosen in indexed.items() if chosen}
    if not indexed:
        return
    from transformers import AttentionInterface

    AttentionInterface.register(_FUNCTION, _attention)
    for path, chosen in indexed.items():
        module: Any = model.get_submodule(path)
        device = next(module.parameters()).device
        for kind, index in chosen.items():
            module.register_buffer(f"{kind}_of_heads", torch.tensor(index, device=device), persistent=False)
        # The model's own configuration still decides which function runs and which masks are made for it.
        module.config_of_model = getattr(module, "config_of_model", module.config)
        module.config = copy.deepcopy(module.config_of_model)
        module.config._attn_implementation = _FUNCTION


def stored_numbers(module: Any) -> dict[str, int]:
    """The whole numbers that a module stores, and those of its configuration as ``config.<name>``."""
    settings = vars(getattr(module, "config", None) or nn.Identity())
    numbers = {**vars(module), **{f"{_CONFIG}{name}": setting for name, setting in settings.items()}}
    return {
        name: number
        for name, number in numbers.items()
        if type(number) is int and not name.removeprefix(_CONFIG).startswith("_")
    }


def _set_numbers(model: nn.Module, heads: Mapping[str, Chosen]) -> None:
    for path, chosen in heads.items():
        module: Any = model.get_submodule(path)
        numbers = {name: number for name, number in chosen.items() if isinstance(number, int)}
        if unknown := numbers.keys() - stored_numbers(module).keys():
            raise CheckpointError(f"{path}: {type(module).__name__} stores no number {', '.join(sorted(unknown))}")
        if any(name.startswith(_CONFIG) for name in numbers):
            module.config = copy.deepcopy(module.config)  # it is that of other modules too
        for name, number in numbers.items():
            owner = module.config if name.startswith(_CONFIG) else module
            setattr(owner, name.removeprefix(_CONFIG), number)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The model's attention function on selected heads: keys are ``[batch, heads, tokens, head size]``."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    index = getattr(module, "keys_of_heads", None)
    if index is not None:
        key, value = key.index_select(1, index), value.index_select(1, index)
    bias = options.get("position_bias")
    if bias is not None and hasattr(module, "bias_of_heads"):
        options["position_bias"] = bias.index_select(1, module.bias_of_heads)
    # An eager function belongs to its modeling file and is not registered; where there is none, SDPA accepts its masks.
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    name = module.config_of_model._attn_implementation
    function = ALL_ATTENTION_FUNCTIONS.get(name) or eager or ALL_ATTENTION_FUNCTIONS["sdpa"]
    result: tuple[Tensor, Tensor | None] = function(module, query, key, value, attention_mask, **options)
    return result


def _passes_bias(model: nn.Module, path: str) -> bool:
    return "position_bias" in inspect.signature(model.get_submodule(path).forward).parameters


def _operand(sdpa: Node, place: int, name: str) -> Any:
    return sdpa.args[place] if len(sdpa.args) > place else sdpa.kwargs.get(name)


def _chosen(gm: GraphModule, node: Any, axis: int) -> list[int] | None:
    """The indices of ``node`` if it is an ``index_select`` by a buffer along ``axis``, else None."""
    if not isinstance(node, Node) or node.target is not aten.index_select.default:
        return None
    dim, index = node.args[1:]
    if not isinstance(index, Node) or index.op != "get_attr" or dim != axis % fx.value(node).dim():
        return None
    numbers: list[int] = fx.attribute(gm, str(index.target)).tolist()
    return numbers


def _keys(gm: GraphModule, sdpa: Node) -> list[int] | None:
    """The key head of every query head; None if all groups have the same size, which implies the key heads."""
    key = sdpa.args[1]
    index = _chosen(gm, key, 1)
    if index is None:
        return None
    assert isinstance(key, Node) and isinstance(key.args[0], Node)
    total = fx.value(key.args[0]).shape[1]
    key_heads = total // _repeated(key.args[0])
    # If the trace repeats each key head for all query heads of its group, several indices name one key head.
    index = [head * key_heads // total for head in index]
    even = len(index) % key_heads == 0 and index == [head // (len(index) // key_heads) for head in range(len(index))]
    return None if even else index


def _repeated(key: Node) -> int:
    """How often the trace repeats each key head: ``[batch, key heads, 1, tokens, size]`` is expanded along its third
    dimension, or heads are repeated as they are."""
    while key.target in _LAYOUTS:
        key = key.all_input_nodes[0]
    if key.target is aten.repeat_interleave.self_int:
        return int(key.args[1])  # type: ignore[arg-type]
    if key.target is not aten.expand.default:
        return 1
    before, after = (fx.value(node).shape for node in (key.all_input_nodes[0], key))
    return int(after[2]) if len(before) == len(after) == 5 and before[2] == 1 else 1
