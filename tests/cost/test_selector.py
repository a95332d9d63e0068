"""The selector against brute force, and the chain's dynamic program beside it."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Sequence

import networkx
import pytest
import torch
from networkx import DiGraph

from fxsparse.cost import selector
from fxsparse.cost.backprop import BackpropGraph
from fxsparse.cost.selector import Instance, dp_baseline, select
from fxsparse.errors import OptionError
from fxsparse.tracing.trace import trace
from tests.support.families import FAMILIES
from tests.support.traced import traced


def cost(graph: DiGraph, chosen: Iterable[str]) -> int:
    """The FLOPs of all edges into what depends on the chosen tensors, as the backprop graph defines it."""
    depends = set(chosen).union(*(networkx.ancestors(graph, name) for name in chosen))
    return sum(flops for _, source, flops in graph.edges(data="flops") if source in depends)


def brute_force(graph: DiGraph, importance: dict[str, float], budget: int) -> float:
    """The greatest importance of all subsets within the budget."""
    names, price = list(importance), dict(graph.in_degree(weight="flops"))
    bit = {node: 1 << place for place, node in enumerate(node for node in graph if price[node])}
    above = {name: sum(bit[node] for node in networkx.ancestors(graph, name) if node in bit) for name in names}
    best, unions, costs, values = 0.0, [0], [0], [0.0]

    @functools.cache
    def union_cost(union: int) -> int:
        return sum(price[node] for node, place in bit.items() if union & place)

    for subset in range(1, 1 << len(names)):
        rest, name = subset & (subset - 1), names[(subset & -subset).bit_length() - 1]
        unions.append(unions[rest] | above[name])
        costs.append(costs[rest] + price[name])
        values.append(values[rest] + importance[name])
        if values[-1] > best and union_cost(unions[-1]) + costs[-1] <= budget:
            best = values[-1]
    return best


def graph_of(
    activations: Sequence[tuple[int, Sequence[int]]], tensors: dict[str, tuple[int, Sequence[int]]]
) -> DiGraph:
    """A backprop graph: the cost of each activation's gradient and the activations it is computed from, and likewise
    for tensors. All of a cost is on the first edge."""
    graph = DiGraph()
    graph.add_node("loss")
    listed = [(f"a{number}", *activation) for number, activation in enumerate(activations)]
    for name, price, users in [*listed, *((name, *tensor) for name, tensor in tensors.items())]:
        for place, user in enumerate([f"a{number}" for number in users] or ["loss"]):
            graph.add_edge(user, name, flops=0 if place else price)
    for name, _, _ in reversed(listed):  # without tensors below it, a value has no gradient
        if not graph.succ[name]:
            graph.remove_node(name)
    return graph


def random_graph(rng: random.Random) -> DiGraph:
    """A random acyclic graph of activations, and tensors that read a few of them."""

    def some(count: int, share: float) -> list[int]:
        return [number for number in range(count) if rng.random() < share]

    count = rng.randint(0, 12)
    activations = [(rng.choice([1, 1, 2, 3, 5, 7, 20]), some(number, 0.35)) for number in range(count)]
    tensors = {f"p{i}": (rng.choice([0, 0, 1, 2, 3, 4, 8, 11]), some(count, 0.15)) for i in range(rng.randint(1, 11))}
    return graph_of(activations, tensors)


def check(graph: DiGraph, importance: dict[str, float], budget: int) -> None:
    """`select` equals brute force, and neither it nor the chain's program exceeds the budget."""
    instance = Instance(graph)
    chosen, best = select(instance, importance, budget), brute_force(graph, importance, budget)
    assert instance.cost(chosen) == cost(graph, chosen) <= budget
    assert sum(importance[name] for name in chosen) == pytest.approx(best)
    assert all(importance[name] > 0 for name in chosen)
    chain = dp_baseline(instance, importance, budget, rounding="ceil")
    assert cost(graph, chain) <= budget
    assert sum(importance[name] for name in chain) <= best + 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_selections_on_random_graphs_equal_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        graph = random_graph(rng)
        names = Instance(graph).tensors
        importance = {name: rng.choice([rng.gauss(0.3, 1), rng.random(), 0.5]) for name in names}
        check(graph, importance, rng.randint(0, cost(graph, names)))


@pytest.mark.parametrize("name", ["bert", "opt", "gpt2", "llama", "t5"])
def test_selections_on_transformers_equal_brute_force(name: str) -> None:
    graph, rng = BackpropGraph(traced(name)[1]), random.Random(name)
    for _ in range(100):
        names = rng.sample(sorted(graph.trainable), rng.randint(2, 10))
        importance = {name: rng.choice([rng.gauss(0.3, 1), rng.expovariate(1)]) for name in names}
        check(graph.networkx, importance, rng.randint(0, graph.cost(names)))
        trained = rng.sample(names, rng.randint(0, len(names)))
        assert cost(graph.networkx, trained) == graph.cost(trained)


def chain(costs: list[int]) -> Instance:
    """Tensors of one unit each in a chain: the k-th pays the activations of all before it."""
    activations = [(price, [k - 1] if k else []) for k, price in enumerate(costs)]
    return Instance(graph_of(activations, {f"p{k}": (1, [k - 1] if k else []) for k in range(len(costs) + 1)}))


def test_everything_of_positive_importance_is_chosen_when_it_fits_the_input_most_included() -> None:
    instance = chain([3, 4, 5])
    importance = {"p0": 1.0, "p1": -1.0, "p2": 0.0, "p3": 0.1}
    assert select(instance, importance, instance.cost(instance.tensors)) == {"p0", "p3"}
    assert dp_baseline(instance, importance, instance.cost(instance.tensors)) == {"p0", "p3"}


def test_nothing_is_chosen_when_nothing_fits_or_nothing_helps() -> None:
    instance = chain([3, 4])
    assert select(instance, dict.fromkeys(instance.tensors, 1.0), 0) == set()
    assert select(instance, dict.fromkeys(instance.tensors, -1.0), 100) == set()
    assert select(instance, dict.fromkeys(instance.tensors, 0.0), 100) == set()


def test_tensors_that_cost_nothing_are_chosen_within_any_budget() -> None:
    instance = Instance(graph_of([], {"bias": (0, []), "weight": (5, [])}))
    assert select(instance, {"bias": 1e-9, "weight": 1.0}, 0) == {"bias"}


def test_a_branch_is_not_paid_for_by_tensors_beside_it() -> None:
    # Two branches join; the chain charges the costly one to whoever comes after it.
    instance = Instance(graph_of([(10, []), (50, [])], {"a": (1, [0]), "b": (1, [1])}))
    importance = {"a": 1.0, "b": 2.0}
    assert select(instance, importance, 60) == {"b"}
    assert select(instance, importance, 61) == {"b"}
    assert select(instance, importance, 62) == {"a", "b"}
    assert dp_baseline(instance, importance, 55, rounding="ceil") == {"a"}


def test_the_published_rounding_can_exceed_the_budget() -> None:
    instance = Instance(graph_of([], {f"p{i}": (3, []) for i in range(10)} | {"big": (1000, [])}))
    importance = dict.fromkeys(instance.tensors, 1.0) | {"big": 0.1}
    floor = dp_baseline(instance, importance, 20, resolution=100)
    ceil = dp_baseline(instance, importance, 20, resolution=100, rounding="ceil")
    assert instance.cost(floor) > 20 >= instance.cost(ceil)
    assert instance.cost(select(instance, importance, 20)) == 18


def test_numbers_as_large_as_a_large_models_are_exact() -> None:
    unit = 10**15
    graph = graph_of([(unit, [])], {f"p{i}": (unit + i, [0] if i == 7 else []) for i in range(12)})
    importance = {f"p{i}": 1.0 + i * 1e-6 for i in range(12)}
    for spare in (0, 1, 37):
        check(graph, importance, 5 * unit + 40 + spare)


def test_too_many_independent_branches_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selector, "UNION_LIMIT", 1000)
    activations = [activation for i in range(12) for activation in ((1, []), (1, [2 * i]))]
    instance = Instance(graph_of(activations, {f"p{i}": (1, [2 * i + 1]) for i in range(12)}))
    with pytest.raises(OptionError, match="more than 1000 combinations"):
        select(instance, dict.fromkeys(instance.tensors, 1.0), 24)


def test_the_selection_of_a_whole_model_on_meta_tensors() -> None:
    with torch.device("meta"):
        family = FAMILIES["opt"]()
    graph = BackpropGraph(trace(family.model, kwargs={k: v.to("meta") for k, v in family.make_batch().items()}))
    assert graph.select(dict.fromkeys(graph.trainable, 1.0), 1.0) == graph.trainable
