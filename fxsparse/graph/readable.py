"""A graph as Python that a person can read.

    # model.layers.0.mlp.up_proj    weight: f32[64, 32]
    linear_5 = aten.linear(mul_3, up_proj.weight)                                  # f32[s0, 16, 64]

One line for each call, headed by the path of the module it came from and the parameters and buffers that are read
there for the first time. Reads are written where they are used, from the last part of the module's path on. Types are
dtype and sizes, with symbols numbered as they appear. ``.default`` and ``torch.ops`` are left out, and ``END`` is the
end of a dimension.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from fxsparse.graph.dynamo import clean_path
from fxsparse.graph.state import attribute
from fxsparse.graph.values import stack_path

_COMMENTS_AT = 80
_LONGEST_LIST = 16
_END = 2**63 - 1
_INFIX = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.floordiv: "//",
    operator.truediv: "/",
    operator.mod: "%",
    operator.eq: "==",
    operator.ge: ">=",
    operator.gt: ">",
    operator.le: "<=",
    operator.lt: "<",
}


def readable(graph: Graph, name: str = "forward", state: Mapping[str, str] | None = None) -> str:
    """``graph`` as Python.

    Args:
        graph: in ATen, or as Dynamo captured it.
        name: of the function.
        state: which inputs are parameters and buffers, and their full names; they are written as reads of these.
    """
    return _Printer(graph, state or {}).function(name)


class _Printer:
    """Prints one graph; the regions it calls (``autocast``) follow as functions of their own."""

    def __init__(self, graph: Graph, state: Mapping[str, str], symbols: dict[str, str] | None = None):
        self.graph = graph
        self.state = {node: state[node.name] for node in graph.nodes if node.name in state and node.op == "placeholder"}
        self.state |= {node: str(node.target) for node in graph.find_nodes(op="get_attr")}
        self.symbols = {} if symbols is None else symbols
        self.shown: set[str] = set()
        self.regions: list[str] = []
        self.path = ""

    def function(self, name: str) -> str:
        inputs = [node for node in self.graph.find_nodes(op="placeholder") if node not in self.state]
        lines = [f"def {name}(", "    self,"] if inputs else [f"def {name}(self):"]
        lines += [_with_comment(f"    {node.name},", self._type(node)) for node in inputs]
        lines += ["):"] if inputs else []
        for path, nodes in _sections(self.graph):
            lines += self._section(path, nodes)
        self.path = ""
        (returned,) = self.graph.output_node().args
        lines += ["", f"    return {self._returned(returned)}"]
        return "\n".join([*lines, *self._region_functions()])

    def _section(self, path: str, nodes: list[Node]) -> list[str]:
        self.path = path
        read = [source for node in nodes for source in node.all_input_nodes if source in self.state]
        state = [text for source in read if (text := self._declared(source))]
        heading = f"    # {path or 'the model itself'}"
        lines = [_with_comment(self._call(node), self._type(node), indent=4) for node in nodes]
        return ["", f"{heading}    {', '.join(dict.fromkeys(state))}" if state else heading, *lines]

    def _declared(self, read: Node) -> str:
        """Name and type of state that is read for the first time; a mode's flag and a region have no such type."""
        name = self.state[read]
        if name in self.shown or not isinstance(_value(read), Tensor):
            return ""
        self.shown.add(name)
        inside = self.path and name.startswith(f"{self.path}.")
        return f"{name[len(self.path) + 1 :] if inside else name}: {self._type(read)}"

    def _call(self, node: Node) -> str:
        return f"{node.name} = {self._called(node)}"

    def _called(self, node: Node) -> str:
        args = [self._text(arg) for arg in node.args]
        named = [f"{name}={self._text(arg)}" for name, arg in node.kwargs.items()]
        if node.op == "call_function" and node.target is operator.getitem:
            return f"{args[0]}[{args[1]}]"
        if node.op == "call_function" and node.target in _INFIX and len(args) == 2:
            return f"{args[0]} {_INFIX[node.target]} {args[1]}"
        if node.op == "call_method":
            return f"{args[0]}.{node.target}({', '.join(args[1:] + named)})"
        target = _path_text(str(node.target)) if node.op == "call_module" else _target_text(node.target)
        return f"{target}({', '.join(args + named)})"

    def _text(self, arg: Any) -> str:
        if isinstance(arg, Node):
            return self._read(self.state[arg]) if arg in self.state else arg.name
        if isinstance(arg, (list, tuple)):
            return self._sequence(arg)
        if isinstance(arg, dict):
            return "{" + ", ".join(f"{key!r}: {self._text(item)}" for key, item in arg.items()) + "}"
        if isinstance(arg, slice):
            return f"slice({', '.join(self._text(item) for item in (arg.start, arg.stop, arg.step))})"
        if arg == _END and isinstance(arg, int):
            return "END"
        if isinstance(arg, torch.device):
            return repr(str(arg))
        if arg is None or isinstance(arg, (bool, int, float, complex, str)):
            return repr(arg)
        return self._numbered(getattr(arg, "__name__", None) or str(arg))

    def _sequence(self, items: list[Any] | tuple[Any, ...]) -> str:
        texts = [self._text(item) for item in items]
        if len(texts) > _LONGEST_LIST and all(isinstance(item, int) for item in items):
            texts = [*texts[:6], "...", texts[-1]]
        if isinstance(items, list):
            return f"[{', '.join(texts)}]"
        return f"({texts[0]},)" if len(texts) == 1 else f"({', '.join(texts)})"

    def _read(self, name: str) -> str:
        parts = name.split(".")
        start = len(self.path.split(".")) - 1
        if not self.path or not name.startswith(f"{self.path}."):
            return _path_text(name)
        while start and parts[start].isdigit():
            start -= 1
        return _path_text(".".join(parts[start:]), root="") if not parts[start].isdigit() else _path_text(name)

    def _returned(self, returned: Any) -> str:
        fields = _fields(self.graph, returned)
        return self._text(returned) if fields is None else self._text(fields)

    def _region_functions(self) -> Iterable[str]:
        owner = self.graph.owning_module
        for node in self.graph.find_nodes(op="get_attr"):
            region = attribute(owner, str(node.target)) if owner is not None else None
            if isinstance(region, GraphModule):
                name = str(node.target).replace(".", "_")
                yield f"\n\n{_Printer(region.graph, {}, self.symbols).function(name)}"

    # --- types ------------------------------------------------------------------------------------------------------

    def _type(self, node: Node) -> str:
        return self._type_of(_value(node))

    def _type_of(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{_dtype(value.dtype)}[{', '.join(self._numbered(str(size)) for size in value.shape)}]"
        if isinstance(value, (list, tuple)):
            return f"({', '.join(map(self._type_of, value))})"
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self._numbered(str(value))
        return "" if value is None or isinstance(value, torch.nn.Module) else repr(value)

    def _numbered(self, text: str) -> str:
        """``text`` with symbols numbered in the order they appear: ``s27`` is the first, ``s0``."""

        def number(match: re.Match[str]) -> str:
            kind = match.group(1)
            count = sum(symbol[0] == kind for symbol in self.symbols)
            return self.symbols.setdefault(match.group(), f"{kind}{count}")

        return re.sub(r"\b([su])\d+\b", number, text)


def _sections(graph: Graph) -> Iterable[tuple[str, list[Node]]]:
    """Calls that follow each other and come from one module."""
    path, nodes = "", list[Node]()
    for node in graph.nodes:
        if node.op in {"placeholder", "get_attr", "output"}:
            continue
        if nodes and _module_path(node) != path:
            yield path, nodes
            nodes = []
        path = _module_path(node)
        nodes.append(node)
    if nodes:
        yield path, nodes


def _module_path(node: Node) -> str:
    if "nn_module_stack" in node.meta:
        path = stack_path(node)
    else:  # a node of the backward pass names the modules of the forward pass
        stack = node.meta.get("fwd_nn_module_stack") or {}
        path = next((str(module[0]) for module in reversed(stack.values())), "")
    return clean_path(path) if path.startswith(("L[", "G[")) else path


def _value(node: Node) -> Any:
    return node.meta.get("val", node.meta.get("example_value"))


def _fields(graph: Graph, returned: Any) -> dict[str, Any] | None:
    """What is returned, by the fields of the model's output object; None where it returns a tensor or a tuple."""
    info = getattr(graph._codegen, "pytree_info", None)
    leaves = pytree.tree_leaves(returned)
    if info is None or info.out_spec is None or info.out_spec.num_leaves != len(leaves):
        return None
    outputs = pytree.tree_unflatten(leaves, info.out_spec)
    return dict(outputs) if isinstance(outputs, Mapping) else None


def _target_text(target: Any) -> str:
    if isinstance(target, OpOverload):
        return str(target).removesuffix(".default")
    if isinstance(target, HigherOrderOperator):
        return str(target.name())
    module = getattr(target, "__module__", None) or ""
    return f"{module}.{getattr(target, '__qualname__', target)}".lstrip(".")


def _path_text(name: str, root: str = "self") -> str:
    """``layers.0.fc`` as Python writes it: ``self.layers[0].fc``."""
    parts = [f"[{part}]" if part.isdigit() else f".{part}" for part in name.split(".")]
    return f"{root}{''.join(parts)}".lstrip(".")


def _dtype(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    for long, short in (("bfloat", "bf"), ("float", "f"), ("uint", "u"), ("int", "i"), ("complex", "c")):
        if name.startswith(long):
            return short + name.removeprefix(long)
    return name


def _with_comment(code: str, comment: str, indent: int = 0) -> str:
    line = " " * indent + code
    return f"{line:<{_COMMENTS_AT}}  # {comment}" if comment else line
