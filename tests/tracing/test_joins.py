"""Keys that are joined to those of a cache that holds nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxsparse

cat = torch.ops.aten.cat.default


class Joining(nn.Module):
    def __init__(self, parts: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear, self.parts, self.dtype = nn.Linear(8, 8), parts, dtype

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return torch.cat([torch.tensor([], dtype=self.dtype), *[x] * self.parts], -1)


@pytest.mark.parametrize("parts", [1, 2])
def test_nothing_is_left_out_of_what_is_joined(parts: int) -> None:
    model = Joining(parts, torch.float32)
    gm = fxsparse.trace(model, (torch.randn(3, 8),))
    left = [len(node.args[0]) for node in gm.graph.find_nodes(op="call_function", target=cat)]
    assert left == ([] if parts == 1 else [2])
    x = torch.randn(5, 8)
    torch.testing.assert_close(gm(x), model(x))


def test_nothing_of_another_dtype_stays() -> None:
    """It says what dtype the result has."""
    model = Joining(1, torch.float64)
    gm = fxsparse.trace(model, (torch.randn(3, 8),))
    assert gm(torch.randn(5, 8)).dtype == torch.float64
