"""Functions inserted into graphs: against eager torch, at several sizes, in both modes, with the same random draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import fxsparse
from fxsparse import graph as fx
from fxsparse.errors import RewriteError

aten = torch.ops.aten


class Scaled(nn.Module):
    """A linear with a parameter and a buffer that only inserted functions read."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 12)
        self.scale = nn.Parameter(torch.rand(12) + 0.5)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def traced(dtype: torch.dtype = torch.float32) -> tuple[GraphModule, Node]:
    """The graph of a model, and the node of its linear."""
    gm = fxsparse.trace(Scaled().to(dtype), (torch.randn(4, 6, 8, dtype=dtype),), dynamic_sequence=True)
    (node,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    return gm, node


def transformed(gm: GraphModule, node: Node, fn: Callable[..., Any], *inputs: Any) -> Node:
    result = fx.transform(gm, node, fn, *inputs)
    gm.graph.lint()
    gm.recompile()
    return result


def linear(gm: GraphModule, x: Tensor) -> Tensor:
    return F.linear(x, gm.get_parameter("linear.weight"), gm.get_parameter("linear.bias"))


def set_mode(gm: GraphModule, training: bool) -> None:
    for module in gm.modules():
        module.training = training


SHAPES = [(4, 6), (1, 6), (7, 3), (2, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_function_equals_eager_at_other_sizes(dtype: torch.dtype) -> None:
    def heads(y: Tensor, scale: Tensor) -> Tensor:
        split = (y * scale).view(y.shape[0], y.shape[1], 3, -1).transpose(1, 2)
        return (split - split.mean(-2, keepdim=True)).transpose(1, 2).reshape(*y.shape[:2], -1) / y.shape[1]

    gm, node = traced(dtype)
    result = transformed(gm, node, heads, "scale")
    assert fx.value(result).shape == fx.value(node).shape and fx.value(result).dtype == dtype
    for shape in SHAPES:
        x = torch.randn(*shape, 8, dtype=dtype)
        assert torch.equal(gm(x), heads(linear(gm, x), gm.get_parameter("scale")))


def test_gradients_equal_eager() -> None:
    def halved(y: Tensor, scale: Tensor) -> Tensor:
        with torch.no_grad():
            norm = y.abs().amax()
        return torch.where(y > 0, y * scale, (y * 0.5).detach()) / norm

    gm, node = traced()
    transformed(gm, node, halved, "scale")
    parameters = [gm.get_parameter(name) for name in ("linear.weight", "linear.bias", "scale")]
    x = torch.randn(5, 3, 8, requires_grad=True)
    expected = torch.autograd.grad(halved(linear(gm, x), parameters[2]).square().sum(), [x, *parameters])
    for gradient, ours in zip(expected, torch.autograd.grad(gm(x).square().sum(), [x, *parameters]), strict=True):
        torch.testing.assert_close(ours, gradient)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("training", [True, False])
def test_dropout_and_draws_are_those_of_eager_with_the_same_seed(training: bool) -> None:
    def noisy(y: Tensor, scale: Tensor, training: bool) -> Tensor:
        y = F.dropout(y, 0.3, training) + training * (torch.rand_like(y) + torch.randn(y.shape[1], 1))
        return F.scaled_dot_product_attention(y, y, y * scale, dropout_p=0.4 if training else 0.0)

    gm, node = traced()
    state = torch.get_rng_state()
    transformed(gm, node, noisy, "scale", "linear.training")
    assert torch.equal(torch.get_rng_state(), state), "tracing drew numbers"
    set_mode(gm, training)
    for shape in SHAPES:
        x = torch.randn(*shape, 8)
        torch.manual_seed(3)
        ours = gm(x)
        torch.manual_seed(3)
        assert torch.equal(ours, noisy(linear(gm, x), gm.get_parameter("scale"), training))
    set_mode(gm, True)
    gm.get_submodule("linear").training = False
    assert torch.equal(gm(x), gm(x)), "the flag is not that of the module named"


def test_a_function_of_sizes_gives_several_results() -> None:
    def parts(y: Tensor, scale: Tensor, options: dict[str, Any]) -> dict[str, Any]:
        rows = y.shape[0]
        pairs = (rows + options["n"] - 1) // options["n"]
        return {"sizes": (rows, pairs), "results": [y[:, :1] * scale, (None, y)], "steps": torch.arange(pairs)}

    gm, node = traced()
    found = fx.insert_function(gm, parts, node, "scale", {"n": 2}, before=node.next)
    rows, pairs = found["sizes"]
    first, (nothing, same) = found["results"]
    assert nothing is None and same is node
    assert fx.value(rows).node.expr == fx.value(node).shape[0].node.expr
    returned = gm.graph.output_node()
    returned.args = ((first,),)
    inputs = (found["steps"], pairs)
    taken = fx.transform(gm, first, lambda y, steps, n: y.sum() + steps.sum() + n, *inputs, before=returned)
    assert returned.args == ((taken,),)
    gm.recompile()
    for rows in (4, 7):
        x, groups = torch.randn(rows, 3, 8), (rows + 1) // 2
        expected = (linear(gm, x)[:, :1] * gm.get_parameter("scale")).sum() + groups * (groups - 1) // 2 + groups
        torch.testing.assert_close(gm(x), expected)


def test_new_nodes_take_the_module_path_and_only_read_state_is_read() -> None:
    gm, node = traced()
    last = node.next
    before = set(gm.graph.nodes)
    result = fx.insert_function(
        gm, lambda y, scale, count: y * scale + 1, node, "scale", "count", before=last, like=node
    )
    new = set(gm.graph.nodes) - before
    assert {n.op for n in new} == {"get_attr", "call_function"} and len(new) == 3 and result in new
    assert {fx.stack_path(n) for n in new} == {"linear"}
    assert all("val" in n.meta and n.meta["nn_module_stack"] == node.meta["nn_module_stack"] for n in new)
    assert not [n for n in gm.graph.find_nodes(op="get_attr") if n.target == "count"]


def test_a_buffer_is_written_in_place() -> None:
    def count(total: Tensor, y: Tensor) -> None:
        total.add_(y.detach().abs().mean())

    gm, node = traced()
    assert fx.insert_function(gm, count, "count", node, before=node.next) is None
    fx.eliminate_dead_code(gm)
    gm.recompile()
    x = torch.randn(2, 3, 8)
    gm(x), gm(x)
    torch.testing.assert_close(gm.get_buffer("count"), 2 * linear(gm, x).abs().mean())


def test_a_module_is_inserted_with_its_state_and_its_mode() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.dropout = nn.LayerNorm(12), nn.Dropout(0.5)
            self.unused = nn.Parameter(torch.zeros(3))

        def forward(self, y: Tensor, mask: Tensor | None) -> Tensor:
            return self.dropout(self.norm(y)) if mask is None else y * mask

    gm, node = traced()
    branch = Branch()
    fx.adopt(gm, "linear.branch", branch)
    result = fx.insert_module(gm, "linear.branch", branch, node, None, before=node.next)
    assert branch.dropout.training and fx.stack_path(result) == "linear.branch"
    gm.graph.output_node().args = ((result,),)
    gm.graph.lint()
    gm.recompile()
    reads = {str(read.target) for read in gm.graph.find_nodes(op="get_attr")}
    assert {"linear.branch.norm.weight", "linear.branch.training"} < reads and "linear.branch.unused" not in reads
    for training in (True, False):
        set_mode(gm, training)
        x = torch.randn(5, 2, 8)
        torch.manual_seed(1)
        ours = gm(x)
        torch.manual_seed(1)
        assert torch.equal(ours, branch.train(training)(linear(gm, x), None))
    ours.sum().backward()
    assert branch.norm.weight.grad is not None


def test_a_compiled_graph_follows_the_mode() -> None:
    gm, node = traced()
    transformed(gm, node, lambda y, training: y + training * y.square(), "training")
    compiled = torch.compile(gm, backend="aot_eager")
    for training in (True, False, True):
        set_mode(gm, training)
        x = torch.randn(3, 2, 8)
        y = linear(gm, x)
        torch.testing.assert_close(compiled(x), y + y.square() if training else y)


OUTSIDE = torch.ones(12)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda y: y * y.sum().item(), "reads the values of a tensor"),
        (lambda y: y if y.sum() > 0 else -y, "reads the values of a tensor"),
        (lambda y: y[y > 0].sum() + y, "reads the values of a tensor"),
        (lambda y: y / int(y.shape[0]), "holds for the traced size .* only"),
        (lambda y: y * OUTSIDE, "not among its inputs"),
        (lambda y: y * torch.tensor([1.0, 2.0, 3.0]).sum(), "not among its inputs"),
    ],
)
def test_functions_that_no_graph_can_hold_are_refused(fn: Callable[[Tensor], Tensor], message: str) -> None:
    gm, node = traced()
    code, shape = str(gm.graph), str(fx.value(node).shape)
    with pytest.raises(RewriteError, match=rf"linear: .*{message}"):
        fx.transform(gm, node, lambda y, scale: fn(y) * scale, "scale")
    assert str(gm.graph) == code and str(fx.value(node).shape) == shape


def test_a_function_that_branches_on_the_mode_is_refused() -> None:
    gm, node = traced()
    with pytest.raises(RewriteError, match=r"other operators with training than without"):
        fx.transform(gm, node, lambda y, training: y.relu() if training else y, "training")
    with pytest.raises(RewriteError, match=r"other operators with training than without"):
        fx.transform(gm, node, lambda y, training: y * (3 if training else 2), "training")
