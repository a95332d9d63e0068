"""Running ``torch.export`` on a model, leaving the model unchanged, and saying where in the model it failed.

`export` is the only call of ``torch.export``. Around it stand context managers that put back what a capture changes
(state, random numbers, configuration, caches of keys), and functions that find the line of the user's model in the
traceback of a failure.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import io
import itertools
import linecache
import logging
import os
import re
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any
from unittest import mock

import sympy
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv, ShapeGuard
from torch.fx.traceback import annotate, preserve_node_meta
from torch.utils import _pytree as pytree

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a model."""

Frame = tuple[FrameType, int]
"""A frame of the model's code and the line it was at."""

_PACKAGES = tuple(
    os.path.realpath(root) + os.sep
    for package in ("torch", "sympy", "fxsparse", "fxsparse.passes", "fxsparse.codegen")
    if (found := importlib.util.find_spec(package)) is not None
    for root in found.submodule_search_locations or ()
)
"""Folders whose frames are not the user's. An editable install keeps ``passes`` and ``codegen`` apart."""
_STANDARD_LIBRARY = os.path.realpath(sysconfig.get_path("stdlib")) + os.sep
_STACK_LINE = re.compile(r'File "(.+)", line (\d+), in (.+)')
_NOISY = tuple(map(logging.getLogger, ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")))


Fixed = set[tuple[int, int]]
"""Dimensions of inputs that the model fixes: the identity of a tensor and the number of the dimension."""


def export(model: nn.Module, inputs: Inputs, free: Sequence[int], fixed: Fixed | None = None) -> ExportedProgram:
    """``torch.export`` of ``model`` in the mode its modules are in.

    Args:
        model: any module.
        inputs: the example.
        free: dimensions of every tensor input that may vary where the model leaves them so.
        fixed: takes the sequence lengths that the model does not leave free, and holds those that are known. Export
            fixes a size in the middle of a capture and has written it as a symbol until then, so it runs again.
    """
    fixed = set() if fixed is None else fixed
    shapes: Any = ShapesCollection()  # export takes one, its annotation does not say so
    for tensor in tensors(inputs):
        wanted = [dimension for dimension in free if dimension < tensor.dim() and (id(tensor), dimension) not in fixed]
        if wanted:
            shapes[tensor] = dict.fromkeys(wanted, Dim.AUTO)
    program = _export(model, inputs, shapes)
    if 1 in free and (stuck := _fixed_lengths(program) - fixed):
        fixed |= stuck
        return export(model, inputs, free, fixed)
    return program


def _fixed_lengths(program: ExportedProgram) -> Fixed:
    """The tensor inputs whose dimension 1 turned out to be a number."""
    names = set(program.graph_signature.user_inputs)
    inputs = [node for node in program.graph.find_nodes(op="placeholder") if node.name in names]
    values = [node.meta["val"] for node in inputs if isinstance(node.meta.get("val"), Tensor)]
    pairs = zip(values, tensors(program.example_inputs), strict=True)
    lengths = [(id(tensor), value.shape[1]) for value, tensor in pairs if value.dim() > 1]
    return {(key, 1) for key, size in lengths if isinstance(size, int) or not size.node.expr.free_symbols}


def _export(model: nn.Module, inputs: Inputs, shapes: Any) -> ExportedProgram:
    with contextlib.ExitStack() as stack:
        for context in (_quiet(), torch.inference_mode(False), torch.enable_grad(), without_autocast()):
            stack.enter_context(context)
        stack.enter_context(_named(model, inputs[1]))
        stack.enter_context(_checkpoints_noted())
        stack.enter_context(_without_idle_moves())
        # With free sizes hardly an entry is found again, and making one takes as long as what it would save.
        stack.enter_context(torch._dynamo.config.patch(fake_tensor_cache_enabled=False))
        return torch.export.export(model, *inputs, dynamic_shapes=shapes, strict=False)


@contextlib.contextmanager
def _without_idle_moves() -> Iterator[None]:
    """Leaves out what changes nothing: modules that their forward converts to the dtype they have (Switch's router).
    Torch would replace the parameters, which capture cannot follow."""
    move = nn.Module.to

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        held = [*module.parameters(), *module.buffers()]
        stays = device is None or all(device in (tensor.device, torch.device(tensor.device.type)) for tensor in held)
        keeps = dtype is None or all(tensor.dtype == dtype for tensor in held if tensor.is_floating_point())
        return module if stays and keeps else move(module, *args, **kwargs)

    with mock.patch.object(nn.Module, "to", to):
        yield


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in nested arguments."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A failing export prints the graph so far and logs advice; our error says what matters."""
    with contextlib.ExitStack() as stack:
        for log in _NOISY:
            stack.enter_context(mock.patch.object(log, "disabled", True))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


CHECKPOINTED = "fxsparse_checkpointed"
"""The annotation, in ``meta["custom"]``, of the nodes that the model ran through ``torch.utils.checkpoint``."""


@contextlib.contextmanager
def _checkpoints_noted() -> Iterator[None]:
    """Runs what the model gives to ``torch.utils.checkpoint`` as it stands, and annotates its nodes with its number.

    Capture cannot follow the reentrant form. A checkpoint within another belongs to the outer one.
    """
    numbers, inside = itertools.count(1), [False]

    @contextlib.contextmanager
    def region() -> Iterator[None]:
        if inside[0]:
            yield
            return
        inside[0] = True
        try:
            with annotate({CHECKPOINTED: next(numbers)}):
                yield
        finally:
            inside[0] = False

    def generator(*_: Any, **__: Any) -> Iterator[None]:
        with region():
            yield

    class Reentrant:
        @staticmethod
        def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
            with region():
                return function(*args)

    with (
        mock.patch.object(torch.utils.checkpoint, "_checkpoint_without_reentrant_generator", generator),
        mock.patch.object(torch.utils.checkpoint, "CheckpointFunction", Reentrant),
        preserve_node_meta(),
    ):
        yield


@contextlib.contextmanager
def _named(model: nn.Module, keywords: Iterable[str]) -> Iterator[None]:
    """What ``forward`` takes as ``**kwargs`` stands in its signature: ``torch.export`` finds no shapes for it there."""
    forward, signature = model.forward, inspect.signature(model.forward)
    own = [item for item in signature.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
    known = {item.name for item in own}
    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in keywords if name not in known]
    if not named:
        yield
        return

    @functools.wraps(forward)
    def with_names(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    with_names.__signature__ = signature.replace(parameters=[*own, *named])  # type: ignore[attr-defined]
    with mock.patch.object(model, "forward", with_names):
        yield


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Autocast belongs to a run, not to the graph: its casts must not be captured."""
    with torch.autocast("cpu", enabled=False), contextlib.ExitStack() as stack:
        if torch.cuda.is_available():
            stack.enter_context(torch.autocast("cuda", enabled=False))
        yield


@contextlib.contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Restores the training flags, the configuration and the random state that capture may touch."""
    flags = [(module, module.training) for module in model.modules()]
    config = getattr(model, "config", None)
    settings = dict(vars(config)) if hasattr(config, "__dict__") else None
    devices = sorted({tensor.device.index for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, training in flags:
            module.training = training
        if settings is not None:
            vars(config).clear()
            vars(config).update(settings)


_CACHES = ("use_cache", "use_mems_eval")
"""Settings of what a model returns beside its results to go on from, in evaluation alone or at all."""


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Turns caches off in every configuration of ``model``: a graph cannot return a cache of keys, nor, in evaluation
    alone, states of earlier segments, as XLNet does.

    A model that makes a cache itself, as PEFT's prefix tuning does, returns it all the same; it is left out.
    """
    configs: dict[int, Any] = {}

    def visit(config: Any) -> None:
        if hasattr(config, "to_diff_dict") and id(config) not in configs:  # a configuration of transformers
            configs[id(config)] = config
            for part in vars(config).values():
                visit(part)

    for module in model.modules():
        visit(vars(module).get("config"))
    cached = [(config, name) for config in configs.values() for name in _CACHES if getattr(config, name, False)]
    before = [getattr(*setting) for setting in cached]
    try:
        for setting in cached:
            setattr(*setting, False)
        with _returning_no_cache(model):
            yield
    finally:
        for setting, value in zip(cached, before, strict=True):
            setattr(*setting, value)


@contextlib.contextmanager
def _returning_no_cache(model: nn.Module) -> Iterator[None]:
    library = sys.modules.get("transformers.cache_utils")
    if library is None:
        yield
        return
    forward = model.forward

    @functools.wraps(forward)
    def without(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if isinstance(output, Mapping) and any(isinstance(item, library.Cache) for item in output.values()):
            kept = {name: item for name, item in output.items() if not isinstance(item, library.Cache)}
            return type(output)(**kept)
        return output

    with mock.patch.object(model, "forward", without):
        yield


# --- where in the model -----------------------------------------------------------------------------------------------


def depends_on_data(error: BaseException | None) -> bool:
    """Whether capture failed because Python asked for the value of a tensor."""
    while error is not None:
        if isinstance(error, GuardOnDataDependentSymNode):
            return True
        error = error.__cause__ or error.__context__
    return False


def model_frames(error: BaseException) -> list[Frame]:
    """The frames of ``error`` that are neither torch's nor ours nor the standard library's, outermost first."""
    return of_the_model(traceback.walk_tb(error.__traceback__))


def package_frames(error: BaseException, package: str) -> list[Frame]:
    """The frames of ``error`` that run code of a package, outermost first."""
    frames = traceback.walk_tb(error.__traceback__)
    return [(frame, line) for frame, line in frames if _package(frame) == package]


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]


def place(frame: FrameType, line: int) -> str:
    """``file:line, in function``."""
    return f"{frame.f_code.co_filename}:{line}, in {frame.f_code.co_name}"


def innermost_module(frames: Sequence[Frame], model: nn.Module) -> nn.Module | None:
    """The module of ``model`` whose method is the deepest in ``frames``."""
    modules = {id(module) for module in model.modules()}
    for frame, _ in reversed(frames):
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(owner, nn.Module) and id(owner) in modules:
            return owner
    return None


def quote(frames: Sequence[Frame]) -> str:
    """``file:line, in function`` of the deepest frame and the source line itself; nothing where there is no frame."""
    if not frames:
        return ""
    frame, line = frames[-1]
    return _quote_line(frame.f_code.co_filename, line, frame.f_code.co_name)


def _quote_line(filename: str, line: int, function: str) -> str:
    return f"\n  {filename}:{line}, in {function}\n    {linecache.getline(filename, line).strip()}"


def quote_node(node: Node) -> str:
    """The same for the line of the model that a captured node came from."""
    for filename, line, function in reversed(_STACK_LINE.findall(node.meta.get("stack_trace") or "")):
        if not _is_library(filename):
            return _quote_line(filename, int(line), function)
    return ""


def quote_guard(guard: ShapeGuard) -> str:
    """The same for the line of the model whose Python decided on a size; nothing where torch's own code asked."""
    frame = guard.sloc.framework_loc
    if not isinstance(frame, traceback.FrameSummary) or _is_library(frame.filename):
        return ""
    return _quote_line(frame.filename, frame.lineno or 0, frame.name)


def where_batch_was_fixed(model: nn.Module, inputs: Inputs) -> str:
    """The line of the model that made a symbolic size a number, quoted; captures the model once more to find it."""
    found: list[list[Frame]] = []
    decide = ShapeEnv._set_replacement

    def watch(self: ShapeEnv, symbol: sympy.Symbol, target: sympy.Expr, *rest: Any) -> None:
        if target.is_Integer:
            found.append(of_the_model(reversed(list(traceback.walk_stack(None)))))
        decide(self, symbol, target, *rest)

    with mock.patch.object(ShapeEnv, "_set_replacement", watch), contextlib.suppress(Exception):
        export(model, inputs, free=[0])
    return next((quote(frames) for frames in found if frames), "")


def of_the_model(frames: Any) -> list[Frame]:
    """The frames that run code of the model."""
    return [(frame, line) for frame, line in frames if not _is_library(frame.f_code.co_filename)]


def _is_library(filename: str) -> bool:
    path = os.path.realpath(filename)
    installed = f"{os.sep}site-packages{os.sep}" in path or f"{os.sep}dist-packages{os.sep}" in path
    in_standard_library = path.startswith(_STANDARD_LIBRARY) and not installed
    return filename.startswith("<") or path.startswith(_PACKAGES) or in_standard_library
