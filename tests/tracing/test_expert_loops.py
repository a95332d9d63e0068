"""Experts that transformers calls in a loop over those that are hit."""

from __future__ import annotations

import copy

import pytest
import torch

import fxsparse
from fxsparse.errors import TraceError
from tests.support.experts import mixtral


def test_a_loop_over_experts_is_refused_with_the_other_way() -> None:
    family = mixtral()
    model = copy.deepcopy(family.model)
    model.set_experts_implementation("eager")  # type: ignore[attr-defined]
    with pytest.raises(TraceError, match=r'model\.set_experts_implementation\("grouped_mm"\)'):
        fxsparse.trace(model, kwargs=family.make_batch(batch=3))
    model.set_experts_implementation("grouped_mm")  # type: ignore[attr-defined]
    gm = fxsparse.trace(model, kwargs=family.make_batch(batch=3)).eval()
    batch = family.make_batch(batch=2)
    with torch.no_grad():
        torch.testing.assert_close(gm(**batch).logits, model.eval()(**batch).logits, rtol=1e-4, atol=1e-5)
