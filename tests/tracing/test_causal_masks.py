"""Masks in attention: which are the lower triangle at every size, which hide nothing, and which must stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from torch.nn import functional as F

from fxsparse.tracing.causal_masks import drop_open_masks, restore_is_causal

SDPA = torch.ops.aten.scaled_dot_product_attention.default


class Attention(nn.Module):
    """Attention over ``[batch, heads, tokens, head_dim]`` with a mask made from the tokens' number."""

    def __init__(self, mask: Callable[[Tensor], Tensor], **options: Any):
        super().__init__()
        self.mask, self.options = mask, options
        self.bias = nn.Parameter(torch.zeros(()))
        self.register_buffer("stored", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        mask = self.mask(x)
        if mask.is_floating_point() and self.options.get("learnt"):
            mask = mask + self.bias
        if mask.is_floating_point() and self.options.get("stored"):
            mask = mask * self.stored
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask, scale=0.5)


def capture(mask: Callable[[Tensor], Tensor], **options: Any) -> tuple[nn.Module, GraphModule]:
    """Captures with a free batch and a free number of tokens."""
    model = Attention(mask, **options)
    sizes = {0: Dim.AUTO, 2: Dim.AUTO}
    program = torch.export.export(model, (torch.randn(3, 2, 7, 8),), dynamic_shapes=(sizes,), strict=False)
    return model, program.module(check_guards=False)


def positions(x: Tensor) -> tuple[Tensor, Tensor]:
    index = torch.arange(x.shape[2], device=x.device)
    return index[:, None], index[None, :]


def compare(x: Tensor) -> Tensor:
    query, key = positions(x)
    return key <= query


def expanded(x: Tensor) -> Tensor:
    return compare(x)[None, None].expand(x.shape[0], 2, -1, -1)


def lower(x: Tensor) -> Tensor:
    return torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).tril()


def additive(x: Tensor) -> Tensor:
    hidden = torch.full((x.shape[2], x.shape[2]), torch.finfo(x.dtype).min)
    return hidden.triu(1)


def infinite(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[2], x.shape[2]).masked_fill(~compare(x), float("-inf"))


def written(x: Tensor) -> Tensor:
    mask = torch.zeros(x.shape[2], x.shape[2])
    mask[:, :].masked_fill_(~compare(x), float("-inf"))
    return mask


@pytest.mark.parametrize("mask", [compare, expanded, lower, additive, infinite, written])
def test_lower_triangles_are_causal(mask: Callable[[Tensor], Tensor]) -> None:
    model, gm = capture(mask)
    assert drop_open_masks(gm) == 0
    assert restore_is_causal(gm) == 1
    gm.graph.lint()
    gm.recompile()
    (attention,) = gm.graph.find_nodes(op="call_function", target=SDPA)
    assert attention.args[3:] == (None, 0.0, True) and attention.kwargs == {"scale": 0.5}
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.arange.default) or mask is written
    for sizes in ((3, 2, 7, 8), (1, 2, 40, 8), (5, 2, 2, 8)):
        x = torch.randn(sizes)
        torch.testing.assert_close(gm(x), model(x))


def test_a_type_that_is_taken_from_a_value_does_not_matter() -> None:
    model, gm = capture(lambda x: infinite(x).type_as(x).to(x) + torch.zeros_like(x[0, 0, :, :1]))
    assert restore_is_causal(gm) == 1
    gm.recompile()
    x = torch.randn(5, 2, 9, 8)
    torch.testing.assert_close(gm(x), model(x))


def window(x: Tensor) -> Tensor:
    query, key = positions(x)
    return (key <= query) & (key > query - 30)


def long_window(x: Tensor) -> Tensor:
    query, key = positions(x)
    return (key <= query) & (key > query - 100_000)


def padding(x: Tensor) -> Tensor:
    return compare(x) & (x[:, :1, None, :, 0] > -100)


def shifted(x: Tensor) -> Tensor:
    query, key = positions(x)
    return key <= query + 1


def reversed_order(x: Tensor) -> Tensor:
    return compare(x).T


def soft(x: Tensor) -> Tensor:
    return torch.full((x.shape[2], x.shape[2]), -10.0).triu(1)


def overwritten(x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).tril()
    mask[:, :1].fill_(False)
    return mask


def drawn(x: Tensor) -> Tensor:
    return compare(x) & (torch.rand(x.shape[2], x.shape[2]) >= 0.0)


@pytest.mark.parametrize(
    "mask", [window, long_window, padding, shifted, reversed_order, soft, overwritten, drawn]
)  # fmt: skip
def test_other_masks_stay(mask: Callable[[Tensor], Tensor]) -> None:
    _, gm = capture(mask)
    before = str(gm.graph)
    assert restore_is_causal(gm) == drop_open_masks(gm) == 0
    assert str(gm.graph) == before


@pytest.mark.parametrize("option", ["learnt", "stored"])
def test_masks_that_hold_state_stay(option: str) -> None:
    _, gm = capture(infinite, **{option: True})
    assert restore_is_causal(gm) == 0


def test_masks_that_hide_nothing() -> None:
    model, gm = capture(lambda x: compare(x) | compare(x).T)
    assert restore_is_causal(gm) == 0
    assert drop_open_masks(gm) == 1
    gm.recompile()
    x = torch.randn(2, 2, 9, 8)
    torch.testing.assert_close(gm(x), model(x))
    _, gm = capture(lambda x: (positions(x)[0] - positions(x)[1]).abs() < 30)  # local attention
    assert drop_open_masks(gm) == 0


def test_queries_and_keys_of_other_lengths() -> None:
    """``is_causal`` lines the first query up with the first key, which a mask over a longer past does not."""

    class Past(nn.Module):
        def forward(self, x: Tensor, past: Tensor) -> Tensor:
            keys = torch.cat([past, x], 2)
            mask = torch.ones(x.shape[2], keys.shape[2], dtype=torch.bool).tril(past.shape[2])
            return F.scaled_dot_product_attention(x, keys, keys, attn_mask=mask)

    sizes = {2: Dim.AUTO}
    inputs = (torch.randn(2, 2, 5, 8), torch.randn(2, 2, 3, 8))
    program = torch.export.export(Past(), inputs, dynamic_shapes=(sizes, sizes), strict=False)
    gm = program.module(check_guards=False)
    assert restore_is_causal(gm) == drop_open_masks(gm) == 0


def test_grouped_queries_and_dropout_are_kept() -> None:
    class Grouped(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(
                q, k, k, attn_mask=compare(q), dropout_p=0.25, scale=0.3, enable_gqa=True
            )

    inputs = (torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8))
    gm = torch.export.export(Grouped(), inputs, strict=False).module(check_guards=False)
    assert restore_is_causal(gm) == 1
    (attention,) = gm.graph.find_nodes(op="call_function", target=SDPA)
    assert attention.args[3:] == (None, 0.25, True)
    assert attention.kwargs == {"scale": 0.3, "enable_gqa": True}
