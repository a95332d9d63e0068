"""Masks that vmap makes of a function of a batch, a head, a query and a key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

import fxsparse

Rule = Callable[[Any, Any, Any, Any, Tensor], Tensor]


def window(batch: Any, head: Any, query: Any, key: Any, seen: Tensor) -> Tensor:
    near = (query - key < 3) & (key - query < 2)
    return near | (key < 1)


def padding(batch: Any, head: Any, query: Any, key: Any, seen: Tensor) -> Tensor:
    return (key <= query) & seen[batch, key]


def heads(batch: Any, head: Any, query: Any, key: Any, seen: Tensor) -> Tensor:
    return (query - key).abs() <= head + 1


def everything(batch: Any, head: Any, query: Any, key: Any, seen: Tensor) -> Tensor:
    return query.new_ones((), dtype=torch.bool)


class Masked(nn.Module):
    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.linear, self.rule = nn.Linear(8, 8), rule

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        function: Any = lambda b, h, q, k: self.rule(b, h, q, k, seen)  # noqa: E731
        for at in range(3, -1, -1):
            function = torch.vmap(function, in_dims=tuple(0 if i == at else None for i in range(4)))
        with TransformGetItemToIndex():  # as transformers does
            mask = function(torch.arange(batch), torch.arange(2), torch.arange(tokens), torch.arange(tokens))
        y = self.linear(x).view(batch, tokens, 2, 4).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(y, y, y, attn_mask=mask)


@pytest.mark.parametrize("rule", [window, padding, heads, everything])
def test_the_mask_is_made_without_vmap(rule: Rule) -> None:
    model = Masked(rule)
    gm = fxsparse.trace(model, (torch.randn(3, 6, 8), torch.ones(3, 6, dtype=torch.bool)))
    assert not [node for node in gm.graph.nodes if "batch_dim" in str(node.target)]
    for batch, tokens in ((3, 6), (5, 9)):
        seen = torch.rand(batch, tokens) < 0.7
        seen[:, 0] = True
        x = torch.randn(batch, tokens, 8)
        torch.testing.assert_close(gm(x, seen), model(x, seen))
