"""The weights of a graph that are held in another form, and the modules that take them over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.conversion.depth import Shortened, renumber
from fxsparse.errors import RewriteError
from fxsparse.graph import live
from fxsparse.modules.held import PARTS, Form, Held
from fxsparse.modules.linears import Product
from fxsparse.modules.spec import linear_kind, place
from fxsparse.passes.nm.branch import Branch
from fxsparse.passes.nm.sparse_linear import SparseLinear, sparse_linears


@dataclass(frozen=True)
class Weight:
    """A weight of the graph that modules hold.

    Attributes:
        form: its form.
        names: all its names in the original.
        source: the name that its tensors stand under in the graph.
        called: the paths of the modules whose code computes its products.
    """

    form: Form
    names: tuple[str, ...]
    source: str
    called: frozenset[str]


def weights_of(gm: GraphModule) -> list[Weight]:
    """The weights that modules must hold in another form."""
    held = _held(gm)
    return [*held, *_beside_branches(gm, {weight.source for weight in held})]


def _held(gm: GraphModule) -> list[Weight]:
    """The N:M weights that the graph reads."""
    tensors = fx.tensors_of(gm)
    calls: dict[str, list[SparseLinear]] = {}
    for linear in sparse_linears(gm):
        calls.setdefault(linear.name, []).append(linear)
    weights: list[Weight] = []
    for name, linears in calls.items():
        first, held = linears[0], linears[0].held
        down = tensors.get(f"{name}_down")
        form = Form(
            name,
            held.storage,
            first.out_features,
            first.in_features,
            first.pattern.n,
            first.pattern.m,
            held.transposed,
            straight_through=bool(first["straight_through"]),
            rank=0 if down is None else int(down.shape[0]),
            started=first.has_branch,
            experts=held.experts,
        )
        called = frozenset(fx.stack_path(linear.node) for linear in linears)
        weights.append(Weight(form, held.names, name, called))
    return weights


def _beside_branches(gm: GraphModule, sparse: set[str]) -> Iterable[Weight]:
    """The dense weights with a low-rank branch."""
    tensors, reads = fx.tensors_of(gm), {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    branches = {branch.weight for branch in live.sites(gm, Branch)} - sparse
    for linear in fx.linears(gm):
        if linear.name not in branches:
            continue
        form = Form(
            linear.name,
            "dense",
            linear.out_features,
            linear.in_features,
            transposed=linear.transposed,
            rank=int(tensors[f"{linear.name}_down"].shape[0]),
            started=f"{linear.name}_down" in reads,
        )
        mine = f"{linear.path}.weight".lstrip(".")
        name = mine if tensors.get(mine) is tensors[linear.name] else linear.name
        yield Weight(form, (name,), linear.name, frozenset([fx.stack_path(linear.node)]))


def hold(module: nn.Module, gm: GraphModule, weight: Weight, shortened: Shortened) -> nn.Module:
    """Lets the modules that own a weight hold it in its form; returns the root, which may be replaced itself."""
    form, tensors = weight.form, fx.tensors_of(gm)
    for name in weight.names:
        path, _, leaf = renumber(name, shortened).rpartition(".")
        owner = module.get_submodule(path)
        if isinstance(owner, Held) and leaf in owner.forms:
            continue  # one module at several paths
        parts = {f"{leaf}_{part}": tensors.get(f"{weight.source}_{part}") for part in PARTS}
        held: dict[str, Tensor | None] = {key: tensor for key, tensor in parts.items() if tensor is not None}
        if form.storage != "compressed":
            held[leaf] = tensors[weight.source]
        site = fx.weight_site(name) if form.experts else fx.module_path(name)
        _check_reader(weight, site, linear_kind(owner, leaf, form), held)
        module = place(module, owner, leaf, form, held)
    return module


def _check_reader(weight: Weight, path: str, kind: type[Product] | None, held: Mapping[str, Any]) -> None:
    """A weight may be read by code that multiplies by it itself only if its dense values say everything, and that code
    gets them: a linear with a mask or a branch has its dense parameter as its weight."""
    if kind is not None and path in weight.called:
        return
    readers = ", ".join(sorted(weight.called)) or path
    masked = kind is not None and weight.form.storage != "compressed"
    if masked or any(name.endswith("_column_mask") for name in held):
        part = "a mask or branch beside a dense weight" if masked else "a second pruning for the gradient of its input"
        raise RewriteError(
            f"the code of {readers} multiplies by this weight itself, where {part} cannot take part; leave it out "
            f"(nm-masks{{exclude=[{path!r}]}}, low-rank{{layers=[...]}}) or keep the graph form",
            pass_name="double-prune" if not masked else "nm-masks" if weight.form.m else "low-rank",
            site=path,
        )
