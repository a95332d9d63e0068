"""The training form: a second graph that a graph module runs in training instead of its own.

The graph module's own graph remains the model: it is evaluated, saved and exported, and passes edit it. The training
form is derived from it and reads the same state by the same names; ``gm(...)`` runs it while ``gm.training`` is set.
Each form has its own code, so a running ``torch.compile`` keeps both and compiles each once.

    gm(...)  ->  gm.forward, the same function for good  ->  code of the graph, or of its training form

Of each there may be two: one that runs it as it stands, and one that recomputes parts of it in the backward pass
(`fxsparse.graph.recompute`), for training with gradients.

Libraries wrap ``forward`` on the instance (accelerate, for mixed precision) and keep the function that they found. It
is therefore one that looks up the code on every call, and nothing here ever assigns or removes ``gm.forward``.

Training may edit a graph thousands of times. What Dynamo compiled of earlier code can never run again, and would count
as recompiles until Dynamo gives up; fx keeps the text of all code that it ever made. Both are let go with the code.
"""

from __future__ import annotations

import inspect
import linecache
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.eval_frame import remove_from_cache
from torch.fx import Graph, GraphModule, Proxy
from torch.fx.graph_module import _loader as fx_sources

from fxsparse import graph as fx
from fxsparse.errors import RewriteError
from fxsparse.graph.partial import can_go, graph_without, input_names
from fxsparse.graph.recompute import recomputing

FORM_KEY = "fxsparse_training_form"
CONDITIONS_KEY = "fxsparse_size_conditions"
"""In ``gm.meta``: conditions on the sizes of inputs under which the graph is the model."""
TRAINING_ONLY = "fxsparse_training_only"
"""In ``gm.meta``: the names of the passes that compute something else in training than in evaluation."""


@dataclass(frozen=True)
class Code:
    """The compiled Python code of a graph: functions of the graph module and its inputs.

    Attributes:
        plain: runs the graph as it stands.
        recomputing: runs its marked regions through ``torch.utils.checkpoint``; None if there are none.
    """

    plain: Callable[..., Any]
    recomputing: Callable[..., Any] | None = None

    @classmethod
    def of(cls, gm: GraphModule, plain: Callable[..., Any]) -> Code:
        """The code of the graph of ``gm``; ``plain`` is what fx made of it."""
        folded = recomputing(gm)
        return cls(plain, None if folded is None else type(folded).forward)

    @property
    def files(self) -> list[str]:
        """The names that fx gave the texts of the functions."""
        names = [function.__code__.co_filename for function in (self.plain, self.recomputing) if function is not None]
        return [name for name in names if name.startswith("<eval_with_key>")]


@dataclass(frozen=True)
class TrainingForm:
    """The graph and code that run in training.

    Attributes:
        graph: the training form, which reads the state of its graph module.
        code: its compiled Python code.
        source: the code of the graph from which it was derived.
        renew: derives it again for a graph module whose graph was edited.
    """

    graph: Graph
    code: Code
    source: str
    renew: Callable[[GraphModule], None]

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainingForm:
        return self  # it holds no state


def set_form(gm: GraphModule, form: GraphModule | None, renew: Callable[[GraphModule], None]) -> None:
    """Makes ``gm`` run ``form``, an edited copy of it, in training; with None it runs its own graph again."""
    before = gm.meta.pop(FORM_KEY, None)
    if before is not None:
        _forget_sources(before.code.files)
    if form is not None:
        form.recompile()
        form.graph.owning_module = None  # otherwise it would keep the copy's tensors alive
        source = gm.graph.python_code("self").src
        gm.meta[FORM_KEY] = TrainingForm(form.graph, _code_of(form), source, renew)
    if hasattr(type(gm), "partial_codes"):
        type(gm).partial_codes = {}  # type: ignore[attr-defined]


def keep_forward(gm: GraphModule) -> None:
    """Puts the function that looks up the code back in the place of the code that ``recompile`` put there."""
    kind: Any = type(gm)  # every graph module has a class of its own
    plain = kind.forward
    kind.graph_code = Code.of(gm, plain)
    kind.input_names, kind.partial_codes = tuple(input_names(gm)), {}
    if "lasting_forward" not in vars(kind):
        kind.lasting_forward, kind.sources = _lasting_forward(), []
        weakref.finalize(kind, _forget_sources, kind.sources).atexit = False
    else:
        remove_from_cache(kind.lasting_forward)
    _forget_sources(kind.sources)
    kind.sources[:] = kind.graph_code.files
    kind.lasting_forward.__signature__ = inspect.signature(plain)
    kind.forward = kind.lasting_forward


def _forget_sources(names: Iterable[str]) -> None:
    """Takes the text of code that is gone out of the caches that tracebacks read."""
    for name in names:
        fx_sources.eval_cache.pop(name, None)
        linecache.cache.pop(name, None)


def _lasting_forward() -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(args, Proxy):
            raise RewriteError(
                "torch.fx.symbolic_trace would make training mode a constant and lose the record of the passes; this "
                "is a graph module already: read gm.graph, copy.deepcopy(gm) to edit it, or call torch.export.export"
            )
        if torch.compiler.is_exporting():
            check_exported(self)
        form = self.meta.get(FORM_KEY)
        # Without a form or regions the mode is not read: a compiled graph must not depend on it.
        in_form = form is not None and self.training
        code: Code = form.code if in_form else type(self).graph_code
        if len(args) + len(kwargs) < len(type(self).input_names):
            absent = absent_inputs(self, args, kwargs)
            code = type(self).partial_codes.get((absent, in_form), code)
            kwargs = {**kwargs, **dict.fromkeys(absent)} if (absent, in_form) in type(self).partial_codes else kwargs
        run = code.plain
        if code.recomputing is not None and self.training and torch.is_grad_enabled():
            run = code.plain if torch.compiler.is_exporting() else code.recomputing
        return run(self, *args, **kwargs)

    forward.__code__ = forward.__code__.replace()  # Dynamo keeps what it compiled by the code, of each class its own
    return forward


def check_exported(gm: GraphModule) -> None:
    """RewriteError where an export of ``gm`` would keep what belongs to its training, or lose conditions."""
    reason = ""
    if gm.meta.get(TRAINING_ONLY) and gm.training:  # in this order: Dynamo guards on what is asked
        reason = (
            f"in training, {', '.join(gm.meta[TRAINING_ONLY])} computes something else in every step, which an "
            "exported program cannot; call eval() first, which exports what the model evaluates"
        )
    elif torch.compiler.is_dynamo_compiling() and gm.meta.get(CONDITIONS_KEY):
        reason = "the graph holds for some sizes only, which Dynamo would forget; export with strict=False"
    if reason and torch.compiler.is_dynamo_compiling():
        raise RuntimeError(reason)  # Dynamo cannot follow the errors of fxsparse
    if reason:
        raise RewriteError(reason)


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
        without = GraphModule(gm, graph_without(graph, absent))
        codes[absent, form is not None] = Code.of(without, type(without).forward)
    return True


def _code_of(gm: GraphModule) -> Code:
    kind: Any = type(gm)
    return kind.graph_code if "graph_code" in vars(kind) else Code.of(gm, kind.forward)


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
