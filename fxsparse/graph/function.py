"""Functions as graphs: the operators that a few lines of torch run on the values of some nodes.

A function is traced by ``make_fx`` before dispatch, as ``torch.export`` traces a model, over the fake values of its
operands: sizes stay the graph's symbols, and dropout and random draws become nodes that draw when the graph runs. A
training flag is a Python bool to the function. It is traced once with the flag and once without, and the constants in
which the two graphs differ read the flag from the module, as `fxsparse.tracing.modes` does for whole models.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, free_unbacked_symbols
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxsparse.errors import RewriteError
from fxsparse.graph import traits
from fxsparse.graph.function_key import Flag, key_of
from fxsparse.graph.values import arguments, set_argument, value

Traced = dict[tuple[Any, ...], tuple[Graph, pytree.TreeSpec, tuple[Flag, ...]]]
"""Graphs of functions, how to unflatten their results, and their flags, by `function_key.key_of`."""

_DATA_DEPENDENT = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)


def function_graph(
    mode: FakeTensorMode,
    fn: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    site: str,
    known: Traced | None = None,
) -> tuple[Graph, pytree.TreeSpec]:
    """The graph of ``fn(*inputs)``.

    Args:
        mode: the fake mode that the values of nodes live in.
        fn: the function.
        inputs: nodes, flags and constants, in nested tuples, lists and dictionaries.
        site: module path that errors name.
        known: graphs of earlier functions, and where this one is noted. A function that is the same as an earlier one
            (`function_key`) is not traced again; of its flags, the names may differ.

    Returns:
        a graph with one placeholder for every node among the inputs, in their order, that returns a list; and how to
        unflatten the list into the result of ``fn``.

    Raises:
        RewriteError: ``fn`` reads the values of a tensor, fixes a symbolic size, uses a tensor that is not among its
            inputs, or runs other operators in training than in evaluation.
    """
    leaves, spec = pytree.tree_flatten(tuple(inputs))
    flags = tuple(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, Flag)))
    key = key_of(fn, leaves) if known is not None else None
    if known is not None and key is not None:
        key = (mode, spec, *key)
        if key in known:
            graph, structure, names = known[key]
            return _renamed(graph, dict(zip(names, flags, strict=True))), structure
    graph, structure = _trace(mode, fn, leaves, spec, off=None, site=site)
    for flag in flags:
        without, _ = _trace(mode, fn, leaves, spec, off=flag, site=site)
        _bind(graph, without, flag, site)
    if known is not None and key is not None:
        known[key] = _renamed(graph, {}), structure, flags
    return graph, structure


def _renamed(graph: Graph, flags: Mapping[Flag, Flag]) -> Graph:
    """A copy of a graph that reads other training flags."""
    names = {flag.name: other.name for flag, other in flags.items()}
    copy = Graph()
    result = copy.graph_copy(graph, {})
    copy.output(result)
    for node in copy.find_nodes(op="get_attr"):
        node.target = names.get(str(node.target), node.target)
    return copy


def _trace(
    mode: FakeTensorMode,
    fn: Callable[..., Any],
    leaves: list[Any],
    spec: pytree.TreeSpec,
    *,
    off: Flag | None,
    site: str,
) -> tuple[Graph, pytree.TreeSpec]:
    """Traces ``fn`` with every flag set but ``off``."""
    structures: list[pytree.TreeSpec] = []

    def flat(*values: Any) -> list[Any]:
        operands = iter(values)
        filled = [
            next(operands) if isinstance(leaf, Node) else leaf != off if isinstance(leaf, Flag) else leaf
            for leaf in leaves
        ]
        results, structure = pytree.tree_flatten(fn(*pytree.tree_unflatten(filled, spec)))
        structures.append(structure)
        return results

    examples = _apart([leaf for leaf in leaves if isinstance(leaf, Node)])
    try:
        # Gradients are on, so that a no_grad inside fn switches back to them.
        with mode, enable_python_dispatcher(), torch.enable_grad(), _symbols_stay(mode, site):
            traced = make_fx(flat, pre_dispatch=True)(*examples)
    except _DATA_DEPENDENT as error:
        raise _reads_data(str(error).partition("\n")[0], site) from error
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            raise RewriteError(
                "the function uses a tensor that is not among its inputs; pass the name of the parameter or buffer",
                site=site,
            )
        if node.op == "call_function" and free_unbacked_symbols(node.meta.get("val")):
            raise _reads_data(f"{node.target} does", site)
    traced.graph.owning_module = None  # its reads are of the graph module it is copied into
    return traced.graph, structures[-1]


def _apart(nodes: Sequence[Node]) -> list[Any]:
    """The fake values of nodes, each with a tensor of its own: nodes of a graph that was traced once share theirs."""
    owners: dict[int, Node] = {}
    examples = []
    for node in nodes:
        example = value(node)
        if isinstance(example, Tensor) and owners.setdefault(id(example), node) is not node:
            example = example.detach().requires_grad_(example.requires_grad)
        examples.append(example)
    return examples


def _reads_data(reason: str, site: str) -> RewriteError:
    return RewriteError(
        f"the function reads the values of a tensor ({reason}), which a graph cannot follow; use torch.where in place "
        "of a branch",
        site=site,
    )


@contextlib.contextmanager
def _symbols_stay(mode: FakeTensorMode, site: str) -> Iterator[None]:
    """Refuses that tracing fixes a symbolic size, before the graph's shape environment notes it."""
    env: Any = mode.shape_env
    if env is None:
        yield
        return
    replace = env._set_replacement

    def checked(symbol: Any, size: Any, *reason: Any) -> None:
        if size.is_number:
            raise RewriteError(
                f"the function holds for the traced size {symbol} = {size} only; compute with x.shape, without int() "
                "and without comparing a size to a number",
                site=site,
            )
        replace(symbol, size, *reason)

    env._set_replacement = checked
    try:
        yield
    finally:
        del env._set_replacement


def _bind(graph: Graph, without: Graph, flag: Flag, site: str) -> None:
    """Lets the constants in which ``graph`` differs from the graph without a flag read the flag."""
    nodes, others = list(graph.nodes), list(without.nodes)
    if [node.target for node in nodes] != [node.target for node in others]:
        raise _modes_differ(flag, site)
    twins = dict(zip(nodes, others, strict=True))
    reads: list[Node] = []

    def read() -> Node:
        if not reads:
            first = next(node for node in nodes if node.op != "placeholder")
            with graph.inserting_before(first):
                reads.append(graph.create_node("get_attr", flag.name))
            reads[0].meta["val"] = True
        return reads[0]

    for node, other in twins.items():
        without_flag = _arguments(other)
        for name, with_flag in _arguments(node).items():
            if repr(map_arg(with_flag, twins.__getitem__)) == repr(without_flag[name]):
                continue
            if name == traits.of(node.target).shaped_like:  # torch 2.15 reads sizes from any tensor of the shape
                continue
            if with_flag is True and without_flag[name] is False:
                set_argument(node, name, read())
            elif isinstance(with_flag, float) and without_flag[name] == 0:  # the dropout probability of attention
                with graph.inserting_before(node):
                    product = graph.call_function(operator.mul, (with_flag, read()))
                product.meta["val"] = with_flag
                set_argument(node, name, product)
            else:
                raise _modes_differ(flag, site)


def _arguments(node: Node) -> dict[str, Any]:
    if hasattr(node.target, "_schema"):
        return arguments(node)
    return {str(place): arg for place, arg in enumerate(node.args)} | node.kwargs


def _modes_differ(flag: Flag, site: str) -> RewriteError:
    return RewriteError(
        f"the function runs other operators with {flag.name} than without; write evaluation + training * (training's "
        "result - evaluation's)",
        site=site,
    )
