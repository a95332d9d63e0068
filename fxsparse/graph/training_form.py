"""A graph module that computes something else in training than its graph says, and its graph in evaluation.

The graph stays what the model is: it is saved, exported and evaluated, and passes edit it. The training form is derived
from it, reads the same state by the same names, and is what ``gm(...)`` runs while ``gm.training`` is set. Either
form has code of its own, so a running ``torch.compile`` keeps both and compiles each once.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule

from fxsparse import graph as fx

FORM_KEY = "fxsparse_training_form"


@dataclass(frozen=True)
class TrainingForm:
    """What runs in training.

    Attributes:
        graph: the training form, over the state of the graph module it belongs to.
        forward: its compiled Python, a function of the graph module and its inputs.
        source: the code it was derived from.
        renew: derives it again, for a graph module whose graph was edited.
    """

    graph: Graph
    forward: Callable[..., Any]
    source: str
    renew: Callable[[GraphModule], None]

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainingForm:
        return self  # it holds no state


def set_form(gm: GraphModule, form: GraphModule | None, renew: Callable[[GraphModule], None]) -> None:
    """Lets ``gm`` run ``form``, an edited copy of it, in training; None: its own graph."""
    if form is None:
        gm.meta.pop(FORM_KEY, None)
    else:
        form.recompile()
        form.graph.owning_module = None  # or it would keep the copy's tensors alive
        source = gm.graph.python_code("self").src
        gm.meta[FORM_KEY] = TrainingForm(form.graph, type(form).forward, source, renew)
    choose_form(gm)


def choose_form(gm: GraphModule) -> None:
    """Puts the form that fits the mode in the place of ``gm.forward``."""
    form = _form(gm)
    if form is not None and gm.training:
        gm.__dict__["forward"] = types.MethodType(form.forward, gm)
    else:
        gm.__dict__.pop("forward", None)


def renew_form(gm: GraphModule) -> None:
    """Derives the training form again where the graph is no longer what it was derived from."""
    form = _form(gm)
    if form is not None and gm.code != form.source:
        form.renew(gm)


def training_graph(gm: GraphModule) -> GraphModule:
    """What ``gm`` runs in training, as a graph module that shares its state: to read, and to count FLOPs of."""
    form = _form(gm)
    if form is None:
        return gm
    copy = fx.copy_sharing_state(gm)
    copy.meta.pop(FORM_KEY)
    choose_form(copy)
    copy.graph = form.graph
    return copy


def _form(gm: GraphModule) -> TrainingForm | None:
    return getattr(gm, "meta", {}).get(FORM_KEY)
