"""A graph that computes something else than its model is refused when it is captured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from fxsparse.errors import TraceError
from fxsparse.graph.record import TRACE_KEY
from fxsparse.tracing.trace import trace


class AsksWhetherItIsTraced(nn.Module):
    """As libraries do that build a mask only for a trace."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        causal = torch.compiler.is_exporting()
        q = self.linear(x)[:, None]
        return {"hidden": x + 1, "attended": F.scaled_dot_product_attention(q, q, q, is_causal=causal)}


class Routed(nn.Module):
    """The order of two numbers that are equal but for rounding decides; the first call, a trace, sees another one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(64))

    def forward(self, x: Tensor) -> Tensor:
        forwards = (self.weight * x).sum(-1)
        backwards = (self.weight.flip(0) * x.flip(-1)).sum(-1)
        traced = torch.compiler.is_exporting()
        close = forwards - backwards + (1e-9 if traced else -1e-9) * forwards
        return torch.where(close > 0, 1.0, -1.0)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.dropout(self.norm(self.linear(x)), 0.5) * self.calls


def test_a_mask_that_only_the_trace_has_is_refused() -> None:
    with pytest.raises(TraceError, match=r"AsksWhetherItIsTraced: .*something else.*attended.*pass what it is made of"):
        trace(AsksWhetherItIsTraced(), (torch.randn(2, 5, 6),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_every_precision(dtype: torch.dtype) -> None:
    with pytest.raises(TraceError, match="something else"):
        trace(AsksWhetherItIsTraced().to(dtype), (torch.randn(2, 5, 6, dtype=dtype),))


def test_a_model_that_rounding_decides_is_noted() -> None:
    notes = trace(Routed(), (torch.rand(40, 64),)).meta[TRACE_KEY].notes
    assert any("as the model's own do by rounding" in note for note in notes), notes


def test_nothing_changes_by_it() -> None:
    model, x = Counts(), torch.randn(3, 4, requires_grad=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.norm.eval()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    gm = trace(model, (x,))
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert model.training and not model.norm.training and x.grad is None
    assert gm.training
    for module in (model, gm):
        for name, tensor in module.state_dict().items():
            torch.testing.assert_close(tensor, state[name], rtol=0, atol=0, msg=name)
    gm(x).sum().backward()
    assert gm.get_buffer("calls") == 1 and x.grad is not None


def test_an_example_that_the_model_cannot_run_is_noted() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4))
    (note,) = (note for note in trace(model, (torch.full((2, 3), 11),)).meta[TRACE_KEY].notes if "compared" in note)
    assert "does not run on the example: IndexError" in note


def test_models_without_values_are_not_compared() -> None:
    with torch.device("meta"):
        model, x = AsksWhetherItIsTraced(), torch.randn(2, 5, 6)
    assert not any("compared" in note for note in trace(model, (x,)).meta[TRACE_KEY].notes)
    with FakeTensorMode():
        model, x = nn.Linear(4, 4), torch.randn(2, 4)
        trace(model, (x,))
