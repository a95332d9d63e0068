"""The backprop graph: the gradients that training a set of tensors needs, and their costs.

A value (a parameter, an activation, a product inside attention) *depends on* a set S of trained tensors when gradients
of S flow through it. The backward pass pays an edge ``u -> op``, the gradient of ``u`` through ``op``, exactly when
``u`` depends on S, so

    cost(S) = sum over values u that depend on S of the FLOPs of u's gradient.

``torch.utils.flop_counter.FlopCounterMode`` counts the same in the real backward pass under math attention. Fused
attention kernels recompute the scores and return all three gradients at once; their cost is not additive and depends on
the device, so every cost here is that of the math form.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import sympy
from networkx import DiGraph
from torch.fx import GraphModule

from fxsparse.cost import dataflow, selector
from fxsparse.cost.dataflow import Operation, Value
from fxsparse.cost.sizes import Sizes, Symbolic, suggest
from fxsparse.errors import OptionError, RewriteError
from fxsparse.graph import parameter_names


@dataclass(frozen=True)
class Costs:
    """FLOPs of every value at some sizes: forward, and of the gradient of each of its sources."""

    forward: list[Any]
    gradients: list[list[Any]]


class BackpropGraph:
    """The costs of training any set of a model's tensors.

    Args:
        gm: a training-IR graph module, as `fxsparse.trace` gives it.
        loss: name of the output the backward pass starts from. By default the output called ``loss``, else the scalar
            outputs, else all floating-point outputs.
        trainable: the tensors that full training trains; by default every parameter that requires a gradient. A graph
            with detached tensors does not show the cost of training them: keep the `BackpropGraph` of the full graph.

    Names are the parameters' full names; a tied tensor has several. Sizes are set by input, as in
    ``cost(trained, input_ids=(8, 128))``, see `fxsparse.cost.sizes`; the default is the traced example.
    """

    def __init__(self, gm: GraphModule, *, loss: str | None = None, trainable: Iterable[str] | None = None):
        self._gm = gm
        self._canonical = {name: names[0] for names in parameter_names(gm).values() for name in names}
        flow = dataflow.read(gm, self._canonical, loss)
        self.values: list[Value] = flow.values
        self.operations: list[Operation] = flow.operations
        self._loss = flow.loss
        self._parameters = {name: flow.parameters.get(name) for name in dict.fromkeys(self._canonical.values())}
        self._active = self._flow()
        if trainable is None:
            trainable = [name for name, parameter in gm.named_parameters() if parameter.requires_grad]
        self.trainable: frozenset[str] = frozenset(map(self._resolve, trainable))
        self._at: dict[tuple[tuple[str, int], ...], Costs] = {}

    # --- costs --------------------------------------------------------------------------------------------------------

    @property
    def parameters(self) -> tuple[str, ...]:
        """The name of every parameter, one for each tensor."""
        return tuple(self._parameters)

    @property
    def uncounted(self) -> tuple[Operation, ...]:
        """Operations of unknown FLOPs."""
        return tuple(operation for operation in self.operations if operation.kind is None)

    def forward(self, **sizes: Any) -> int:
        """FLOPs of the forward pass."""
        self._complete()
        return sum(self.costs(**sizes).forward)

    def cost(self, trained: Iterable[str], /, **sizes: Any) -> int:
        """FLOPs of the backward pass that trains exactly these tensors.

        Raises:
            OptionError: an unknown name, or sizes the graph does not have.
            RewriteError: the graph holds operators without a formula.
        """
        self._complete()
        return sum(sum(flops) for _, flops in self.paid(trained, self.costs(**sizes)))

    def full(self, **sizes: Any) -> int:
        """FLOPs of the backward pass that trains every trainable tensor."""
        return self.cost(self.trainable, **sizes)

    def expression(self, trained: Iterable[str] | None = None, /) -> sympy.Expr:
        """`cost` as an expression of the graph's symbols; without a set, the FLOPs of the forward pass.

        Raises:
            OptionError: some operator's FLOPs were measured and have no closed form.
        """
        self._complete()
        costs = self._evaluate(Symbolic())
        if trained is None:
            return sympy.Add(*costs.forward)
        return sympy.Add(*(term for _, terms in self.paid(trained, costs) for term in terms))

    def costs(self, **sizes: Any) -> Costs:
        """The FLOPs of every value and every gradient; 0 for `uncounted` operations."""
        at = Sizes(self._gm, sizes)
        key = tuple(at.values.items())
        if key not in self._at:
            self._at[key] = self._evaluate(at)
        return self._at[key]

    def _complete(self) -> None:
        if self.uncounted:
            listed = sorted(
                {f"{operation.node.target} ({operation.module or 'model'})" for operation in self.uncounted}
            )
            raise RewriteError(
                f"no FLOPs formula for {', '.join(listed)}; register one with @fxsparse.cost.formulas.formula",
                pass_name="backprop",
            )

    def _evaluate(self, sizes: Sizes | Symbolic) -> Costs:
        forward: list[Any] = [0] * len(self.values)
        gradients: list[list[Any]] = [[0] * len(value.sources) for value in self.values]
        for operation in self.operations:
            if operation.call is None:
                continue
            for index, product in zip(operation.values, operation.call.products(sizes), strict=True):
                forward[index] = product.flops
                flops = list(product.gradients.values())
                gradients[index] = [0 if at is None else flops[at] for _, at in self.values[index].sources]
        return Costs(forward, gradients)

    def paid(self, trained: Iterable[str], costs: Costs) -> Iterator[tuple[int, list[Any]]]:
        """The values that depend on ``trained``, in the order of the forward pass, each with the FLOPs of every
        gradient that the backward pass computes at it."""
        depends = [False] * len(self.values)
        for name in map(self._resolve, _names(trained)):
            if (index := self._parameters[name]) is not None:
                depends[index] = True
        for index in self._active:
            sources = zip(self.values[index].sources, costs.gradients[index], strict=True)
            flops = [cost for (source, _), cost in sources if depends[source]]
            if flops:
                depends[index] = True
                yield index, flops

    def _flow(self) -> list[int]:
        """The values between a parameter and the loss, in the order of the forward pass."""
        reachable = [value.operator == "parameter" for value in self.values]
        for index, value in enumerate(self.values):
            reachable[index] = reachable[index] or any(reachable[source] for source, _ in value.sources)
        needed = [False] * len(self.values)
        for index in self._loss:
            needed[index] = True
        for index in reversed(range(len(self.values))):
            if needed[index]:
                for source, _ in self.values[index].sources:
                    needed[source] = True
        return [index for index in range(len(self.values)) if reachable[index] and needed[index]]

    def _resolve(self, name: str) -> str:
        if name in self._canonical:
            return self._canonical[name]
        if name in dict(self._gm.named_buffers(remove_duplicate=False)):
            raise OptionError("is a buffer; only parameters are trained", site=name)
        raise OptionError(f"no parameter of that name{suggest(name, self._canonical)}", site=name)

    # --- selection ----------------------------------------------------------------------------------------------------

    def select(self, importance: Mapping[str, float], rho: float, **sizes: Any) -> set[str]:
        """The tensors of the greatest summed importance that can be trained within a share of the full step's FLOPs.

        Maximises the importance of S under ``forward + cost(S) <= rho * (forward + full)``, exactly (see
        `selector`). Tensors of negative or zero importance are never chosen; at ``rho=1`` every other one is.

        Args:
            importance: importance by parameter name; tensors not named are not trained.
            rho: share of a full training step, in (0, 1].
            sizes: sizes by input.

        Returns:
            Names, as ``importance`` spells them.

        Raises:
            OptionError: unknown names, importances that are not finite, rho outside (0, 1] or below the cost of the
                forward pass (the message says the least possible), or nothing to train.
        """
        spelling, values = self._importances(importance)
        budget = self.budget(rho, **sizes)
        instance = self.instance(values, **sizes)
        return {spelling[name] for name in selector.select(instance, values, budget)}

    def budget(self, rho: float, **sizes: Any) -> int:
        """The FLOPs that a share ``rho`` of a full training step leaves for the backward pass."""
        if isinstance(rho, bool) or not isinstance(rho, numbers.Real) or not 0 < rho <= 1:
            raise OptionError(f"must lie in (0, 1], not {rho!r}", site="rho")
        if not self.trainable:
            raise OptionError("the model has no trainable tensor: no parameter requires a gradient")
        forward, full = self.forward(**sizes), self.full(**sizes)
        budget = math.floor(Fraction(float(rho)) * (forward + full)) - forward
        if budget < 0:
            least = math.ceil(Fraction(forward, forward + full) * 10_000) / 10_000
            raise OptionError(
                f"the forward pass alone costs more than {rho} of a full training step; the least possible is {least}",
                site="rho",
            )
        return budget

    def instance(self, names: Iterable[str], **sizes: Any) -> selector.Instance:
        """The selection problem among the tensors called ``names``."""
        costs = self.costs(**sizes)
        # The gradients of one value are paid together: fold every value's costs into one.
        price = [0] * len(self.values)
        users: list[list[int]] = [[] for _ in self.values]
        for index in self._active:
            for (source, _), flops in zip(self.values[index].sources, costs.gradients[index], strict=True):
                price[source] += flops
                users[source].append(index)
        priced = [i for i in self._active if price[i] and self.values[i].operator != "parameter"]
        bit = {index: position for position, index in enumerate(priced)}
        closures = [0] * len(self.values)  # the priced values that a value's gradient flows through, itself included
        for index in reversed(self._active):
            closures[index] = functools.reduce(int.__or__, (closures[user] for user in users[index]), 0)
            if index in bit:
                closures[index] |= 1 << bit[index]
        tensors = {}
        for name in names:
            value = self._parameters[self._resolve(name)]
            tensors[name] = selector.Tensor(*((0, 0) if value is None else (price[value], closures[value])))
        return selector.Instance(tensors, [price[i] for i in priced], [closures[i] for i in priced])

    def _importances(self, importance: Mapping[str, float]) -> tuple[dict[str, str], dict[str, float]]:
        """The user's spelling and the importance of every tensor."""
        spelling: dict[str, str] = {}
        values: dict[str, float] = {}
        for spelled, value in importance.items():
            name, value = self._resolve(spelled), float(value)
            if not math.isfinite(value):
                raise OptionError(f"the importance is {value}; importances must be finite", site=spelled)
            if values.setdefault(name, value) != value:
                raise OptionError(f"is tied to {spelling[name]}, which was given another importance", site=spelled)
            spelling.setdefault(name, spelled)
        if not values:
            raise OptionError("no tensor to select from: the importances are empty")
        return spelling, values

    # --- the graph as networkx ----------------------------------------------------------------------------------------

    @functools.cached_property
    def networkx(self) -> DiGraph:
        """The backward pass at the traced sizes, see `to_networkx`."""
        return self.to_networkx()

    def to_networkx(self, **sizes: Any) -> DiGraph:
        """The backward pass as a directed graph from the loss to the parameters, nodes in the order autograd visits
        them.

        Nodes are named as values are and have ``operator``, ``module``, ``forward`` (FLOPs) and, for parameters,
        ``trainable``. An edge ``op -> u`` has ``flops``, the cost of the gradient of ``u`` through ``op``.
        """
        costs = self.costs(**sizes)
        graph = DiGraph()
        active = set(self._active)
        for index in reversed(self._active):
            value = self.values[index]
            extra = {"trainable": value.name in self.trainable} if value.operator == "parameter" else {}
            graph.add_node(
                value.name, operator=value.operator, module=value.module, forward=costs.forward[index], **extra
            )
        for index in reversed(self._active):
            for (source, _), flops in zip(self.values[index].sources, costs.gradients[index], strict=True):
                if source in active:
                    edge = (self.values[index].name, self.values[source].name)
                    paid = graph.edges[edge]["flops"] if graph.has_edge(*edge) else 0
                    graph.add_edge(*edge, flops=paid + flops)
        return graph


def _names(trained: Iterable[str]) -> Iterable[str]:
    if isinstance(trained, str):
        raise OptionError(f"expected a collection of parameter names, not the string {trained!r}")
    return trained
