"""What follows a linear in a graph, told as an epilogue; and the operators that carry it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from fxsparse.codegen.epilogue import Epilogue
from fxsparse.codegen.fused_ops import nm_linear_epilogue, sparse_tensor_core_linear, sparse_wgmma_linear
from fxsparse.codegen.kernels.demux_linear import DemuxLinear
from fxsparse.codegen.metadata import pack_metadata, pack_wgmma_metadata
from fxsparse.codegen.spec import Tile
from fxsparse.errors import OptionError
from fxsparse.lowering.fusion import following, fuse_linears
from fxsparse.ops.nm import Pattern, nm_mask, pack

PATTERN = Pattern(2, 4)
WEIGHT = torch.randn(24, 32)
VALUES, INDICES = pack(WEIGHT, nm_mask(WEIGHT.abs(), PATTERN), PATTERN)
BIAS = torch.randn(24)


def linear(x: Tensor) -> Tensor:
    return torch.ops.fxsparse.nm_linear(x, VALUES, INDICES, None, BIAS, 2, 4)


def chain(function, *inputs: Tensor):
    gm = make_fx(function, pre_dispatch=True, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    start = next(node for node in gm.graph.nodes if node.target is torch.ops.fxsparse.nm_linear.default)
    return gm, following(start)


@pytest.mark.parametrize(
    ("function", "steps"),
    [
        (lambda x, g, r: F.gelu(linear(x)), "gelu"),
        (lambda x, g, r: F.gelu(linear(x), approximate="tanh") + r, "gelu_tanh add"),
        (lambda x, g, r: r + F.silu(linear(x)) * g, "silu mul add"),
        (lambda x, g, r: torch.tanh(F.relu(linear(x))), "relu tanh"),
        (lambda x, g, r: g * linear(x), "mul"),
    ],
)
def test_chains_that_are_understood(function, steps):
    x, gate, residual = torch.randn(5, 32), torch.randn(5, 24), torch.randn(5, 24)
    with torch.no_grad():
        gm, found = chain(function, x, gate, residual)
        assert " ".join(found.steps) == steps
        assert len(found) == len(found.steps)
        assert fuse_linears(gm) == len(found)
        calls = [node.target for node in gm.graph.nodes if node.op == "call_function"]
        assert calls == [torch.ops.fxsparse.nm_linear_epilogue.default]
        torch.testing.assert_close(gm(x, gate, residual), function(x, gate, residual))


@pytest.mark.parametrize(
    ("function", "steps"),
    [
        (lambda x, g: torch.sigmoid(linear(x)), ""),
        (lambda x, g: F.relu(linear(x)) * 2, "relu"),
        (lambda x, g: linear(x) * g[:1], ""),
        (lambda x, g: torch.add(linear(x), g, alpha=2), ""),
        (lambda x, g: (lambda y: y * y)(F.relu(linear(x))), "relu"),
        (lambda x, g: (lambda y: (F.relu(y), F.silu(y)))(linear(x)), ""),
        (lambda x, g: linear(x) + g.double(), ""),
        (lambda x, g: F.gelu(linear(x)).sum(), "gelu"),
    ],
)
def test_what_is_not_understood_stays_outside(function, steps):
    x, gate = torch.randn(5, 32), torch.randn(5, 24)
    with torch.no_grad():
        gm, found = chain(function, x, gate)
        assert " ".join(found.steps) == steps
        fuse_linears(gm)
        torch.testing.assert_close(gm(x, gate), function(x, gate))


def test_an_operand_computed_after_the_linear():
    def function(x: Tensor, g: Tensor) -> Tensor:
        y = linear(x)
        return F.silu(y) * torch.exp(g)

    x, gate = torch.randn(5, 32), torch.randn(5, 24)
    with torch.no_grad():
        gm, found = chain(function, x, gate)
        assert found.steps == ("silu", "mul")
        fuse_linears(gm)
        torch.testing.assert_close(gm(x, gate), function(x, gate))


def test_linears_that_are_unwanted_are_left_alone():
    with torch.no_grad():
        gm, _ = chain(lambda x: F.relu(linear(x)), torch.randn(5, 32))
        assert fuse_linears(gm, unwanted=lambda node: True) == 0
        assert any(node.target is torch.ops.fxsparse.nm_linear.default for node in gm.graph.nodes)


def test_operators_pass_opcheck():
    x, gate = torch.randn(2, 5, 32), torch.randn(2, 5, 24)
    torch.library.opcheck(nm_linear_epilogue, (x, VALUES, INDICES, BIAS, 2, 4, "silu mul", [gate]))
    expected = F.gelu(F.linear(x, WEIGHT * nm_mask(WEIGHT.abs(), PATTERN)))
    for op, words in ((sparse_tensor_core_linear, pack_metadata), (sparse_wgmma_linear, pack_wgmma_metadata)):
        torch.library.opcheck(op, (x, VALUES, words(INDICES), None, "gelu", []))
        torch.testing.assert_close(op(x, VALUES, words(INDICES), None, "gelu", []), expected)


def test_a_gated_epilogue_makes_one_column_of_two():
    x, operand = torch.randn(2, 5, 32), torch.randn(2, 5, 12)
    args = (x, VALUES, INDICES, BIAS, 2, 4, "gated_gelu add", [operand])
    torch.library.opcheck(nm_linear_epilogue, args)
    product = F.linear(x, WEIGHT * nm_mask(WEIGHT.abs(), PATTERN), BIAS)
    torch.testing.assert_close(nm_linear_epilogue(*args), F.gelu(product[..., ::2]) * product[..., 1::2] + operand)


def test_operators_compile():
    class Layer(nn.Module):
        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return nm_linear_epilogue(x, VALUES, INDICES, BIAS, 2, 4, "silu mul", [gate])

    x, gate = torch.randn(5, 32), torch.randn(5, 24)
    layer = Layer()
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x, gate), layer(x, gate))
    exported = torch.export.export(layer, (x, gate)).module()
    torch.testing.assert_close(exported(x, gate), layer(x, gate))


def test_epilogues_check_and_print():
    assert str(Epilogue(True, ("gelu", "mul"))) == "bias -> gelu -> mul"
    assert Epilogue(True, ("mul", "relu")).formula("x") == "relu((x + bias) * operand0)"
    assert Epilogue(False, ("gated_silu", "add")).formula("x") == "gated_silu(x) + operand0"
    for wrong in (("softmax",), ("gated_softmax",), ("gated_mul",), ("relu", "gated_silu")):
        with pytest.raises(OptionError, match=f"no epilogue step '{wrong[-1]}'"):
            Epilogue(False, wrong)
    with pytest.raises(OptionError, match="this kernel has no step 'gated_silu'"):
        DemuxLinear("float32", Tile(16, 16, 16), 2, epilogue=Epilogue(False, ("gated_silu",))).render()
