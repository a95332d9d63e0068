"""Taking units out of a graph: smaller weights, and the constants of views that follow from them.

Which axis of which node shrinks is probed (`fxsparse.analysis.axes`). The sizes that calls write down follow
(`fxsparse.graph.resize`), and anything that does not fit raises. Heads are in `slice_heads`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.analysis.axes import losses
from fxsparse.analysis.probing import shape_of
from fxsparse.analysis.structures import MLP
from fxsparse.errors import RewriteError
from fxsparse.graph import Linear, traits
from fxsparse.graph.resize import CannotResize, DoesNotFit, Losses, patches_for, resize

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
        resize(gm, patches_for(lost), changed)
    except DoesNotFit as error:
        raise RewriteError(f"does not fit smaller sizes at {error.node.name}: {error.reason}", site=site) from error
    except CannotResize as error:
        raise RewriteError(str(error), site=site) from error


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
        keeps = traits.keeps_zero(user)
        if keeps != "any" and not (keeps == "first" and user.args[0] is node):
            raise RewriteError(f"its result goes into {user.target}, not into a sum with its stream", site=site)
        node = user


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
    _replace_parameter(gm, linear.weight, 1 - axis if linear.transposed else axis, index)
    if axis == 1 or linear.bias is None:
        return [linear.weight]
    bias = fx.read_of(linear.bias)
    if bias.op != "get_attr" or len(bias.users) != 1:
        raise RewriteError("its bias is computed or shared, so its rows cannot be taken out", site=linear.path)
    _replace_parameter(gm, bias, 0, index)
    return [linear.weight, bias]


def _replace_parameter(gm: GraphModule, read: Node, axis: int, index: Tensor) -> None:
    old = gm.get_parameter(str(read.target))
    new = old.detach().index_select(axis, index.to(old.device))
    reads = fx.reads(gm)[id(old)]
    fx.set_parameter(gm, str(read.target), new, requires_grad=old.requires_grad)
    for each in reads:
        each.meta = {**each.meta, "val": fx.fake_mode(gm).from_tensor(new, static_shapes=True)}
