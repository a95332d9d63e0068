"""In-place operators on temporaries: gone from the graph, and the numbers, gradients and modes are those of eager."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fxsparse
from fxsparse.passes import Change, Pass
from fxsparse.tracing.functional import functionalise
from tests.support.experts import deepseek, mixtral
from tests.support.families import Family

Case = Callable[[Tensor, Tensor, "Model"], Any]


class Model(nn.Module):
    """``case(hidden, x, model)`` with ``hidden [batch, 6, 8]`` a temporary that has a gradient and ``x`` an input."""

    def __init__(self, case: Case):
        super().__init__()
        self.case = case
        self.linear = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.5, inplace=True)
        self.register_buffer("calls", torch.arange(8.0))

    def forward(self, x: Tensor) -> Any:
        return self.case(self.linear(x * 1), x, self)


def in_place(gm: nn.Module) -> Iterator[Node]:
    for part in gm.modules():
        if isinstance(part, GraphModule):
            for node in part.graph.nodes:
                schema = getattr(node.target, "_schema", None)
                if schema is not None and schema.is_mutable:
                    yield node


def names(gm: nn.Module) -> list[str]:
    return [node.name for node in in_place(gm)]


def run(module: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs, the input and the buffer as they were left; and gradients."""
    module.zero_grad()
    torch.manual_seed(1)
    x = x.clone()
    outputs = pytree.tree_leaves(module(x))
    sum(output.float().square().mean() for output in outputs).backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
    return [*(output.detach() for output in outputs), x, module.calls.clone()], gradients


def assert_same(model: nn.Module, gm: nn.Module, *, autocast: bool = False) -> None:
    """Outputs bit for bit; gradients may be summed in another order."""
    tolerance = 1e-2 if autocast or model.case is under_autocast else 1e-5
    for training in (True, False):
        for batch in (2, 5):
            x = torch.randn(batch, 6, 8)
            results = []
            for module in (copy.deepcopy(model), copy.deepcopy(gm)):
                module.train(training)
                with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                    results.append(run(module, x))
            (expected, gradients), (found, found_gradients) = results
            for one, other in zip(expected, found, strict=True):
                torch.testing.assert_close(other, one, rtol=0, atol=0)
            for left, right in zip(gradients, found_gradients, strict=True):
                assert (left is None) == (right is None)
                if left is not None and right is not None:
                    torch.testing.assert_close(right, left, rtol=tolerance, atol=tolerance)


# --- operators --------------------------------------------------------------------------------------------------------


def divides(h: Tensor, x: Tensor, m: Model) -> Tensor:
    weights = h.softmax(-1).topk(2).values
    weights /= weights.sum(-1, keepdim=True)
    return weights


def arithmetic(h: Tensor, x: Tensor, m: Model) -> Tensor:
    a, b, c = h * 1, h * 2, h * 3
    a.add_(b, alpha=2).sub_(1).mul_(x).addcmul_(x, x, value=0.5)
    b.clamp_(-1, 1).exp_()
    c.neg_().lerp_(a, 0.3).pow_(2)
    return a + b + c


def activations(h: Tensor, x: Tensor, m: Model) -> Tensor:
    return F.silu(h * 1, inplace=True) + F.leaky_relu(h * 2, inplace=True) + F.relu_(h * 3) + F.elu(h * 4, inplace=True)


def masks(h: Tensor, x: Tensor, m: Model) -> Tensor:
    a, b = h * 1, h + 1
    a.masked_fill_(x > 0, -1.0)
    a.masked_fill_(x > 0.5, torch.tensor(7.0))
    b[x > 0] = 0.0
    hidden = x > 1
    hidden |= x < -1
    hidden &= x < 2
    return a * b * hidden


def fills(h: Tensor, x: Tensor, m: Model) -> Tensor:
    a, b, c = h * 1, torch.empty_like(h), torch.full((6, 6), -torch.inf)
    a[:, 0].zero_()
    a[:, 1].fill_(2.0)
    a[:, 2].fill_(torch.tensor(3.0))
    b.fill_(1.0)
    return a * b + c.triu_(1).softmax(-1) @ h


def scatters(h: Tensor, x: Tensor, m: Model) -> Tensor:
    order = x.argsort(-1)
    one_hot = torch.zeros_like(h).scatter_(-1, order[..., :2], 1.0)
    total = torch.zeros_like(h)
    total.scatter_add_(-1, order, h)
    total.index_add_(1, torch.tensor([0, 2]), h[:, :2])
    total.index_copy_(2, torch.tensor([1]), h[..., :1])
    total.index_fill_(1, torch.tensor([3]), 2.0)
    return one_hot * h + total


def puts(h: Tensor, x: Tensor, m: Model) -> Tensor:
    y = h * 1
    y[:, torch.tensor([0, 2])] = 1.0
    y.index_put_((torch.tensor([0, 1]), torch.tensor([1, 1])), h[0, :2], accumulate=True)
    return y


def types(h: Tensor, x: Tensor, m: Model) -> Tensor:
    double, count, single = torch.zeros(x.shape, dtype=torch.float64), torch.zeros(x.shape, dtype=torch.long), h * 1
    double += h
    double[:, 0] = x[:, 0]
    count += x > 0
    count[:, 0] = 3
    single += double
    return single * count + double.float()


def noise(h: Tensor, x: Tensor, m: Model) -> Tensor:
    drop_path = x.new_empty(x.shape[0], 1, 1).bernoulli_(0.7).div_(0.7)
    y = h * 2
    y[:, 0].uniform_()
    return (y + torch.empty_like(h).normal_() + torch.empty_like(h).exponential_().log()) * drop_path


def gumbel(h: Tensor, x: Tensor, m: Model) -> Tensor:
    return F.gumbel_softmax(h, hard=True)


def dropout(h: Tensor, x: Tensor, m: Model) -> Tensor:
    y = h * 1
    return m.dropout(y) + y


def constants(h: Tensor, x: Tensor, m: Model) -> Tensor:
    scale = torch.tensor(2.0)
    scale += 1
    ramp = torch.arange(6.0)
    ramp[2] = scale
    return h * ramp.mul_(2)[:, None]


# --- views ------------------------------------------------------------------------------------------------------------


def slices(h: Tensor, x: Tensor, m: Model) -> Tensor:
    y = torch.zeros_like(h)
    y[..., 2:].copy_(h[..., :-2])
    y[..., :2] = x[..., :2]
    y[:, 1:][:, ::2][..., 3:7].mul_(3)
    y.narrow(1, 2, 3)[:, 1:].add_(1)
    return y


def selects(h: Tensor, x: Tensor, m: Model) -> Tensor:
    y = h * 1
    y[:, 0] *= 2
    y[:, 1, 2] += 5
    y[:, -1, -2] = 0.0
    y[0] = 2.0
    y[:, None, :, None][:, 0, 2, 0].mul_(2)
    return y


def transposes(h: Tensor, x: Tensor, m: Model) -> Tensor:
    y = h * 1
    y.transpose(1, 2)[:, 3].add_(1)
    y.permute(2, 0, 1)[2].mul_(2)
    y.movedim(0, 2)[1].mul_(3)
    y.mT[:, 0].add_(1)
    return y


def reshapes(h: Tensor, x: Tensor, m: Model) -> Tensor:
    y = h * 1
    y.view(-1, 2, 3, 8).flatten(1, 2)[:, 2].zero_()
    y.unsqueeze(1).squeeze(1).reshape(-1, 48)[:, 7].fill_(4.0)
    y.unflatten(1, (2, 3))[:, 1, 1].add_(1)
    return y


def pieces(h: Tensor, x: Tensor, m: Model) -> Tensor:
    y = torch.zeros(x.shape)
    left, right = y.chunk(2, -1)
    left.add_(x[..., :4])
    right.sub_(left)
    _, middle, last = y.split([1, 2, 3], 1)
    middle.mul_(2)
    last[:, 0] = 1.0
    y.split(4, 1)[1].add_(1)
    y.unbind(1)[3].add_(2)
    y.chunk(2, 0)[1].add_(3)  # of a varying size
    return torch.cat([right, left], -1) * h


def diagonals(h: Tensor, x: Tensor, m: Model) -> Tensor:
    y, flat = h * 1, torch.zeros(48)
    y.diagonal(0, 1, 2).mul_(2)
    y.diagonal(1, 1, 2).zero_()
    flat.as_strided((6, 4), (8, 2), 1).add_(2.0)
    return y * flat.view(6, 8)


def complex_views(h: Tensor, x: Tensor, m: Model) -> Tensor:
    rotated = torch.view_as_complex((h * 1).view(-1, 6, 4, 2))
    rotated.mul_(1j)
    parts = torch.view_as_real(rotated)
    parts[..., 0].mul_(2)
    return torch.view_as_real(rotated).flatten(2)


def in_place_views(h: Tensor, x: Tensor, m: Model) -> Tensor:
    y = h * 1
    y.unsqueeze_(1).squeeze_(1).transpose_(1, 2)
    y[:, 0] = 1.0
    return y


def broadcasts(h: Tensor, x: Tensor, m: Model) -> Tensor:
    y = h * 1
    y += torch.ones(8)
    y[:, 1:3] = x[:, :1]
    return y


def maybe_views(h: Tensor, x: Tensor, m: Model) -> Tensor:
    """What returns its input here and would return a copy there."""
    y = h * 1
    same, turned, cast = y.contiguous(), y.transpose(1, 2).contiguous(), y.to(torch.float32)
    same.add_(1)
    turned.mul_(5)
    cast.mul_(2)
    return y + turned.transpose(1, 2) + same.reshape(-1, 6, 8)


def layouts(h: Tensor, x: Tensor, m: Model) -> Tensor:
    """Views count on the memory layout of the tensor that is written into."""
    y, turned = torch.empty_like(x), torch.empty_like(x).transpose(1, 2) * 1
    y.copy_((h.transpose(1, 2) * 1).transpose(1, 2))
    turned.copy_(h.transpose(1, 2))
    return y.view(-1, 48) + turned.transpose(1, 2).view(-1, 48)


def unknown_sizes(h: Tensor, x: Tensor, m: Model) -> Tensor:
    chosen = h[x > 0]
    chosen.mul_(2)
    chosen[:1] += 1
    return chosen.sum()


# --- order ------------------------------------------------------------------------------------------------------------


def reads_between_writes(h: Tensor, x: Tensor, m: Model) -> Tensor:
    y = h * 1
    flat = y.view(-1, 48)
    before = flat.mean()
    flat.mul_(2)
    after = y.mean()
    y[:, 0] = before
    return flat * after + y.transpose(1, 2).reshape(-1, 48)


def reads_a_list(h: Tensor, x: Tensor, m: Model) -> Tensor:
    y = x + 0
    halves = y.chunk(2, -1)
    y.add_(1)
    return torch.cat(halves[::-1], -1) * h


def reads_behind_detach(h: Tensor, x: Tensor, m: Model) -> Tensor:
    y = h * 2
    detached = y.detach()
    y.mul_(3)
    return y * detached


def returns_views(h: Tensor, x: Tensor, m: Model) -> tuple[Tensor, Tensor]:
    y = h * 1
    first = y[:, 0]
    y.mul_(2)
    return first, y


def without_gradients(h: Tensor, x: Tensor, m: Model) -> Tensor:
    with torch.no_grad():
        y = torch.zeros(x.shape)
        y[:, 1] = h[:, 1]
        y.mul_(2)
    return h * y


def residual(h: Tensor, x: Tensor, m: Model) -> Tensor:
    shortcut = h
    h = m.linear(h)
    h += shortcut
    return F.relu_(h)


def under_autocast(h: Tensor, x: Tensor, m: Model) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = m.linear(h)
        y += h
        y[..., 0] = 1
    return y.float()


OPERATORS = (divides, arithmetic, activations, masks, fills, scatters, puts, types, noise, gumbel, dropout, constants)
VIEWS = (slices, selects, transposes, reshapes, pieces, diagonals, complex_views, in_place_views, broadcasts)
VIEWS += (maybe_views, layouts, unknown_sizes)
ORDER = (reads_between_writes, reads_a_list, reads_behind_detach, returns_views, without_gradients)
ORDER += (residual, under_autocast)


def traced(case: Case) -> tuple[Model, GraphModule]:
    if case is unknown_sizes and torch.__version__.startswith("2.11."):
        pytest.skip("torch.export cannot slice a tensor of unknown size in torch 2.11")
    model = Model(case)
    return model, fxsparse.trace(model, (torch.randn(4, 6, 8),))


@pytest.mark.parametrize("case", OPERATORS + VIEWS + ORDER, ids=lambda case: case.__name__)
def test_temporaries_are_not_written_into(case: Case) -> None:
    model, gm = traced(case)
    assert not names(gm)
    assert_same(model, gm)
    for node in gm.graph.nodes:
        assert "val" in node.meta and (node.op != "call_function" or "nn_module_stack" in node.meta), node


@pytest.mark.parametrize("case", [divides, residual, slices, activations, types], ids=lambda case: case.__name__)
def test_types_under_autocast_are_those_of_eager(case: Case) -> None:
    model, gm = traced(case)
    assert_same(model, gm, autocast=True)


@pytest.mark.parametrize("case", [slices, dropout, pieces], ids=lambda case: case.__name__)
def test_compiles(case: Case) -> None:
    model, gm = traced(case)
    compiled = torch.compile(copy.deepcopy(gm), backend="aot_eager", fullgraph=True, dynamic=True)
    for training in (True, False):
        x = torch.randn(5, 6, 8)
        twin = copy.deepcopy(model)
        twin.train(training), compiled.train(training)
        torch.manual_seed(1)
        expected = twin(x)
        torch.manual_seed(1)
        torch.testing.assert_close(compiled(x), expected)


# --- what stays -------------------------------------------------------------------------------------------------------


def into_an_input(h: Tensor, x: Tensor, m: Model) -> Tensor:
    before = torch.empty_like(x)
    before.copy_(x)
    x.view(-1, 48)[:, 0].add_(1)
    return h * x * before


def into_a_buffer(h: Tensor, x: Tensor, m: Model) -> Tensor:
    before = torch.empty(8)
    before.copy_(m.calls)
    m.calls.add_(1)
    m.calls[:2].mul_(2)
    return h * m.calls + before


def behind_autograd(h: Tensor, x: Tensor, m: Model) -> Tensor:
    """The value changes and the formula of the gradient does not."""
    y = h * 2
    y.detach().mul_(3)
    return y * h


def from_a_region(h: Tensor, x: Tensor, m: Model) -> Tensor:
    y = h * 2
    with torch.no_grad():
        y.mul_(3)
    return y.sin()


def out_argument(h: Tensor, x: Tensor, m: Model) -> Tensor:
    y = torch.zeros(x.shape)
    torch.add(x, x, out=y)
    return h * y.mul_(2)


@pytest.mark.parametrize(
    ("case", "stay"),
    [
        (into_an_input, ["add_"]),
        (into_a_buffer, ["add_", "mul_"]),
        (behind_autograd, ["mul_"]),
        (from_a_region, ["mul_"]),
        (out_argument, ["add", "mul_"]),
    ],
    ids=lambda item: getattr(item, "__name__", None),
)
def test_other_writes_stay_in_order(case: Case, stay: list[str]) -> None:
    model, gm = traced(case)
    assert names(gm) == stay
    assert_same(model, gm)


def test_a_functional_graph_is_left_alone() -> None:
    _, gm = traced(slices)
    code = gm.code
    assert functionalise(gm) == 0 and gm.graph.python_code("self").src == code


# --- real models ------------------------------------------------------------------------------------------------------


@functools.cache
def _experts(build: Callable[[], Family]) -> tuple[Family, GraphModule]:
    family = build()
    return family, fxsparse.trace(family.model, kwargs=family.make_batch(batch=4))


@pytest.mark.parametrize("build", [mixtral, deepseek], ids=lambda build: build.__name__)
def test_models_with_experts(build: Callable[[], Family]) -> None:
    family, gm = _experts(build)
    assert not names(gm)
    for training in (True, False):
        family.model.train(training), gm.train(training)
        for batch in (2, 3):
            inputs = family.make_batch(batch=batch)
            expected, found = family.model(**inputs), gm(**inputs)
            torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=0)
            gradients = [torch.autograd.grad(o.loss, list(family.model.parameters())) for o in (expected, found)]
            for one, other in zip(*gradients, strict=True):
                torch.testing.assert_close(other, one, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "passes",
    ["gates{target=0.5,score=random},materialize", "multiplex{n=2}", "nm-masks,double-prune", "drop-layers{count=1}"],
)
@pytest.mark.parametrize("build", [mixtral, deepseek], ids=lambda build: build.__name__)
def test_passes_reach_models_with_experts(build: Callable[[], Family], passes: str) -> None:
    family, gm = _experts(build)
    rewritten = fxsparse.rewrite(gm, passes)
    assert all(entry.rewritten for entry in rewritten.meta["fxsparse"].entries)
    assert not names(rewritten)
    output = rewritten(**family.make_batch(batch=6))
    assert torch.isfinite(pytree.tree_leaves(output)[0]).all()


def test_the_one_line_call_sees_functional_graphs() -> None:
    seen: list[list[str]] = []

    class Looks(Pass):
        name = "test-looks"

        def rewrite(self, graph: GraphModule) -> list[Change]:
            seen.append(names(graph))
            return [Change("", True, "looked")]

    model = Model(slices)
    compiled = torch.compile(model, backend="fxsparse", options={"passes": [Looks()], "compiler": "eager"})
    x = torch.randn(5, 6, 8)
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)
    assert seen == [[]]


class Counted(nn.Module):
    """What it counts scales its output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.calls.mul_(2)
        return self.linear(x) * self.calls


def test_a_buffer_that_counts_and_scales_trains() -> None:
    """Export ends with a copy of the buffer onto itself, after which autograd refused the factor."""
    model, x = Counted(), torch.randn(3, 4)
    gm = fxsparse.trace(copy.deepcopy(model), (x,))
    for _ in range(2):
        outputs = [module(x) for module in (model, gm)]
        torch.testing.assert_close(*outputs)
        for output in outputs:
            output.sum().backward()
    torch.testing.assert_close(gm.calls, model.calls)
    for (name, one), other in zip(model.named_parameters(), gm.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=name)
