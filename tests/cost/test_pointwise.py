"""FLOPs of biases, norms, activations and tables: closed forms, and the operators that autograd really runs."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxsparse.cost.backprop import BackpropGraph
from fxsparse.cost.flops import count_flops
from fxsparse.passes import SelectTensors
from fxsparse.tracing.trace import trace
from tests.support.traced import traced

WIDTH, TABLE = 8, 11


class Block(nn.Module):
    """A table, and a transformer layer of one head written out, on ``ids [batch, tokens]``."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(TABLE, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.randn(WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        h = self.first(x)
        weights = torch.softmax(self.q(h) @ self.k(h).transpose(1, 2) * 0.5, -1)
        x = x + weights @ self.v(h)
        return (x + self.down(F.gelu(self.up(self.second(x)))) * self.scale).sum()


class Counter(TorchDispatchMode):
    """Sums the FLOPs of the operators that run, each by the convention of `fxsparse.cost.pointwise`."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.flops += self.of(func.overloadpacket._qualified_op_name.removeprefix("aten::"), args)
        return result

    @staticmethod
    def of(name: str, args: Any) -> int:
        size = args[0].numel() if args and isinstance(args[0], Tensor) else 0
        if name in {"mm", "bmm"}:
            return 2 * size * args[1].shape[-1]
        if name == "native_layer_norm_backward":
            return sum(wanted * flops * size for wanted, flops in zip(args[-1], (8, 2, 1), strict=True))
        once = {"mul": 1, "sum": 1, "gelu_backward": 11, "_softmax_backward_data": 4, "embedding_dense_backward": 1}
        return once.get(name, 0) * size


def test_the_backward_pass_of_any_selection_costs_what_its_operators_do() -> None:
    """Additions that accumulate gradients are not counted, here nor there."""
    ids, model, rng = torch.randint(TABLE, (2, 5)), Block(), random.Random(0)
    graph = BackpropGraph(trace(model, (ids,)), pointwise=True)
    names = sorted(graph.trainable)
    for _ in range(40):
        trained = rng.sample(names, rng.choice([1, 1, 2, 4, len(names)]))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        loss = model(ids)
        with Counter() as counter:
            loss.backward()
        assert graph.cost(trained) == counter.flops, trained


def test_closed_forms() -> None:
    rows, model = 6, nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4, bias=False))
    gm = trace(model, (torch.randn(rows, 8),))
    graph, hidden, product = BackpropGraph(gm, pointwise=True), rows * 16, 2 * rows * 16 * 4
    assert graph.forward() == 2 * rows * 8 * 16 + hidden + 5 * hidden + 7 * hidden + product
    assert graph.cost({"2.bias"}) == product + hidden
    assert graph.cost({"2.weight"}) == product + 2 * hidden
    assert graph.cost({"0.bias"}) == product + 8 * hidden + 11 * hidden + hidden
    assert graph.cost({"0.weight", "0.bias"}) == graph.cost({"0.bias"}) + 2 * rows * 8 * 16
    (batch,) = graph.expression({"0.bias"}).free_symbols
    assert graph.expression({"0.bias"}).subs(batch, rows) == graph.cost({"0.bias"})
    assert count_flops(gm, pointwise=True).forward == graph.forward() > count_flops(gm).forward


@pytest.mark.parametrize("name", ["opt", "llama", "t5", "bert"])
def test_products_of_models_cost_the_same_and_everything_else_something(name: str) -> None:
    family, gm = traced(name)
    with_rest, products = BackpropGraph(gm, pointwise=True), BackpropGraph(gm)
    assert not with_rest.uncounted
    assert products.forward() < with_rest.forward() < 2 * products.forward()
    for norm in (key for key in products.trainable if "norm" in key.lower()):
        assert products.networkx.in_degree(norm, weight="flops") == 0
        assert with_rest.networkx.in_degree(norm, weight="flops") > 0
    small, large = (with_rest.full(**family.make_batch(batch=batch)) for batch in (2, 4))
    assert math.isclose(large, 2 * small, rel_tol=0.02)


def test_a_budget_may_count_everything() -> None:
    _, gm = traced("opt")
    names = sorted(BackpropGraph(gm).trainable)
    importance = {name: random.Random(name).random() for name in names}
    graph = BackpropGraph(gm, pointwise=True)
    chosen = graph.select(importance, 0.5)
    assert graph.forward() + graph.cost(chosen) <= 0.5 * (graph.forward() + graph.full())
    assert str(SelectTensors(rho=0.5, pointwise=True)) == "select-tensors{rho=0.5,pointwise=true}"
