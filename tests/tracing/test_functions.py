"""``torch.autograd.Function``: a graph keeps its forward, so its backward has to be the forward's derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.errors import FxsparseError, TraceError
from fxsparse.ops.nm import Pattern, nm_mask


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class Rounded(torch.autograd.Function):
    """Its gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.mul(4).round().div(4)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Model(nn.Module):
    def __init__(self, function: type[torch.autograd.Function], *, only_in_training: bool = False, p: float = 0.0):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)
        self.function, self.only_in_training, self.dropout = function, only_in_training, nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.first(x))
        y: Tensor = self.second(self.function.apply(h) if self.training or not self.only_in_training else h)
        return y


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_backward_that_is_the_derivative_is_kept(training: bool, p: float) -> None:
    model, x = Model(Square, p=p).train(training), torch.randn(4, 8)
    gm = fxsparse.trace(model, (x,)).eval()
    for module in (model.eval(), gm):
        module.zero_grad()
        module(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gm.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize("only_in_training", [False, True])
def test_another_backward_is_refused(only_in_training: bool) -> None:
    model = Model(Rounded, only_in_training=only_in_training)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    why = r"training computes something" if only_in_training else r"Rounded has a backward .*of first.*custom_op"
    with pytest.raises(TraceError, match=f"(?s){why}"):
        fxsparse.trace(model, (torch.randn(4, 8),))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters()) and model.training


def test_the_way_that_the_refusal_names_works() -> None:
    class Passing(Model):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            y: Tensor = self.second(h + (h.mul(4).round().div(4) - h).detach())
            return y

    model, x = Passing(Rounded), torch.randn(4, 8)
    gm = fxsparse.trace(model, (x,))
    for module in (model, gm):
        module.zero_grad()
        module(x).square().sum().backward()
        assert module.get_parameter("first.weight").grad.any()
    torch.testing.assert_close(gm(x), Model.forward(model, x))


@torch.library.custom_op("fxsparse_tests::rounded", mutates_args=())
def rounded(x: Tensor) -> Tensor:
    return x.mul(4).round().div(4)


rounded.register_fake(torch.empty_like)
rounded.register_autograd(lambda ctx, grad: grad)


class Operator(Model):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(rounded(self.first(x)))
        return y


def test_an_operator_keeps_its_backward_everywhere() -> None:
    model, x = Operator(Rounded), torch.randn(4, 8)
    model(x).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    compiled = torch.compile(model, backend="fxsparse", options={"compiler": "aot_eager", "fallback": False})
    for module in (fxsparse.trace(model, (x,)), compiled):
        module.zero_grad()
        module(x).square().sum().backward()
        for name, gradient in expected.items():
            torch.testing.assert_close(module.get_parameter(name).grad, gradient)
    masked = fxsparse.rewrite(model, "nm-masks{keep_first=false,keep_head=false,storage=masked}", (x,))
    masked(x).square().sum().backward()
    assert masked.get_parameter("first.weight").grad.any()


OPTIONS = {"compiler": "aot_eager", "fallback": False}
MASKS = "nm-masks{keep_first=false,keep_head=false}"


@pytest.mark.parametrize("function", [Square, Rounded])
def test_the_bare_call_keeps_a_backward(function: Any) -> None:
    model, x = Model(function), torch.randn(4, 8)
    with torch.no_grad():
        model.second.weight.mul_(nm_mask(model.second.weight.abs(), Pattern(2, 4)))
    model.second.requires_grad_(False)
    model(x).square().sum().backward()
    expected = model.first.weight.grad
    model.zero_grad()
    compiled = torch.compile(model, backend="fxsparse", options={**OPTIONS, "lower": {"nm_linear": "compressed"}})
    compiled(x).square().sum().backward()
    torch.testing.assert_close(model.first.weight.grad, expected)


def test_the_one_line_call_keeps_a_backward_or_refuses_it() -> None:
    x = torch.randn(4, 8)
    model = Model(Square)
    gm = fxsparse.rewrite(model, MASKS.replace("{", "{storage=masked,"), (x,))
    compiled = torch.compile(model, backend="fxsparse", options={**OPTIONS, "passes": MASKS})
    for module in (gm, compiled):
        module(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gm.get_parameter(name).grad)
    torch._dynamo.reset()
    compiled = torch.compile(Model(Rounded), backend="fxsparse", options={**OPTIONS, "passes": MASKS})
    with pytest.raises(FxsparseError, match=r"Rounded has a backward of its own.*custom_op"):
        compiled(x)
    with torch.no_grad():
        assert compiled(x).shape == x.shape
