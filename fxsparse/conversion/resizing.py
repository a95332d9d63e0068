"""Gives the layers of a Hugging Face model individual sizes, also zero.

A configuration has one number for all layers, so a model whose layers differ is built at the full size and resized:

| step | function |
|---|---|
| a module without tensors in ``sizes`` is replaced by one that adds nothing to the residual stream | `_absent` |
| every other parameter gets its new shape, without values | `resize` |
| numbers derived from shapes (features, heads, groups) are set again | `_follow` |
| tied parameters are tied again | `_tie` |

The caller loads the values afterwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.conversion.heads import Chosen
from fxsparse.errors import CheckpointError

Sizes = dict[str, tuple[int, ...]]
"""The shape of every tensor by its name; a removed tensor has an empty shape or no entry."""

# The attribute names that modules use for the number of heads, the size of one, and the size of all together.
_HEADS = ("num_heads", "n_heads", "n_head", "num_attention_heads")
_HEAD_SIZES = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
_ALL_HEADS = ("all_head_size", "inner_dim", "split_size")
_QUERIES, _KEYS = ("q_proj", "query", "q"), ("k_proj", "key", "k")
_FUSED = {"c_attn": "c_proj", "query_key_value": "dense"}
"""Projections to queries, keys and values together, and those that read as many features as queries have."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_BIAS = "relative_attention_bias"
_LENGTHS = {
    "Linear": ("out_features", "in_features"),
    "Conv1D": ("nx", "nf"),
    "Conv2d": ("out_channels", "in_channels"),
    "Embedding": ("num_embeddings", "embedding_dim"),
}


def sizes_of(state: Mapping[str, Tensor]) -> Sizes:
    """The shape of every tensor."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def resize(model: nn.Module, sizes: Mapping[str, tuple[int, ...]], heads: Mapping[str, Chosen] | None = None) -> None:
    """Gives the parameters and buffers of ``model`` new shapes and replaces the modules that have no parameters left.

    A module without parameters becomes one that adds nothing to the residual stream; a norm becomes the identity. The
    values of resized parameters are undefined until they are loaded.

    Args:
        model: changed in place.
        sizes: the shapes of all its parameters.
        heads: the key and bias heads that attentions select and numbers that they store, see
            `fxsparse.conversion.heads`; those are not set here.

    Raises:
        CheckpointError: the rows of an attention's projections are not a whole number of heads.
    """
    tied = _tied(model)
    scalars = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.dim()}
    named = {name for name, shape in sizes.items() if shape or name in scalars}
    for path, module in _absent(model, named, tied).items():
        model.set_submodule(path, module)
    alone = {name for name, _ in model.named_parameters()} - named - {name for group in tied for name in group}
    for path, module in model.named_modules():
        for name, parameter in list(module._parameters.items()):
            full = f"{path}.{name}" if path else name
            wanted = sizes.get(full)
            if parameter is not None and full in alone:
                delattr(module, name)
                setattr(module, name, torch.zeros((), device="cpu"))  # a scale of what is gone, which is zeros (BEiT)
            elif parameter is not None and wanted and tuple(parameter.shape) != wanted:
                setattr(module, name, nn.Parameter(parameter.new_empty(wanted), parameter.requires_grad))
        for name, buffer in list(module._buffers.items()):
            wanted = sizes.get(f"{path}.{name}" if path else name)
            if buffer is not None and wanted and tuple(buffer.shape) != wanted:
                module._buffers[name] = buffer.new_empty(wanted)
    for path, module in model.named_modules():
        _follow(module, path, (heads or {}).get(path, {}))
    _tie(model, tied)


def _tied(model: nn.Module) -> list[set[str]]:
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return [group for group in names.values() if len(group) > 1]


def _tie(model: nn.Module, tied: list[set[str]]) -> None:
    for group in tied:
        first, *others = sorted(group)
        for name in others:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, model.get_parameter(first))


# --- removed modules --------------------------------------------------------------------------------------------------


def _absent(model: nn.Module, named: set[str], tied: list[set[str]]) -> dict[str, nn.Module]:
    """The replacements, by path, of the modules that have no parameter in ``named``."""
    named = named | {name for group in tied if group & named for name in group}
    replacements: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if not path or any(path.startswith(f"{outer}.") for outer in replacements):
            continue
        parameters = [f"{path}.{name}" for name, _ in module.named_parameters()]
        # A position bias can stay although its attention is removed, because later layers read it.
        if not parameters or any(name in named for name in parameters if _BIAS not in name):
            continue
        replacement = _replacement(module, any(name in named for name in parameters))
        if replacement is not None:
            replacements[path] = replacement
    return replacements


def _replacement(module: nn.Module, keeps_bias: bool) -> nn.Module | None:
    """A module that adds nothing in the place of ``module``; None if its parts are replaced one by one instead."""
    if "input_tensor" in inspect.signature(module.forward).parameters:
        return _KeepsInput()
    if any(hasattr(module, name) for name in _HEAD_SIZES):
        return _NoAttention(module, keeps_bias)
    if all(parameter.dim() == 1 for parameter in module.parameters()):
        return _Identity()
    if isinstance(module, nn.ModuleList) or any(map(_is_norm, module.modules())):
        return None  # it computes the residual sum itself: the terms of the sum are replaced
    return None if keeps_bias else _Nothing()


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1


class _KeepsInput(nn.Module):
    """Replaces a projection with residual sum and norm: returns the residual."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return input_tensor


class _Identity(nn.Module):
    """Replaces a norm."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class _Nothing(nn.Module):
    """Replaces a feed-forward layer: adds zeros to the residual stream. Some also take the size of an image."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(hidden_states)


class _NoAttention(nn.Module):
    """Replaces an attention: returns zeros, and serves the layers that read its cache or its position bias.

    Its cache grows as before, because the length of the whole cache is read from one layer. If it owned a position bias
    (T5), the bias is computed as before.
    """

    def __init__(self, attention: Any, keeps_bias: bool):
        super().__init__()
        numbers = {name: item for name, item in vars(attention).items() if isinstance(item, (bool, int, float))}
        vars(self).update(numbers)
        self.layer_idx = getattr(attention, "layer_idx", None)
        self.passes_bias = "position_bias" in inspect.signature(attention.forward).parameters
        if keeps_bias:
            self.relative_attention_bias = attention.relative_attention_bias
            self.kind: Any = type(attention)
            self._relative_position_bucket = attention._relative_position_bucket

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        tokens = length = hidden_states.shape[1]
        seen: Any = 0
        is_cross = any(kwargs.get(name) is not None for name in ("key_value_states", "encoder_hidden_states"))
        if past_key_values is not None and self.layer_idx is not None and not is_cross:
            seen = past_key_values.get_seq_length(self.layer_idx)
            seen = seen.clone() if isinstance(seen, Tensor) else seen  # a static cache writes to it
            cache = getattr(past_key_values, "self_attention_cache", past_key_values)
            empty = hidden_states.new_zeros(hidden_states.shape[0], 1, tokens, 1)
            length = cache.update(empty, empty, self.layer_idx)[0].shape[-2]
        nothing = torch.zeros_like(hidden_states)
        if not self.passes_bias:
            return nothing, None
        if position_bias is None and hasattr(self, "relative_attention_bias"):
            position_bias = self.kind.compute_bias(
                self, tokens, length, device=hidden_states.device, past_seen_tokens=seen
            )
        return nothing, position_bias, None


# --- smaller modules --------------------------------------------------------------------------------------------------


def _follow(module: nn.Module, path: str, chosen: Chosen) -> None:
    """Sets the numbers of features and heads that a module stores to those of its parameters."""
    weight: Any = getattr(module, "weight", None)
    names = _LENGTHS.get(type(module).__name__)
    if isinstance(weight, nn.Parameter) and names:
        for name, length in zip(names, weight.shape, strict=False):
            setattr(module, name, int(length))
    _follow_experts(module)
    if isinstance(module, nn.LayerNorm) and isinstance(weight, nn.Parameter):
        module.normalized_shape = tuple(weight.shape)
    size = _number(module, _HEAD_SIZES)
    if size is None and (together := _number(module, _ALL_HEADS)) and (count := _number(module, _HEADS)):
        size = together // count  # OpenAI GPT's
    rows, key_rows = _rows(module)
    if size is None or not rows:
        return
    whole = not (rows % size or key_rows % size or (rows % key_rows and "keys" not in chosen))
    if not whole and any(isinstance(number, int) for number in chosen.values()):
        return  # they are set as they are chosen
    if not whole:
        raise CheckpointError(
            f"{path}: {rows} rows of queries and {key_rows} of keys are no whole heads of {size}, or groups differ"
        )
    for name, number in (
        # A module that selects bias heads keeps its full number of heads: if it gets no position bias, it makes one of
        # zeros with that many heads, from which later layers select.
        *((name, rows // size) for name in _HEADS if "bias" not in chosen),
        *((name, rows) for name in _ALL_HEADS),
        # Where one linear makes grouped queries and keys (GPTBigCode), it is split by these.
        *((("embed_dim", rows), ("kv_dim", key_rows)) if hasattr(module, "kv_dim") else ()),
        ("kv_heads", key_rows // size),
        ("num_key_value_heads", key_rows // size),
        ("num_key_value_groups", 1 if "keys" in chosen else rows // key_rows),
    ):
        if hasattr(module, name):
            setattr(module, name, number)


def _number(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """The first number of a module under one of these names."""
    return next((int(getattr(module, name)) for name in names if isinstance(getattr(module, name, None), int)), None)


def _follow_experts(module: nn.Module) -> None:
    """Sets the number of experts that a router, or what holds their matrices, stores."""
    own = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() > 1]
    for name in _EXPERTS:
        if own and isinstance(getattr(module, name, None), int):
            setattr(module, name, int(own[0].shape[0]))


def _rows(module: nn.Module) -> tuple[int, int]:
    """The features of an attention's queries, and of its keys; 0 where it has no known projection."""
    for together, output in _FUSED.items():
        if hasattr(module, together) and hasattr(module, output):
            (_, both), (rows, _) = _features(getattr(module, together)), _features(getattr(module, output))
            return rows, (both - rows) // 2
    rows, keys = (_rows_of(module, names) for names in (_QUERIES, _KEYS))
    return rows, keys or rows


def _rows_of(module: nn.Module, names: tuple[str, ...]) -> int:
    weights = (getattr(getattr(module, name, None), "weight", None) for name in names)
    return next((int(weight.shape[0]) for weight in weights if isinstance(weight, Tensor)), 0)


def _features(linear: Any) -> tuple[int, int]:
    """How many features a linear, or a Conv1D, reads and makes."""
    shape = linear.weight.shape
    return (int(shape[0]), int(shape[1])) if type(linear).__name__ == "Conv1D" else (int(shape[1]), int(shape[0]))
