"""Lets a graph module follow its parameters to another dtype or device: ``.to``, ``.half``, ``.cuda`` after tracing.

Capture writes what the model's Python derived from its parameters into the graph as constants: ``x.to(weight.dtype)``
becomes ``to(x, float32)``, and so does ``x.to(torch.float32)``, which must stay. Which of the two it was, and what else
the model does in another dtype alone (T5 converts back after its norms), shows where the model is traced in that dtype.
So a cast makes the graph anew, of a copy of the model without values, and the state of the graph module stays:

    the model in the new dtype, of fake tensors  ->  trace  ->  the passes of the record  ->  the new graph

That takes the time of a trace and no memory. It gives what casting the model before rewriting it gives, to the dtype of
every tensor. A graph that was edited in any other way than by passes and their events cannot be made anew, and refuses.

A device changes nothing but itself: where it is written in the graph, it is replaced.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.node import map_aggregate, map_arg
from torch.utils import _pytree as pytree

from fxsparse import graph as fx
from fxsparse.errors import RewriteError
from fxsparse.graph.graph_state import STATES, follow
from fxsparse.graph.record import record_of
from fxsparse.graph.training_form import CONDITIONS_KEY, follow_edit
from fxsparse.tracing.export import Inputs

ORIGIN = "fxsparse_origin"
CONSTANTS = "fxsparse_constants"
"""In ``gm.meta``: the names of the tensors that capture made, which a cast of the model does not reach."""

Place = tuple[torch.dtype, torch.device]
"""Where a tensor is, and of which dtype."""

_SWITCHES = (torch.ops.higher_order.wrap_with_autocast, torch.amp.autocast_mode._enter_autocast)


@dataclass(frozen=True)
class Origin:
    """How a graph came to be; kept in the meta of a graph module and shared by its copies.

    Attributes:
        model: a copy of the model, of fake tensors; or why there is none.
        inputs: the example, of tensors without values.
        trace: traces a model with such an example.
        passes: how many passes the record named when the model was traced.
        code: of the graph as tracing and passes left it; empty if it was edited before the last of them ran.
        rewrite: runs passes, given as text, without the values of new state.
        places: where tensors are now, by where they were when the model was traced.
    """

    model: nn.Module | str
    inputs: Inputs
    trace: Callable[[nn.Module, Inputs], GraphModule]
    passes: int
    code: str
    rewrite: Callable[[GraphModule, str], GraphModule] | None = None
    places: Mapping[Place, Place] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        return self


def note_origin(
    gm: GraphModule, model: nn.Module, inputs: Inputs, trace: Callable[[nn.Module, Inputs], GraphModule]
) -> None:
    """Notes of a graph that was just traced how to make it again."""
    tensors = fx.tensors_of(model)
    if any(isinstance(tensor, FakeTensor) for tensor in tensors.values()):
        return  # it is being made again
    plain = [item for module in model.modules() for item in vars(module).values() if isinstance(item, Tensor)]
    mode = FakeTensorMode()
    memo: dict[int, Any] = {id(tensor): tensor for tensor in plain}  # a cast does not reach them
    try:
        memo |= {id(tensor): _fake(mode, tensor, tensor.dtype) for tensor in tensors.values()}
        kept: nn.Module | str = copy.deepcopy(model, memo)
    except Exception as error:
        kept = f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error})"
    places = {_place(tensor): _place(tensor) for tensor in tensors.values()}
    example = pytree.tree_map_only(Tensor, lambda tensor: _fake(mode, tensor, tensor.dtype), inputs)
    gm.meta[ORIGIN] = Origin(kept, example, trace, len(record_of(gm).entries), gm.code, places=places)


def note_rewrite(gm: GraphModule, before: GraphModule, rewrite: Callable[[GraphModule, str], GraphModule]) -> None:
    """Notes of a graph that a pipeline just made of ``before`` how to run its passes again."""
    origin = before.meta.get(ORIGIN)
    if origin is not None:
        gm.meta[ORIGIN] = replace(origin, rewrite=rewrite, code=gm.code if before.code == origin.code else "")


@dataclass(frozen=True)
class Cast:
    """What becomes of a graph module whose tensors a function converts.

    Attributes:
        function: as ``nn.Module._apply`` takes it.
        devices: the new ones, by those that the graph names.
        origin: of the graph module afterwards, but for its code; None if it has none.
        made: whether the graph is then as tracing and passes make it.
        graph: the graph in the new dtype; None where only the device changes.
        dtypes: of the tensors, by identity, that are of another one where the model was cast before it was rewritten.
    """

    function: Callable[[Tensor], Tensor]
    devices: Mapping[torch.device, torch.device]
    origin: Origin | None
    made: bool
    graph: GraphModule | None = None
    dtypes: Mapping[int, torch.dtype] = field(default_factory=dict)

    def convert(self, tensor: Tensor) -> Tensor:
        """A tensor of the graph module, converted."""
        result = self.function(tensor)
        wanted = self.dtypes.get(id(tensor), result.dtype)
        return result if result.dtype == wanted else tensor.to(result.device, wanted)

    def finish(self, gm: GraphModule) -> None:
        """Gives ``gm`` its new graph, once its tensors have been converted."""
        if self.graph is not None:
            _install(self.graph, gm)
        _move(gm, self.devices)
        if self.origin is not None:
            gm.meta[ORIGIN] = replace(self.origin, code=gm.code if self.made else "")


def cast_of(gm: GraphModule, function: Callable[[Tensor], Tensor]) -> Cast | None:
    """What becomes of ``gm`` when ``function`` converts its tensors; None if their dtypes and devices stay.

    Raises:
        RewriteError: the graph cannot follow to another dtype. Nothing was changed.
    """
    tensors, before = fx.tensors_of(gm).values(), gm.meta.get(ORIGIN)
    if any(isinstance(tensor, FakeTensor) for tensor in tensors):
        return None
    places = {*map(_place, tensors), *(before.places.values() if before is not None else ())}
    with torch.no_grad():
        moves = {place: _place(function(torch.empty((), dtype=place[0], device=place[1]))) for place in places}
    if all(old == new for old, new in moves.items()):
        return None
    follow(gm)
    made = before is not None and gm.code == before.code
    after = before
    if before is not None:
        after = replace(before, places={first: moves[last] for first, last in before.places.items()})
    dtypes = {new[0] for old, new in moves.items() if old[0] != new[0]}
    if not dtypes:
        return Cast(function, {old[1]: new[1] for old, new in moves.items()}, after, made)
    try:
        graph = _made_anew(gm, before, after)
    except Exception as error:
        raise RewriteError(
            f"the graph cannot follow to {', '.join(map(str, dtypes))}: {error}\n"
            "Cast the model before it is traced and rewritten instead; nothing was changed"
        ) from error
    wanted = fx.tensors_of(graph)
    dtypes_kept = {
        id(item): wanted[name].dtype
        for name, tensor in fx.tensors_of(gm).items()
        if name in wanted and wanted[name].dtype != moves[_place(tensor)][0]
        for item in (tensor, tensor.grad)
        if item is not None
    }
    assert after is not None  # without an origin no graph is made anew
    devices = {first[1]: last[1] for first, last in after.places.items()}
    return Cast(function, devices, after, True, graph, dtypes_kept)


def convert(gm: GraphModule, function: Callable[[Tensor], Tensor], apply: Callable[..., Any]) -> None:
    """Lets ``apply``, the ``_apply`` of ``gm`` as a module, convert its tensors, and the graph follow them."""
    cast = cast_of(gm, function)
    apply(function if cast is None else cast.convert)
    if cast is not None:
        cast.finish(gm)


# --- making a graph anew ----------------------------------------------------------------------------------------------


def _made_anew(gm: GraphModule, before: Origin | None, after: Origin | None) -> GraphModule:
    """The graph of ``gm`` in the dtypes of ``after``, on fake tensors and the devices of the trace."""
    if before is None or after is None:
        raise RewriteError("it is not known how it was made")
    if isinstance(before.model, str):
        raise RewriteError(before.model)
    modules = [str(node.target) for node in gm.graph.find_nodes(op="call_module")]
    if modules:
        raise RewriteError(f"it calls {modules[0]}, which holds a model of its own (run end-distill first)")
    if gm.code != before.code and _outline(_remade(gm, before)) != _outline(gm):
        raise RewriteError("it was edited since the last pass ran, or training has changed it")
    graph = _remade(gm, after)
    mine, theirs = _shapes(gm), _shapes(graph)
    if mine != theirs:
        differs = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
        raise RewriteError(f"passes that run again make other tensors ({', '.join(differs[:4])})")
    return graph


def _remade(gm: GraphModule, origin: Origin) -> GraphModule:
    """The model of ``origin`` where its tensors are now, traced and rewritten as ``gm`` was."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    dtypes = {first[0]: last[0] for first, last in origin.places.items()}
    assert isinstance(origin.model, nn.Module)
    memo: dict[int, Any] = {}
    for tensor in fx.tensors_of(origin.model).values():
        memo[id(tensor)] = _fake(mode, tensor, origin.places[_place(tensor)][0])
    for module in origin.model.modules():
        memo |= {id(item): item for item in vars(module).values() if isinstance(item, Tensor)}
    inputs: Any = pytree.tree_map_only(
        Tensor, lambda x: torch.zeros(x.shape, dtype=dtypes.get(x.dtype, x.dtype), device=x.device), origin.inputs
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = origin.trace(copy.deepcopy(origin.model, memo), inputs)
        text = ",".join(entry.text for entry in record_of(gm).entries[origin.passes :])
        if text:
            assert origin.rewrite is not None
            made = origin.rewrite(made, text)
    states = made.meta.get(STATES, {})
    for buffer, state in gm.meta.get(STATES, {}).items():
        if buffer in states and states[buffer].on != state.on:
            made.meta[STATES] = {**made.meta[STATES], buffer: replace(states[buffer], on=state.on)}
            states[buffer].enter(made, state.on)
    return made


def _fake(mode: FakeTensorMode, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=tensor.device)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def _place(tensor: Tensor) -> Place:
    return tensor.dtype, tensor.device


def _shapes(gm: GraphModule) -> dict[str, tuple[int, ...]]:
    made = gm.meta.get(CONSTANTS, ())
    return {name: tuple(tensor.shape) for name, tensor in fx.tensors_of(gm).items() if name not in made}


def _outline(gm: GraphModule) -> list[Any]:
    """The nodes of a graph and of the regions that it calls, without their names."""
    numbers = {node: number for number, node in enumerate(gm.graph.nodes)}
    lines = []
    for node in gm.graph.nodes:
        named = str(node.target) if node.op in ("call_function", "get_attr") else ""
        lines.append((node.op, named, repr(map_arg((node.args, dict(node.kwargs)), numbers.__getitem__))))
    return lines + [_outline(region) for _, region in _regions(gm)]


# --- giving it to a graph module --------------------------------------------------------------------------------------


def _install(graph: GraphModule, gm: GraphModule) -> None:
    """Gives ``gm`` the graph of another graph module with the same state, in place."""
    for path, _ in _regions(gm):
        gm.delete_submodule(path)
    for path, region in _regions(graph):
        gm.add_submodule(path, region)
        for name, holder in region.named_modules():  # of flags, at the paths of the model's modules
            holder.training = _training(gm, name)
    for name in gm.meta.get(CONSTANTS, ()):
        fx.delete(gm, name)
    for name in graph.meta.get(CONSTANTS, ()):
        gm.get_submodule(fx.module_path(name)).register_buffer(
            name.rpartition(".")[2], fx.attribute(graph, name), persistent=False
        )
    for key in (CONSTANTS, CONDITIONS_KEY):
        gm.meta[key] = graph.meta[key]
    gm.graph = graph.graph
    follow_edit(gm)


def _training(gm: GraphModule, path: str) -> bool:
    try:
        return gm.get_submodule(path).training
    except AttributeError:
        return gm.training


def _regions(gm: GraphModule) -> list[tuple[str, GraphModule]]:
    """The graph modules that a graph calls (code under autocast), with their paths."""
    return [(path, part) for path, part in gm.named_modules() if path and isinstance(part, GraphModule)]


def _move(gm: GraphModule, devices: Mapping[torch.device, torch.device]) -> None:
    """Writes other devices in a graph and its regions; in place, tensors of the state were moved before."""
    devices = {old: new for old, new in devices.items() if old != new}
    if not devices:
        return
    kinds = {old.type: new.type for old, new in devices.items() if torch.amp.is_autocast_available(new.type)}
    for name in gm.meta.get(CONSTANTS, ()):
        owner, leaf = gm.get_submodule(fx.module_path(name)), name.rpartition(".")[2]
        owner._buffers[leaf] = _moved(owner._buffers[leaf], devices)
    for part in [gm, *(region for _, region in _regions(gm))]:
        for node in part.graph.nodes:
            node.args, node.kwargs = map_aggregate(
                (node.args, node.kwargs),
                lambda item: devices.get(item, item) if isinstance(item, torch.device) else item,
            )
            if node.target in _SWITCHES and node.args[0] in kinds:
                node.update_arg(0, kinds[node.args[0]])
            node.meta["val"] = pytree.tree_map_only(Tensor, lambda x: _moved(x, devices), node.meta.get("val"))
        part.recompile()
    follow_edit(gm)


def _moved(tensor: Any, devices: Mapping[torch.device, torch.device]) -> Any:
    if tensor.device not in devices:
        return tensor
    if not isinstance(tensor, FakeTensor):
        return tensor.to(devices[tensor.device])
    with tensor.fake_mode:
        return torch.empty_strided(
            tensor.shape,
            tensor.stride(),
            dtype=tensor.dtype,
            device=devices[tensor.device],
            requires_grad=tensor.requires_grad,
        )
