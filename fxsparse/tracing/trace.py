"""From a model to a training-IR graph.

The training IR is the pre-dispatch ATen graph of ``torch.export``, made usable for rewriting and training: the
parameters are the model's own, ``train()`` and ``eval()`` work, assertions and other noise of capture are gone, nothing
is written in place but what outlives the call, and attention that is causal says so.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

from fxsparse import graph as fx
from fxsparse.errors import CheckpointError, FxsparseError, InternalError, OptionError, TraceError
from fxsparse.exclusive import exclusive
from fxsparse.graph import traits
from fxsparse.graph.added_state import set_aside
from fxsparse.graph.graph_state import follow, infer, state_buffers, with_vectors
from fxsparse.graph.recompute import is_marked, mark, plan
from fxsparse.graph.record import TRACE_KEY
from fxsparse.graph.sharded import unsharded_class
from fxsparse.graph.training_form import CONDITIONS_KEY, keep_forward, renew_form
from fxsparse.modules.sites import STARTED
from fxsparse.options import checked, shown
from fxsparse.tracing import decisions
from fxsparse.tracing.both_modes import in_both_modes, may_run_twice
from fxsparse.tracing.casting import CONSTANTS, convert, note_origin
from fxsparse.tracing.causal_masks import drop_open_masks, restore_is_causal
from fxsparse.tracing.compared import check_values, functions_noted
from fxsparse.tracing.decisions import answering, answers_on
from fxsparse.tracing.export import (
    CHECKPOINTED,
    Fixed,
    Inputs,
    depends_on_data,
    export,
    innermost_module,
    left_as_it_was,
    model_frames,
    package_frames,
    place,
    quote,
    quote_node,
    without_cache,
)
from fxsparse.tracing.exported import follow_interpreter
from fxsparse.tracing.functional import functionalise
from fxsparse.tracing.input_sizes import (
    ANY_LENGTH_KEY,
    DEFAULTS_KEY,
    SizeCondition,
    check_batch_is_free,
    check_inputs,
    check_one_row,
    fixed_dimensions,
    size_conditions,
    tensor_inputs,
    with_two_rows,
)
from fxsparse.tracing.joins import drop_empty_parts
from fxsparse.tracing.modes import ModesDiffer, bind_training_flags, is_random
from fxsparse.tracing.module_form import carry_on
from fxsparse.tracing.no_grad import inline_no_grad
from fxsparse.tracing.vmapped import without_vmap
from fxsparse.version import how_to_report


@dataclass(frozen=True)
class Trace:
    """How a graph module was captured; kept in ``gm.meta["fxsparse_trace"]``.

    Attributes:
        inputs: name and example sizes of every tensor input.
        notes: what a reader of the graph should know, such as "captured in evaluation mode because ...".
        state: the names in its ``state_dict`` then.
    """

    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    notes: tuple[str, ...] = ()
    state: frozenset[str] = frozenset()


class TracedModule(GraphModule):
    """A graph module that refuses inputs it was not captured for; a smaller size could broadcast in silence."""

    @torch._dynamo.decorators.skip  # the check is Python's; what it calls is compiled, and runs when it is exported
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = check_inputs(self, args, kwargs)
        follow(self)  # here and not in forward, which Dynamo and export trace whole
        return super().__call__(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What ``to``, ``half``, ``cuda`` and their like run on every tensor."""
        if not recurse:
            return super()._apply(fn, recurse)
        convert(self, fn, super()._apply)
        return self

    def recompile(self) -> Any:
        with unsharded_class(self):
            code = super().recompile()
            keep_forward(self)
            follow_interpreter(self)
        renew_form(self)
        return code

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the graph takes ``num_items_in_batch``; the Trainer of transformers asks."""
        return "num_items_in_batch" in self.graph._codegen.pytree_info.orig_args  # type: ignore[attr-defined]

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As of any module; a tied tensor may stand under one of its names only, as in a file of safetensors."""
        names = [names for names in fx.parameter_names(self).values() if len(names) > 1]
        alone = {twin: state_dict[name] for tied in names for name in tied if name in state_dict for twin in tied}
        return super().load_state_dict({**alone, **state_dict} if alone else state_dict, *args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        own = with_vectors(self, own)
        state_dict.update((f"{prefix}{name}", value) for name, value in own.items())  # the caller's copy
        super()._load_from_state_dict(state_dict, prefix, *rest)
        missing = rest[2]  # checkpoints of earlier versions hold no flags
        missing[:] = [key for key in missing if key.removeprefix(prefix) not in state_buffers(self)]
        infer(self, own)
        follow(self)

    def __copy__(self) -> GraphModule:
        return fx.copy_sharing_state(self)

    def __reduce__(self) -> Any:
        raise CheckpointError(
            "a graph module of fxsparse cannot be pickled, nor saved whole by torch.save: sizes and the record "
            "would be lost. Call fxsparse.save(gm, path) and fxsparse.load(path, model, ...); within a training, "
            "torch.save(gm.state_dict(), path) and gm.load_state_dict are complete"
        )

    def __reduce_package__(self, exporter: Any) -> Any:
        return self.__reduce__()

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphModule:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch copies its own tree specs in a deprecated way
            copy = super().__deepcopy__(memo)
        fx.copy_tree(self, copy, memo)  # torch copies what the graph reads, and forgets which buffers are persistent
        for name in [name for name in vars(self) if "_hook" in name]:  # of these torch copies only some
            copy.__dict__[name] = deepcopy(vars(self)[name], memo)
        # A forward that a library wrapped, and its other notes; nn.Module leaves what it compiled behind too.
        for name in set(vars(self)) - set(vars(copy)) - {"_compiled_call_impl"}:
            copy.__dict__[name] = deepcopy(vars(self)[name], memo)
        return copy


class TracedPreTrained(TracedModule):
    """The graph module of a transformers model, which says of itself what trainers ask the model."""

    original_class: type[nn.Module]
    loss_type: str | None
    _keys_to_ignore_on_save = None

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first parameter of floating point."""
        return next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Trainers call it; the graph has no modules to switch, so it is refused unless blocks are recomputed."""
        if not any(map(is_marked, self.graph.nodes)):
            raise OptionError(
                "a graph calls none of the modules that gradient checkpointing switches: let blocks be recomputed by "
                'gm = fxsparse.rewrite(gm, "recompute"), or enable it on the model before it is traced'
            )

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of parameter elements, of those that require a gradient, or without embeddings."""
        lookups = self.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default)
        embeddings = {
            id(fx.attribute(self, str(node.args[0].target))) for node in lookups if node.args[0].op == "get_attr"
        }
        counted = (p for p in self.parameters() if p.requires_grad or not only_trainable)
        return sum(p.numel() for p in counted if not exclude_embeddings or id(p) not in embeddings)


@exclusive
def trace(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_batch: bool = True,
    dynamic_sequence: bool | None = None,
) -> GraphModule:
    """Captures ``model`` as a training-IR graph.

    The graph module takes the arguments of the example, returns what the model returns (a Hugging Face output object
    included) and holds the model's own Parameter objects under their original names, tied ones under all of them;
    ``state_dict()`` has the model's keys. ``train()`` and ``eval()`` work. It runs on the device of the example.

    A module without weights that draws random numbers in training alone (stochastic depth, noise) computes both, and
    its mode chooses. One whose training is not a graph (layer drop branches on a random number) is captured as it
    evaluates; the notes of the trace say so, and a warning. So is one with weights that draws what its evaluation does
    not, and one that was given in evaluation mode and computes something else in training.

    A branch of Python's on the values of integers, as of a mask, is taken as on the example where capture needs that;
    the notes say so, and every call asserts that its inputs answer alike. Other branches on data are refused.

    Threads that trace, rewrite or compile wait for each other.

    Args:
        model: any module that ``torch.export`` can follow. It is left as it was: mode, configuration, random state.
            A graph module that was traced before is returned as it is, a compiled module stands for what it compiles.
        args: example positional inputs.
        kwargs: example keyword inputs; what is not a tensor (None, flags) becomes part of the graph.
        dynamic_batch: let dimension 0 of every tensor input vary. An example of one row is repeated for capture,
            because a size of 1 cannot be told from a broadcast.
        dynamic_sequence: let dimension 1 of every tensor input, the sequence length, vary as well where the model
            does; True notes the inputs whose dimension 1 stays fixed. By default it varies if that can be captured,
            but is never 1, which cannot be told from a broadcast. Every other size stays that of the example.

    Raises:
        OptionError: an option is of another type.
        TraceError: the model cannot be captured, or not with a free batch size; the message quotes the line that
            stopped it.
        InternalError: tracing has a bug.
    """
    dynamic_batch = checked("dynamic_batch", dynamic_batch, bool)
    dynamic_sequence = checked("dynamic_sequence", dynamic_sequence, bool | None)
    if isinstance(args, Tensor) or not isinstance(args, Iterable):
        raise OptionError(f"args is a tuple of positional inputs, such as (x,), and not {shown(args)}")
    kwargs = dict(checked("kwargs", kwargs or {}, Mapping[str, Any]))
    if isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    if isinstance(model, GraphModule) and TRACE_KEY in model.meta:
        return model
    with torch.inference_mode(False):
        given: Inputs = pytree.tree_map_only(Tensor, _own_copy, (tuple(args), kwargs))
    with without_cache(model), set_aside(model), functions_noted() as functions:
        if dynamic_sequence is None:
            try:
                gm, notes = _with_free_sizes(model, given, dynamic_batch, True)
            except TraceError:
                gm, notes = _with_free_sizes(model, given, dynamic_batch, False)
        else:
            gm, notes = _with_free_sizes(model, given, dynamic_batch, dynamic_sequence)
            notes += fixed_dimensions(gm, 1) if dynamic_sequence else []
        notes += _lost_hooks(model)
        notes += _simplify_masks(gm)
        notes += _recomputed(gm)
        gm.graph.lint()
        gm.recompile()
        notes += check_values(model, gm, given, functions)
    gm.meta[ANY_LENGTH_KEY] = bool(dynamic_sequence)
    parameters = inspect.signature(model.forward).parameters.values()
    gm.meta[DEFAULTS_KEY] = {item.name: item.default for item in parameters if item.default is not item.empty}
    inputs = tuple((node.name, _example_sizes(node)) for node in tensor_inputs(gm))
    gm.meta[TRACE_KEY] = Trace(inputs, tuple(notes), frozenset(gm.state_dict(keep_vars=True)))
    carry_on(model, gm, tuple(notes))
    note_origin(gm, model, given, functools.partial(_again, dynamic_batch, dynamic_sequence))
    return gm


def _again(dynamic_batch: bool, dynamic_sequence: bool | None, model: nn.Module, example: Inputs) -> GraphModule:
    return trace(model, *example, dynamic_batch=dynamic_batch, dynamic_sequence=dynamic_sequence)


def _with_free_sizes(
    model: nn.Module, given: Inputs, dynamic_batch: bool, dynamic_sequence: bool
) -> tuple[GraphModule, list[str]]:
    """The captured graph with these sizes free, and notes on it."""
    notes: list[str] = []
    example = with_two_rows(model, given) if dynamic_batch else given
    free = [dimension for dimension, wanted in enumerate((dynamic_batch, dynamic_sequence)) if wanted]
    gm = _capture(model, example, free, notes)
    if dynamic_batch:
        notes += check_batch_is_free(model, gm, example)
    gm.meta[CONDITIONS_KEY] = size_conditions(gm)
    notes += map(str, gm.meta[CONDITIONS_KEY])
    if example is not given:
        check_one_row(model, gm, given)
        notes.append("captured with two rows, the example's one row repeated")
    return gm, notes


def _lost_hooks(model: nn.Module) -> Iterator[str]:
    """A note on the hooks of the model's modules, which the graph does not call."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    ours = {path for path, module in model.named_modules() if module is fx.module_form_of(model)}  # one follows flags
    paths = [
        path or "the model"
        for path, module in model.named_modules()
        if sum(len(getattr(module, kind)) for kind in kinds) > (path in ours and STARTED in module._buffers)
    ]
    if paths:
        shown = ", ".join(paths[:4]) + (", ..." if len(paths) > 4 else "")
        yield (
            f"hooks of {shown} are not called by the graph: capture ran forward hooks once, and what they compute is "
            "part of it; backward hooks and side effects are lost"
        )


def _simplify_masks(gm: GraphModule) -> list[str]:
    """Lets attention go without masks where it can, and notes in how many."""
    longest: dict[Any, int] = {}
    dropped, causal = drop_open_masks(gm), restore_is_causal(gm, longest)
    windows = tuple(
        SizeCondition(sympy.Le(length, most), ", the window of its attention; trace with a longer example to go beyond")
        for length, most in longest.items()
    )
    gm.meta[CONDITIONS_KEY] += windows
    counts = {"mask that hides nothing dropped": dropped, "causal mask turned into is_causal": causal}
    changes = [f"{what} in {count} attention{'s' if count > 1 else ''}" for what, count in counts.items() if count]
    return [*changes, *map(str, windows)]


def _own_copy(tensor: Tensor) -> Tensor:
    """Two arguments that are one tensor (``labels=input_ids``) would be captured as one input."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _example_sizes(node: Node) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else size.node.hint for size in fx.value(node).shape)


# --- capture ----------------------------------------------------------------------------------------------------------


def _capture(model: nn.Module, example: Inputs, free: list[int], notes: list[str]) -> GraphModule:
    """Captures both modes as one graph; what only works in evaluation mode is held there, and what is random in
    training alone runs in both."""
    held: dict[type[nn.Module], str] = {}
    both: set[type[nn.Module]] = set()
    unfit: set[type[nn.Module]] = set()
    fixed: Fixed = set()
    decides = False
    decided: dict[str, bool] = {}

    def exported(training: bool) -> ExportedProgram:
        with left_as_it_was(model), contextlib.ExitStack() as stack:
            for module in model.modules():
                module.training = training and type(module) not in held
            if decides:
                stack.enter_context(answering(model, answers_on(model, example), decided))
            stack.enter_context(in_both_modes(model, both - held.keys(), unfit))
            return export(model, example, free, fixed)

    while True:
        try:
            gm = _assemble(model, exported(training=True))
            paths = {path for path, module in model.named_modules() if type(module) in held}
            bind_training_flags(gm, _flat_module(exported(training=False)), paths)
            break
        except ModesDiffer as difference:
            if unfit - held.keys():
                held |= dict.fromkeys(unfit, "in training it gives results of another type or shape")
                continue
            path = difference.path
            while path and type(model.get_submodule(path)) in held:
                path = path.rpartition(".")[0]
            module, error = model.get_submodule(path), _modes_differ(model, path, difference)
            if type(module) in held or (module.training and not difference.is_random(path)):
                raise error from difference
            if module.training and type(module) not in both and may_run_twice(module):
                both.add(type(module))
                continue
            held[type(module)] = f"in training it runs other operators{_where(difference)}"
        except Exception as failure:
            decides = _hold(model, failure, held, decides)
    for kind, reason in held.items():
        note = f"{kind.__name__} is captured as it evaluates, because {reason}"
        warnings.warn(f"{note}\nTraining the graph runs it that way too, but for its dropout.", stacklevel=3)
        notes.append(note)
    notes += [decisions.note(where, answer) for where, answer in decided.items()]
    return gm


def _hold(model: nn.Module, failure: Exception, held: dict[type[nn.Module], str], decides: bool) -> bool:
    """Notes the module whose training branches on data; returns whether branches on masks are to be decided."""
    frames = model_frames(failure)
    owner = innermost_module(frames, model) if depends_on_data(failure) else None
    if owner is None or (decides and type(owner) in held):
        raise _cannot_capture(model, failure) from failure
    if type(owner) in held:  # its evaluation branches on data too
        held.clear()
        return True
    held[type(owner)] = f"in training it branches on data{quote(frames)}"
    return decides


def _where(difference: ModesDiffer) -> str:
    return quote_node(difference.training) or quote_node(difference.evaluation)


def _modes_differ(model: nn.Module, path: str, difference: ModesDiffer) -> TraceError:
    site = f"{type(model).__name__}{f', {path}' if path else ''}"
    what_to_do = (
        "Call eval() on that module before tracing to capture what it evaluates, or move the difference out of it."
    )
    if getattr(getattr(model, "config", None), "apply_spec_augment", False):  # masks drawn by NumPy while Python runs
        what_to_do = (
            "SpecAugment draws its masks outside of torch, so a graph would have those of its capture: set "
            "config.apply_spec_augment=False, and mask the inputs"
        )
    return TraceError(
        f"{site}: training computes something else than evaluation, which one graph cannot hold{_where(difference)}\n"
        f"{what_to_do}"
    )


def _cannot_capture(model: nn.Module, error: Exception) -> FxsparseError:
    name, where = type(model).__name__, quote(model_frames(error))
    ours = package_frames(error, "fxsparse")
    if not any(frame.f_code is export.__code__ for frame, _ in ours):  # the model ran, what followed is ours
        where_ours = place(*ours[-1])
        return InternalError(
            f"tracing {name} broke in {where_ours} with {type(error).__name__}: {error}\n{how_to_report()}",
            place=where_ours,
        )
    if depends_on_data(error):
        return TraceError(
            f"{name} cannot be captured: Python needs the value of a tensor here, and a graph has none{where}\n"
            f"{_other_choice(model, error)}"
        )
    reason = str(error).strip().partition("\n")[0]
    return TraceError(f"{name} cannot be captured: {type(error).__name__}: {reason}{where}\n{_other_way(model, error)}")


def _other_choice(model: nn.Module, error: Exception) -> str:
    """What to do about code that branches on data."""
    frames = model_frames(error)
    module = frames[-1][0].f_locals.get("self") if frames else None
    if hasattr(module, "is_transposed") and hasattr(model, "set_experts_implementation"):  # experts of transformers
        return (
            'Its experts are called in a loop; model.set_experts_implementation("grouped_mm") computes them together.'
        )
    return "Write the choice with torch.where or torch.cond, or move it out of the model."


def _other_way(model: nn.Module, error: Exception) -> str:
    """What to do about code that runs, but not while torch captures it."""
    frames = model_frames(error)
    known = frames[-1][0].f_locals if frames else {}
    parameters = inspect.signature(model.forward).parameters
    missing = next((name for name in parameters if "mask" in name and known.get(name, name) is None), None)
    if missing is not None:
        return f"There is no {missing} there, which the model may make itself except while it is captured: give it."
    return "The model runs, but not while torch.export captures it: change that line, or trace the modules around it."


def _assemble(model: nn.Module, program: ExportedProgram) -> GraphModule:
    """The exported graph over a tree of modules with the names, the flags and the very tensors of ``model``."""
    exported = _flat_module(program)
    is_pretrained = hasattr(model, "config") and hasattr(model, "main_input_name")
    kind = TracedPreTrained if is_pretrained else TracedModule
    gm: Any = kind(nn.Module(), Graph(), type(model).__name__)
    if is_pretrained:
        gm.config, gm.main_input_name, gm.original_class = model.config, model.main_input_name, type(model)
        gm.loss_type = getattr(model, "loss_type", None)  # the Trainer counts labels by it
    tree = _mirror(model, {})
    gm.training = tree.training
    for held in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        getattr(gm, held).update(getattr(tree, held))
    first: dict[int, str] = {}
    for name, tensor in (*gm.named_parameters(), *gm.named_buffers()):
        first[id(tensor)] = name
    reads: dict[str, Node] = {}
    constants: list[str] = []
    for node in exported.graph.find_nodes(op="get_attr"):
        item = fx.attribute(exported, str(node.target))
        name = first.get(id(item), str(node.target))  # a tied tensor is read under its first name
        if name in reads:
            fx.replace(node, reads[name])
            continue
        reads[name] = node
        if name != node.target:
            node.target = name
            node._rename(name.replace(".", "_"))
        if _adopt(gm, name, item):
            constants.append(name)
    gm.graph = exported.graph
    gm.meta[CONSTANTS] = tuple(constants)
    return gm


def _flat_module(program: ExportedProgram) -> GraphModule:
    """The graph of an exported program, without assertions, in-place temporaries and regions without gradients."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gm = program.module(check_guards=False)
    for part in [module for module in gm.modules() if isinstance(module, GraphModule)]:
        _mark_checkpointed(part.graph)
        for node in list(part.graph.nodes):
            if traits.of(node.target).asserts and _always_holds(node):
                part.graph.erase_node(node)
    gm.graph.eliminate_dead_code(is_impure_node=_has_effect)
    without_vmap(gm)
    functionalise(gm)
    drop_empty_parts(gm)
    inline_no_grad(gm)
    gm.graph.eliminate_dead_code(is_impure_node=_has_effect)
    for node in gm.graph.nodes:
        node.meta.setdefault("val", None)
    return gm


def _mark_checkpointed(graph: Graph) -> None:
    """Marks what the model ran through ``torch.utils.checkpoint`` to be recomputed, and drops torch's annotations."""
    regions: dict[int, list[Node]] = {}
    for node in graph.nodes:
        number = node.meta.pop("custom", {}).get(CHECKPOINTED)
        if number is not None:
            regions.setdefault(number, []).append(node)
    for nodes in regions.values():
        mark(graph, nodes)


def _recomputed(gm: GraphModule) -> Iterator[str]:
    """A note on what the model had checkpointed."""
    paths = [region.path for region in plan(gm.graph) if not region.refusal]
    if paths:
        shown = paths[0] if len(paths) == 1 else f"{paths[0]} to {paths[-1]}, {len(paths)} regions"
        yield f"recomputed in the backward pass, because the model had checkpointing on: {shown}"


def _has_effect(node: Node) -> bool:
    """Whether ``node`` matters although nothing reads it: it writes, asserts, or moves the random state. A dropout of
    what nobody reads does not: it would keep all alive that it is computed from (CANINE's last encoder)."""
    if node.op != "call_function":
        return node.op in {"placeholder", "output"}
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return isinstance(node.target, torch._ops.HigherOrderOperator)
    reads = any(isinstance(read.meta.get("val"), Tensor) for read in traits.values_read(node))
    return bool(schema.is_mutable) or (is_random(node) and not reads) or traits.of(node.target).asserts


def _always_holds(node: Node) -> bool:
    """Whether an assertion says what capture knows already; one on data, or a size that data decides, stays."""
    if node.target is torch.ops.aten._assert_tensor_metadata.default:
        return True
    condition = fx.value(node.args[0]) if isinstance(node.args[0], Node) else True
    return not isinstance(condition, Tensor) and statically_known_true(condition)


def _mirror(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """A bare tree of modules with the names, the flags, the parameters and the buffers of ``module``."""
    if id(module) not in done:
        copy = done[id(module)] = fx.shell(module)
        copy.training = module.training
        copy._parameters.update(module._parameters)
        copy._buffers.update(module._buffers)
        copy._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
        for name, child in module._modules.items():
            copy._modules[name] = None if child is None else _mirror(child, done)
    return done[id(module)]


def _adopt(gm: GraphModule, name: str, item: Any) -> bool:
    """Gives ``gm`` a constant or a region that capture made, unless the model's own tree has it.

    Returns:
        whether it is a constant.
    """
    try:
        fx.attribute(gm, name)
    except AttributeError:
        path, _, leaf = name.rpartition(".")
        owner = gm.get_submodule(path)
        if isinstance(item, Tensor):
            owner.register_buffer(leaf, item, persistent=False)
            return True
        setattr(owner, leaf, item)
    return False
