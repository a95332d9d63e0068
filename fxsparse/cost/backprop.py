"""The backprop graph: the gradients that training a set of tensors needs, and their costs.

A value (a parameter, an activation, a product inside attention) *depends on* a set S of trained tensors when gradients
of S flow through it. The backward pass pays an edge ``op -> u``, the gradient of ``u`` through ``op``, exactly when
``u`` depends on S, so

    cost(S) = sum of the FLOPs of all edges op -> u into values u that depend on S.

The graph is one of networkx, from the loss to the parameters, and everything is read from it: what depends on S is S
and its ancestors, the order of the backward pass is a topological one, and the selection (`selector`) and its picture
(`plot`) are made on it.

``torch.utils.flop_counter.FlopCounterMode`` counts the same in the real backward pass under math attention. Fused
attention kernels recompute the scores and return all three gradients at once; their cost is not additive and depends on
the device, so every cost here is that of the math form. What is no matrix product costs nothing there, and here only
if it is asked for (`fxsparse.cost.pointwise`).
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import networkx
import sympy
from networkx import DiGraph
from torch.fx import GraphModule

from fxsparse.cost import dataflow, plot, selector
from fxsparse.cost.dataflow import Operation, reached
from fxsparse.cost.sizes import Sizes, Symbolic, suggest
from fxsparse.errors import OptionError, RewriteError
from fxsparse.graph import parameter_names


@dataclass(frozen=True)
class Costs:
    """FLOPs at some sizes: of every value in the forward pass, and of every edge in the backward. What is not in them
    costs nothing."""

    forward: dict[str, Any]
    gradients: dict[tuple[str, str], Any]


class BackpropGraph:
    """The costs of training any set of a model's tensors.

    Args:
        gm: a training-IR graph module, as `fxsparse.trace` gives it.
        loss: name of the output the backward pass starts from. By default the output called ``loss``, else the scalar
            outputs, else all floating-point outputs.
        trainable: the tensors that full training trains; by default every parameter that requires a gradient. A graph
            with detached tensors does not show the cost of training them: keep the `BackpropGraph` of the full graph.
        pointwise: count biases, norms, activations and the like too, as `fxsparse.cost.pointwise` says.

    Names are the parameters' full names; a tied tensor has several. Sizes are set by input, as in
    ``cost(trained, input_ids=(8, 128))``, see `fxsparse.cost.sizes`; the default is the traced example.
    """

    def __init__(
        self,
        gm: GraphModule,
        *,
        loss: str | None = None,
        trainable: Iterable[str] | None = None,
        pointwise: bool = False,
    ):
        self._gm = gm
        self._canonical = {name: names[0] for names in parameter_names(gm).values() for name in names}
        flow = dataflow.read(gm, self._canonical, loss, pointwise=pointwise)
        self.operations: list[Operation] = flow.operations
        self._values: DiGraph = flow.graph
        parameters = [name for name, kind in flow.graph.nodes(data="operator") if kind == "parameter"]
        between = reached(flow.graph, flow.loss) & reached(flow.graph.reverse(copy=False), parameters)
        self._backward: DiGraph = flow.graph.subgraph(between).copy()
        if trainable is None:
            trainable = [name for name, parameter in gm.named_parameters() if parameter.requires_grad]
        self.trainable: frozenset[str] = frozenset(map(self._resolve, trainable))
        self._costs: dict[tuple[tuple[str, int], ...], Costs] = {}
        self._graphs: dict[tuple[tuple[str, int], ...], DiGraph] = {}
        self._instances: dict[tuple[tuple[str, int], ...], selector.Instance] = {}

    # --- the graph ----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def networkx(self) -> DiGraph:
        """The graph at the traced sizes, see `to_networkx`."""
        return self.to_networkx()

    def to_networkx(self, **sizes: Any) -> DiGraph:
        """The backward pass as a directed graph from the loss to the parameters, nodes in the order autograd visits
        them. Costs and selections are read from it, so it cannot be changed; a copy can.

        Nodes are named as their parameters and the nodes of the traced graph and have ``operator``, ``module``,
        ``forward`` (FLOPs) and, for parameters, ``trainable``. An edge ``op -> u`` has ``flops``, the cost of the
        gradient of ``u`` through ``op``.
        """
        key = self._key(sizes)
        if key not in self._graphs:
            costs, graph = self.costs(**sizes), DiGraph()
            place = {name: position for position, name in enumerate(self._values)}
            # Autograd runs, of what is ready, first what the forward pass computed last.
            for name in networkx.lexicographical_topological_sort(self._backward, key=lambda name: -place[name]):
                graph.add_node(name, **self._backward.nodes[name], forward=costs.forward.get(name, 0))
                if graph.nodes[name]["operator"] == "parameter":
                    graph.nodes[name]["trainable"] = name in self.trainable
            for edge in self._backward.edges:
                graph.add_edge(*edge, flops=costs.gradients.get(edge, 0))
            self._graphs[key] = networkx.freeze(graph)
        return self._graphs[key]

    @property
    def parameters(self) -> tuple[str, ...]:
        """The name of every parameter, one for each tensor."""
        return tuple(dict.fromkeys(self._canonical.values()))

    # --- costs --------------------------------------------------------------------------------------------------------

    @property
    def uncounted(self) -> tuple[Operation, ...]:
        """Operations of unknown FLOPs."""
        return tuple(operation for operation in self.operations if operation.kind is None)

    def forward(self, **sizes: Any) -> int:
        """FLOPs of the forward pass."""
        self._complete()
        return sum(self.costs(**sizes).forward.values())

    def cost(self, trained: Iterable[str], /, **sizes: Any) -> int:
        """FLOPs of the backward pass that trains exactly these tensors.

        Raises:
            OptionError: an unknown name, or sizes the graph does not have.
            RewriteError: the graph holds operators without a formula.
        """
        self._complete()
        return sum(self.paid(trained, self.costs(**sizes)).values())

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
        return sympy.Add(*(costs.forward if trained is None else self.paid(trained, costs)).values())

    def costs(self, **sizes: Any) -> Costs:
        """The FLOPs of every value and every gradient; nothing for `uncounted` operations."""
        key = self._key(sizes)
        if key not in self._costs:
            self._costs[key] = self._evaluate(Sizes(self._gm, sizes))
        return self._costs[key]

    def paid(self, trained: Iterable[str], costs: Costs) -> dict[str, Any]:
        """The FLOPs of the gradients that the backward pass of ``trained`` computes at every value it comes to, but for
        the parameters themselves."""
        chosen = {name for name in map(self._resolve, _names(trained)) if name in self._backward}
        depends = reached(self._backward.reverse(copy=False), chosen)
        return {
            value: sum(costs.gradients.get((value, source), 0) for source in self._backward[value] if source in depends)
            for value in depends - chosen
        }

    def edges_of(self, value: str, position: int) -> list[tuple[str, str]]:
        """The edges of a value that hold the gradient at this position of its product."""
        return [(value, source) for source, edge in self._values.adj[value].items() if position in edge["gradients"]]

    def _key(self, sizes: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
        return tuple(Sizes(self._gm, sizes).values.items()) if sizes else self._traced

    @functools.cached_property
    def _traced(self) -> tuple[tuple[str, int], ...]:
        return tuple(Sizes(self._gm).values.items())

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
        forward: dict[str, Any] = {}
        gradients: dict[tuple[str, str], Any] = {}
        for operation in self.operations:
            if operation.call is None:
                continue
            for value, product in zip(operation.values, operation.call.products(sizes), strict=True):
                forward[value] = product.flops
                flops = list(product.gradients.values())
                for source, edge in self._values.adj[value].items():
                    gradients[value, source] = sum(flops[position] for position in edge["gradients"])
        return Costs(forward, gradients)

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
        return {spelling[name] for name in selector.select(self.instance(**sizes), values, budget)}

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

    def instance(self, **sizes: Any) -> selector.Instance:
        """The selection problem on this graph."""
        key = self._key(sizes)
        if key not in self._instances:
            self._instances[key] = selector.Instance(self.to_networkx(**sizes))
        return self._instances[key]

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

    def plot(self, path: str | Path, trained: Iterable[str] | None = None, /, **sizes: Any) -> Path:
        """Draws the backward pass: tensors that are trained, gradients that are computed, and what they cost.

        A row is an operation, the loss at the top. Lines are gradients on their way to the parameters, drawn strongly
        where training ``trained`` computes them; squares are parameters, filled where they are trained.

        Args:
            path: the file to write; its ending decides the format (png, pdf, svg).
            trained: names of the tensors that are trained, as `select` returns them; by default all trainable ones.
            sizes: sizes by input.

        Raises:
            OptionError: an unknown name, or sizes the graph does not have.
        """
        chosen = frozenset(map(self._resolve, _names(self.trainable if trained is None else trained)))
        return plot.draw(self.to_networkx(**sizes), chosen, self.forward(**sizes), Path(path))


def _names(trained: Iterable[str]) -> Iterable[str]:
    if isinstance(trained, str):
        raise OptionError(f"expected a collection of parameter names, not the string {trained!r}")
    return trained
