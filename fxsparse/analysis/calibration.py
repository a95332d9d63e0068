"""Calibration batches: running them through a graph, at once or one linear after another.

`sequentially` walks through a graph once and lets the caller replace each weight before anything behind it runs:

    stage k     the linears whose inputs are known once the weights of stages 1 .. k-1 are replaced
    observe     run all batches from the stage's first linear to its last, sum x^T x of every input
    update      the caller turns each sum and weight into a new weight
    go on       run the same nodes again with the new weights, up to the first linear of stage k+1

So every node runs at most twice a batch, however deep the model. Between stages a batch is held as the values that
later nodes read, in a transformer the residual stream and the masks, and of the sums only those of one stage exist.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from fxsparse import graph as fx
from fxsparse.errors import RewriteError
from fxsparse.graph import Linear

Site = Sequence[Linear]
"""The linears that share a weight."""

Update = Callable[[Site, Tensor], Tensor]
"""Gives the new weight of a site, in the layout it is stored in, from x^T x summed over all its inputs, float64
``[in, in]``."""

_Values = MutableMapping[Node, Any]


def call(gm: GraphModule, batch: Any) -> None:
    """Runs a graph on a batch: a mapping of keyword arguments, a tuple of arguments, or a single tensor."""
    if isinstance(batch, Mapping):
        gm(**batch)
    elif isinstance(batch, (tuple, list)):
        gm(*batch)
    else:
        gm(batch)


def does_not_run(batch: int, error: Exception, pass_name: str) -> RewriteError:
    """The error for a batch that does not run."""
    return RewriteError(
        f"calibration batch {batch} does not run through the model: {type(error).__name__}: {error}",
        pass_name=pass_name,
    )


@torch.no_grad()
def sequentially(
    gm: GraphModule, sites: Sequence[Site], batches: Iterable[Any], update: Update, *, pass_name: str = "nm-masks"
) -> None:
    """Replaces weights in order of execution, each by what the batches show behind all replaced ones before it.

    In evaluation mode and without gradients. Linears of which none feeds another, such as queries, keys and values,
    are observed together. A weight that several linears share is replaced once: what lies between them is observed
    with them.

    Args:
        gm: the traced graph module; it is not changed.
        sites: the linears to observe, those that share a weight together.
        batches: as `call` takes them. They are read once; what later stages need of them is held.
        update: called once for each site.

    Raises:
        RewriteError: there are no batches, or one does not run through the model.
    """
    walk = _Walk(gm, pass_name)
    walk.read(batches)
    stages = _stages(gm, sites)
    starts = [walk.place[stage[0].node] for stage in stages]
    ends: list[int | None] = [*starts, None]
    walk.forward(0, ends[0] or 0)
    for stage, start, end in zip(stages, starts, ends[1:], strict=True):
        sums = walk.observe(stage, start)
        members = {linear.node for linear in stage}
        for site in sites:
            if site[0].node in members:
                weight = update(site, sum(sums[linear.input] for linear in site))  # type: ignore[arg-type]
                walk.replace(site[0], weight)
        if end is not None:
            walk.forward(start, end)


def _stages(gm: GraphModule, sites: Sequence[Site]) -> list[list[Linear]]:
    """The linears in order of execution, cut before each that depends on one since the last cut."""
    place = {node: at for at, node in enumerate(gm.graph.nodes)}
    last = {linear.node: place[site[-1].node] for site in sites for linear in site}
    stages: list[list[Linear]] = []
    reached: set[Node] = set()  # nodes that depend on a linear of the last stage
    seen = open_until = 0
    nodes = list(gm.graph.nodes)
    for linear in sorted((linear for site in sites for linear in site), key=lambda linear: place[linear.node]):
        at = place[linear.node]
        reached |= _depending(nodes[seen:at], reached)
        seen = at
        if not stages or (linear.input in reached and at > open_until):
            stages.append([])
            reached = set()
            open_until = 0
        stages[-1].append(linear)
        open_until = max(open_until, last[linear.node])
        reached.add(linear.node)
    return stages


def _depending(nodes: Iterable[Node], reached: set[Node]) -> set[Node]:
    """The nodes, in order, that depend on one that is reached."""
    more: set[Node] = set()
    for node in nodes:
        if any(source in reached or source in more for source in node.all_input_nodes):
            more.add(node)
    return more


class _Inputs(nn.Module):
    """Stops a graph once its inputs are known, in the order of its placeholders."""

    class Known(Exception):
        """The inputs are known."""

    def forward(self, *values: Any) -> Any:
        raise _Inputs.Known(values)


class _Walk:
    """All batches on their way through a graph.

    Attributes:
        place: the position of every node.
    """

    def __init__(self, gm: GraphModule, pass_name: str):
        self.gm = fx.copy_sharing_state(gm).eval()
        self.pass_name = pass_name
        self.nodes = list(self.gm.graph.nodes)
        self.interpreter = Interpreter(self.gm, garbage_collect_values=False)
        self.place = {node: at for at, node in enumerate(gm.graph.nodes)}
        self.twins = dict(zip(gm.graph.nodes, self.nodes, strict=True))
        varies = fx.depends_on_inputs(self.gm)
        self.constant = [node for node in self.nodes if node not in varies and node.op != "output"]
        self.constants: dict[Node, Any] = {}
        for node in self.constant:
            self.constants[node] = self._run(node, self.constants)
        self.values: list[dict[Node, Any]] = []

    def read(self, batches: Iterable[Any]) -> None:
        """Takes the inputs of the graph out of every batch."""
        reader = fx.copy_sharing_state(self.gm)
        inputs = reader.graph.find_nodes(op="placeholder")
        reader.add_submodule("calibration_inputs", _Inputs())
        with reader.graph.inserting_after(inputs[-1]):
            reader.graph.call_module("calibration_inputs", tuple(inputs))
        reader.recompile()
        for count, batch in enumerate(batches):
            try:
                call(reader, batch)
            except _Inputs.Known as known:
                mine = self.gm.graph.find_nodes(op="placeholder")
                self.values.append(dict(zip(mine, known.args[0], strict=True)))
            except Exception as error:
                raise does_not_run(count, error, self.pass_name) from error
        if not self.values:
            raise RewriteError("the calibration holds no batch", pass_name=self.pass_name)

    def forward(self, start: int, end: int) -> None:
        """Runs the nodes from ``start`` to before ``end``, and forgets what no later one reads."""
        later = {source for node in self.nodes[end:] for source in node.all_input_nodes}
        for count, values in enumerate(self.values):
            self._advance(count, values, start, end)
            for node in values.keys() - later:
                del values[node]

    def observe(self, stage: Sequence[Linear], start: int) -> dict[Node, Tensor]:
        """x^T x over all batches of the inputs of a stage, float64 ``[in, in]``, by the node of the input."""
        end = max(self.place[linear.node] for linear in stage)
        inputs = {linear.input for linear in stage}
        sums: dict[Node, Tensor] = {}
        for count, values in enumerate(self.values):
            ahead = dict(values)
            self._advance(count, ahead, start, end)
            for node in inputs:
                x = ChainMap(ahead, self.constants)[self.twins[node]]
                x = x.reshape(-1, x.shape[-1])
                x = x.float() if x.itemsize < 4 else x
                product = (x.t() @ x).double()
                sums[node] = sums[node].add_(product) if node in sums else product
        return sums

    def replace(self, linear: Linear, weight: Tensor) -> None:
        """Lets all that runs from now on read another weight, under each of its names."""
        old = fx.attribute(self.gm, linear.name)
        stale = {node for node in self.constant if node.op == "get_attr" and self.constants[node] is old}
        self.constants.update(dict.fromkeys(stale, weight))
        for node in self.constant:
            if any(source in stale for source in node.all_input_nodes):
                self.constants[node] = self._run(node, self.constants)
                stale.add(node)

    def _advance(self, count: int, values: dict[Node, Any], start: int, end: int) -> None:
        both: _Values = ChainMap(values, self.constants)
        try:
            for node in self.nodes[start:end]:
                if node.op not in {"placeholder", "output"} and node not in self.constants:
                    values[node] = self._run(node, both)
        except Exception as error:
            raise does_not_run(count, error, self.pass_name) from error

    def _run(self, node: Node, values: Mapping[Node, Any]) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        return getattr(self.interpreter, node.op)(node.target, args, kwargs)
