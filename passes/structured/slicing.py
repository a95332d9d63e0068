"""Taking heads and channels out of a graph: smaller weights, and the constants of views that follow from them.

Which axis of which node shrinks is probed: change exactly what is removed, and an axis on which some indices change and
others do not is one that loses those. Sizes written in views, reshapes, expansions and splits are patched there, fake
values are propagated anew with the original symbols, and anything that does not fit raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.analysis.probing import between, evaluate, shape_of
from fxsparse.analysis.structures import MLP, Attention, Rows
from fxsparse.errors import RewriteError
from fxsparse.graph import Linear

aten = torch.ops.aten

_DRAWS = 4
_SIZED = {aten.view.default: 1, aten.reshape.default: 1, aten.expand.default: 1, aten._unsafe_view.default: 1}
_DEFAULTS = (None, None, None, None, 0.0, False)  # query, key, value, attn_mask, dropout_p, is_causal


def slice_mlp(gm: GraphModule, mlp: MLP, keep: Tensor) -> None:
    """Leaves some channels of an MLP.

    Args:
        gm: the graph; weights are replaced, never written to.
        mlp: of `fxsparse.analysis.structures`, found in ``gm`` as it is.
        keep: bool ``[channels]``, at least one.

    Raises:
        RewriteError: a weight serves something else too, or a constant of the graph does not follow.
    """
    _require_own_weights(gm, [*(rows.linear for rows in mlp.projections), mlp.output.linear], mlp.path)
    removed = {rows.linear.node: rows.index[~keep].flatten() for rows in mlp.projections}
    edits = _shrinking(removed, [mlp.output.linear.input])
    for rows in mlp.projections:
        _take(gm, rows.linear, rows=_rest(rows.linear.out_features, rows.index[~keep]))
    _take(gm, mlp.output.linear, columns=_rest(mlp.output.linear.in_features, mlp.output.index[~keep]))
    _apply(gm, edits, mlp.path)


def slice_attention(gm: GraphModule, attention: Attention, keep: Tensor) -> None:
    """Leaves some heads of an attention; keys and values stay that a kept head reads.

    Args and errors as for :func:`slice_mlp`; ``keep`` is bool ``[heads]``.
    """
    output = attention.output.linear
    _require_own_weights(gm, [*(rows.linear for rows in attention.projections), output], attention.path)
    sdpa = attention.sdpa
    shared = attention.heads // attention.kv_heads
    kept_groups = keep.view(attention.kv_heads, shared).any(1)
    kept = {"query": keep, "key": kept_groups, "value": kept_groups}
    removed: dict[Node, Tensor] = {}
    for rows in attention.projections:
        gone = rows.index[~kept[rows.kind]].flatten()
        removed[rows.linear.node] = torch.cat([removed.get(rows.linear.node, gone[:0]), gone])
    operands = [arg for arg in sdpa.args[:3] if isinstance(arg, Node)]
    edits = _shrinking(removed, operands)
    before = shape_of(operands[1])[1]
    edits += _shrinking({sdpa: (~keep).nonzero().flatten()}, [output.input], axis=1)
    for linear in {rows.linear.node: rows.linear for rows in attention.projections}.values():
        _take(gm, linear, rows=_rest(linear.out_features, removed[linear.node]))
    _take(gm, output, columns=_rest(output.in_features, attention.output.index[~keep]))
    if shared > 1:
        _match_keys(gm, sdpa, keep, kept_groups, expanded=before == attention.heads, site=attention.path)
    _slice_mask(gm, sdpa, keep, attention.heads)
    _apply(gm, edits, attention.path)


def remove_result(gm: GraphModule, linear: Linear, site: str) -> None:
    """Takes out what a linear adds to a stream: the sum reads the stream alone.

    Raises:
        RewriteError: the linear's result is not added to anything.
    """
    node = linear.node
    while True:
        users = [user for user in node.users if isinstance(user.meta.get("val"), Tensor)]
        if len(users) != 1:
            raise RewriteError("its result is read more than once, so it cannot be taken out", site=site)
        (user,) = users
        if user.target in (aten.add.Tensor, aten.add_.Tensor):
            others = [arg for arg in user.args[:2] if arg is not node]
            if len(others) == 1 and isinstance(others[0], Node) and shape_of(others[0]) == shape_of(user):
                fx.replace(user, others[0])
                return
        if user.target not in _KEEPS_ZERO:
            raise RewriteError(f"its result goes into {user.target}, not into a sum with its stream", site=site)
        node = user


_KEEPS_ZERO = {
    *(aten.dropout.default, aten.mul.Tensor, aten.view.default, aten.reshape.default, aten.contiguous.default),
    *(aten.clone.default, aten.to.dtype, aten.div.Tensor, aten.transpose.int),
}


# --- weights ----------------------------------------------------------------------------------------------------------


def _rest(size: int, removed: Tensor) -> Tensor:
    kept = torch.ones(size, dtype=torch.bool)
    kept[removed.flatten()] = False
    return kept.nonzero().flatten()


def _require_own_weights(gm: GraphModule, linears: Iterable[Linear], site: str) -> None:
    names = fx.parameter_names(gm)
    for linear in linears:
        reads = [user for node in fx.reads(gm).get(id(gm.get_parameter(linear.name)), ()) for user in node.users]
        if len(reads) != 1 or len(names[id(gm.get_parameter(linear.name))]) != 1:
            raise RewriteError(f"{linear.name} is shared: what else reads it would lose parts too", site=site)


def _take(gm: GraphModule, linear: Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Leaves some rows or columns of a linear's weight, and of its bias."""
    axis = 0 if rows is not None else 1
    index = rows if rows is not None else columns
    assert index is not None
    _replace_parameter(gm, linear.weight, 1 - axis if linear.transposed else axis, index)
    bias = linear.bias
    if rows is not None and bias is not None:
        bias = fx.read_of(bias)
        if bias.op != "get_attr" or len(bias.users) != 1:
            raise RewriteError("its bias is computed or shared, so its rows cannot be taken out", site=linear.path)
        _replace_parameter(gm, bias, 0, index)


def _replace_parameter(gm: GraphModule, read: Node, axis: int, index: Tensor) -> None:
    old = gm.get_parameter(str(read.target))
    new = old.detach().index_select(axis, index.to(old.device))
    fx.set_parameter(gm, str(read.target), new, requires_grad=old.requires_grad)
    read.meta = {**read.meta, "val": fx.fake_mode(gm).from_tensor(new, static_shapes=True)}


# --- keys, masks ------------------------------------------------------------------------------------------------------


def _match_keys(gm: GraphModule, sdpa: Node, keep: Tensor, kept_groups: Tensor, *, expanded: bool, site: str) -> None:
    """Gives every kept query head its key and value where groups lost different numbers of heads."""
    groups, shared = len(kept_groups), len(keep) // len(kept_groups)
    sizes = keep.view(groups, shared).sum(1)[kept_groups]
    if len(sizes.unique()) == 1 and (not expanded or int(sizes[0]) == shared):
        return
    if expanded:  # keys of all heads of the kept groups are there: leave out those whose query is gone
        position = keep.view(groups, shared)[kept_groups].flatten().nonzero().flatten()
    else:
        order = torch.arange(groups)[kept_groups].repeat_interleave(sizes)
        position = torch.searchsorted(kept_groups.nonzero().flatten(), order)
    name = f"{site.replace('.', '_')}_key_of_head"
    fx.set_buffer(gm, name, position.to(_device(gm)))
    index = fx.insert_attribute(gm, name, before=sdpa)
    args: list[Any] = list(sdpa.args)
    for place in (1, 2):
        with gm.graph.inserting_before(sdpa):
            chosen = gm.graph.call_function(aten.index_select.default, (args[place], 1, index))
        chosen.meta = dict(args[place].meta)
        args[place] = chosen
    sdpa.args = tuple(args)
    sdpa.kwargs = {name: item for name, item in sdpa.kwargs.items() if name != "enable_gqa"}


def _slice_mask(gm: GraphModule, sdpa: Node, keep: Tensor, heads: int) -> None:
    """A mask with an axis of heads loses those that go, at this attention and nowhere else."""
    mask = sdpa.args[3] if len(sdpa.args) > 3 else sdpa.kwargs.get("attn_mask")
    if not isinstance(mask, Node) or len(shape_of(mask)) < 3 or shape_of(mask)[-3] != heads or heads == 1:
        return
    name = f"{sdpa.name}_mask_heads"
    fx.set_buffer(gm, name, keep.nonzero().flatten().to(_device(gm)))
    index = fx.insert_attribute(gm, name, before=sdpa)
    with gm.graph.inserting_before(sdpa):
        chosen = gm.graph.call_function(aten.index_select.default, (mask, len(shape_of(mask)) - 3, index))
    chosen.meta = dict(mask.meta)
    sdpa.replace_input_with(mask, chosen)


def _device(gm: GraphModule) -> torch.device:
    return next((parameter.device for parameter in gm.parameters()), torch.device("cpu"))


# --- constants --------------------------------------------------------------------------------------------------------

_Edit = tuple[Node, Any]
"""A node and, for each of its results, the sizes that axes shrink to: ``[{axis: size}, ...]``, with what of the input
stays along each axis."""


def _shrinking(removed: Mapping[Node, Tensor], targets: Sequence[Node], axis: int = -1) -> list[_Edit]:
    """The nodes between some sources and targets whose axes shrink when parts of the sources go."""
    removed = {source: index for source, index in removed.items() if len(index)}
    path = [node for node in between(set(removed), targets) if node not in removed]
    if not removed or not path:
        return []
    stand_ins: dict[Node, Any] = {}
    changed: dict[Node, list[list[Tensor]]] = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for _ in range(_DRAWS):
            first = {source: torch.randn(shape_of(source)) for source in removed}
            second = {}
            for source, index in removed.items():
                other = first[source].clone()
                other.index_copy_(axis % other.dim(), index, torch.randn_like(other.index_select(axis, index)))
                second[source] = other
            runs = [evaluate(path, given, stand_ins) for given in (first, second)]
            for node in [*removed, *path]:
                marks = [_changed(a, b) for a, b in zip(*(_results(run[node]) for run in runs), strict=True)]
                if node in changed:
                    marks = [
                        [m | n for m, n in zip(mine, its, strict=True)]
                        for mine, its in zip(marks, changed[node], strict=True)
                    ]
                changed[node] = marks
    return [(node, ([_kept(axes) for axes in changed[node]], changed)) for node in path]


def _results(value: Any) -> list[Tensor]:
    if isinstance(value, (tuple, list)):
        return [item for item in value if isinstance(item, Tensor)]
    return [value] if isinstance(value, Tensor) else []


def _changed(a: Tensor, b: Tensor) -> list[Tensor]:
    """For every axis, which of its indices hold a change."""
    differs = a.ne(b) & ~(a.isnan() & b.isnan()) if a.is_floating_point() else a.ne(b)
    return [differs.movedim(axis, 0).flatten(1).any(1) if a.dim() > 1 else differs for axis in range(a.dim())]


def _kept(axes: list[Tensor]) -> dict[int, Tensor]:
    """The axes that lose some indices, each with those that stay."""
    return {axis: ~mark for axis, mark in enumerate(axes) if bool(mark.any()) and not bool(mark.all())}


def _apply(gm: GraphModule, edits: list[_Edit], site: str) -> None:
    """Patches the sizes that nodes write down, and propagates fake values to all that changed."""
    for node, (results, changed) in edits:
        _patch(node, results, changed)
    propagate(gm, site)


def propagate(gm: GraphModule, site: str) -> None:
    """Computes the fake values of a graph anew, from those of its inputs, parameters and buffers.

    Raises:
        RewriteError: sizes do not fit, or would for some batch sizes only.
    """
    guards = _guards(gm)
    dirty: set[Node] = set()
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            dirty.add(node)
        elif node.op == "call_function" and any(source in dirty for source in node.all_input_nodes):
            before = node.meta.get("val")
            try:
                with fx.fake_mode(gm), enable_python_dispatcher(), torch.no_grad():
                    after = node.target(*_example(gm, node.args), **_example(gm, node.kwargs))
            except Exception as error:
                raise RewriteError(f"does not fit smaller sizes at {node.name}: {error}", site=site) from error
            if not _same_shape(before, after):
                node.meta = {**node.meta, "val": after}
                dirty.add(node)
    if _guards(gm) != guards:
        raise RewriteError("smaller sizes would hold for some batch sizes only: a constant was missed", site=site)


def patch_sizes(node: Node, kept: dict[int, Tensor]) -> None:
    """Patches what a call writes down of its result's sizes: bool masks of what stays of the axes that shrink."""
    if node.target in (aten.layer_norm.default, aten.rms_norm.default):
        node.args = (node.args[0], [int(mask.sum()) for mask in kept.values()], *node.args[2:])
    else:
        _patch(node, [kept], {})


def _patch(node: Node, results: list[dict[int, Tensor]], changed: Mapping[Node, Any]) -> None:
    target = node.target
    args: list[Any] = list(node.args)
    if target in _SIZED:
        sizes = list(args[1])
        for axis, kept in results[0].items():
            if isinstance(sizes[axis], int) and sizes[axis] != -1:
                sizes[axis] = int(kept.sum())
        args[1] = sizes
    elif target is aten.unflatten.int:
        dim, sizes = int(args[1]), list(args[2])
        dim = dim % (len(shape_of(node)) - len(sizes) + 1)
        for axis, kept in results[0].items():
            if dim <= axis < dim + len(sizes) and isinstance(sizes[axis - dim], int) and sizes[axis - dim] != -1:
                sizes[axis - dim] = int(kept.sum())
        args[2] = sizes
    elif target is aten.split_with_sizes.default:
        dim = int(args[2]) if len(args) > 2 else 0
        sizes = list(args[1])
        for part, axes in enumerate(results):
            for axis, kept in axes.items():
                if axis == dim % len(fx.value(node)[part].shape):
                    sizes[part] = int(kept.sum())
        args[1] = sizes
    elif target is aten.split.Tensor:
        dim = int(args[2]) if len(args) > 2 else 0
        for axis, kept in results[0].items():
            if axis == dim % len(fx.value(node)[0].shape):
                args[1] = int(kept.sum())
    elif target is aten.slice.Tensor and isinstance(node.args[0], Node):
        given: list[Any] = [*args[1:], *(0, 0, 2**63 - 1, 1)[len(args) - 1 :]]
        dim, start, end, step = given
        source = changed.get(node.args[0])
        left = None if source is None else _kept(source[0]).get(int(dim) % len(source[0]))
        if left is not None and step == 1:
            bounds = [_bound(place, len(left)) for place in (start, end)]
            args[1:] = [dim, int(left[: bounds[0]].sum()), int(left[: bounds[1]].sum())]
    node.args = tuple(args)


def _bound(place: Any, size: int) -> int:
    place = 0 if place is None else int(place)
    return max(0, min(size, place + size if place < 0 else place))


def _example(gm: GraphModule, arg: Any) -> Any:
    def value(node: Node) -> Any:
        found = node.meta.get("val")
        if found is None and node.op == "get_attr":
            found = fx.attribute(gm, str(node.target))
        return False if found is None else found  # a flag or a probability of training

    return torch.fx.map_arg(arg, value)


def _same_shape(before: Any, after: Any) -> bool:
    def shapes(value: Any) -> Any:
        return [tuple(map(str, item.shape)) for item in _results(value)]

    return bool(shapes(before) == shapes(after))


def _guards(gm: GraphModule) -> int:
    """How many equalities of sizes hold by assumption; that there is more than one group, say, restricts nothing."""
    environment = fx.fake_mode(gm).shape_env
    return sum(isinstance(guard.expr, sympy.Eq) for guard in environment.guards) if environment is not None else 0


def rows_of_kind(attention: Attention, kind: str) -> Rows:
    """The rows of an attention's queries, keys or values."""
    return next(rows for rows in attention.projections if rows.kind == kind)
