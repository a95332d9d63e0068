"""Kept values of a dense weight, and the way back."""

from __future__ import annotations

import pytest
import torch

from fxsparse.errors import RewriteError
from fxsparse.ops import nm
from fxsparse.ops.nm import Pattern
from fxsparse.ops.nm_values import nm_spread, nm_values


@pytest.mark.parametrize("pattern", [Pattern(1, 2), Pattern(2, 4), Pattern(2, 8)], ids=str)
def test_each_undoes_the_other_and_is_its_gradient(pattern: Pattern) -> None:
    weight = torch.randn(6, 24, dtype=torch.float64, requires_grad=True)
    mask = nm.nm_mask(weight.detach().abs(), pattern)
    values, indices = nm.pack(weight.detach(), mask, pattern)
    n, m = pattern.n, pattern.m
    torch.testing.assert_close(nm_values(weight, indices, n, m), values)
    torch.testing.assert_close(nm_spread(values, indices, 24, n, m), weight.detach() * mask)
    torch.library.opcheck(nm_values.overload, (weight, indices, n, m))
    torch.library.opcheck(nm_spread.overload, (values, indices, 24, n, m))
    assert torch.autograd.gradcheck(lambda w: nm_values(w, indices, n, m), weight)


def test_indices_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RewriteError, match="indices is"):
        nm_values(torch.randn(4, 16), torch.zeros(4, 3, dtype=torch.uint8), 2, 4)
    with pytest.raises(RewriteError, match="values is"):
        nm_spread(torch.randn(4, 4), torch.zeros(4, 2, dtype=torch.uint8), 16, 2, 4)
