"""The one-line call: ``torch.compile(model, backend="fxsparse", options={"passes": ...})``.

Passes see one of Dynamo's graphs in the training IR. Weights stay the model's own; what passes add is state that
follows from them. After a graph break one compiled graph may serve several identical layers, while passes may tell
layers apart by their
names: the first call with another layer's weights checks that the passes would have done the same to it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse.errors import RewriteError
from fxsparse.graph.derived_buffers import BORROWED
from fxsparse.graph.dynamo import INSTEAD, names_in, retrace, state_names, training_ir, with_inputs
from fxsparse.graph.record import Record, record_of
from fxsparse.graph.runtime_state import Slot
from fxsparse.tracing.functional import functionalise

if TYPE_CHECKING:
    from torch import nn

    from fxsparse.passes.pipeline import Pipeline


class RewrittenGraph:
    """One of Dynamo's graphs after the passes.

    Args:
        pipeline: the passes.
        gm: Dynamo's graph.
        example_inputs: its real inputs.
        root: the compiled module, where there is one.

    Attributes:
        module: the rewritten graph, with Dynamo's inputs and then those of the slots.
        slots: where its extra inputs come from.
        record: what the passes did.
        names: full names of the parameters and buffers among Dynamo's inputs, by position.

    Raises:
        RewriteError: a pass refused, or did something that needs the two-step call.
    """

    def __init__(self, pipeline: Pipeline, gm: GraphModule, example_inputs: Sequence[Any], root: nn.Module | None):
        self.pipeline, self.gm = pipeline, gm
        self.retraced = retrace(gm)
        functionalise(self.retraced)
        self.names = state_names(gm, example_inputs, root)
        self.module, self.slots, self.record = self._rewrite(example_inputs, self.names)
        self._root = weakref.ref(root) if root is not None else None
        self._first = min(self.names, default=None)
        self._served: dict[int, weakref.ref[Tensor]] = {}
        self._note_served(example_inputs)

    def _rewrite(self, inputs: Sequence[Any], names: dict[int, str]) -> tuple[GraphModule, list[Slot], Record]:
        graph = training_ir(self.retraced, self.gm, inputs, names)
        graph.meta[BORROWED] = True
        rewritten = self.pipeline(graph)
        module, slots = with_inputs(rewritten, self.gm, inputs, names)
        return module, slots, record_of(rewritten)

    def _note_served(self, inputs: Sequence[Any]) -> None:
        if self._first is not None:
            weight = inputs[self._first]
            self._served[id(weight)] = weakref.ref(weight)

    def check_serves(self, inputs: Sequence[Any]) -> None:
        """Checks that the passes do to the weights of this call what they did to those the graph was compiled with.

        Raises:
            RewriteError: they tell them apart.
        """
        if self._first is None:
            return
        served = self._served.get(id(inputs[self._first]))
        if served is None or served() is not inputs[self._first]:
            self._check(inputs)
            self._note_served(inputs)

    def _check(self, inputs: Sequence[Any]) -> None:
        root = self._root() if self._root is not None else None
        known = names_in(root)
        names = {position: known.get(id(inputs[position]), name) for position, name in self.names.items()}
        if names == self.names or len(set(names.values())) < len(names):
            return
        module, slots, _ = self._rewrite(inputs, names)
        same = _structure(module) == _structure(self.module) and _origins(slots) == _origins(self.slots)
        if not same:
            here, there = names[min(names)], self.names[min(names)]
            raise RewriteError(
                f"the model breaks into graphs, one compiled graph serves this part and that of {there}, and the "
                f"passes treat the two differently; {INSTEAD}",
                site=here,
            )


def _origins(slots: list[Slot]) -> list[Any]:
    return [(slot.positions, slot.states) for slot in slots]


def _structure(module: GraphModule) -> list[Any]:
    """A graph without its names: two are equal where they compute the same from their inputs."""
    places: dict[Node, int] = {node: place for place, node in enumerate(module.graph.nodes)}

    def place(arg: Any) -> Any:
        return f"%{places[arg]}" if isinstance(arg, Node) else arg

    def described(node: Node) -> tuple[Any, ...]:
        target = "" if node.op == "placeholder" else node.target
        args, kwargs = (repr(_mapped(arg, place)) for arg in (node.args, node.kwargs))
        return node.op, target, args, kwargs

    return [described(node) for node in module.graph.nodes]


def _mapped(arg: Any, function: Any) -> Any:
    if isinstance(arg, (list, tuple)):
        return [_mapped(item, function) for item in arg]
    if isinstance(arg, dict):
        return {key: _mapped(item, function) for key, item in arg.items()}
    return function(arg)
