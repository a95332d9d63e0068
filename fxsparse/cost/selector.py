"""Chooses the tensors to train: the greatest importance within a budget of backward FLOPs, exactly.

The costs are those of the backprop graph, a directed graph of networkx from the loss to the tensors whose edges
``op -> u`` have the FLOPs of the gradient of ``u``. All edges into one value are paid together, so that training a
tensor p costs its own gradient, ``weight_cost``, and those of the activations among its ancestors, its closure D(p). An
activation's gradient is paid once, even if several tensors need it:

    cost(S) = sum of weight_cost over S  +  activation costs of the union of D(p) over S

`select` maximises importance under ``cost(S) <= budget``:

1. Enumerate the unions of closures that the budget allows. In a transformer they are few: a tensor low in the model
   pays for everything above. Where D(p) has one entry x, through which all of it is reached (the key a projection
   makes), p only contributes D(p) - {x}, and x becomes the price of opening the group of tensors that enter there. Else
   independent entries (the keys of every cross attention) would multiply.
2. Given a union, the tensors that need nothing beyond it but their entry form a 0/1 knapsack with opening costs.
3. Solve the knapsacks in order of their linear relaxation until none left can beat the best selection.

GreenTrainer (arXiv 2309.13192) treats the model as a chain, in which a tensor pays for everything after it: safe, but
not optimal on a graph. `dp_baseline` is its dynamic program.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import networkx
import numpy as np
from networkx import DiGraph
from numpy.typing import NDArray

from fxsparse.errors import OptionError

UNION_LIMIT = 200_000
_SLACK = 1 + 1e-12  # above the rounding of a sum of importances, so that no better selection is cut off by it


@dataclass(frozen=True)
class Tensor:
    """The cost of training one tensor.

    Attributes:
        weight_cost: FLOPs of its own gradient.
        closure: the activations its gradient flows through, as a bit mask.
    """

    weight_cost: int
    closure: int


class Instance:
    """A selection problem: a backprop graph, and the closures of its nodes as bit masks.

    Args:
        graph: a directed acyclic graph from the loss to the tensors that can be trained, which have no successors.
            Edges have ``flops``. It must not be changed afterwards.

    Attributes:
        tensors: the candidates by name.
        activation_costs: FLOPs of the gradient of each activation that costs any; bit i of a closure is activation i.
        activation_closures: the activations that the gradient of activation i flows through, itself included.
    """

    def __init__(self, graph: DiGraph):
        self.graph = graph
        price: dict[str, int] = dict(graph.in_degree(weight="flops"))
        self.tensors: dict[str, Tensor] = {}
        self.activation_costs: list[int] = []
        self.activation_closures: list[int] = []
        closures: dict[str, int] = {}
        for node in networkx.topological_sort(graph):
            closure = functools.reduce(int.__or__, map(closures.__getitem__, graph.pred[node]), 0)
            if not graph.succ[node]:
                self.tensors[node] = Tensor(price[node], closure)
            elif price[node]:
                closure |= 1 << len(self.activation_costs)
                self.activation_costs.append(price[node])
                self.activation_closures.append(closure)
            closures[node] = closure

    def cost(self, chosen: Collection[str]) -> int:
        """FLOPs of the backward pass that trains ``chosen``; a tensor that is not in the graph costs nothing."""
        tensors = [self.tensor(name) for name in chosen]
        union = functools.reduce(int.__or__, (tensor.closure for tensor in tensors), 0)
        return self.union_cost(union) + sum(tensor.weight_cost for tensor in tensors)

    def tensor(self, name: str) -> Tensor:
        return self.tensors.get(name, Tensor(0, 0))

    def union_cost(self, union: int) -> int:
        """FLOPs of the gradients of a set of activations."""
        return int(self._costs @ np.unpackbits(self.packed(union), count=len(self.activation_costs), bitorder="little"))

    def packed(self, union: int) -> NDArray[np.uint8]:
        """A bit mask of activations as bytes, lowest bits first; at least one byte."""
        return np.frombuffer(union.to_bytes(len(self.activation_costs) // 8 + 1, "little"), dtype=np.uint8)

    @functools.cached_property
    def _costs(self) -> NDArray[np.int64]:
        return np.array(self.activation_costs, dtype=np.int64)


def select(instance: Instance, importance: Mapping[str, float], budget: int) -> set[str]:
    """The tensors of the greatest summed importance whose training costs at most ``budget``.

    Args:
        instance: the candidates and their costs.
        importance: the finite importance of the candidates by name; one without a positive importance is never chosen,
            one that is not in the graph costs nothing.
        budget: FLOPs of the backward pass, not negative.

    Raises:
        OptionError: the graph has more than `UNION_LIMIT` unions: too many independent branches for an exact selection.
    """
    if not any(value > 0 for value in importance.values()):
        return set()
    candidates = _Candidates.of(instance, importance)
    knapsacks = [candidates.knapsack(union, budget - cost) for union, cost in candidates.unions(budget).items()]
    best = _Selection(0.0, ())
    for knapsack in sorted(knapsacks, key=lambda knapsack: knapsack.bound, reverse=True):
        if knapsack.bound <= best.importance * _SLACK:
            break
        best = knapsack.solve(best)
    chosen = {candidates.names[member] for member in best.members}
    if instance.cost(chosen) > budget:
        raise RuntimeError(
            f"the selector chose {instance.cost(chosen)} FLOPs under a budget of {budget}; please report this"
        )
    return chosen


class _Selection(NamedTuple):
    importance: float
    members: tuple[int, ...]


class _Choice(NamedTuple):
    """Members that are taken together."""

    cost: int
    importance: float
    members: tuple[int, ...]


@dataclass(frozen=True)
class _Candidates:
    """The tensors worth choosing, greatest importance per FLOP first, in groups that need and enter the same
    activations.

    Attributes:
        instance: the selection problem.
        names, costs, values, group: of each tensor, ``[members]``.
        needs: bits of the activations each group needs, without its entry, ``[groups, activations]``.
        masks: the same as bit masks.
        entries: the activation each group enters by, or -1.
    """

    instance: Instance
    names: list[str]
    costs: NDArray[np.int64]
    values: NDArray[np.float64]
    group: NDArray[np.int64]
    needs: NDArray[np.uint8]
    masks: list[int]
    entries: NDArray[np.int64]

    @classmethod
    def of(cls, instance: Instance, importance: Mapping[str, float]) -> _Candidates:
        names = [name for name, value in importance.items() if value > 0]
        costs = np.array([instance.tensor(name).weight_cost for name in names], dtype=np.int64)
        values = np.array([importance[name] for name in names], dtype=np.float64)
        order = np.argsort(-_density(costs, values), kind="stable")
        names = [names[i] for i in order]
        entry_of = {closure: bit for bit, closure in enumerate(instance.activation_closures)}
        closures = list(dict.fromkeys(instance.tensor(name).closure for name in names))
        entries = [entry_of.get(closure, -1) for closure in closures]
        masks = [mask if bit < 0 else mask & ~(1 << bit) for mask, bit in zip(closures, entries, strict=True)]
        position = {closure: i for i, closure in enumerate(closures)}
        return cls(
            instance,
            names,
            costs[order],
            values[order],
            np.array([position[instance.tensor(name).closure] for name in names], dtype=np.int64),
            np.array([instance.packed(mask) for mask in masks], dtype=np.uint8).reshape(len(masks), -1),
            masks,
            np.array(entries, dtype=np.int64),
        )

    def unions(self, budget: int) -> dict[int, int]:
        """Every union of activations needed by groups that fits the budget, and its cost."""
        unions, refused = {0: 0}, set()
        for needs in dict.fromkeys(self.masks):
            for union in list(unions):
                joined = union | needs
                if joined in unions or joined in refused:
                    continue
                cost = self.instance.union_cost(joined)
                if cost > budget:
                    refused.add(joined)
                    continue
                unions[joined] = cost
                if len(unions) > UNION_LIMIT:
                    raise OptionError(
                        f"more than {UNION_LIMIT} combinations of branches fit the budget, too many for an exact "
                        "selection; name fewer tensors in the importances"
                    )
        return unions

    def knapsack(self, union: int, capacity: int) -> _Knapsack:
        """The choices that are left once a union is paid, with ``capacity`` FLOPs."""
        paid = self.instance.packed(union)
        reachable = ~np.any(self.needs & ~paid, axis=1)
        entered = (self.entries < 0) | (paid[self.entries >> 3] >> (self.entries & 7) & 1).astype(bool)
        fitting = self.costs <= capacity
        closed = []
        for group in np.flatnonzero(reachable & ~entered):
            opening = self.instance.activation_costs[self.entries[group]]
            members = np.flatnonzero((self.group == group) & (self.costs <= capacity - opening))
            if len(members):
                closed.append((opening, members))
        return _Knapsack(
            capacity, self.costs, self.values, np.flatnonzero((reachable & entered)[self.group] & fitting), closed
        )


def _density(costs: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(values, costs, out=np.full(len(costs), np.inf), where=costs > 0)


# --- the knapsack within one union ------------------------------------------------------------------------------------


class _Line(NamedTuple):
    """Pieces by density, summed up: the value of a capacity if pieces could be cut."""

    costs: NDArray[np.int64]  # [pieces + 1], cumulative
    values: NDArray[np.float64]  # [pieces + 1], cumulative

    @classmethod
    def of(cls, costs: NDArray[np.int64], values: NDArray[np.float64]) -> _Line:
        order = np.argsort(-_density(costs, values), kind="stable")
        return cls(np.concatenate(([0], np.cumsum(costs[order]))), np.concatenate(([0.0], np.cumsum(values[order]))))

    def worth(self, capacity: NDArray[np.int64]) -> NDArray[np.float64]:
        """The relaxed value of each capacity, ``[n]``."""
        full = np.searchsorted(self.costs, capacity, side="right") - 1
        cut = np.minimum(full + 1, len(self.costs) - 1)
        gained, paid = self.values[cut] - self.values[full], self.costs[cut] - self.costs[full]
        share = np.divide(capacity - self.costs[full], paid, out=np.zeros(len(capacity)), where=paid > 0)
        return self.values[full] + share * gained


@dataclass(frozen=True)
class _Knapsack:
    """The choice of tensors once a union of activations is paid.

    Attributes:
        capacity: FLOPs left.
        costs, values: of every candidate.
        free: candidates that need no further activation, by density.
        closed: groups whose entry must be paid: the FLOPs of the entry, and the candidates, by density.
    """

    capacity: int
    costs: NDArray[np.int64]
    values: NDArray[np.float64]
    free: NDArray[np.int64]
    closed: list[tuple[int, NDArray[np.int64]]]

    @functools.cached_property
    def bound(self) -> float:
        """No selection within this union is worth more."""
        return float(self.line(self.closed, self.free).worth(np.array([self.capacity]))[0])

    def line(self, closed: Sequence[tuple[int, NDArray[np.int64]]], free: NDArray[np.int64]) -> _Line:
        """The linear relaxation of some groups and candidates."""
        costs, values = [self.costs[free]], [self.values[free]]
        for opening, members in closed:
            first = self.opened(opening, members)
            costs += [np.array([first.cost]), self.costs[members[len(first.members) :]]]
            values += [np.array([first.importance]), self.values[members[len(first.members) :]]]
        return _Line.of(np.concatenate(costs), np.concatenate(values))

    def opened(self, opening: int, members: NDArray[np.int64]) -> _Choice:
        """The opening with its densest members, as many as give the greatest density: the relaxation takes it first."""
        costs, values = opening + np.cumsum(self.costs[members]), np.cumsum(self.values[members])
        last = int(np.argmax(_density(costs, values)))
        return _Choice(int(costs[last]), float(values[last]), tuple(members[: last + 1].tolist()))

    def choices(self, opening: int, members: NDArray[np.int64]) -> list[_Choice]:
        """Every undominated way to take some of a closed group, and to take none."""
        states = [_Choice(opening, 0.0, ())]
        for member in members.tolist():
            cost, value = int(self.costs[member]), float(self.values[member])
            grown = [_Choice(s.cost + cost, s.importance + value, (*s.members, member)) for s in states]
            states = _undominated([s for s in states + grown if s.cost <= self.capacity])
        return [_Choice(0, 0.0, ()), *states]

    def greedy(self) -> _Selection:
        """Free candidates by density, each taken if it still fits."""
        left, taken = self.capacity, []
        for member in self.free.tolist():
            if self.costs[member] <= left:
                left -= int(self.costs[member])
                taken.append(member)
        return _Selection(float(self.values[taken].sum()), tuple(taken))

    def solve(self, best: _Selection) -> _Selection:
        """The best selection within this union if it beats ``best``, else ``best``.

        Grows the list of undominated (cost, value) pairs choice by choice (Nemhauser and Ullmann 1969) and drops a pair
        when the relaxation of the remaining choices cannot lift it above ``best``.
        """
        best = max(best, self.greedy(), key=lambda selection: selection.importance)
        gratis = self.costs[self.free] == 0
        always, free = self.free[gratis], self.free[~gratis]
        stages = [self.choices(*group) for group in self.closed]
        stages += [
            [_Choice(0, 0.0, ()), _Choice(int(self.costs[i]), float(self.values[i]), (i,))] for i in free.tolist()
        ]

        costs, values = np.zeros(1, dtype=np.int64), np.array([self.values[always].sum()])
        history = []
        for number, choices in enumerate(stages):
            rest = self.line(self.closed[number + 1 :], free[max(number + 1 - len(self.closed), 0) :])
            grown = (costs[:, None] + np.array([choice.cost for choice in choices])).ravel()
            worth = (values[:, None] + np.array([choice.importance for choice in choices])).ravel()
            states = np.flatnonzero(grown <= self.capacity)
            states = states[np.lexsort((-worth[states], grown[states]))]
            before = np.maximum.accumulate(np.concatenate(([-np.inf], worth[states][:-1])))
            states = states[worth[states] > before]
            states = states[worth[states] + rest.worth(self.capacity - grown[states]) > best.importance * _SLACK]
            if not len(states):
                return best
            costs, values = grown[states], worth[states]
            history.append(states)
        state = int(np.argmax(values))
        if values[state] <= best.importance:
            return best
        members = always.tolist()
        for choices, states in zip(reversed(stages), reversed(history), strict=True):
            state, choice = divmod(int(states[state]), len(choices))
            members += choices[choice].members
        return _Selection(float(self.values[members].sum()), tuple(members))


def _undominated(states: Iterable[_Choice]) -> list[_Choice]:
    best: list[_Choice] = []
    for state in sorted(states, key=lambda state: (state.cost, -state.importance)):
        if not best or state.importance > best[-1].importance:
            best.append(state)
    return best


# --- the baseline -----------------------------------------------------------------------------------------------------


def dp_baseline(
    instance: Instance,
    importance: Mapping[str, float],
    budget: int,
    *,
    resolution: int = 1000,
    rounding: Literal["floor", "ceil"] = "floor",
) -> set[str]:
    """GreenTrainer's dynamic program (arXiv 2309.13192), for comparison.

    The tensors stand in a chain, from the output to the input; choosing one pays its own gradient and all activation
    gradients up to it. With ``t`` quantised FLOPs, ``L[k, t]`` is the greatest importance among the first k tensors,
    and tensor k is either skipped, ``L[k-1, t]``, or taken after the last chosen one before it, j < k, in a state in
    which j itself was taken.

    It is not optimal on the chain: a state in which skipping j was better than taking it is no longer available, though
    it may have paid for more of the activations. It is not optimal on a graph either, because a selection pays for
    branches that it does not need. With ``rounding="floor"``, as published, quantisation loses cost and the selection
    may exceed the budget; with ``"ceil"`` it never does.

    Args:
        instance, importance, budget: as for `select`.
        resolution: units of the cost of training every candidate (1000 in the authors' code).
        rounding: of quantised costs.
    """
    names = sorted(importance, key=lambda name: instance.union_cost(instance.tensor(name).closure))
    if not instance.cost(names):
        return {name for name in names if importance[name] > 0}
    chain = _Chain.of(instance, names, budget, resolution, rounding)
    taken, previous = chain.solve([importance[name] for name in names])
    chosen, k, t = set(), len(names), chain.limit
    while k:
        if taken[k, t] == -np.inf:
            k -= 1
            continue
        chosen.add(names[k - 1])
        j = int(previous[k, t])
        t -= chain.step(j, k)
        k = j
    return chosen


@dataclass(frozen=True)
class _Chain:
    """Tensors from the output to the input, the first being tensor 1, with quantised costs.

    Attributes:
        weights: of each tensor's own gradient.
        depths: of the activation gradients up to each tensor; 0 before the first.
        limit: the budget.
    """

    weights: list[int]
    depths: list[int]
    limit: int

    @classmethod
    def of(cls, instance: Instance, names: Sequence[str], budget: int, resolution: int, rounding: str) -> _Chain:
        total = instance.cost(names)

        def quantised(cost: int) -> int:
            return cost * resolution // total if rounding == "floor" else -(-cost * resolution // total)

        unions = itertools.accumulate((instance.tensor(name).closure for name in names), int.__or__)
        reach = [0, *(instance.union_cost(union) for union in unions)]
        weights = [quantised(instance.tensor(name).weight_cost) for name in names]
        depths = [0, *itertools.accumulate(quantised(after - before) for before, after in itertools.pairwise(reach))]
        whole = sum(weights) + depths[-1] if rounding == "floor" else resolution
        return cls(weights, depths, budget * whole // total)

    def step(self, j: int, k: int) -> int:
        """The cost of taking tensor k if the last tensor taken is j, or 0 for none."""
        return self.weights[k - 1] + self.depths[k] - self.depths[j]

    def solve(self, importance: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """``L[k, t]`` of states in which k is taken, else -inf; and the tensor taken before k."""
        shape = (len(importance) + 1, self.limit + 1)
        best, taken, previous = np.zeros(shape), np.full(shape, -np.inf), np.zeros(shape, dtype=np.int64)
        taken[0] = 0.0
        for k, gain in enumerate(importance, start=1):
            with_k = np.full(self.limit + 1, -np.inf)
            for j in range(k):
                shift = self.step(j, k)
                if shift <= self.limit:
                    candidate = taken[j, : self.limit + 1 - shift]
                    better = candidate > with_k[shift:]
                    with_k[shift:][better] = candidate[better]
                    previous[k, shift:][better] = j
            with_k += gain
            better = with_k > best[k - 1]
            best[k] = np.where(better, with_k, best[k - 1])
            taken[k, better] = with_k[better]
        return taken, previous
