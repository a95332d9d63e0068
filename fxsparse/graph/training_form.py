"""The training form: a second graph that a graph module runs in training instead of its own.

The graph module's own graph remains the model: it is evaluated, saved and exported, and passes edit it. The training
form is derived from it and reads the same state by the same names; ``gm(...)`` runs it while ``gm.training`` is set.
Each form has its own code, so a running ``torch.compile`` keeps both and compiles each once.

    gm(...)  ->  gm.forward, the same function for good  ->  code of the graph, or of its training form

Libraries wrap ``forward`` on the instance (accelerate, for mixed precision) and keep the function that they found. It
is therefore one that looks up the code on every call, and nothing here ever assigns or removes ``gm.forward``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule, Proxy

from fxsparse import graph as fx
from fxsparse.errors import RewriteError
from fxsparse.graph.partial import can_go, code_without, input_names

FORM_KEY = "fxsparse_training_form"


@dataclass(frozen=True)
class TrainingForm:
    """The graph and code that run in training.

    Attributes:
        graph: the training form, which reads the state of its graph module.
        forward: its compiled Python code, a function of the graph module and its inputs.
        source: the code of the graph from which it was derived.
        renew: derives it again for a graph module whose graph was edited.
    """

    graph: Graph
    forward: Callable[..., Any]
    source: str
    renew: Callable[[GraphModule], None]

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainingForm:
        return self  # it holds no state


def set_form(gm: GraphModule, form: GraphModule | None, renew: Callable[[GraphModule], None]) -> None:
    """Makes ``gm`` run ``form``, an edited copy of it, in training; with None it runs its own graph again."""
    if form is None:
        gm.meta.pop(FORM_KEY, None)
    else:
        form.recompile()
        form.graph.owning_module = None  # otherwise it would keep the copy's tensors alive
        source = gm.graph.python_code("self").src
        gm.meta[FORM_KEY] = TrainingForm(form.graph, _code_of(form), source, renew)
    if hasattr(type(gm), "partial_codes"):
        type(gm).partial_codes = {}  # type: ignore[attr-defined]


def keep_forward(gm: GraphModule) -> None:
    """Puts the function that looks up the code back in the place of the code that ``recompile`` put there."""
    kind: Any = type(gm)  # every graph module has a class of its own
    kind.graph_code = kind.forward
    kind.input_names, kind.partial_codes = tuple(input_names(gm)), {}
    if "lasting_forward" not in vars(kind):
        kind.lasting_forward = _lasting_forward()
    kind.lasting_forward.__signature__ = inspect.signature(kind.graph_code)
    kind.forward = kind.lasting_forward


def _lasting_forward() -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(args, Proxy):
            raise RewriteError(
                "torch.fx.symbolic_trace would make training mode a constant and lose the record of the passes; this "
                "is a graph module already: read gm.graph, copy.deepcopy(gm) to edit it, or call torch.export.export"
            )
        form = self.meta.get(FORM_KEY)
        # Without a form the mode is not read: a compiled graph must not depend on it.
        in_form = form is not None and self.training
        code = form.forward if in_form else type(self).graph_code
        if len(args) + len(kwargs) < len(type(self).input_names):
            absent = absent_inputs(self, args, kwargs)
            code = type(self).partial_codes.get((absent, in_form), code)
            kwargs = {**kwargs, **dict.fromkeys(absent)} if (absent, in_form) in type(self).partial_codes else kwargs
        return code(self, *args, **kwargs)

    return forward


def absent_inputs(gm: GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the inputs that a call leaves out."""
    return tuple(name for name in type(gm).input_names[len(args) :] if name not in kwargs)  # type: ignore[attr-defined]


def prepare_without(gm: GraphModule, absent: tuple[str, ...]) -> bool:
    """Derives what ``gm`` runs without these inputs in its present mode; False if it cannot do without them."""
    form = _form(gm) if gm.training else None
    graph, codes = (gm.graph if form is None else form.graph), type(gm).partial_codes  # type: ignore[attr-defined]
    if (absent, form is not None) not in codes:
        if not can_go(graph, absent):
            return False
        codes[absent, form is not None] = code_without(gm, graph, absent)
    return True


def _code_of(gm: GraphModule) -> Callable[..., Any]:
    code: Callable[..., Any] = getattr(type(gm), "graph_code", type(gm).forward)
    return code


def renew_form(gm: GraphModule) -> None:
    """Derives the training form again if the graph has changed since."""
    form = _form(gm)
    if form is not None and gm.code != form.source:
        form.renew(gm)


def follow_edit(gm: GraphModule) -> None:
    """Derives the training form again after an edit of the graph; RewriteError where it cannot follow."""
    form = _form(gm)
    if form is not None:
        form.renew(gm)


def training_graph(gm: GraphModule) -> GraphModule:
    """The graph that ``gm`` runs in training, as a graph module with the same state, to read or to count its FLOPs."""
    form = _form(gm)
    if form is None:
        return gm
    copy = fx.copy_sharing_state(gm)
    copy.meta.pop(FORM_KEY)
    copy.graph = form.graph
    return copy


def _form(gm: GraphModule) -> TrainingForm | None:
    return getattr(gm, "meta", {}).get(FORM_KEY)
