"""Functions as graphs: the operators that a few lines of torch run on the values of some nodes.

A function is traced by ``make_fx`` before dispatch, as ``torch.export`` traces a model, over the fake values of its
operands: sizes stay the graph's symbols, and dropout and random draws become nodes that draw when the graph runs. A
training flag is a Python bool to the function. It is traced once with the flag and once without, and the constants in
which the two graphs differ read the flag from the module, as `fxsparse.tracing.modes` does for whole models.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, free_unbacked_symbols
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxsparse.errors import RewriteError
from fxsparse.graph import traits
from fxsparse.graph.values import arguments, set_argument, value

_DATA_DEPENDENT = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)


@dataclass(frozen=True)
class Flag:
    """A training flag among the inputs of a function, by its full name, such as ``encoder.training``."""

    name: str


def function_graph(
    mode: FakeTensorMode, fn: Callable[..., Any], inputs: Sequence[Any], *, site: str
) -> tuple[Graph, pytree.TreeSpec]:
    """The graph of ``fn(*inputs)``.

    Args:
        mode: the fake mode that the values of nodes live in.
        fn: the function.
        inputs: nodes, flags and constants, in nested tuples, lists and dictionaries.
        site: module path that errors name.

    Returns:
        a graph with one placeholder for every node among the inputs, in their order, that returns a list; and how to
        unflatten the list into the result of ``fn``.

    Raises:
        RewriteError: ``fn`` reads the values of a tensor, fixes a symbolic size, uses a tensor that is not among its
            inputs, or runs other operators in training than in evaluation.
    """
    leaves, spec = pytree.tree_flatten(tuple(inputs))
    graph, structure = _trace(mode, fn, leaves, spec, off=None, site=site)
    for flag in dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, Flag)):
        without, _ = _trace(mode, fn, leaves, spec, off=flag, site=site)
        _bind(graph, without, flag, site)
    return graph, structure


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

    examples = [value(leaf) for leaf in leaves if isinstance(leaf, Node)]
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
