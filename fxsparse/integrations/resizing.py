"""Giving the layers of a Hugging Face model sizes of their own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.errors import CheckpointError

Sizes = dict[str, tuple[int, ...]]

# What modules call the same number: heads, the size of one, all of them together.
_HEADS = ("num_heads", "n_heads", "num_attention_heads")
_HEAD_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim")
_ALL_HEADS = ("all_head_size", "inner_dim", "split_size")
_QUERIES, _KEYS = ("q_proj", "query", "q"), ("k_proj", "key", "k")
_LENGTHS = {
    "Linear": ("out_features", "in_features"),
    "Conv1D": ("nx", "nf"),
    "Embedding": ("num_embeddings", "embedding_dim"),
}


def sizes_of(state: Mapping[str, Tensor]) -> Sizes:
    """The shape of every tensor."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def resize(model: nn.Module, sizes: Mapping[str, tuple[int, ...]]) -> None:
    """Gives the parameters of ``model`` new shapes, and takes modules out whose parameters are not named.

    A module without any of its parameters becomes one that adds nothing to the residual stream; a norm becomes the
    identity. Values of resized parameters are undefined: they are loaded next.

    Raises:
        CheckpointError: an attention's sizes are no whole number of heads.
    """
    tied = _tied(model)
    for path in _absent(model, set(sizes), tied):
        model.set_submodule(path, _without(model.get_submodule(path)))
    for path, module in model.named_modules():
        for name, parameter in list(module._parameters.items()):
            wanted = sizes.get(f"{path}.{name}" if path else name)
            if parameter is not None and wanted is not None and tuple(parameter.shape) != wanted:
                setattr(module, name, nn.Parameter(parameter.new_empty(wanted), parameter.requires_grad))
    for module in model.modules():
        _follow(module)
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


def _absent(model: nn.Module, named: set[str], tied: list[set[str]]) -> list[str]:
    """The outermost modules that have parameters and of whose parameters none is named."""
    alias = {name: group for group in tied for name in group}
    found: list[str] = []
    for path, module in model.named_modules():
        if not path or any(path.startswith(f"{outer}.") for outer in found):
            continue
        own = [f"{path}.{name}" for name, _ in module.named_parameters()]
        if own and not any(name in named or alias.get(name, set()) & named for name in own):
            found.append(path)
    return found


def _without(module: nn.Module) -> nn.Module:
    accepted = inspect.signature(module.forward).parameters
    if "input_tensor" in accepted:
        return _KeepsInput()
    if any(hasattr(module, name) for name in _HEAD_SIZES):
        return _NoAttention(getattr(module, "layer_idx", None))
    is_norm = all(parameter.dim() == 1 for parameter in module.parameters())
    return _Identity() if is_norm else _Nothing()


class _KeepsInput(nn.Module):
    """In the place of a projection with its residual sum and norm: the residual."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return input_tensor


class _Identity(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class _Nothing(nn.Module):
    """In the place of a feed-forward layer: zeros to add to the residual stream."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


class _NoAttention(nn.Module):
    """In the place of an attention; its cache grows all the same, for the length of a cache is read from one layer."""

    def __init__(self, layer_idx: int | None):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any) -> tuple[Any, ...]:
        if past_key_values is not None and self.layer_idx is not None:
            empty = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            past_key_values.update(empty, empty, self.layer_idx)
        return torch.zeros_like(hidden_states), None


def _follow(module: nn.Module) -> None:
    """Lets the numbers that a module keeps about its sizes follow its parameters."""
    weight: Any = getattr(module, "weight", None)
    names = _LENGTHS.get(type(module).__name__)
    if isinstance(weight, nn.Parameter) and names:
        for name, length in zip(names, weight.shape, strict=True):
            setattr(module, name, int(length))
    if isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)
    size = next(
        (int(getattr(module, name)) for name in _HEAD_SIZES if isinstance(getattr(module, name, None), int)), None
    )
    rows, key_rows = _rows(module, _QUERIES), _rows(module, _KEYS)
    if size is None or rows is None:
        return
    if rows % size or (key_rows or rows) % size or rows % (key_rows or rows):
        raise CheckpointError(
            f"{rows} rows of queries and {key_rows} of keys are no whole heads of {size}, or their groups differ"
        )
    for name in _HEADS:
        if hasattr(module, name):
            setattr(module, name, rows // size)
    for name in _ALL_HEADS:
        if hasattr(module, name):
            setattr(module, name, rows)
    for name, number in (
        ("num_key_value_heads", (key_rows or rows) // size),
        ("num_key_value_groups", rows // (key_rows or rows)),
    ):
        if hasattr(module, name):
            setattr(module, name, number)


def _rows(module: nn.Module, names: tuple[str, ...]) -> int | None:
    for name in names:
        weight = getattr(getattr(module, name, None), "weight", None)
        if isinstance(weight, Tensor):
            return int(weight.shape[0])
    fused = getattr(getattr(module, "c_attn", None), "weight", None)  # GPT-2's, [in, queries + keys + values]
    return int(fused.shape[1]) // 3 if isinstance(fused, Tensor) else None
