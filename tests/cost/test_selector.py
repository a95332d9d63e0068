"""The selector against brute force, and the chain's dynamic program beside it."""

from __future__ import annotations

import functools
import random

import pytest
import torch

from fxsparse.cost import selector
from fxsparse.cost.backprop import BackpropGraph
from fxsparse.cost.selector import Instance, Tensor, dp_baseline, select
from fxsparse.errors import OptionError
from fxsparse.tracing.trace import trace
from tests.support.families import FAMILIES
from tests.support.traced import traced


def brute_force(instance: Instance, importance: dict[str, float], budget: int) -> float:
    """The greatest importance of all subsets within the budget."""
    names = list(instance.tensors)
    best, unions, costs, values = 0.0, [0], [0], [0.0]

    @functools.cache
    def union_cost(union: int) -> int:
        return sum(cost for bit, cost in enumerate(instance.activation_costs) if union >> bit & 1)

    for subset in range(1, 1 << len(names)):
        rest, name = subset & (subset - 1), names[(subset & -subset).bit_length() - 1]
        unions.append(unions[rest] | instance.tensors[name].closure)
        costs.append(costs[rest] + instance.tensors[name].weight_cost)
        values.append(values[rest] + importance[name])
        if values[-1] > best and union_cost(unions[-1]) + costs[-1] <= budget:
            best = values[-1]
    return best


def random_instance(rng: random.Random) -> Instance:
    """A random acyclic graph of activations, and tensors that read a few of them."""
    activations, tensors = rng.randint(0, 12), rng.randint(1, 11)
    closures: list[int] = []
    for bit in range(activations):
        above = [closure for closure in closures if rng.random() < 0.35]
        closures.append(functools.reduce(int.__or__, above, 1 << bit))
    return Instance(
        {
            f"p{i}": Tensor(
                rng.choice([0, 0, 1, 2, 3, 4, 8, 11]),
                functools.reduce(int.__or__, (closure for closure in closures if rng.random() < 0.15), 0),
            )
            for i in range(tensors)
        },
        [rng.choice([1, 1, 2, 3, 5, 7, 20]) for _ in range(activations)],
        closures,
    )


def check(instance: Instance, importance: dict[str, float], budget: int) -> None:
    """`select` equals brute force, and neither it nor the chain's program exceeds the budget."""
    chosen, best = select(instance, importance, budget), brute_force(instance, importance, budget)
    assert instance.cost(chosen) <= budget
    assert sum(importance[name] for name in chosen) == pytest.approx(best)
    assert all(importance[name] > 0 for name in chosen)
    chain = dp_baseline(instance, importance, budget, rounding="ceil")
    assert instance.cost(chain) <= budget
    assert sum(importance[name] for name in chain) <= best + 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_selections_on_random_graphs_equal_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        instance = random_instance(rng)
        importance = {name: rng.choice([rng.gauss(0.3, 1), rng.random(), 0.5]) for name in instance.tensors}
        check(instance, importance, rng.randint(0, instance.cost(instance.tensors)))


@pytest.mark.parametrize("name", ["bert", "opt", "gpt2", "llama", "t5"])
def test_selections_on_transformers_equal_brute_force(name: str) -> None:
    graph, rng = BackpropGraph(traced(name)[1]), random.Random(name)
    for _ in range(100):
        names = rng.sample(sorted(graph.trainable), rng.randint(2, 10))
        instance = graph.instance(names)
        importance = {name: rng.choice([rng.gauss(0.3, 1), rng.expovariate(1)]) for name in names}
        check(instance, importance, rng.randint(0, graph.cost(names)))
        trained = rng.sample(names, rng.randint(0, len(names)))
        assert instance.cost(trained) == graph.cost(trained)


def chain(costs: list[int]) -> Instance:
    """Tensors of one unit each in a chain: the k-th pays the activations of all before it."""
    closures = [(1 << k + 1) - 1 for k in range(len(costs))]
    tensors = {f"p{k}": Tensor(1, closures[k - 1] if k else 0) for k in range(len(costs) + 1)}
    return Instance(tensors, costs, closures)


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
    instance = Instance({"bias": Tensor(0, 0), "weight": Tensor(5, 0)}, [], [])
    assert select(instance, {"bias": 1e-9, "weight": 1.0}, 0) == {"bias"}


def test_a_branch_is_not_paid_for_by_tensors_beside_it() -> None:
    # Two branches join; the chain charges the costly one to whoever comes after it.
    instance = Instance({"a": Tensor(1, 0b01), "b": Tensor(1, 0b10)}, [10, 50], [0b01, 0b10])
    importance = {"a": 1.0, "b": 2.0}
    assert select(instance, importance, 60) == {"b"}
    assert select(instance, importance, 61) == {"b"}
    assert select(instance, importance, 62) == {"a", "b"}
    assert dp_baseline(instance, importance, 55, rounding="ceil") == {"a"}


def test_the_published_rounding_can_exceed_the_budget() -> None:
    instance = Instance({f"p{i}": Tensor(3, 0) for i in range(10)} | {"big": Tensor(1000, 0)}, [], [])
    importance = dict.fromkeys(instance.tensors, 1.0) | {"big": 0.1}
    floor = dp_baseline(instance, importance, 20, resolution=100)
    ceil = dp_baseline(instance, importance, 20, resolution=100, rounding="ceil")
    assert instance.cost(floor) > 20 >= instance.cost(ceil)
    assert instance.cost(select(instance, importance, 20)) == 18


def test_numbers_as_large_as_a_large_models_are_exact() -> None:
    unit = 10**15
    instance = Instance({f"p{i}": Tensor(unit + i, 0) for i in range(12)}, [unit], [1])
    importance = {f"p{i}": 1.0 + i * 1e-6 for i in range(12)}
    for spare in (0, 1, 37):
        check(instance, importance, 5 * unit + 40 + spare)


def test_too_many_independent_branches_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selector, "UNION_LIMIT", 1000)
    closures = [bits for i in range(12) for bits in (1 << 2 * i, 0b11 << 2 * i)]
    instance = Instance({f"p{i}": Tensor(1, 0b11 << 2 * i) for i in range(12)}, [1] * 24, closures)
    with pytest.raises(OptionError, match="more than 1000 combinations"):
        select(instance, dict.fromkeys(instance.tensors, 1.0), 24)


def test_the_selection_of_a_whole_model_on_meta_tensors() -> None:
    with torch.device("meta"):
        family = FAMILIES["opt"]()
    graph = BackpropGraph(trace(family.model, kwargs={k: v.to("meta") for k, v in family.make_batch().items()}))
    assert graph.select(dict.fromkeys(graph.trainable, 1.0), 1.0) == graph.trainable
