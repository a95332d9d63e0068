"""Reading and editing a training-IR graph: linears, parameters, state, fake values.

The training IR is the pre-dispatch ATen graph of ``torch.export``: parameters and buffers are ``get_attr`` nodes
named by their fully qualified name, ``node.meta["val"]`` is a fake tensor with symbolic sizes,
``node.meta["nn_module_stack"]`` says which module of the model a node came from.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node

aten = torch.ops.aten

# Nobody reads what these return, yet they decide how the nodes after them run.
_MODE_SWITCHES = {
    torch._C._set_grad_enabled,
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
}

_TRANSPOSES = {aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default}
FROZEN = "fxsparse_frozen"  # marks a ``detach`` that keeps a parameter from being trained
_CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.convolution.default,
}
# op -> positions of (input, weight, bias) and whether the weight argument is stored [in, out].
_DENSE_LINEARS: dict[Any, tuple[int, int, int | None, bool]] = {
    aten.linear.default: (0, 1, 2, False),
    aten.addmm.default: (1, 2, 0, True),
    aten.mm.default: (0, 1, None, True),
    aten.matmul.default: (0, 1, None, True),
}


@dataclass(frozen=True)
class Linear:
    """A product with a parameter, ``y = x W^T + b``, in the form the model wrote it.

    Attributes:
        node: the node that computes ``y``.
        weight: the ``get_attr`` node of the parameter.
        transposed: True where the parameter is stored ``[in, out]`` (Hugging Face ``Conv1D``).
        path: path of the module it is, such as ``model.layers.0.fc1``; a tied weight's linear has its own, ``lm_head``.
    """

    node: Node
    weight: Node
    transposed: bool
    path: str

    @property
    def input(self) -> Node:
        """The node of ``x``, ``[..., in_features]``, as the graph is now."""
        return self.node.args[_DENSE_LINEARS[self.node.target][0]]  # type: ignore[return-value]

    @property
    def bias(self) -> Node | None:
        """The node of ``b``, or None."""
        at = _DENSE_LINEARS[self.node.target][2]
        return self.node.args[at] if at is not None and at < len(self.node.args) else None  # type: ignore[return-value]

    @property
    def name(self) -> str:
        """Full name of the weight parameter, such as ``model.layers.0.fc1.weight``."""
        return str(self.weight.target)

    @property
    def out_features(self) -> int:
        return int(value(self.weight).shape[1 if self.transposed else 0])

    @property
    def in_features(self) -> int:
        return int(value(self.weight).shape[0 if self.transposed else 1])


def linears(gm: GraphModule) -> Iterator[Linear]:
    """The dense linears of a graph whose weight is a two-dimensional parameter, in order of execution."""
    names = parameter_names(gm)
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in _DENSE_LINEARS:
            linear = _as_linear(gm, node, names)
            if linear is not None:
                yield linear


def _as_linear(gm: GraphModule, node: Node, names: dict[int, list[str]]) -> Linear | None:
    _, at_weight, _, transposed = _DENSE_LINEARS[node.target]
    if any(factor != 1 for factor in node.kwargs.values()):  # addmm's alpha and beta
        return None
    weight: Any = node.args[at_weight]
    if not isinstance(weight, Node):
        return None
    weight = read_of(weight)
    if weight.op != "get_attr" and is_transpose(weight):
        weight, transposed = read_of(weight.args[0]), not transposed
    parameter = attribute(gm, str(weight.target)) if weight.op == "get_attr" else None
    if not isinstance(parameter, nn.Parameter) or parameter.dim() != 2:
        return None
    paths = [module_path(name) for name in names.get(id(parameter), ())]
    path = stack_path(node) if stack_path(node) in paths else module_path(str(weight.target))
    return Linear(node, weight, transposed, path)


def read_of(node: Node) -> Node:
    """The node behind the ``detach`` that freezes a parameter; ``node`` itself where there is none."""
    return node.args[0] if FROZEN in node.meta else node  # type: ignore[return-value]


def is_transpose(node: Node) -> bool:
    """Whether ``node`` swaps the two dimensions of a matrix."""
    if node.target not in _TRANSPOSES or len(value(node).shape) != 2:
        return False
    dims = tuple(d for arg in node.args[1:] for d in (arg if isinstance(arg, (list, tuple)) else (arg,)))
    return not dims or (dims in {(0, 1), (1, 0), (-1, -2), (-2, -1)} and not _is_identity_permute(node, dims))


def _is_identity_permute(node: Node, dims: tuple[Any, ...]) -> bool:
    return node.target is aten.permute.default and tuple(d % 2 for d in dims) == (0, 1)


def applies_parameter(gm: GraphModule, node: Node) -> bool:
    """Whether ``node`` is a dense product of its input with a weight: a linear or a convolution."""
    if node.op != "call_function":
        return False
    if node.target in _DENSE_LINEARS:
        return _as_linear(gm, node, {}) is not None
    return node.target in _CONVOLUTIONS or str(node.target).startswith("fxsparse.")


def is_embedding(node: Node) -> bool:
    """Whether ``node`` looks rows up in an embedding table."""
    return node.target in {aten.embedding.default, aten.embedding_bag.default}


def first_linears(gm: GraphModule) -> set[Node]:
    """Linears that no other linear or convolution feeds: the first layer after the input (queries, keys and values
    alike)."""
    fed: set[Node] = set()
    first: set[Node] = set()
    for node in gm.graph.nodes:
        if any(source in fed for source in node.all_input_nodes):
            fed.add(node)
        elif applies_parameter(gm, node):
            first.add(node)
        if node in first:
            fed.add(node)
    return first


def head_linears(gm: GraphModule) -> set[Node]:
    """Linears whose result reaches an output without another linear and without joining a residual stream: the
    heads."""
    follows: set[Node] = set()  # nodes after which a linear or a residual sum still comes
    heads: set[Node] = set()
    computed = depends_on_inputs(gm)
    for node in reversed(gm.graph.nodes):
        if any(user in follows or applies_parameter(gm, user) or _joins_stream(user, computed) for user in node.users):
            follows.add(node)
        elif node.users and applies_parameter(gm, node):
            heads.add(node)
    return heads


def depends_on_inputs(gm: GraphModule) -> set[Node]:
    """The inputs of a graph and every node that is computed from one."""
    reached: set[Node] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder" or any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    return reached


def _joins_stream(node: Node, computed: set[Node]) -> bool:
    """Whether ``node`` adds two activations, as a residual connection does; a sum of losses is a scalar."""
    if node.target not in {aten.add.Tensor, aten.add_.Tensor}:
        return False
    terms = [arg for arg in node.args[:2] if isinstance(arg, Node) and arg in computed]
    return len(set(terms)) == 2 and all(isinstance(value(term), Tensor) and value(term).dim() > 1 for term in terms)


# --- parameters and buffers -------------------------------------------------------------------------------------------


def module_path(name: str) -> str:
    """The module part of a parameter's full name: ``a.b.weight`` -> ``a.b``."""
    return name.rpartition(".")[0]


def attribute(gm: nn.Module, name: str) -> Any:
    """The object a dotted name refers to; AttributeError where there is none."""
    owner: Any = gm
    for part in name.split("."):
        owner = getattr(owner, part)
    return owner


def value(node: Node) -> Any:
    """The fake value of ``node``, with symbolic sizes."""
    return node.meta["val"]


def example_of(arg: Any) -> Any:
    """``arg`` with every node replaced by its fake value."""
    return torch.fx.node.map_arg(arg, value)


def stack_path(node: Node) -> str:
    """Path of the module ``node`` came from; an empty string for the model itself."""
    stack = node.meta.get("nn_module_stack")
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    if path.startswith("_empty_nn_module_stack"):  # what export writes on sizes that it read itself
        return ""
    return re.sub(r"@\d+", "", path)  # a module that is called again has a numbered path


def parameter_names(gm: nn.Module) -> dict[int, list[str]]:
    """All names of every parameter by its identity; more than one where weights are tied."""
    names: dict[int, list[str]] = {}
    for name, parameter in gm.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def reads(gm: GraphModule) -> dict[int, list[Node]]:
    """The ``get_attr`` nodes that read each parameter or buffer, by the tensor's identity: tied names come together."""
    nodes: dict[int, list[Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            tensor = attribute(gm, str(node.target))
            if isinstance(tensor, Tensor):
                nodes.setdefault(id(tensor), []).append(node)
    return nodes


def set_parameter(gm: nn.Module, name: str, tensor: Tensor, *, requires_grad: bool = True) -> nn.Parameter:
    """Registers ``tensor`` as the parameter called ``name``, on the submodule that owns the name."""
    parameter = nn.Parameter(tensor, requires_grad=requires_grad)
    owner, leaf = _owner(gm, name)
    owner.register_parameter(leaf, parameter)
    return parameter


def set_buffer(gm: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Registers ``tensor`` as the persistent buffer called ``name``, on the submodule that owns the name."""
    owner, leaf = _owner(gm, name)
    owner.register_buffer(leaf, tensor)
    return tensor


def delete(gm: nn.Module, name: str) -> None:
    """Removes the parameter or buffer called ``name``."""
    owner, leaf = _owner(gm, name)
    delattr(owner, leaf)


def delete_state(gm: nn.Module, names: Collection[str]) -> None:
    """Removes those parameters and buffers among ``names`` that are still there."""
    present = [
        name for name, _ in (*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False))
    ]
    for name in present:
        if name in names:
            delete(gm, name)


def _owner(gm: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return (gm.get_submodule(path) if path else gm), leaf


# --- editing ----------------------------------------------------------------------------------------------------------


def fake_mode(gm: GraphModule) -> FakeTensorMode:
    """The fake mode the graph's values live in."""
    for node in gm.graph.nodes:
        fake = node.meta.get("val")
        if isinstance(fake, FakeTensor):
            return fake.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def insert_attribute(gm: GraphModule, name: str, *, before: Node) -> Node:
    """A ``get_attr`` node of a parameter or buffer, inserted before ``before``, with its fake value."""
    tensor = attribute(gm, name)
    with gm.graph.inserting_before(before):
        node = gm.graph.get_attr(name)
    node.meta["val"] = fake_mode(gm).from_tensor(tensor.detach(), static_shapes=True)
    _inherit(node, before)
    return node


def insert_call(
    gm: GraphModule, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *, like: Node
) -> Node:
    """A call of ``target`` inserted before ``like``, with its fake value and the module path of ``like``."""
    with gm.graph.inserting_before(like):
        node = gm.graph.call_function(target, args, kwargs or {})
    refresh(gm, node)
    _inherit(node, like)
    return node


def replace_with_call(gm: GraphModule, old: Node, target: Any, args: tuple[Any, ...]) -> Node:
    """Replaces ``old`` by a call of ``target`` whose result has the same shape and dtype."""
    with gm.graph.inserting_before(old):
        node = gm.graph.call_function(target, args)
    node.meta = dict(old.meta)
    replace(old, node)
    return node


def refresh(gm: GraphModule, node: Node) -> None:
    """Recomputes the fake value of a call from the fake values of its arguments."""
    # Composite operators see symbolic sizes only through the Python dispatcher, in torch 2.11.
    symbolic = enable_python_dispatcher() if _is_composite(node.target) else contextlib.nullcontext()
    with fake_mode(gm), symbolic, torch.no_grad():
        node.meta["val"] = node.target(*example_of(node.args), **example_of(node.kwargs))  # type: ignore[operator]


@functools.cache
def _is_composite(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return False
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), str(key).rpartition(".")[2])


def _inherit(node: Node, source: Node) -> None:
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack", "recompute", "ac_graph_id"):
        if key in source.meta:
            node.meta[key] = source.meta[key]


def replace(old: Node, new: Node) -> None:
    """Lets every user of ``old`` read ``new``, and removes ``old``."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def copy_sharing_state(gm: GraphModule) -> GraphModule:
    """A copy with a graph and a module tree of its own whose parameters and buffers are the same tensors."""
    shared = {id(tensor): tensor for tensor in (*gm.parameters(), *gm.buffers())}
    return copy.deepcopy(gm, shared)


def copy_tree(source: nn.Module, target: nn.Module, memo: dict[int, Any]) -> None:
    """Gives ``target`` the modules, parameters, buffers and flags of ``source``, copied as ``copy.deepcopy`` does with
    ``memo``, in the same order. Modules that ``target`` has already stay."""
    done: dict[int, nn.Module] = {}

    def visit(module: nn.Module, twin: nn.Module) -> nn.Module:
        done[id(module)] = twin
        twin.training = module.training
        twin._parameters = copy.deepcopy(module._parameters, memo)
        twin._buffers = copy.deepcopy(module._buffers, memo)
        twin._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
        present, twin._modules = twin._modules, {}
        for name, child in module._modules.items():
            if child is None or id(child) in done:
                twin._modules[name] = None if child is None else done[id(child)]
            else:
                twin._modules[name] = visit(child, present.get(name) or nn.Module())
        return twin

    visit(source, target)


def eliminate_dead_code(gm: GraphModule) -> None:
    """Removes nodes nothing reads, dropout included, and keeps writes to buffers and inputs, and switches of modes."""
    gm.graph.eliminate_dead_code(is_impure_node=_acts_beyond_its_result)


def _acts_beyond_its_result(node: Node) -> bool:
    if node.op in {"placeholder", "output"}:
        return True
    if node.op != "call_function":
        return False
    if node.target in _MODE_SWITCHES:
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return False
    # A write matters where what it mutates outlives the call: a buffer, a parameter or an input, also through views.
    written = [
        arg
        for arg, spec in zip(node.args, schema.arguments, strict=False)
        if spec.alias_info and spec.alias_info.is_write
    ]
    return any(_outlives_call(arg) for arg in written)


def _outlives_call(arg: Any) -> bool:
    while isinstance(arg, Node):
        if arg.op in {"get_attr", "placeholder"}:
            return True
        if arg.users and len(arg.users) > 1:
            return True
        arg = arg.args[0] if arg.args and _is_view(arg) else None
    return False


def _is_view(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(spec.alias_info for spec in schema.returns)


def state_read(gm: GraphModule) -> set[str]:
    """Names of the parameters and buffers that the graph reads; a tied tensor counts under all its names."""
    used = {id(attribute(gm, str(node.target))) for node in gm.graph.nodes if node.op == "get_attr"}
    named = [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]
    return {name for name, tensor in named if id(tensor) in used}
