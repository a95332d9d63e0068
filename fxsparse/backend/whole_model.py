"""The one-line call on a whole model: ``torch.compile(model, backend="fxsparse", options={"recipe": "sat"})``.

Passes whose state follows from the weights run on each of Dynamo's graphs (``one_line``). Others need the whole model
and state that lasts. Where one of Dynamo's graphs is all of a model's ``forward``, and such a pass or a schedule
asks for it, the model is rewritten as by `fxsparse.rewrite`, and what passes add is registered with it
(`fxsparse.graph.added_state`). Dynamo's graph itself is then not compiled. In its place stands a function that calls
the rewritten graph module, compiled, with the arguments of the call:

    forward of the model, in Dynamo's code
        outputs = graph(inputs)           -> WholeModel.__call__ -> torch.compile(rewritten)(*arguments)
        returns an object made of outputs

Which output belongs where in that object only Dynamo's code knows. So the first call runs that code once with stand-ins
for the outputs, and looks where they are in the object it returns. The model's own ``forward`` stays as it was.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
import sys
import threading
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.utils import counters
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fxsparse.backend.compiled import Origin
from fxsparse.conversion.folders import save_readably
from fxsparse.conversion.in_place import in_place, restore_in_place
from fxsparse.errors import OptionError, RewriteError, TraceError
from fxsparse.graph.added_state import NAME, AddedState, added_state_of, attach_state
from fxsparse.graph.record import TRACE_KEY
from fxsparse.graph.runtime_state import forget_states
from fxsparse.graph.wrapped import module_form_of, unwrapped_module

if TYPE_CHECKING:
    from types import FrameType

    from fxsparse.passes.pipeline import Pipeline

ONE_LINE = "fxsparse_one_line"
"""In ``gm.meta``: that the graph module belongs to a model which a one-line call rewrote."""

_RESUMED = re.compile(r"torch_dynamo_resume_in_.*_at_(?P<line>\d+)")
_rehearsal = threading.local()


# --- which graphs are whole -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Why the passes see a graph of Dynamo's for itself, and not a whole model.

    Attributes:
        reason: in a sentence.
        where: the line of the model at which Dynamo broke it, with its file; may be empty.
    """

    reason: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.reason}{f' ({self.where})' if self.where else ''}"

    def added_to(self, error: RewriteError) -> RewriteError:
        """What a pass refused, with the reason why it saw a part only."""
        told = RewriteError(f"{error}; the passes see a part of the model only: {self}")
        told.pass_name, told.site = error.pass_name, error.site
        return told


def part_of(gm: GraphModule, target: Any) -> Part | None:
    """Why ``gm`` is not the whole ``forward`` of the module that is compiled; None if it is."""
    if not isinstance(target, nn.Module):
        return Part("a function was compiled, in which a model may be a part")
    if isinstance(target, GraphModule) and TRACE_KEY in target.meta:
        return Part("a graph module was compiled, which fxsparse.rewrite rewrites")
    if isinstance(target, nn.parallel.DistributedDataParallel):
        return Part("DistributedDataParallel was compiled; wrap the compiled model instead")
    translator = InstructionTranslator.current_tx()
    output = translator.output
    reason = output.compile_subgraph_reason
    if reason is not None and reason.graph_break:
        frame = reason.user_stack[-1] if reason.user_stack else None
        where = f"{frame.filename}:{frame.lineno}" if frame else ""
        return Part(f"Dynamo breaks it: {_told(reason.reason)}", where)
    resumed = _RESUMED.match(translator.f_code.co_name)
    if resumed is not None:
        return Part("Dynamo broke it before", f"{translator.f_code.co_filename}:{resumed['line']}")
    if len(output.graph.find_nodes(op="placeholder")) != len(gm.graph.find_nodes(op="placeholder")):
        return Part("DistributedDataParallel lets Dynamo split it; set torch._dynamo.config.optimize_ddp = False")
    code, values = output.root_tx.f_code, output.root_tx.f_locals
    owner = values.get(code.co_varnames[0]) if code.co_argcount else None
    if isinstance(owner, nn.Module) and owner is not target:
        where = f"{code.co_filename}:{code.co_firstlineno}"
        return Part(f"Dynamo gave up the model's forward and compiles {type(owner).__name__} by itself", where)
    if holds_cache(values):
        return Part("it was given a cache of keys and values")
    return None


def _told(reason: str) -> str:
    """A reason of Dynamo's in a line. One that only says that a step failed stands for the last that it counted."""
    told = reason.strip().splitlines()
    counted = list(counters["graph_break"])
    if told[0] == "step_unsupported" and counted:
        told = [line.strip() for line in counted[-1].splitlines()]
    context = (line for line in told[1:] if line.startswith("Developer debug context: "))
    return "; ".join((told[0], *(line.removeprefix("Developer debug context: ") for line in context)))


def holds_cache(tree: Any) -> bool:
    """Whether there is a cache of keys and values among arguments."""
    return any(map(_is_cache, pytree.tree_leaves(tree, is_leaf=_is_cache)))


def _is_cache(item: Any) -> bool:
    return "Cache" in type(item).__name__


# --- the rewritten model ----------------------------------------------------------------------------------------------


def rewritten(
    model: nn.Module, pipeline: Pipeline, arguments: tuple[Any, ...], keywords: Mapping[str, Any], among: Sequence[Any]
) -> AddedState:
    """What the passes added to ``model``; they run if they did not before.

    Args:
        model: the model, whose parameters stay its own.
        pipeline: the passes.
        arguments, keywords: of the call, the example that the model is traced with.
        among: modules that the call went through.

    Raises:
        TraceError, RewriteError: as of `fxsparse.rewrite`.
        OptionError: the model was rewritten by other passes before.
    """
    state = added_state_of(model)
    if state is not None:
        state.check_passes(str(pipeline))
        if state.graph is not None:
            return state
    graph = traced_and_rewritten(model, pipeline, arguments, keywords)
    theirs = {id(parameter) for parameter in model.parameters()}
    own = [name for name, parameter in graph.named_parameters() if id(parameter) not in theirs]
    if own and any(isinstance(module, nn.parallel.DistributedDataParallel) for module in among):
        raise RewriteError(
            f"the passes add parameters ({own[0]}, {len(own)} in all) that DistributedDataParallel does not know and "
            "would not reduce; call the compiled model once before it is wrapped"
        )
    graph.meta[ONE_LINE] = True
    state = attach_state(model)
    save_readably(model)
    state.hold(graph, model, str(pipeline))
    return state


def traced_and_rewritten(
    model: nn.Module, pipeline: Pipeline, arguments: tuple[Any, ...], keywords: Mapping[str, Any]
) -> GraphModule:
    """The graph of ``model`` after the passes, traced for any batch size if that can be."""
    from fxsparse.tracing.trace import trace

    try:
        traced = trace(model, arguments, keywords)
    except TraceError:
        traced = trace(model, arguments, keywords, dynamic_batch=False)
    return pipeline(traced)


def with_dense_weights(pipeline: Pipeline) -> Pipeline:
    """The pipeline with weights that stay the model's own: N:M weights are masked, not replaced by compressed ones."""
    from fxsparse.passes import InsertNMMasks, Pipeline

    passes = (replace(item, storage="masked") if isinstance(item, InsertNMMasks) else item for item in pipeline.passes)
    return Pipeline(passes, callback=pipeline.callback, keep_graphs=pipeline.keep_graphs)


def forget(model: nn.Module) -> None:
    """Takes out of ``model`` what the passes of a one-line call added to it, so that it is the user's again.

    Weights that were trained stay as trained. ``requires_grad`` of parameters that passes froze is set again. The next
    call of ``torch.compile(model, backend="fxsparse", ...)`` may name other passes; what was compiled before is void.

    After ``weights="compressed"`` linears have dense weights again, zero where they were pruned and with the low-rank
    branches that had started added. These are new parameters, of which an optimizer has to be told.

    Args:
        model: the model, or what ``torch.compile`` or ``DistributedDataParallel`` made of it.

    Raises:
        OptionError: no one-line call added anything to the model.
    """
    inner = unwrapped_module(model)
    form = module_form_of(inner)
    if form is not None and in_place(form) is not None:
        restore_in_place(form)
        return
    state = added_state_of(inner)
    if state is None:
        raise OptionError("fxsparse.forget: no one-line call has added anything to this model")
    del inner._modules[NAME]
    vars(inner).pop("save_pretrained", None)
    forget_states(inner)
    for name, wanted in state.asked.items():
        inner.get_parameter(name).requires_grad_(wanted)


def add_new_parameters(graph: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Gives an optimizer of a model the parameters that the passes of a one-line call added to it.

    Each joins the group of the parameter that is nearest to it by its name.
    """
    held = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    named = list(graph.named_parameters())
    groups = {name: held[id(parameter)] for name, parameter in named if id(parameter) in held}
    if not groups or not graph.meta.get(ONE_LINE):  # type: ignore[union-attr, operator]
        return
    for name, parameter in named:
        if id(parameter) not in held:
            groups[max(groups, key=functools.partial(_nearness, name))]["params"].append(parameter)


def _nearness(name: str, other: str) -> int:
    """How many modules two parameters have in common."""
    pairs = zip(name.split("."), other.split("."), strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


# --- in the place of Dynamo's graph -----------------------------------------------------------------------------------


class ReplacedGraph(ABC):
    """Stands in the place of a graph of Dynamo's, which is all of a model's ``forward``.

    Args:
        gm: Dynamo's graph.
    """

    def __init__(self, gm: GraphModule):
        self.count = len(gm.graph.output_node().args[0])  # type: ignore[arg-type]
        self.places: list[str | None] | None = None

    def __call__(self, *inputs: Any) -> list[Any]:
        stage = getattr(_rehearsal, "stage", None)
        if stage is not None:
            return stage.stand_ins(self.count)
        call = Call.current()
        if self.places is None:
            self.places = _rehearse(call, self.count)
        return _outputs(self.places, call.model, self.run(call, inputs))

    @abstractmethod
    def run(self, call: Call, inputs: Sequence[Any]) -> Any:
        """What the model's ``forward`` returns for a call; ``inputs`` are those of the graph."""


class WholeModel(ReplacedGraph):
    """Runs the rewritten model.

    Args:
        gm: Dynamo's graph.
        pipeline: the passes.
        names: the names of parameters and buffers among the inputs, by position.
        compile: compiles the rewritten graph module.
    """

    def __init__(
        self,
        gm: GraphModule,
        pipeline: Pipeline,
        names: Mapping[int, str],
        compile: Callable[[GraphModule, bool | None], Callable[..., Any]],
    ):
        super().__init__(gm)
        self.pipeline, self.names, self.compile = pipeline, dict(names), compile
        self.compiled: weakref.WeakKeyDictionary[nn.Module, Callable[..., Any]] = weakref.WeakKeyDictionary()

    def run(self, call: Call, inputs: Sequence[Any]) -> Any:
        state = rewritten(call.model, self.pipeline, call.arguments, call.keywords, call.among)
        assert state.graph is not None
        self._share(state, inputs)
        state.follow_modes()
        self._warn_without_schedule(state)
        run = self.compiled.get(state)
        if run is None:
            run = self.compiled[state] = self.compile(state.graph, call.dynamic)
        return run(*call.arguments, **call.keywords)

    def _share(self, state: AddedState, inputs: Sequence[Any]) -> None:
        """Lets the graph read the tensors that the model has now."""
        for position, name in self.names.items():
            if state.shared.get(name) is not inputs[position]:
                if name in state.shared:
                    state.set_shared(name, inputs[position])
                state.shared[name] = inputs[position]

    def _warn_without_schedule(self, state: AddedState) -> None:
        if state.scheduled or not (state.graph.training and torch.is_grad_enabled()):  # type: ignore[union-attr]
            return
        state.scheduled = True
        waiting = [str(item) for item in self.pipeline.passes if item.needs_schedule]
        if waiting:
            warnings.warn(
                f"{', '.join(waiting)}: nothing varies while the model trains until there is a schedule; call "
                "fxsparse.Schedule(compiled, optimizer, total_steps=...) and its step() after every optimizer step",
                stacklevel=2,
            )


def _outputs(places: Sequence[str | None], model: nn.Module, result: Any) -> list[Any]:
    """The outputs of Dynamo's graph, found where they are in what ``forward`` returned."""
    leaves = {pytree.keystr(path): leaf for path, leaf in pytree.tree_flatten_with_path(result)[0]}
    outputs = []
    for place in places:
        if place is None or place.startswith(".buffer "):
            outputs.append(None if place is None else model.get_buffer(place.removeprefix(".buffer ")))
        elif place in leaves:
            outputs.append(leaves[place])
        elif "past_key_values" in place or "cache" in place.lower():
            _warn_of_cache()
            outputs.append(None)
        else:
            raise RewriteError(
                f"this call returns {place.lstrip('.')}, which the first call did not, and the graph is that of "
                "the first call: call fxsparse.forget(model), and begin with a call like this one"
            )
    return outputs


def _warn_of_cache() -> None:
    warnings.warn(
        "the rewritten model keeps no cache of keys and values, and that in its output is empty; pass use_cache=False",
        stacklevel=4,
    )


@dataclass(frozen=True)
class Call:
    """A call of a compiled model that is running.

    Attributes:
        model: the model.
        arguments, keywords: what its ``forward`` was called with, after forward pre-hooks.
        again: calls Dynamo's code of ``forward`` once more.
        dynamic: what ``torch.compile(dynamic=...)`` said.
        among: modules that the call went through.
    """

    model: nn.Module
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    again: Callable[..., Any]
    dynamic: bool | None
    among: tuple[nn.Module, ...]

    @classmethod
    def current(cls) -> Call:
        """Reads the stack: Dynamo's code tells a graph its tensors, and neither the model nor its arguments."""
        model = Origin.of_current_call().module
        assert model is not None
        frames = list(_callers(sys._getframe(2)))
        modules = [(frame, _first_argument(frame)) for frame in frames]
        at, entry = next((at, frame) for at, frame in enumerate(frames) if frame.f_code.co_name == "compile_wrapper")
        forward = next((frame for frame, first in modules[:at] if first is model), None)
        context, function = entry.f_locals["self"], entry.f_locals["fn"]
        method = function if "forward" in vars(model) else type(model).forward.__get__(model)
        if forward is not None:
            arguments, keywords = _arguments(forward, model)
        else:  # Dynamo compiles a function around a module whose class is torch's own
            arguments, keywords, method = entry.f_locals["args"], dict(entry.f_locals["kwargs"]), function
        among = tuple(first for _, first in modules if isinstance(first, nn.Module))
        return cls(model, arguments, keywords, context(method), getattr(context, "_dynamic", None), among)


def arguments_given() -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """What the call of ``torch.compile``'s result that is running was given; None if none is."""
    frames = (frame for frame in _callers(sys._getframe(1)) if frame.f_code.co_name == "compile_wrapper")
    entry = next(frames, None)
    return None if entry is None else (tuple(entry.f_locals["args"]), dict(entry.f_locals["kwargs"]))


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _first_argument(frame: FrameType) -> Any:
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def _arguments(frame: FrameType, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the call of ``forward`` that runs in ``frame`` was given; defaults are left out."""
    code, values = frame.f_code, frame.f_locals
    named = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    rest = iter(code.co_varnames[code.co_argcount + code.co_kwonlyargcount :])
    further = values[next(rest)] if code.co_flags & inspect.CO_VARARGS else ()
    keywords = dict(values[next(rest)]) if code.co_flags & inspect.CO_VARKEYWORDS else {}
    defaults = {item.name: item.default for item in inspect.signature(model.forward).parameters.values()}
    if further:
        return (*(values[name] for name in named[: code.co_argcount - 1]), *further), keywords
    keywords = {name: values[name] for name in named} | keywords
    return (), {name: value for name, value in keywords.items() if value is not defaults.get(name, inspect)}


class _Stage:
    """What a rehearsal of Dynamo's code hands out in the place of outputs."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def stand_ins(self, count: int) -> list[Tensor]:
        self.tensors = [torch.empty(0) for _ in range(count)]
        return self.tensors


def _rehearse(call: Call, count: int) -> list[str | None]:
    """Where each output of Dynamo's graph is in what ``forward`` returns, or which buffer it becomes."""
    buffers = [(module, name, buffer) for module in call.model.modules() for name, buffer in module._buffers.items()]
    stage = _rehearsal.stage = _Stage()
    try:
        result = call.again(*call.arguments, **call.keywords)
    finally:
        _rehearsal.stage = None
    places = {id(leaf): pytree.keystr(path) for path, leaf in pytree.tree_flatten_with_path(result)[0]}
    paths = {id(module): path for path, module in call.model.named_modules()}
    for module, name, buffer in buffers:
        if module._buffers[name] is not buffer:
            places[id(module._buffers[name])] = f".buffer {paths[id(module)]}.{name}".replace(" .", " ")
            module._buffers[name] = buffer
    if len(stage.tensors) != count:
        raise RewriteError("the model's forward could not be called twice with the same inputs, which the passes need")
    return [places.get(id(tensor)) for tensor in stage.tensors]
