"""The backprop graph against what autograd really computes."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any

import networkx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fxsparse.cost.backprop import BackpropGraph
from fxsparse.errors import OptionError
from fxsparse.tracing.trace import trace
from tests.support.families import FAMILIES, Family


@functools.cache
def traced(name: str) -> tuple[Family, GraphModule]:
    family = FAMILIES[name]()
    return family, trace(family.model, kwargs=family.make_batch(batch=4, seq=16), dynamic_sequence=True)


def graph_of(name: str) -> BackpropGraph:
    gm = traced(name)[1]
    gm.requires_grad_(True)
    return BackpropGraph(gm)


def counted(model: nn.Module, trained: Sequence[str], **batch: Any) -> tuple[int, int]:
    """FLOPs of the forward and of the backward pass, as torch counts them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    model.requires_grad_(False)
    for name in trained:
        parameters[name].requires_grad_(True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(**batch)
        forward = counter.get_total_flops()
        loss = output[0] if isinstance(output, tuple) else output["loss"]
        if loss.requires_grad:
            loss.backward()
    model.zero_grad(set_to_none=True)
    return forward, counter.get_total_flops() - forward


def some(names: Sequence[str], rng: random.Random) -> list[str]:
    return rng.sample(names, rng.choice([1, 1, 2, 3, 5, len(names) // 3, len(names)]))


@pytest.mark.parametrize("name", ["sequential", "bert", "opt", "gpt2", "llama", "t5", "vit", "qwen2"])
def test_the_cost_is_what_the_counter_counts_for_fifty_random_selections(name: str) -> None:
    family, gm = traced(name)
    graph, rng = graph_of(name), random.Random(0)
    names = [name for name, _ in gm.named_parameters(remove_duplicate=False)]
    for _ in range(50):
        trained, batch = some(names, rng), family.make_batch(batch=rng.choice([2, 3, 5]), seq=rng.choice([10, 16, 26]))
        forward, backward = counted(gm, trained, **batch)
        assert graph.forward(**batch) == forward
        assert graph.cost(trained, **batch) == backward, trained


@pytest.mark.parametrize("name", ["opt", "llama", "t5"])
def test_the_cost_is_that_of_the_model_that_was_traced(name: str) -> None:
    family, _ = traced(name)
    graph, rng = graph_of(name), random.Random(1)
    names = [name for name, _ in family.model.named_parameters()]
    for _ in range(10):
        trained, batch = some(names, rng), family.make_batch(batch=3, seq=16)
        assert (graph.forward(**batch), graph.cost(trained, **batch)) == counted(family.model, trained, **batch)


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_attention_written_out_costs_the_same(name: str) -> None:
    family = FAMILIES[name]()
    family.model.set_attn_implementation("eager")  # type: ignore[operator]
    batch = family.make_batch(batch=4, seq=16)
    graph, fused = BackpropGraph(trace(family.model, kwargs=batch)), graph_of(name)
    rng, names = random.Random(2), sorted(graph.trainable)
    for _ in range(20):
        trained = some(names, rng)
        assert graph.cost(trained) == fused.cost(trained) == counted(family.model, trained, **batch)[1]


def test_attention_charges_each_projection_what_its_gradient_passes_through() -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Parameter(torch.randn(2, 5, 8)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(self.q, self.k, self.v).sum() + x.sum()

    graph, u = BackpropGraph(trace(Attend(), (torch.randn(2, 3),))), 2 * 2 * 5 * 5 * 8
    costs = {names: graph.cost(list(names)) / u for names in ("q", "k", "v", "qk", "qv", "kv", "qkv")}
    assert costs == {"q": 2, "k": 2, "v": 1, "qk": 3, "qv": 3, "kv": 3, "qkv": 4}


# --- where gradients stop ---------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """``first`` and ``second`` feed ``third`` in a way that ``between`` decides."""

    def __init__(self, between: Any):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.between(self.first(x), self.second(x))).sum()


def in_place(a: Tensor, b: Tensor) -> Tensor:
    a = a.clone()
    a[:, 2:5].copy_(b[:, 2:5])
    return a.view(-1, 8)


def without_gradient(a: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        a = a * 2
    return a + b


BETWEEN = {
    "sum": lambda a, b: a + b,
    "detach": lambda a, b: a.detach() + b,
    "no_grad": without_gradient,
    "written in place": in_place,
    "shape only": lambda a, b: torch.zeros_like(a) + b.type_as(a),
    "integers": lambda a, b: b * (a > 0) + b * a.to(torch.int64),
    "piecewise constant": lambda a, b: a.round() + b,
    "chunks": lambda a, b: torch.cat([*a.chunk(2, -1)[:1], b[:, :4]], -1),
    "unused": lambda a, b: b,
    "fourier": lambda a, b: torch.fft.fft(torch.fft.fft(a, dim=-1), dim=-2).real + b,
    "fourier of real numbers": lambda a, b: torch.fft.irfft(torch.fft.rfft(a), n=8) + torch.fft.fft2(b).real,
}


@pytest.mark.parametrize("between", BETWEEN)
def test_gradients_stop_where_autograd_stops_them(between: str) -> None:
    x = torch.randn(4, 8)
    model = Chain(BETWEEN[between])
    gm = trace(model, (x,))
    graph = BackpropGraph(gm)
    for trained in (
        ["first.weight"],
        ["second.weight"],
        ["first.weight", "third.weight"],
        ["first.weight", "second.weight"],
    ):
        model.requires_grad_(False)
        for name in trained:
            model.get_parameter(name).requires_grad_(True)
        with FlopCounterMode(display=False) as counter:
            loss = model(x)
            forward = counter.get_total_flops()
            if loss.requires_grad:
                loss.backward()
        assert graph.cost(trained) == counter.get_total_flops() - forward, trained


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.second(x) * 3
        with torch.autocast("cpu", enabled=False):
            x = (x.float() * 2) @ torch.ones(8, 8)
        return (x * 3).sum()


def test_regions_under_autocast_are_part_of_the_graph() -> None:
    gm = trace(Autocast(), (torch.randn(4, 8),))
    graph = BackpropGraph(gm)
    assert graph.trainable <= set(graph.networkx)
    assert sum(flops for _, _, flops in graph.networkx.edges(data="flops")) == graph.full() == 5 * 2 * 4 * 8 * 8 - 512
    assert [graph.cost({name}) // 512 for name in ("first.weight", "second.weight", "second.bias")] == [3, 2, 1]


def test_a_detached_parameter_costs_nothing() -> None:
    gm = trace(Chain(BETWEEN["sum"]), (torch.randn(4, 8),))
    full = BackpropGraph(gm)
    node = gm.graph.find_nodes(op="get_attr", target="third.weight")[0]
    with gm.graph.inserting_after(node):
        detached = gm.graph.call_function(torch.ops.aten.detach.default, (node,))
        detached.meta["val"] = node.meta["val"].detach()
    node.replace_all_uses_with(detached, delete_user_cb=lambda user: user is not detached)
    graph = BackpropGraph(gm)
    assert graph.cost({"third.weight"}) == 0
    assert graph.full() == full.full() - 2 * 4 * 8 * 8


# --- the loss ---------------------------------------------------------------------------------------------------------


class TwoOutputs(nn.Module):
    def __init__(self, scalar: bool):
        super().__init__()
        self.first, self.second, self.scalar = nn.Linear(8, 8), nn.Linear(8, 8), scalar

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first, second = self.first(x), self.second(x)
        return {"a": first.sum() if self.scalar else first, "b": second}


@pytest.mark.parametrize(
    ("scalar", "loss", "trained"), [(True, None, "a"), (False, None, "ab"), (True, "b", "b"), (False, "a", "a")]
)
def test_the_backward_pass_starts_at_the_loss(scalar: bool, loss: str | None, trained: str) -> None:
    graph = BackpropGraph(trace(TwoOutputs(scalar), (torch.randn(4, 8),)), loss=loss)
    assert (graph.cost({"first.weight"}) > 0, graph.cost({"second.weight"}) > 0) == ("a" in trained, "b" in trained)


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(OptionError, match="it names a, b"):
        BackpropGraph(trace(TwoOutputs(True), (torch.randn(4, 8),)), loss="loss")


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_tied_tensor_answers_to_each_of_its_names() -> None:
    graph = graph_of("opt")
    head, embedding = graph.cost({"lm_head.weight"}), graph.cost({"model.decoder.embed_tokens.weight"})
    assert head == embedding == graph.cost({"lm_head.weight", "model.decoder.embed_tokens.weight"})
    assert head > graph.cost({"model.decoder.layers.0.fc1.weight"})
    assert len(graph.parameters) == len(dict(traced("opt")[1].named_parameters()))


@pytest.mark.parametrize(
    ("trained", "message"),
    [
        ({"model.decoder.layers.0.fc3.weight"}, "did you mean model.decoder.layers.0.fc"),
        ({"nonsense"}, "no parameter of that name"),
        ("lm_head.weight", "not the string"),
    ],
)
def test_unknown_names_are_refused(trained: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        graph_of("opt").cost(trained)


def test_a_buffer_is_not_trained() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    with pytest.raises(OptionError, match="is a buffer"):
        BackpropGraph(trace(model, (torch.randn(4, 8),))).cost({"1.running_mean"})


# --- networkx ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_the_networkx_graph_runs_backwards_and_holds_the_costs(name: str) -> None:
    graph = graph_of(name)
    drawn = graph.networkx
    order = {node: position for position, node in enumerate(drawn)}
    assert all(order[op] < order[source] for op, source in drawn.edges)
    assert networkx.is_directed_acyclic_graph(drawn)
    assert graph.trainable == {node for node, kind in drawn.nodes(data="operator") if kind == "parameter"}
    assert sum(flops for _, _, flops in drawn.edges(data="flops")) == graph.full()

    rng = random.Random(3)
    for _ in range(10):
        trained = some(sorted(graph.trainable), rng)
        depends = set(trained).union(*(networkx.ancestors(drawn, name) for name in trained))
        assert sum(flops for _, source, flops in drawn.edges(data="flops") if source in depends) == graph.cost(trained)


def test_costs_at_other_sizes_are_on_the_edges_too() -> None:
    graph = graph_of("opt")
    drawn = graph.to_networkx(input_ids=(8, 16))
    assert sum(flops for _, _, flops in drawn.edges(data="flops")) == graph.full(input_ids=(8, 16)) == 2 * graph.full()


# --- selection --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["opt", "llama", "t5"])
@pytest.mark.parametrize("rho", [0.4, 0.55, 0.8, 1.0])
def test_a_selection_stays_within_its_share_of_the_full_step(name: str, rho: float) -> None:
    graph, rng = graph_of(name), random.Random(4)
    importance = {name: rng.gauss(0.5, 1) for name in graph.trainable}
    chosen = graph.select(importance, rho)
    assert graph.forward() + graph.cost(chosen) <= rho * (graph.forward() + graph.full())
    assert all(importance[name] > 0 for name in chosen)
    if rho == 1:
        assert chosen == {name for name, value in importance.items() if value > 0}


def test_names_come_back_as_they_were_given() -> None:
    graph = graph_of("opt")
    importance = {"model.decoder.embed_tokens.weight": 1.0, "model.decoder.layers.2.fc2.bias": 1.0}
    assert graph.select(importance, 1.0) == set(importance)
    with pytest.raises(OptionError, match=r"tied to model\.decoder\.embed_tokens\.weight"):
        graph.select(importance | {"lm_head.weight": 2.0}, 1.0)


def test_the_least_possible_share_is_named_and_possible() -> None:
    graph = graph_of("opt")
    with pytest.raises(OptionError, match=r"the least possible is (0\.\d+)") as error:
        graph.select(dict.fromkeys(graph.trainable, 1.0), 0.1)
    least = float(str(error.value).rpartition(" ")[2])
    assert graph.budget(least) >= 0
    with pytest.raises(OptionError):
        graph.budget(least - 1e-3)


@pytest.mark.parametrize("rho", [0, -0.5, 1.1, float("nan"), True, "0.5"])
def test_a_share_outside_zero_to_one_is_refused(rho: Any) -> None:
    with pytest.raises(OptionError, match=r"\(0, 1\]"):
        graph_of("opt").select({"lm_head.weight": 1.0}, rho)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_importances_must_be_finite(value: float) -> None:
    with pytest.raises(OptionError, match=r"lm_head.weight: the importance is (nan|inf)"):
        graph_of("opt").select({"lm_head.weight": value}, 0.5)


def test_something_must_be_trainable() -> None:
    gm = traced("opt")[1]
    gm.requires_grad_(False)
    with pytest.raises(OptionError, match="no trainable tensor"):
        BackpropGraph(gm).select({"lm_head.weight": 1.0}, 0.5)
    with pytest.raises(OptionError, match="importances are empty"):
        graph_of("opt").select({}, 0.5)


def test_what_full_training_is_can_be_given() -> None:
    gm = traced("opt")[1]
    gm.requires_grad_(False)
    graph = BackpropGraph(gm, trainable=["lm_head.weight"])
    assert graph.full() == graph.cost({"lm_head.weight"}) > 0
