"""Counts the FLOPs and bytes of the forward and the backward pass, by module.

FLOPs are those of matrix products, as ``torch.utils.flop_counter.FlopCounterMode`` counts them under math attention
(`formulas`), and on request those of the rest (`pointwise`). The backward pass computes the gradients of the trained
tensors only (`backprop`). Bytes are the reads and writes of operators that run one by one; a device moves fewer bytes
where operators are fused.

`count_flops` gives the full table at any sizes, `costs` the totals that the record stores for every pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.cost.backprop import BackpropGraph
from fxsparse.cost.dataflow import Operation, tensors_of
from fxsparse.cost.nm_hardware import nm_step_flops
from fxsparse.cost.sizes import Sizes
from fxsparse.graph.recompute import plan
from fxsparse.graph.record import Costs
from fxsparse.graph.training_form import training_graph


@dataclass
class Cost:
    """The costs of a module, including the modules inside it.

    Attributes:
        forward, backward: FLOPs.
        recomputed: FLOPs of the forward pass that the backward pass repeats, at most: an implementation leaves out
            the last of a region where nothing needs their results.
        forward_bytes, backward_bytes: bytes read and written.
    """

    forward: int = 0
    backward: int = 0
    forward_bytes: int = 0
    backward_bytes: int = 0
    recomputed: int = 0

    @property
    def step(self) -> int:
        """FLOPs of a training step without the optimizer."""
        return self.forward + self.backward + self.recomputed

    def add(self, other: Cost) -> None:
        self.forward += other.forward
        self.backward += other.backward
        self.forward_bytes += other.forward_bytes
        self.backward_bytes += other.backward_bytes
        self.recomputed += other.recomputed


@dataclass
class FlopCount(Cost):
    """The costs of a graph at concrete sizes.

    Attributes:
        forward, backward, forward_bytes, backward_bytes, recomputed: totals of the whole graph, FLOPs and bytes;
            ``forward`` is also the cost of inference.
        modules: the cost of every module, by path; a parent's cost includes its children's.
        uncounted: operations with unknown FLOPs, as ``node: operator``. If there are any, all FLOPs are lower bounds.
        sizes: the size of every symbol.
    """

    modules: dict[str, Cost] = field(default_factory=dict)
    uncounted: tuple[str, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)

    def table(self, depth: int = 3) -> str:
        """A table of the modules down to ``depth`` names in their path."""
        header = ("module", "forward", "backward", "step", "of all", "bytes")
        rows = [("model", self), *((path, cost) for path, cost in self.modules.items() if path.count(".") < depth)]
        lines = [header, *(self._row(path, cost) for path, cost in rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = "\n".join(
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )
        return "\n".join([text, *(f"not counted: {line}" for line in self.uncounted)])

    def _row(self, path: str, cost: Cost) -> tuple[str, ...]:
        *parents, name = path.split(".")
        share = f"{cost.step / self.step:.1%}" if self.step else "-"
        label = "  " * (len(parents) + (cost is not self)) + name
        flops = (engineering(n) for n in (cost.forward, cost.backward, cost.step))
        return (label, *flops, share, engineering(cost.forward_bytes + cost.backward_bytes))

    def __str__(self) -> str:
        return self.table()


def engineering(number: int) -> str:
    """``1234567`` as ``1.23 M``."""
    for scale, unit in ((10**15, "P"), (10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return str(number)


def count_flops(
    gm: nn.Module, *, trained: Iterable[str] | None = None, pointwise: bool = False, **sizes: Any
) -> FlopCount:
    """The FLOPs and bytes of a graph, in total and by module.

    Args:
        gm: a training-IR graph module, as `fxsparse.trace` returns it. If a pass gave it a separate form for training
            (``select-neurons``), pass ``fxsparse.graph.training_form.training_graph(gm)`` to count that form.
        trained: names of the tensors that the backward pass trains; by default those that require a gradient.
        pointwise: count biases, norms, activations and the like too, see `fxsparse.cost.pointwise`.
        sizes: sizes by input, such as ``input_ids=(8, 128)`` or a whole batch of tensors (``**batch``); by default
            those of the traced example. See `fxsparse.cost.sizes`.

    Raises:
        OptionError: the graph has no tensor or input of that name, or cannot take that size.
    """
    gm = fx.graph_module_of(gm, "fxsparse.count_flops")
    graph = BackpropGraph(gm, pointwise=pointwise)
    at = Sizes(gm, sizes)
    costs = graph.costs(**sizes)
    backward = graph.paid(graph.trainable if trained is None else trained, costs)
    again = _recomputed(gm)
    total = Cost()
    modules: dict[str, Cost] = {}
    for operation in graph.operations:
        forward = sum(costs.forward.get(value, 0) for value in operation.values)
        cost = Cost(
            forward,
            sum(backward.get(value, 0) for value in operation.values),
            *_bytes(operation, at, any(value in backward for value in operation.values)),
            forward if operation.node in again else 0,
        )
        total.add(cost)
        for path in _prefixes(operation.module):
            modules.setdefault(path, Cost()).add(cost)
    uncounted = tuple(f"{operation.node.name}: {operation.node.target}" for operation in graph.uncounted)
    return FlopCount(**vars(total), modules=modules, uncounted=uncounted, sizes=at.values)


def step_flops(gm: GraphModule) -> tuple[int, int]:
    """FLOPs at the traced sizes: of the forward pass, and of a training step of all tensors that require a gradient."""
    return _step_flops(gm, BackpropGraph(gm))


def _step_flops(gm: GraphModule, graph: BackpropGraph) -> tuple[int, int]:
    costs = graph.costs()
    forward, backward = sum(costs.forward.values()), sum(graph.paid(graph.trainable, costs).values())
    again = _recomputed(gm)
    values = (value for operation in graph.operations if operation.node in again for value in operation.values)
    return forward, forward + backward + sum(costs.forward.get(value, 0) for value in values)


def node_flops(gm: GraphModule) -> dict[Node, int]:
    """FLOPs of the forward pass by node, at the traced sizes."""
    graph = BackpropGraph(gm)
    forward = graph.costs().forward
    return {item.node: sum(forward.get(value, 0) for value in item.values) for item in graph.operations}


def _recomputed(gm: GraphModule) -> set[Node]:
    """The nodes that the backward pass computes once more."""
    return {node for region in plan(gm.graph) if not region.refusal for node in region.nodes}


def _prefixes(path: str) -> Iterator[str]:
    names = path.split(".") if path else []
    for length in range(1, len(names) + 1):
        yield ".".join(names[:length])


def _bytes(operation: Operation, sizes: Sizes, is_trained: bool) -> tuple[int, int]:
    """Bytes read and written by an operation in the forward and in the backward pass."""
    written = _size(operation.node, sizes)
    arguments = operation.node.all_input_nodes
    if operation.kind == "view":
        return 0, 0
    if operation.kind == "create":
        return written, 0
    if operation.kind == "gather":
        indices = sum(_size(argument, sizes) for argument in arguments if not _is_floating(argument))
        forward = 2 * written + indices
    else:
        forward = written + sum(_size(argument, sizes) for argument in arguments)
    if not is_trained:
        return forward, 0
    # The backward pass reads the incoming gradient and the inputs, and writes a gradient for each input.
    return forward, written + 2 * sum(_size(argument, sizes) for argument in arguments if _is_floating(argument))


def _size(node: Node, sizes: Sizes) -> int:
    return sum(sizes.operand(tensor).bytes for tensor in tensors_of(node))


def _is_floating(node: Node) -> bool:
    return any(tensor.is_floating_point() for tensor in tensors_of(node))


def costs(gm: GraphModule) -> Costs:
    """The costs of a training-IR graph at the sizes it was traced with; tied parameters count once."""
    trained = training_graph(gm)
    graph = BackpropGraph(trained)
    forward, step = _step_flops(trained, graph)
    parameters = list(gm.parameters())
    return Costs(
        forward_flops=forward,
        step_flops=step,
        parameters=sum(parameter.numel() for parameter in parameters),
        parameter_bytes=sum(parameter.nbytes for parameter in parameters),
        buffer_bytes=sum(buffer.nbytes for buffer in gm.buffers()),
        optimizer_bytes=sum(2 * parameter.nbytes for parameter in parameters if parameter.requires_grad),
        nm_step_flops=nm_step_flops(trained, graph),
    )
