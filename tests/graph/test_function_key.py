"""Functions that are the same are traced once, and whatever differs between two of them is seen."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import fxsparse
from fxsparse import graph as fx
from fxsparse.graph import function
from fxsparse.graph.edit import TRACED

FACTOR = 3.0


class Two(nn.Module):
    """Two linears of one size, a third of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 6)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.first(x), self.second(x), self.drop(self.third(x))


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was traced."""
    seen: list[Any] = []
    trace = function._trace

    def noted(mode: Any, fn: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(fn)
        return trace(mode, fn, *args, **kwargs)

    monkeypatch.setattr(function, "_trace", noted)
    return seen


def graph() -> tuple[GraphModule, list[Node], Tensor]:
    x = torch.randn(4, 8)
    gm = fxsparse.trace(Two(), (x,))
    return gm, [node for node in gm.graph.nodes if node.target is torch.ops.aten.linear.default], x


def results(gm: GraphModule, x: Tensor) -> tuple[Tensor, ...]:
    gm.graph.lint()
    gm.recompile()
    gm.eval()
    out: tuple[Tensor, ...] = gm(x)
    return out


def test_the_same_function_is_traced_once(traces: list[Any]) -> None:
    gm, (first, second, third), x = graph()
    plain = results(gm, x)

    def scaled(by: float) -> Callable[[Tensor], Tensor]:
        return lambda y: y.tanh() * by

    for node in (first, second):
        fx.transform(gm, node, scaled(2.0))
    assert len(traces) == 1
    fx.transform(gm, third, scaled(2.0))
    assert len(traces) == 2, "another shape"
    for out, before in zip(results(gm, x), plain, strict=True):
        torch.testing.assert_close(out, before.tanh() * 2)
    copy = fx.copy_sharing_state(gm)
    (node,) = [node for node in copy.graph.nodes if node.name == first.name]
    fx.transform(copy, node, scaled(2.0))
    assert len(traces) == 2, "copies share what was traced"


def _helped(y: Tensor) -> Tensor:
    return y * FACTOR


def _defaulted(by: float) -> Callable[..., Tensor]:
    def fn(y: Tensor, factor: float = by) -> Tensor:
        return y * factor

    return fn


def _closed(by: Any) -> Callable[[Tensor], Tensor]:
    return lambda y: y * by


def _nested(by: float) -> Callable[[Tensor], Tensor]:
    inner = _closed(by)
    return lambda y: inner(y)


def _attribute(by: float) -> Callable[[Tensor], Tensor]:
    held = SimpleNamespace(by=by)
    return lambda y: y * held.by


class _Callable:
    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, y: Tensor) -> Tensor:
        return y * self.by


def _inner(y: Tensor, by: float) -> Tensor:
    return y * by


@pytest.mark.parametrize(
    "make",
    [_closed, _defaulted, _nested, _attribute, _Callable, lambda by: functools.partial(_inner, by=by),
     lambda by: _closed((by,)[0]), lambda by: lambda y: _closed({"by": [by]}["by"][0])(y)],
    ids=["closure", "default", "nested", "attribute", "object", "partial", "tuple", "inside"],
)  # fmt: skip
def test_functions_that_differ_are_told_apart(make: Callable[[float], Callable[[Tensor], Tensor]]) -> None:
    gm, (first, second, _), x = graph()
    plain = results(gm, x)
    fx.transform(gm, first, make(2.0))
    fx.transform(gm, second, make(5.0))
    out = results(gm, x)
    torch.testing.assert_close(out[0], plain[0] * 2)
    torch.testing.assert_close(out[1], plain[1] * 5)


def test_globals_that_changed_are_seen(monkeypatch: pytest.MonkeyPatch, traces: list[Any]) -> None:
    gm, (first, second, _), x = graph()
    plain = results(gm, x)
    fx.transform(gm, first, lambda y: _helped(y))
    monkeypatch.setitem(globals(), "FACTOR", 7.0)
    fx.transform(gm, second, lambda y: _helped(y))
    out = results(gm, x)
    torch.testing.assert_close(out[0], plain[0] * 3)
    torch.testing.assert_close(out[1], plain[1] * 7)
    assert len(traces) == 2


def test_numbers_of_other_types_are_told_apart(traces: list[Any]) -> None:
    gm, (first, second, third), x = graph()
    plain = results(gm, x)

    def picked(at: Any) -> Callable[[Tensor], Tensor]:
        return lambda y: y + y.new_full((), 0.5) if at is True else y * at

    for node, at in ((first, 1), (second, True), (third, 1.0)):
        fx.transform(gm, node, picked(at))
    torch.testing.assert_close(results(gm, x)[1], plain[1] + 0.5)
    assert len(traces) == 3


def test_dtypes_are_told_apart() -> None:
    def matrix(y: Tensor) -> Tensor:
        return y @ y.mT

    gm, (first, second, _), x = graph()
    half = fx.transform(gm, first, lambda y: y.bfloat16())
    fx.transform(gm, half, matrix)
    fx.transform(gm, second, matrix)
    assert [each.dtype for each in results(gm, x)] == [torch.bfloat16, torch.float32, torch.float32]
    assert [fx.value(node).dtype for node in gm.graph.output_node().all_input_nodes[:2]] == [
        torch.bfloat16,
        torch.float32,
    ]


def test_the_setting_of_a_trace_is_told_apart(traces: list[Any]) -> None:
    def matrix(y: Tensor) -> Tensor:
        return y @ y.mT + torch.ones(())

    gm, (first, second, _), _ = graph()
    fx.transform(gm, first, matrix)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fx.transform(gm, second, matrix)
    assert len(traces) == 2


def test_flags_have_the_names_of_their_own_place(traces: list[Any]) -> None:
    gm, (first, second, _), x = graph()
    for node, flag in ((first, "training"), (second, "drop.training")):
        fx.transform(gm, node, lambda y, training: y + training * y.square(), flag)
    assert len(traces) == 2, "once with the flag and once without"
    gm.recompile()
    plain = Two().eval()
    plain.load_state_dict(gm.state_dict())
    expected = plain(x)
    for mine, its in ((False, True), (True, False)):
        gm.training, gm.get_submodule("drop").training = mine, its
        out = gm(x)
        torch.testing.assert_close(out[0], expected[0] + mine * expected[0].square())
        torch.testing.assert_close(out[1], expected[1] + its * expected[1].square())


def test_nodes_of_one_trace_are_told_apart_as_operands() -> None:
    gm, (first, second, _), x = graph()
    plain = results(gm, x)
    a, b = (fx.transform(gm, node, lambda y: y.tanh()) for node in (first, second))
    returned = gm.graph.output_node()
    mixed = fx.insert_function(gm, lambda p, q: p - 2 * q, a, b, before=returned)
    returned.replace_input_with(a, mixed)
    torch.testing.assert_close(results(gm, x)[0], plain[0].tanh() - 2 * plain[1].tanh())


def test_a_function_that_remembers_is_called_every_time(traces: list[Any]) -> None:
    gm, (first, second, _), _ = graph()
    calls: list[int] = []

    def remembers(y: Tensor) -> Tensor:
        calls.append(1)
        return y * len(calls)

    for node in (first, second):
        fx.transform(gm, node, remembers)
    assert len(calls) == len(traces) == 2


def test_what_was_traced_is_not_saved() -> None:
    gm, (first, *_), _ = graph()
    fx.transform(gm, first, lambda y: y.tanh())
    assert gm.meta[TRACED]
    assert gm.meta[TRACED].__reduce__()[0]() == {}
