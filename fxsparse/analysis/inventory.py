"""What a graph has to offer to passes, counted without looking for structures: products with weights, and softmaxes
between products. What a pass says about its sites is compared with these counts, so that nothing is left out silently.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.graph import traits
from fxsparse.graph.record import Change, record_of, skipped
from fxsparse.graph.state import module_path

_PRODUCTS = ("linear", "matmul", "mm", "mv", "conv", "einsum", "bilinear", "dot")
_LAYOUTS = {"reshape", "permute", "broadcast", "slices", "select", "item"}


@dataclass(frozen=True)
class Weighted:
    """A weight that a graph multiplies by.

    Attributes:
        site: path of the module that applies it, or, of one that is not called a weight, its own name.
        kind: ``linear``, ``convolution``, ``experts`` (several matrices in one weight), or another ``product``.
        names: all of its names.
    """

    site: str
    kind: str
    names: frozenset[str]


def weighted(gm: GraphModule) -> list[Weighted]:
    """The weights of a graph, each once: parameters of two dimensions and more that a product reads, perhaps in
    another layout or converted, and what passes hold them as."""
    found: dict[str, Weighted] = {}
    names = fx.parameter_names(gm)
    originals = {f"{weight.name}_values": weight for weight in record_of(gm).weights}
    for read in gm.graph.find_nodes(op="get_attr"):
        held = fx.attribute(gm, str(read.target))
        if not isinstance(held, nn.Parameter) or held.dim() < 2:
            continue
        name = str(read.target)
        all_names = frozenset(names.get(id(held), [name]))
        if name in originals:
            name, all_names = originals[name].name, frozenset((*all_names, *originals[name].names))
        for user in _readers(read, held.dim() > 2):
            kind = _kind(user, held)
            if kind is not None:
                paths = {module_path(each) for each in all_names}
                path = fx.stack_path(user) if fx.stack_path(user) in paths else module_path(name)
                site = path if fx.weight_site(name) != name else name
                found.setdefault(site, Weighted(site, kind, all_names))
    return list(found.values())


def _readers(read: Node, experts: bool) -> Iterator[Node]:
    """What reads a tensor, also in another layout or converted, or some of its experts; of a table it is no weight."""
    layouts = _LAYOUTS | {"index"} if experts else _LAYOUTS
    pending = list(read.users)
    while pending:
        user = pending.pop()
        known = traits.of(user.target)
        if known.copies is not None or known.axes in layouts:
            pending += user.users
        else:
            yield user


def _kind(node: Node, weight: nn.Parameter) -> str | None:
    axes = traits.of(node.target).axes
    name = str(node.target).partition(".")[2].partition(".")[0]
    if axes == "convolution":
        return "convolution"
    if axes != "product" and not any(part in name for part in _PRODUCTS):
        return None
    if weight.dim() == 3 and weight.shape[0] > 1 and not ("einsum" in name and _sums_apart(str(node.args[0]))):
        return "experts"
    return "linear" if weight.dim() == 2 else "product"


def _sums_apart(equation: str) -> bool:
    """Whether no index is that of a matrix of its own, which both operands and the result of an einsum have."""
    terms = equation.replace("->", ",").replace("...", "").split(",")
    return not set.intersection(*(set(term.strip()) for term in terms))


def softmaxes(gm: GraphModule) -> list[Node]:
    """The softmaxes, fused attentions among them, whose result another product of activations reads."""
    softened = (node for node in gm.graph.nodes if traits.of(node.target).axes == "softmax")
    fused = [node for node in gm.graph.nodes if "scaled_dot_product" in str(node.target)]
    return [*(node for node in softened if any(map(_multiplies, _followers(node)))), *fused]


def _followers(node: Node) -> Iterator[Node]:
    """What reads a result, through operators that work on each element."""
    pending, seen = list(node.users), set()
    while pending:
        user = pending.pop()
        if user in seen:
            continue
        seen.add(user)
        known = traits.of(user.target)
        if known.axes == "pointwise" or known.axes in _LAYOUTS:
            pending += user.users
        else:
            yield user


def _multiplies(node: Node) -> bool:
    return any(part in str(node.target) for part in ("matmul", "bmm", "einsum"))


def unreported(changes: Iterable[Change], weights: Iterable[Weighted], reason: str) -> list[Change]:
    """A change, skipped with ``reason``, for every weight that none of ``changes`` names, nor a module it is in."""
    named: Any = [change.site for change in changes]
    return [
        skipped(weight.site, f"{reason} ({weight.kind})" if weight.kind != "linear" else reason)
        for weight in weights
        if not any(_covers(name, own) for name in named for own in (weight.site, *weight.names))
    ]


def _covers(site: str, name: str) -> bool:
    return not site or site == name or name.startswith(f"{site}.")
