"""What a model computes without some of its layers, built by hand."""

from __future__ import annotations

import copy

from torch import nn


def built_without(model: nn.Module, dropped: dict[str, tuple[int, ...]]) -> nn.Module:
    """The model with shorter lists of layers; a T5 stack's position bias moves to its first layer."""
    model = copy.deepcopy(model)
    for path, gone in dropped.items():
        layers = model.get_submodule(path)
        kept = nn.ModuleList(layer for number, layer in enumerate(layers) if number not in gone)
        if path.endswith("block"):
            attention = kept[0].layer[0].SelfAttention
            attention.relative_attention_bias = layers[0].layer[0].SelfAttention.relative_attention_bias
            attention.has_relative_attention_bias = True
        model.set_submodule(path, kept)
    return model
