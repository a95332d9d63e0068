"""Side inputs of a core that runs at another batch size: made again, or merged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxsparse
from fxsparse.errors import RewriteError
from fxsparse.passes import Multiplex


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.heads, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self.heads(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind()
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return x + self.out(attended.transpose(1, 2).flatten(2))


class Windowed(nn.Module):
    """A window over the last three tokens, in a mask with a row for each of the batch."""

    def __init__(self, like: str) -> None:
        super().__init__()
        self.like = like
        self.embedding, self.head = nn.Embedding(20, 16), nn.Linear(16, 20)
        self.layers = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, ids: Tensor) -> Tensor:
        rows, tokens = ids.shape
        like = ids if self.like == "input" else self.embedding.weight
        mask = like.new_ones((rows, 1, tokens, tokens)).bool().tril().triu(-2)
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x)


@pytest.mark.parametrize("like", ["input", "parameter"])
def test_a_mask_of_the_dtype_and_device_of_a_tensor_is_made_again(like: str) -> None:
    model = Windowed(like)
    gm = fxsparse.rewrite(model, [Multiplex(2)], (torch.randint(20, (4, 6)),)).eval()
    assert gm.graph.find_nodes(op="call_function", target=torch.ops.aten.new_ones.default)
    ids = torch.randint(20, (6, 6))
    once = gm(ids)
    assert once.shape == (6, 6, 20)
    other = ids.clone()
    other[0, 5] = (ids[0, 5] + 1) % 20  # of the first member of the first group
    differs = (gm(other) != once).any(-1)
    assert differs[:2, 5].all() and not differs[:, :5].any() and not differs[2:].any()


class Routed(nn.Module):
    """Splits the rows by their values, as JetMoe's experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        expert, order = (rows[:, 0] > 0).long().sort()
        counts = (expert[:, None] == torch.arange(2)).sum(0).tolist()
        parts = rows[order].split(counts)
        routed = torch.cat([layer(part) for layer, part in zip(self.experts, parts, strict=True)])
        return x + torch.zeros_like(rows).index_add(0, order, routed).view_as(x)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 16), nn.Linear(16, 20)
        self.layers = nn.ModuleList([Routed() for _ in range(2)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_sizes_that_data_decides_are_refused() -> None:
    with pytest.raises(
        RewriteError, match=r"layers\.0.* in the core has a size that data decides.*leave this pass out"
    ):
        fxsparse.rewrite(Mixture(), [Multiplex(2)], (torch.randint(20, (4, 6)),))
