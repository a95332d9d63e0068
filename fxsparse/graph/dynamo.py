"""Converts Dynamo's graphs to the training IR and back.

| | Dynamo's graph | training IR |
|---|---|---|
| parameters and buffers | plain inputs | ``get_attr`` nodes with full names |
| operators | Python functions, methods, regions | ATen, before dispatch |
| fake values | ``meta["example_value"]`` | ``meta["val"]`` |

The one-line call uses four functions in this order: `retrace` gives the ATen graph, `state_names` names the inputs that
are parameters or buffers, `training_ir` makes them ``get_attr`` nodes, and `with_inputs`, after the passes, makes them
inputs again. Dynamo's own graph is never edited, because torch needs it and its fake values afterwards.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy

from fxsparse import graph as fx
from fxsparse.errors import RewriteError
from fxsparse.graph.derived_buffers import Derived, derived_buffers
from fxsparse.graph.runtime_state import Constants, Slot, State, StaticStates

_STATE = re.compile(r"\._(?:parameters|buffers)\b")
_STEP = re.compile(r"""\._(?:modules|parameters|buffers)\[['"]([^'"]+)['"]\]|\.(\w+)|\[['"]?([^'"\]]+)['"]?\]""")
_ROOT = re.compile(r"""^[LG]\[['"]([^'"]+)['"]\]""")
_CONSTANT = "_tensor_constant"  # make_fx's name for a tensor that the traced code creates from numbers


# --- names ------------------------------------------------------------------------------------------------------------


def state_names(gm: GraphModule, example_inputs: Sequence[Any], root: nn.Module | None) -> dict[int, str]:
    """The full names of all inputs that are parameters or buffers, by position.

    Args:
        gm: Dynamo's graph.
        example_inputs: the real inputs.
        root: the compiled module, which names its tensors. Without it the names are derived from Dynamo's sources.
    """
    known = names_in(root)
    names: dict[int, str] = {}
    for position, (node, tensor) in enumerate(zip(placeholders(gm), example_inputs, strict=True)):
        if not isinstance(tensor, Tensor):
            continue
        source = source_name(node)
        if id(tensor) in known or isinstance(tensor, nn.Parameter) or _STATE.search(source):
            names[position] = _unused(known.get(id(tensor)) or clean_path(source) or node.name, names)
    return names


def names_in(root: nn.Module | None) -> dict[int, str]:
    """The name of every parameter and buffer of a module, by identity; the first name of a tied one."""
    named: dict[int, str] = {}
    if root is not None:
        for name, tensor in (
            *root.named_parameters(remove_duplicate=False),
            *root.named_buffers(remove_duplicate=False),
        ):
            named.setdefault(id(tensor), name)
    return named


def _unused(name: str, names: dict[int, str]) -> str:
    """``name``, or a similar name if it equals, contains or is contained in the path of another."""
    taken = set(names.values())
    clash = any(name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.") for other in taken)
    return f"input_{len(names)}_{name.replace('.', '_')}" if clash else name


def source_name(node: Node) -> str:
    """Dynamo's source of an input, as a Python expression; an empty string if it has none."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return ""
    return str(source.name() if callable(source.name) else source.name)


def clean_path(source: str) -> str:
    """The module path in a source: ``L['self']._modules['fc']._parameters['weight']`` -> ``fc.weight``."""
    root = _ROOT.match(source)
    steps = _STEP.findall(source[root.end() :] if root else source)
    return ".".join(next(filter(None, step)).replace(".", "_") for step in steps)


def placeholders(gm: GraphModule) -> list[Node]:
    """The inputs of a graph, in order."""
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


# --- to the training IR -----------------------------------------------------------------------------------------------


def training_ir(
    traced: GraphModule, gm: GraphModule, example_inputs: Sequence[Any], names: dict[int, str]
) -> GraphModule:
    """The training IR of Dynamo's graph; its parameters and buffers are the tensors among ``example_inputs``.

    Args:
        traced: the result of :func:`retrace`.
        gm: Dynamo's graph.
        example_inputs: the real inputs.
        names: the names of parameters and buffers among the inputs, by position.
    """
    state = nn.Module()
    for name, module in traced.named_children():
        state.add_module(name, module)
    for name, tensor in traced.named_buffers(recurse=False):  # constants of the traced code
        state.register_buffer(name, tensor, persistent=False)
    for position, name in names.items():
        _register(state, name, example_inputs[position])
    graph = Graph()
    moved: dict[Node, Node] = {}
    for position, node in enumerate(placeholders(traced)):
        if position not in names:
            moved[node] = graph.node_copy(node)
    for position, node in enumerate(placeholders(traced)):
        if position in names:
            moved[node] = graph.get_attr(names[position])
            moved[node].meta = dict(node.meta)
    prefix = _prefix(gm, names)
    for node in traced.graph.nodes:
        if node.op != "placeholder":
            moved[node] = graph.node_copy(node, moved.__getitem__)
            _name_modules(moved[node], prefix)
    return GraphModule(state, graph, class_name="TrainingIR")


def retrace(gm: GraphModule) -> GraphModule:
    """Dynamo's graph in ATen operators before dispatch, with the fake mode and the symbols of its inputs.

    It has the same inputs in the same order. Training flags are constants in it: Dynamo compiles once for each mode.
    """
    fakes = [_fresh(node.meta["example_value"]) for node in placeholders(gm)]
    interpreter = _MetaKeepingInterpreter(gm)
    with fake_mode_of(gm), enable_python_dispatcher(), torch.fx.traceback.preserve_node_meta():
        return make_fx(lambda *args: interpreter.run(*args), pre_dispatch=True)(*fakes)


class _MetaKeepingInterpreter(Interpreter):
    """Copies the meta of each node, above all its module path, to the nodes traced from it."""

    def run_node(self, n: Node) -> Any:
        with torch.fx.traceback.set_current_meta(n):
            return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.higher_order.autograd_function_apply and _takes_gradients(args):
            raise RewriteError(
                "the model calls a torch.autograd.Function, whose backward is lost in the graph that passes see: write "
                "it as a torch.library.custom_op with register_autograd, or use the two-step call, which compares "
                "gradients with the model's: fxsparse.rewrite(model, [...], kwargs=batch)"
            )
        if target is not torch.ops.higher_order.tag_activation_checkpoint:
            return super().call_function(target, args, kwargs)
        region, *inputs = args
        if "_checkpoint_context_fn" in region.meta:
            raise ValueError("passes cannot look into selective activation checkpointing (context_fn=...)")
        return _MetaKeepingInterpreter(_marked_to_recompute(region)).run(*inputs)


def _takes_gradients(args: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)


_regions = itertools.count(1_000_000)  # numbers of checkpointed regions, far above torch's own


def _marked_to_recompute(region: GraphModule) -> GraphModule:
    """A copy of a checkpointed region with torch's marks to recompute its nodes in the backward pass."""
    graph, moved, number = Graph(), dict[Node, Node](), next(_regions)
    for node in region.graph.nodes:
        moved[node] = graph.node_copy(node, moved.__getitem__)
        moved[node].meta.update(recompute=CheckpointPolicy.PREFER_RECOMPUTE, ac_graph_id=number)
    return GraphModule(region, graph)


def _fresh(fake: Any) -> Any:
    """A new fake tensor like ``fake``, safe for in-place operations; numbers wrapped by Dynamo stay as they are."""
    if type(fake) not in (FakeTensor, nn.Parameter) or fake.dim() == 0 or fake.layout != torch.strided:
        return fake
    with fake.fake_mode:
        return torch.empty_strided(
            fake.size(), fake.stride(), dtype=fake.dtype, device=fake.device, requires_grad=fake.requires_grad
        )


def _register(state: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = state
    for part in filter(None, path.split(".")):
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor)


def _prefix(gm: GraphModule, names: dict[int, str]) -> str:
    """The path of the captured module in the compiled one, with a final dot; not empty only after a graph break."""
    nodes = placeholders(gm)
    for position, name in names.items():
        local = clean_path(source_name(nodes[position]))
        if local and name.endswith(f".{local}"):
            return name[: -len(local)]
    return ""


def _name_modules(node: Node, prefix: str) -> None:
    stack = node.meta.get("nn_module_stack")
    if stack:
        node.meta["nn_module_stack"] = {
            key: ((prefix + clean_path(path)).strip("."), *rest) for key, (path, *rest) in stack.items()
        }


# --- back to inputs ---------------------------------------------------------------------------------------------------

INSTEAD = (
    "use the two-step call: rewritten = fxsparse.rewrite(model, [...], kwargs=batch), an optimizer over "
    'rewritten.parameters(), then torch.compile(rewritten, backend="fxsparse")'
)


def with_inputs(
    rewritten: GraphModule, gm: GraphModule, example_inputs: Sequence[Any], names: dict[int, str]
) -> tuple[GraphModule, list[Slot]]:
    """Converts a rewritten graph to a Dynamo graph that takes Dynamo's inputs in order, then the state added by passes.

    Returns:
        the graph, and the sources of its extra inputs, in order.

    Raises:
        RewriteError: a pass added or replaced a parameter, which no optimizer in a one-line call could train; or it
            added a buffer without a rule that computes it from weights; or it changed the number of inputs.
    """
    originals = placeholders(gm)
    free = [node for position, node in enumerate(originals) if position not in names]
    remaining = placeholders(rewritten)
    if len(remaining) != len(free):
        raise RewriteError(f"a pass changed the number of inputs from {len(free)} to {len(remaining)}; {INSTEAD}")
    graph = Graph()
    inputs = {node: copy_placeholder(graph, node) for node in originals}
    moved = {node: inputs[original] for node, original in zip(remaining, free, strict=True)}
    state_inputs = {id(example_inputs[position]): inputs[originals[position]] for position in names}
    added: dict[str, list[Node]] = {}
    for node in rewritten.graph.nodes:
        if node.op == "get_attr":
            tensor = fx.attribute(rewritten, str(node.target))
            if id(tensor) in state_inputs:
                moved[node] = state_inputs[id(tensor)]
            elif isinstance(tensor, Tensor):
                added.setdefault(str(node.target), []).append(node)
    slots = _slots(rewritten, list(added), {name: position for position, name in names.items()})
    for slot in slots:
        for name in slot.names:
            node = add_placeholder(graph, name, added[name][0].meta["val"])
            moved.update(dict.fromkeys(added[name], node))
    for node in rewritten.graph.nodes:
        if node not in moved:
            moved[node] = graph.node_copy(node, moved.__getitem__)
            if "val" in node.meta:
                moved[node].meta["example_value"] = node.meta["val"]
    return dynamo_module(rewritten, graph, like=gm), slots


def _slots(rewritten: GraphModule, names: list[str], positions: dict[str, int]) -> list[Slot]:
    """The sources of the state added by passes; a slot holds all state of the same weights."""
    derived = derived_buffers(rewritten)
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in names:
        _check_added(rewritten, name, derived)
        groups.setdefault(tuple(sorted(_weights_of(name, derived, positions))), []).append(name)
    slots = []
    for weights, members in groups.items():
        if weights:
            places = {name: weights.index(position) for name, position in positions.items() if position in weights}
            states = StaticStates(tuple(_state(name, derived, places) for name in members))
            slots.append(Slot(weights, states, tuple(members)))
        else:
            slots.append(Slot((), Constants(tuple(fx.attribute(rewritten, name) for name in members)), tuple(members)))
    return slots


def _check_added(rewritten: GraphModule, name: str, derived: dict[str, Derived]) -> None:
    if isinstance(fx.attribute(rewritten, name), nn.Parameter):
        raise RewriteError(f"a pass added a parameter that no optimizer has seen; {INSTEAD}", site=name)
    if name not in derived and not name.startswith(_CONSTANT):
        raise RewriteError(
            "a pass added a buffer without a rule that computes it from weights "
            "(fxsparse.graph.derived_buffers.derive), so it cannot be computed for the other layers that run the same "
            f"compiled graph; {INSTEAD}",
            site=name,
        )


def _weights_of(name: str, derived: dict[str, Derived], positions: dict[str, int]) -> set[int]:
    if name in positions:
        return {positions[name]}
    if name not in derived:
        return set()
    return {weight for source in derived[name].sources for weight in _weights_of(source, derived, positions)}


def _state(name: str, derived: dict[str, Derived], places: dict[str, int]) -> State:
    sources = (
        places[source] if source in places else _state(source, derived, places) for source in derived[name].sources
    )
    return State(derived[name].rule, tuple(sources))


# --- building graphs in Dynamo's form ---------------------------------------------------------------------------------


def copy_placeholder(graph: Graph, node: Node) -> Node:
    """A copy of an input in ``graph``, with Dynamo's source."""
    copy = graph.node_copy(node)
    copy._dynamo_source = getattr(node, "_dynamo_source", None)
    return copy


def add_placeholder(graph: Graph, name: str, fake: Any) -> Node:
    """An input unknown to Dynamo, with the meta that torch expects; its address is marked as stable between calls."""
    node = graph.placeholder(f"state_{name.replace('.', '_')}")
    node.target = node.name  # unique
    node.meta.update(example_value=fake, val=fake, tensor_dict={"_dynamo_static_input_type": "unguarded"})
    node._dynamo_source = None
    return node


def dynamo_module(root: nn.Module, graph: Graph, *, like: GraphModule) -> GraphModule:
    """A graph module with the attributes that torch reads from Dynamo's graph modules, copied from ``like``."""
    module = GraphModule(root, graph)
    module.meta = dict(like.meta)
    for attribute in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(like, attribute):
            setattr(module, attribute, getattr(like, attribute))
    return module


def copy_dynamo_graph(gm: GraphModule) -> GraphModule:
    """A copy of Dynamo's graph that may be edited."""
    graph, moved = Graph(), dict[Node, Node]()
    for node in gm.graph.nodes:
        is_input = node.op == "placeholder"
        moved[node] = copy_placeholder(graph, node) if is_input else graph.node_copy(node, moved.__getitem__)
    return dynamo_module(gm, graph, like=gm)


def fake_mode_of(gm: GraphModule) -> FakeTensorMode:
    """The fake mode of a Dynamo graph's inputs and values; torch compiles in another one afterwards."""
    fakes = (node.meta.get("example_value") for node in placeholders(gm))
    return next((fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor)), None) or FakeTensorMode()


def static_fake(gm: GraphModule, tensor: Tensor) -> Tensor:
    """A fake tensor like ``tensor``, with fixed sizes, in the fake mode of the graph."""
    return fake_mode_of(gm).from_tensor(tensor, static_shapes=True)
