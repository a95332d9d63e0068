"""Taking units out of a graph: smaller weights, and the constants of views that follow from them.

Which axis of which node shrinks is probed (`fxsparse.analysis.axes`). The sizes that calls write down follow
(`fxsparse.graph.resize`), and anything that does not fit raises. Heads are in `slice_heads`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.analysis.added import Added, NotAdded, added
from fxsparse.analysis.axes import losses
from fxsparse.analysis.expert_channels import ExpertMLP
from fxsparse.analysis.experts import Mixture
from fxsparse.analysis.probing import between, shape_of
from fxsparse.analysis.structures import MLP
from fxsparse.errors import RewriteError
from fxsparse.graph import Linear, traits
from fxsparse.graph.resize import CannotResize, DoesNotFit, Losses, Patches, patches_for, resize
from fxsparse.tracing.views import has_sizes

aten = torch.ops.aten


def slice_mlp(gm: GraphModule, mlp: MLP, keep: Tensor) -> None:
    """Leaves some channels of an MLP.

    Args:
        gm: the graph; weights are replaced, never written to.
        mlp: of `fxsparse.analysis.structures`, found in ``gm`` as it is.
        keep: bool ``[channels]``, at least one.

    Raises:
        RewriteError: a weight serves something else too, or a constant of the graph does not follow.
    """
    require_own_weights(gm, [*(rows.linear for rows in mlp.projections), mlp.output.linear], mlp.path)
    removed = {rows.linear.node: rows.index[~keep].flatten() for rows in mlp.projections}
    lost = losses(removed, [mlp.output.linear.input])
    changed = take(gm, mlp.output.linear, 1, mlp.output.index[~keep])
    for rows in mlp.projections:
        changed += take(gm, rows.linear, 0, rows.index[~keep])
    follow(gm, lost, changed, mlp.path)


def drop_experts(gm: GraphModule, mixture: Mixture, keep: Tensor) -> None:
    """Leaves some experts of a mixture: their rows of the router, their matrices and the numbers of experts.

    Args:
        gm: the graph; weights are replaced, never written to.
        mixture: of `fxsparse.analysis.experts`, found in ``gm`` as it is.
        keep: bool ``[experts]``, as many at least as a row is routed to.

    Raises:
        RewriteError: too few are left, or a constant of the graph does not follow.
    """
    left = int(keep.sum())
    if left < mixture.chosen:
        raise RewriteError(f"{left} experts are left, and each row is routed to {mixture.chosen}", site=mixture.path)
    changed = take(gm, mixture.router, 0, (~keep).nonzero().flatten())
    for weight in mixture.weights:
        changed += _replace_state(gm, weight, 0, keep.nonzero().flatten())
    patches = {node: arguments(left) for node, arguments in mixture.counts.items()}
    _resize(gm, patches, changed, mixture.path)


def slice_expert_mlp(gm: GraphModule, mlp: ExpertMLP, keep: Tensor) -> None:
    """Leaves some channels of experts, the same of each; as :func:`slice_mlp`."""
    lost = losses({source: index[~keep].flatten() for source, index in mlp.sources}, [mlp.output.input])
    changed = _replace_state(gm, mlp.output.weight, mlp.columns, keep.nonzero().flatten())
    for read, dim, index in mlp.projections:
        rows = torch.ones(fx.value(read).shape[dim], dtype=torch.bool).index_fill(0, index[~keep].flatten(), False)
        changed += _replace_state(gm, read, dim, rows.nonzero().flatten())
    follow(gm, lost, changed, mlp.path)


def silence_channels(gm: GraphModule, mlp: ExpertMLP, idle: Tensor) -> None:
    """Gives channels of experts, bool ``[channels]``, weight 0 in what reads them."""
    name = mlp.output.name
    old = gm.get_parameter(name)
    index = idle.nonzero().flatten().to(old.device)
    if len(index):
        silent = old.detach().index_fill(mlp.columns, index, 0)
        fx.set_parameter(gm, name, silent, requires_grad=old.requires_grad)


def follow(gm: GraphModule, lost: Losses, changed: Iterable[Node], site: str) -> None:
    """Lets all sizes follow what is lost.

    Args:
        gm: the graph module, changed in place.
        lost: what its nodes lose.
        changed: nodes that were inserted, or have a new value.
        site: for messages.

    Raises:
        RewriteError: sizes do not fit, or would for some batch sizes only.
    """
    try:
        patches = patches_for(lost)
    except CannotResize as error:
        raise RewriteError(str(error), site=site) from error
    _resize(gm, patches, changed, site)


def _resize(gm: GraphModule, patches: Patches, changed: Iterable[Node], site: str) -> None:
    try:
        resize(gm, patches, changed)
    except DoesNotFit as error:
        raise RewriteError(f"does not fit smaller sizes at {error.node.name}: {error.reason}", site=site) from error
    except CannotResize as error:
        raise RewriteError(str(error), site=site) from error


def remove_result(gm: GraphModule, linear: Linear, site: str) -> None:
    """Takes out what a linear adds to a stream: the sum reads the stream alone.

    Raises:
        RewriteError: the linear's result is not added to anything, or something else reads it.
    """
    try:
        found = added(linear)
    except NotAdded as reason:
        raise RewriteError(str(reason), site=site) from reason
    _lend(found)
    fx.replace(found.total, found.stream)


def _lend(found: Added) -> None:
    """Lets what reads no more than a dtype or sizes of a term read those of its sum, so that the term can go."""
    for node in (found.node, *between({found.node}, [found.total])):
        for user in list(node.users):
            if node is not found.total and user.op == "call_function" and node not in traits.values_read(user):
                mine, other = fx.value(node), fx.value(found.stream)
                if isinstance(other, Tensor) and mine.dtype == other.dtype and has_sizes(mine, other):
                    user.replace_input_with(node, found.stream)


# --- weights ----------------------------------------------------------------------------------------------------------


def require_own_weights(gm: GraphModule, linears: Iterable[Linear], site: str) -> None:
    """Refuses weights that other calls read than those of ``linears``, or that have several names.

    Raises:
        RewriteError: names the weight.
    """
    names, calls = fx.parameter_names(gm), list(linears)
    for linear in calls:
        reads = [user for node in fx.reads(gm).get(id(gm.get_parameter(linear.name)), ()) for user in node.users]
        own = sum(other.name == linear.name for other in calls)
        if len(reads) != own or len(names[id(gm.get_parameter(linear.name))]) != 1:
            raise RewriteError(f"{linear.name} is shared: what else reads it would lose parts too", site=site)


def take(gm: GraphModule, linear: Linear, axis: int, removed: Tensor) -> list[Node]:
    """Takes some rows (axis 0) or columns (1) out of a linear's weight, and out of its bias; gives what changed."""
    size = linear.out_features if axis == 0 else linear.in_features
    index = torch.ones(size, dtype=torch.bool).index_fill(0, removed.flatten(), False).nonzero().flatten()
    changed = _replace_state(gm, linear.weight, 1 - axis if linear.transposed else axis, index)
    if axis == 1 or linear.bias is None:
        return changed
    return [*changed, *_take_bias(gm, fx.read_of(linear.bias), index, linear)]


def _take_bias(gm: GraphModule, bias: Node, index: Tensor, linear: Linear) -> list[Node]:
    """Leaves some positions of a bias: of what is read, of the parts that are joined to one, of zeros like one."""
    if bias.op == "get_attr":
        own = {other.node for other in fx.linears(gm) if other.name == linear.name}
        readers = {user for read in fx.reads(gm)[id(fx.attribute(gm, str(bias.target)))] for user in read.users}
        if any(user not in own and user.target is not aten.cat.default and not _is_like(user) for user in readers):
            raise RewriteError("its bias is shared, so its rows cannot be taken out", site=linear.path)
        return _replace_state(gm, bias, 0, index)
    if _is_like(bias):
        return []  # as long as what it is like
    if bias.target is aten.cat.default:
        changed, begin = [bias], 0
        for part in bias.args[0]:  # type: ignore[union-attr]
            end = begin + shape_of(part)[0]  # type: ignore[arg-type]
            inside = index[(index >= begin) & (index < end)] - begin
            changed += _take_bias(gm, part, inside, linear)  # type: ignore[arg-type]
            begin = end
        return changed
    rows = fx.insert_buffer(gm, f"{linear.node.name}_bias_rows", index, before=linear.node)
    chosen = fx.insert_call(gm, aten.index_select.default, (bias, 0, rows), like=linear.node)
    linear.node.replace_input_with(bias, chosen)
    return [chosen]


def _is_like(node: Node) -> bool:
    """Whether of another tensor a node reads sizes alone, as ``zeros_like`` does."""
    return bool(traits.of(node.target).shaped_like)


def _replace_state(gm: GraphModule, read: Node, axis: int, index: Tensor) -> list[Node]:
    """Leaves some positions of a parameter or buffer; gives the nodes that read it."""
    old, name = fx.attribute(gm, str(read.target)), str(read.target)
    reads = fx.reads(gm)[id(old)]
    new: Tensor = old.detach().index_select(axis, index.to(old.device))
    if isinstance(old, nn.Parameter):
        fx.set_parameter(gm, name, new, requires_grad=old.requires_grad)
    else:
        path, _, leaf = name.rpartition(".")
        gm.get_submodule(path)._buffers[leaf] = new
    for each in reads:
        each.meta = {**each.meta, "val": fx.fake_mode(gm).from_tensor(new, static_shapes=True)}
    return reads
