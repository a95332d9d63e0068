"""The ``torch.compile`` backend: ``torch.compile(model, backend="fxsparse")``.

Dynamo's graph goes down this list; every step leaves a graph that torch takes for one of Dynamo's own:

1. with ``options={"passes": ...}``: to the training IR, through the passes, and back (``one_line``), or the whole model
   is rewritten at its first call (``whole_model``, ``compressed``);
2. frozen N:M weights run from compressed form where that pays (``lower``);
3. what the graph needs beyond Dynamo's inputs is looked up by the weights' identity on every call (``runtime_state``);
4. the rest is Inductor's, which inlines the references of our operators (``inductor``, ``inline``).

The bare call runs no passes and computes what eager computes.
"""

from __future__ import annotations

import copy
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch.fx import GraphModule

from fxsparse.backend.compiled import CompiledGraph, Origin, compiled_graphs, forget_all, record_launches
from fxsparse.backend.compressed import CompressedModel, is_compressed
from fxsparse.backend.inductor import config_patches
from fxsparse.backend.one_line import RewrittenGraph
from fxsparse.backend.options import BackendOptions
from fxsparse.backend.registered_states import note_example, registered
from fxsparse.backend.whole_model import ONE_LINE, Part, WholeModel, part_of, with_dense_weights
from fxsparse.errors import FxsparseError, LoweringError, OptionError, RewriteError
from fxsparse.graph.added_state import added_state_of, wants_whole
from fxsparse.graph.dynamo import copy_dynamo_graph, state_names
from fxsparse.graph.record import record_of
from fxsparse.graph.runtime_state import Slot, invalidate
from fxsparse.graph.wrapped import unwrapped_module
from fxsparse.lowering.after_partition import call_kernels, use_sparse_tensor_cores
from fxsparse.lowering.choose import LAUNCHING
from fxsparse.lowering.lower import lower_graph

__all__ = ["compiled_graphs", "fxsparse", "invalidate"]


def fxsparse(
    gm: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """Compiles one of Dynamo's graphs; called by ``torch.compile(model, backend="fxsparse")``.

    Args:
        gm: the graph.
        example_inputs: its real inputs.
        options: ``passes`` (text, Pass objects, a list of either, a Pipeline) or ``recipe`` (a name): what to rewrite
            in every graph; ``weights``: ``dense``, the default, lets them stay the model's own, N:M ones masked;
            ``compressed`` puts compressed ones into the model at the first call (``compressed``); ``lower`` (operator
            -> implementation): pins a choice, or excludes some; ``tune`` (seconds): how long a graph may measure
            products nobody measured before; ``fallback``: False makes a graph that cannot be lowered an error;
            ``compiler``: ``inductor``, ``aot_eager`` or ``eager``; any option of Inductor.
        mode: as for Inductor.

    Returns:
        the compiled function. What the user did wrong (:class:`~fxsparse.errors.OptionError`,
        :class:`~fxsparse.errors.RewriteError`) is raised when it is called: Dynamo would wrap, or swallow, an error
        raised here.
    """
    eval_frame.cached_backends.setdefault(id(fxsparse), fxsparse)  # whose reset() a torch._dynamo.reset() calls, once
    try:
        parsed = BackendOptions.parse(options, mode)
        origin = Origin.of_current_call()
        if parsed.pipeline is None or is_compressed(origin.module, parsed):
            return _compile_graph(gm, list(example_inputs), parsed, origin)
        part = part_of(gm, origin.target)
        if parsed.weights == "compressed":
            return _compressing(gm, parsed, part)
        try:
            if part is not None or not wants_whole(origin.module):
                return _compile_graph(gm, list(example_inputs), parsed, origin)
        except RewriteError as error:
            if isinstance(error, OptionError):
                raise
            if part is not None:
                raise part.added_to(error) from error.__cause__
        names = state_names(gm, example_inputs, origin.module)
        return WholeModel(gm, with_dense_weights(parsed.pipeline), names, _compiler(options or {}, mode))
    except FxsparseError as error:
        return _raising(error)


def _compressing(gm: GraphModule, options: BackendOptions, part: Part | None) -> Callable[..., Any]:
    """What compresses the model when it is first called; a part of a model is refused."""
    if part is not None:
        raise OptionError(
            f'weights="compressed" rewrites a whole model at its first call, and this is a part only: {part}. Begin '
            "with a call that is one graph, or call fxsparse.rewrite, and then fxsparse.to_module or torch.compile"
        )
    assert options.pipeline is not None
    return CompressedModel(gm, options.pipeline)


def _compiler(options: Mapping[str, Any], mode: str | None) -> Callable[..., Callable[..., Any]]:
    """Compiles a rewritten graph module with the options of the call, less its passes."""
    rest = {name: value for name, value in options.items() if name not in ("passes", "recipe", "weights")}

    def compile(graph: GraphModule, dynamic: bool | None) -> Callable[..., Any]:
        return torch.compile(graph, backend="fxsparse", options=rest, mode=mode, dynamic=dynamic)

    return compile


def _reset() -> None:
    forget_all()
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is not None:
        trees.reset_cudagraph_trees()


fxsparse.reset = _reset  # type: ignore[attr-defined]  # called by torch._dynamo.reset()


def _raising(error: FxsparseError) -> Callable[..., Any]:
    def refuse(*args: Any) -> Any:
        for failure in (error, error.__cause__):
            if failure is not None:
                traceback.clear_frames(failure.__traceback__)  # they hold the model's parameters
        raise copy.copy(error) from error.__cause__

    return refuse


def _compile_graph(
    gm: GraphModule, example_inputs: list[Any], options: BackendOptions, origin: Origin
) -> Callable[..., Any]:
    report = CompiledGraph(str(gm.meta.get("dynamo_compile_id") or ""), options)
    module = origin.module
    if module is not None and (options.weights == "compressed" or _is_of_one_line(module)):
        report.record = record_of(module)
    rewritten = _run_passes(gm, example_inputs, options, origin.module, report)
    before, slots = (rewritten.module, rewritten.slots) if rewritten is not None else (gm, [])
    names = rewritten.names if rewritten is not None else state_names(gm, example_inputs, origin.module)
    report.shapes = {name: tuple(example_inputs[position].shape) for position, name in names.items()}
    lowered, extra = _lower(before, example_inputs, names, options, report)
    added = (name for slot in (*slots, *extra) for name in slot.names)
    report.inputs = names | dict(enumerate(added, len(example_inputs)))
    values = _values([*slots, *extra], example_inputs)
    fixed = _of_fixed_size(values)
    inner = _compile(lowered, [*example_inputs, *values], report)
    del fixed
    if any(choice.implementation in LAUNCHING for choice in report.choices):
        inner = record_launches(inner, report.launches)
    if rewritten is not None and module is not None:
        pipeline = with_dense_weights(rewritten.pipeline)
        slots = [registered(slot, rewritten.names, pipeline) for slot in slots]
        state = added_state_of(unwrapped_module(module))
        if state is not None:
            note_example(state, pipeline)
    if rewritten is not None or extra:
        dense = _Dense(before, slots, report) if extra else None
        inner = _with_states(inner, [*slots, *extra], rewritten, dense)
    origin.add(report, inner)
    return inner


def _is_of_one_line(module: nn.Module) -> bool:
    return isinstance(module, GraphModule) and ONE_LINE in module.meta


def _run_passes(
    gm: GraphModule, example_inputs: list[Any], options: BackendOptions, root: nn.Module | None, report: CompiledGraph
) -> RewrittenGraph | None:
    if options.pipeline is None or options.weights == "compressed":  # the passes are in the model's modules
        return None
    try:
        rewritten = RewrittenGraph(options.pipeline, gm, example_inputs, root)
    except FxsparseError:
        raise
    except Exception as error:
        _fall_back("bringing the graph into the form passes work on", error, options, report)
        return None
    report.record = rewritten.record
    return rewritten


def _lower(
    gm: GraphModule,
    example_inputs: list[Any],
    names: dict[int, str],
    options: BackendOptions,
    report: CompiledGraph,
) -> tuple[GraphModule, list[Slot]]:
    try:
        lowered = lower_graph(gm, example_inputs, names, options.pins, options.tune)
    except Exception as error:
        _fall_back("lowering", error, options, report)
        return gm, []
    report.choices += lowered.choices
    report.overrides.update(lowered.overrides)
    for note in lowered.notes:
        report.note(note)
    return lowered.module, list(lowered.slots)


def _fall_back(what: str, error: Exception, options: BackendOptions, report: CompiledGraph) -> None:
    """Lets the graph run as it was, with a note and a warning, or raises."""
    reason = f"{what} failed, so graph {report.name} runs as it was: {type(error).__name__}: {error}"
    if not options.fallback:
        raise LoweringError(reason) from error
    report.note(reason)
    warnings.warn(f"fxsparse: {reason}", stacklevel=2)


# --- compiling --------------------------------------------------------------------------------------------------------


def _compile(gm: GraphModule, inputs: list[Any], report: CompiledGraph) -> Callable[..., Any]:
    options = report.options
    if options.compiler == "eager":
        report.show(gm.graph)
        return lambda *args: gm.forward(*args)  # of a bound method it cannot be told whether it is alive
    if options.compiler == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager, boxed_nop

        def shown(graph: GraphModule, args: list[Any]) -> Callable[..., Any]:
            report.show(graph.graph)
            edits = use_sparse_tensor_cores(graph.graph, report.overrides), call_kernels(graph.graph, report.overrides)
            if any(edits):
                graph.recompile()
            return boxed_nop(graph, args)

        return aot_eager(gm, inputs, fw_compiler=shown, bw_compiler=shown)
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(gm, inputs, config_patches=config_patches(options, report.overrides, report.show))
    return compiled


def _values(slots: list[Slot], example_inputs: list[Any]) -> list[Tensor]:
    """The extra inputs for the weights that are compiled with."""
    return [tensor for slot in slots for tensor in slot.get(example_inputs) or ()]


def _of_fixed_size(tensors: list[Tensor]) -> list[Any]:
    """Fake tensors that keep torch, for as long as they live, from making symbols of the sizes of ``tensors``."""
    context = torch._guards.TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return []
    return [context.fake_mode.from_tensor(tensor, static_shapes=True) for tensor in tensors]


def _with_states(
    inner: Callable[..., Any], slots: list[Slot], rewritten: RewrittenGraph | None, dense: Callable[..., Any] | None
) -> Callable[..., Any]:
    """``inner`` with its extra inputs looked up for the weights of each call."""

    def call(*args: Any) -> Any:
        if rewritten is not None:
            rewritten.check_serves(args)
        extra: list[Any] = []
        for slot in slots:
            tensors = slot.get(args)
            if tensors is None:
                assert dense is not None
                return dense(*args)
            extra += tensors
        return inner(*args, *extra)

    return call


class _Dense:
    """The graph before frozen weights were compressed: for calls where one is no longer N:M; compiled when needed."""

    def __init__(self, gm: GraphModule, slots: list[Slot], report: CompiledGraph):
        self.gm, self.slots, self.report = copy_dynamo_graph(gm), slots, report
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if self.compiled is None:
            self.report.note("a frozen weight, or a mask, no longer satisfies its pattern: the dense graph runs")
            inner = torch.compile(self.gm.forward, backend=lambda gm, inputs: _compile(gm, inputs, self.report))
            self.compiled = _with_states(inner, self.slots, None, None)
        return self.compiled(*args)
