"""The graphs that the backend compiled, and the compiled model or function that each belongs to.

A backend is told neither the module that is compiled nor its name, so `Origin` reads both from the stack of the
compilation. The graphs are kept by a weak reference to that module or function; a module whose graphs Dynamo reuses
for another of the same class finds them by the names and shapes of its state. Launches of generated kernels are
counted around every call, forward and backward.
"""

from __future__ import annotations

import inspect
import re
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch._dynamo import external_utils
from torch._dynamo.eval_frame import OptimizedModule, innermost_fn
from torch.fx import Graph

from fxsparse.backend.options import BackendOptions
from fxsparse.codegen.loaded import recording, start, stop
from fxsparse.graph.added_state import added_state_of
from fxsparse.graph.readable import readable
from fxsparse.graph.record import Record
from fxsparse.lowering.choice import Choice

_AOT_INPUT = re.compile(r"(?P<kind>primals_|arg)(?P<number>\d+)(_1)?$")
_lock = threading.Lock()
_graphs: dict[int, tuple[weakref.ref[Any], list[CompiledGraph]]] = {}


@dataclass
class CompiledGraph:
    """One graph that Dynamo captured, and what became of it.

    Attributes:
        name: Dynamo's number of the graph, ``0/0``; what follows the slash counts recompiles.
        options: what was asked for.
        shapes: of the parameters and buffers it was compiled with, by their full names.
        record: of the passes that ran on the graph; None in the bare call.
        choices: the implementation of every fxsparse operator and of every frozen N:M weight found.
        overrides: implementations of operators that fixed rules would not choose, by `timings.key` of their problem.
        notes: why something asked for did not happen, at compile time or later.
        launches: of generated kernels, by source file; forward and backward.
        inputs: names of the parameters and buffers among the inputs, by position.
        sources: the graphs that the compiler was given, as Python, each with ``forward`` or ``backward``; none of what
            torch took from its compile caches.
        runs: gives what runs it, or None once Dynamo has dropped that, as it does where code was replaced.
    """

    name: str
    options: BackendOptions
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    record: Record | None = None
    choices: list[Choice] = field(default_factory=list)
    overrides: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    launches: dict[Path, int] = field(default_factory=dict)
    inputs: dict[int, str] = field(default_factory=dict)
    sources: list[tuple[str, str]] = field(default_factory=list)
    runs: Callable[[], Any] = field(default=lambda: None, repr=False, compare=False)

    def show(self, graph: Graph) -> None:
        """Adds a graph that the compiler is given to the sources; a text that cannot be made is noted."""
        inputs = [node.name for node in graph.find_nodes(op="placeholder")]
        which = "backward" if any(name.startswith("tangents_") for name in inputs) else "forward"
        try:
            self.sources.append((which, readable(graph, which, self._named(inputs, which))))
        except Exception as error:
            self.note(f"the {which} graph cannot be shown: {type(error).__name__}: {error}")

    def _named(self, inputs: list[str], which: str) -> dict[str, str]:
        """Names of state by the names of a graph's inputs: AOTAutograd numbers Dynamo's, other graphs take them all."""
        matches = {name: _AOT_INPUT.fullmatch(name) for name in inputs}
        places = {name: int(m["number"]) - (m["kind"] == "primals_") for name, m in matches.items() if m is not None}
        if not places and which == "forward":
            places = {name: place for place, name in enumerate(inputs)}
        return {name: self.inputs[place] for name, place in places.items() if place in self.inputs}

    def note(self, text: str) -> None:
        """Adds a note once."""
        if text not in self.notes:
            self.notes.append(text)


@dataclass(frozen=True)
class Origin:
    """The call of ``torch.compile`` a graph is compiled for.

    Attributes:
        target: the module, or the function where there is none; None outside ``torch.compile``.
    """

    target: Any

    @property
    def module(self) -> nn.Module | None:
        return self.target if isinstance(self.target, nn.Module) else None

    @classmethod
    def of_current_call(cls) -> Origin:
        """Reads the stack of the compilation that is running: a backend is told neither the module nor its name."""
        frame = inspect.currentframe()
        while frame is not None:
            if frame.f_code.co_name == "compile_wrapper" and "fn" in frame.f_locals:
                return cls(_target(frame.f_locals["fn"]))
            owner = frame.f_locals.get("self") if frame.f_code.co_name in ("__call__", "_call_impl") else None
            if isinstance(owner, OptimizedModule):
                return cls(_target(owner))
            frame = frame.f_back
        return cls(None)

    def add(self, graph: CompiledGraph, run: Callable[..., Any]) -> None:
        """Notes that ``graph`` was compiled for this call, to ``run``; forgets the graphs that Dynamo has dropped."""
        graph.runs = weakref.ref(innermost_fn(run))  # Dynamo keeps what its own wrappers wrap, and not those
        if self.target is not None:
            with _lock:
                graphs = _graphs_of(self.target)
                graphs[:] = [*_alive(graphs), graph]


def compiled_graphs(compiled: Callable[..., Any]) -> list[CompiledGraph]:
    """The graphs compiled so far for what ``torch.compile(..., backend="fxsparse")`` returned.

    Args:
        compiled: a compiled module or function, or a module compiled in place by ``module.compile(...)``.

    Returns:
        graphs in the order they were compiled, one for every piece between graph breaks, every mode and every
        recompile. Empty before the first call, and after ``torch._dynamo.reset()``. A graph that cannot run any more,
        because the model was edited since, is not among them. A module of the same class and shapes as one that was
        compiled before it runs that one's graphs, which are then given.
    """
    options, target = options_of(compiled), _target(compiled)
    with _lock:
        graphs = _graphs_of(target) or _graphs_of_twins(target)
        graphs = [graph for graph in _alive(graphs) if options is None or graph.options == options]
        state = added_state_of(target)
        return graphs if state is None or state.graph is None else [*_alive(_graphs_of(state.graph)), *graphs]


@dataclass(frozen=True)
class Launches:
    """A generated kernel that ran in a compiled model.

    Attributes:
        name: of the function, as profilers show it.
        file: its source, for a person to read.
        count: launches so far, forward and backward; a CUDA graph counts once, when it is captured.
    """

    name: str
    file: Path
    count: int

    def __str__(self) -> str:
        return f"{self.name}: {self.count} launch{'es' if self.count != 1 else ''}, {self.file}"


def kernels(compiled: Callable[..., Any]) -> list[Launches]:
    """The generated kernels that ran in what ``torch.compile(..., backend="fxsparse")`` returned, most launched first.

    Empty where operators run as ATen that Inductor fuses; ``explain`` says why.
    """
    total: dict[Path, int] = {}
    for graph in compiled_graphs(compiled):
        for file, count in graph.launches.items():
            total[file] = total.get(file, 0) + count
    names = {file: file.stem.rpartition("_")[0] for file in total}
    return sorted(
        (Launches(names[file], file, count) for file, count in total.items()), key=lambda item: (-item.count, item.name)
    )


def record_launches(inner: Callable[..., Any], launches: dict[Path, int]) -> Callable[..., Any]:
    """``inner``, with the generated kernels that it and its backward pass launch added to ``launches``."""

    def call(*args: Any) -> Any:
        with recording(launches):
            outputs = inner(*args)
        tensors = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        node = next((t.grad_fn for t in tensors if isinstance(t, Tensor) and t.grad_fn is not None), None)
        if node is not None:  # all of a compiled graph's outputs have the one backward pass
            node.register_prehook(lambda gradients: start(launches))
            node.register_hook(lambda inputs, gradients: stop(launches))
        return outputs

    return call


def forget_all() -> None:
    """Forgets every graph."""
    with _lock:
        _graphs.clear()


def _alive(graphs: list[CompiledGraph]) -> list[CompiledGraph]:
    return [graph for graph in graphs if graph.runs() is not None]


def _graphs_of(target: Any) -> list[CompiledGraph]:
    key = id(target)
    known = _graphs.get(key)
    if known is None or known[0]() is not target:

        def forget(dead: weakref.ref[Any], graphs: dict[int, Any] = _graphs) -> None:
            if key in graphs and graphs[key][0] is dead:
                del graphs[key]

        known = _graphs[key] = (weakref.ref(target, forget), [])
    return known[1]


def _graphs_of_twins(target: Any) -> list[CompiledGraph]:
    """Graphs compiled for other modules like ``target``: Dynamo keeps them by the code, not by the module."""
    if not isinstance(target, nn.Module):
        return []
    state = (*target.named_parameters(remove_duplicate=False), *target.named_buffers(remove_duplicate=False))
    shapes = {name: tuple(tensor.shape) for name, tensor in state}
    alike = (graphs for reference, graphs in list(_graphs.values()) if type(reference()) is type(target))
    return [graph for graphs in alike for graph in graphs if graph.shapes.items() <= shapes.items()]


def _target(compiled: Any) -> Any:
    """What was compiled: the module, also where a method of it was; otherwise the function."""
    while True:
        if isinstance(compiled, OptimizedModule):
            compiled = compiled._orig_mod
        elif isinstance(compiled, nn.Module):
            return compiled
        elif inspect.ismethod(compiled):
            compiled = compiled.__self__ if isinstance(compiled.__self__, nn.Module) else compiled.__func__
        elif "_torchdynamo_orig_callable" in getattr(compiled, "__dict__", {}):
            compiled = compiled._torchdynamo_orig_callable
        elif _is_wrapper_of_dynamo(compiled):
            compiled = compiled.__wrapped__
        else:
            return compiled


def _is_wrapper_of_dynamo(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename == external_utils.__file__ and hasattr(function, "__wrapped__")


def options_of(compiled: Any) -> BackendOptions | None:
    """The options ``compiled`` was made with; None if they cannot be told: all graphs of its target count then."""
    if not isinstance(compiled, OptimizedModule) and isinstance(compiled, nn.Module):
        compiled = compiled._compiled_call_impl
    backend: Any = getattr(getattr(compiled, "dynamo_ctx", None), "callback", None)
    backend = backend or _callback_of(compiled)
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    arguments = getattr(backend, "kwargs", None)
    return BackendOptions.parse(**arguments) if isinstance(arguments, dict) else None


def _callback_of(function: Any) -> Any:
    """What ``torch.compile`` closed over when it wrapped a function."""
    if not inspect.isfunction(function):
        return None
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return next((cell.cell_contents for name, cell in cells if name == "callback"), None)
