"""Dynamo's graphs as training-IR graphs, and back.

Dynamo hands parameters in as plain inputs and writes Python functions; passes expect ``get_attr`` nodes with full
names and ATen operators. Dynamo's own graph is never edited: torch still needs it, and its fake values, afterwards.
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
_STEP = re.compile(
    r"""\._(?:modules|parameters|buffers)\[['"]([^'"]+)['"]\]|\.([A-Za-z_]\w*)|\[['"]?([^'"\]]+)['"]?\]"""
)
_ROOT = re.compile(r"""^[LG]\[['"]([^'"]+)['"]\]""")
_CONSTANT = "_tensor_constant"  # make_fx's name for a tensor the traced code made from numbers


# --- names ------------------------------------------------------------------------------------------------------------


def state_names(gm: GraphModule, example_inputs: Sequence[Any], root: nn.Module | None) -> dict[int, str]:
    """Full names of those inputs that are parameters or buffers, by their position.

    Args:
        gm: Dynamo's graph.
        example_inputs: the real inputs.
        root: the compiled module; names are those it gives. Without one they follow from Dynamo's sources.
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
    """Names of a module's parameters and buffers by identity; of a tied one the first."""
    named: dict[int, str] = {}
    if root is not None:
        for name, tensor in (
            *root.named_parameters(remove_duplicate=False),
            *root.named_buffers(remove_duplicate=False),
        ):
            named.setdefault(id(tensor), name)
    return named


def _unused(name: str, names: dict[int, str]) -> str:
    """``name``, or a name like it that neither equals nor contains another."""
    taken = set(names.values())
    clash = any(name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.") for other in taken)
    return f"input_{len(names)}_{name.replace('.', '_')}" if clash else name


def source_name(node: Node) -> str:
    """Where Dynamo found an input, as a Python expression; empty where it does not say."""
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
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


# --- to the training IR -----------------------------------------------------------------------------------------------


def training_ir(
    traced: GraphModule, gm: GraphModule, example_inputs: Sequence[Any], names: dict[int, str]
) -> GraphModule:
    """The form passes work on: a graph whose parameters and buffers are the tensors among ``example_inputs``.

    Args:
        traced: what :func:`retrace` made of Dynamo's graph.
        gm: Dynamo's graph.
        example_inputs: the real inputs.
        names: names of those that are state, by position.
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
    """Dynamo's graph in ATen operators before dispatch, in the fake mode and with the symbols of its inputs.

    It takes the same inputs in the same order. Training flags are baked in: Dynamo compiles once for each mode.
    """
    fakes = [_fresh(node.meta["example_value"]) for node in placeholders(gm)]
    interpreter = _MetaKeepingInterpreter(gm)
    with fake_mode_of(gm), enable_python_dispatcher(), torch.fx.traceback.preserve_node_meta():
        return make_fx(lambda *args: interpreter.run(*args), pre_dispatch=True)(*fakes)


class _MetaKeepingInterpreter(Interpreter):
    """Hands the meta of the node that runs, its module path above all, to the nodes traced from it."""

    def run_node(self, n: Node) -> Any:
        with torch.fx.traceback.set_current_meta(n):
            return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is not torch.ops.higher_order.tag_activation_checkpoint:
            return super().call_function(target, args, kwargs)
        region, *inputs = args
        if "_checkpoint_context_fn" in region.meta:
            raise ValueError("passes cannot look into selective activation checkpointing (context_fn=...)")
        return _MetaKeepingInterpreter(_marked_to_recompute(region)).run(*inputs)


_regions = itertools.count(1_000_000)  # numbers of checkpointed regions, apart from torch's own


def _marked_to_recompute(region: GraphModule) -> GraphModule:
    """A copy of a checkpointed region whose nodes ask to be recomputed in the backward pass, as torch marks them."""
    graph, moved, number = Graph(), dict[Node, Node](), next(_regions)
    for node in region.graph.nodes:
        moved[node] = graph.node_copy(node, moved.__getitem__)
        moved[node].meta.update(recompute=CheckpointPolicy.PREFER_RECOMPUTE, ac_graph_id=number)
    return GraphModule(region, graph)


def _fresh(fake: Any) -> Any:
    """A fake tensor like ``fake`` that in-place operations may write to; numbers that Dynamo wrapped stay as is."""
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
    """Path of the module whose forward was captured, seen from the compiled module; not empty after a graph break."""
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
    """A rewritten training-IR graph that takes Dynamo's inputs again, in their order, and then what passes added.

    Returns:
        the graph, and where its further inputs come from, in their order.

    Raises:
        RewriteError: a pass added or replaced a parameter, which the optimizer of a one-line call cannot have seen;
            or state that does not say how it follows from weights; or it changed the number of inputs.
    """
    originals = placeholders(gm)
    free = [node for position, node in enumerate(originals) if position not in names]
    kept = placeholders(rewritten)
    if len(kept) != len(free):
        raise RewriteError(f"a pass changed the number of inputs from {len(free)} to {len(kept)}; {INSTEAD}")
    graph = Graph()
    inputs = {node: copy_placeholder(graph, node) for node in originals}
    moved = {node: inputs[original] for node, original in zip(kept, free, strict=True)}
    own = {id(example_inputs[position]): inputs[originals[position]] for position in names}
    added: dict[str, list[Node]] = {}
    for node in rewritten.graph.nodes:
        if node.op == "get_attr":
            tensor = fx.attribute(rewritten, str(node.target))
            if id(tensor) in own:
                moved[node] = own[id(tensor)]
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
    """Where state that passes added comes from, that of the same weights together."""
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
            "a pass added a buffer without saying how it follows from weights (fxsparse.graph.derived_buffers.derive), "
            "so that it "
            f"cannot be told for the other layers one compiled graph may serve; {INSTEAD}",
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


# --- building graphs that torch takes for Dynamo's --------------------------------------------------------------------


def copy_placeholder(graph: Graph, node: Node) -> Node:
    copy = graph.node_copy(node)
    copy._dynamo_source = getattr(node, "_dynamo_source", None)
    return copy


def add_placeholder(graph: Graph, name: str, fake: Any) -> Node:
    """An input that Dynamo does not know, with the meta torch expects; its address is stable as a parameter's."""
    node = graph.placeholder(f"state_{name.replace('.', '_')}")
    node.target = node.name  # unique
    node.meta.update(example_value=fake, val=fake, tensor_dict={"_dynamo_static_input_type": "unguarded"})
    node._dynamo_source = None
    return node


def dynamo_module(root: nn.Module, graph: Graph, *, like: GraphModule) -> GraphModule:
    """A graph module with what torch reads off those of Dynamo."""
    module = GraphModule(root, graph)
    module.meta = dict(like.meta)
    for attribute in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(like, attribute):
            setattr(module, attribute, getattr(like, attribute))
    return module


def copy_dynamo_graph(gm: GraphModule) -> GraphModule:
    """A copy of Dynamo's graph to edit."""
    graph, moved = Graph(), dict[Node, Node]()
    for node in gm.graph.nodes:
        is_input = node.op == "placeholder"
        moved[node] = copy_placeholder(graph, node) if is_input else graph.node_copy(node, moved.__getitem__)
    return dynamo_module(gm, graph, like=gm)


def fake_mode_of(gm: GraphModule) -> FakeTensorMode:
    """The fake mode of a Dynamo graph's values: that of its inputs, not the one torch compiles in afterwards."""
    fakes = (node.meta.get("example_value") for node in placeholders(gm))
    return next((fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor)), None) or FakeTensorMode()


def static_fake(gm: GraphModule, tensor: Tensor) -> Tensor:
    """A fake tensor like ``tensor``, of fixed size, in the mode of the graph's values."""
    return fake_mode_of(gm).from_tensor(tensor, static_shapes=True)
