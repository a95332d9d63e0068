"""Taking heads and channels out of a graph: smaller weights, and the constants of views that follow from them.

Which axis of which node shrinks is probed (`fxsparse.analysis.axes`), from the projections to attention and from
attention to its output apart, because keys and queries lose different heads. The sizes that calls write down follow
(`fxsparse.graph.resize`), and anything that does not fit raises.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.analysis.axes import losses
from fxsparse.analysis.probing import shape_of
from fxsparse.analysis.structures import MLP, Attention
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
    _require_own_weights(gm, [*(rows.linear for rows in mlp.projections), mlp.output.linear], mlp.path)
    removed = {rows.linear.node: rows.index[~keep].flatten() for rows in mlp.projections}
    lost = losses(removed, [mlp.output.linear.input])
    changed = _take(gm, mlp.output.linear, 1, mlp.output.index[~keep])
    for rows in mlp.projections:
        changed += _take(gm, rows.linear, 0, rows.index[~keep])
    follow(gm, lost, changed, mlp.path)


def slice_attention(gm: GraphModule, attention: Attention, keep: Tensor) -> None:
    """Leaves some heads of an attention; keys and values stay that a kept head reads.

    Args and errors as for :func:`slice_mlp`; ``keep`` is bool ``[heads]``.
    """
    output = attention.output.linear
    _require_own_weights(gm, [*(rows.linear for rows in attention.projections), output], attention.path)
    sdpa = attention.sdpa
    key_of_head = _undo_choice_of_keys(gm, sdpa)
    kept_groups = keep.view(attention.kv_heads, -1).any(1)
    removed: dict[Node, list[Tensor]] = {}
    for rows in attention.projections:
        gone = rows.index[~(keep if rows.kind == "query" else kept_groups)]
        removed.setdefault(rows.linear.node, []).append(gone.flatten())
    rows_gone = {node: torch.cat(parts) for node, parts in removed.items()}
    keys = shape_of(attention.operands[1])[1]
    lost = {
        **losses(rows_gone, attention.operands),
        **losses({sdpa: (~keep).nonzero().flatten()}, [output.input], axis=1),
    }
    changed = _take(gm, output, 1, attention.output.index[~keep])
    for linear in {rows.linear.node: rows.linear for rows in attention.projections}.values():
        changed += _take(gm, linear, 0, rows_gone[linear.node])
    if attention.heads > attention.kv_heads:
        changed += _match_keys(gm, sdpa, keep, kept_groups, keys, key_of_head, attention.path)
    changed += _slice_mask(gm, attention, keep)
    follow(gm, lost, changed, attention.path)


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


def _require_own_weights(gm: GraphModule, linears: Iterable[Linear], site: str) -> None:
    names = fx.parameter_names(gm)
    for linear in linears:
        reads = [user for node in fx.reads(gm).get(id(gm.get_parameter(linear.name)), ()) for user in node.users]
        if len(reads) != 1 or len(names[id(gm.get_parameter(linear.name))]) != 1:
            raise RewriteError(f"{linear.name} is shared: what else reads it would lose parts too", site=site)


def _take(gm: GraphModule, linear: Linear, axis: int, removed: Tensor) -> list[Node]:
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
    fx.set_parameter(gm, str(read.target), new, requires_grad=old.requires_grad)
    read.meta = {**read.meta, "val": fx.fake_mode(gm).from_tensor(new, static_shapes=True)}


# --- keys, masks ------------------------------------------------------------------------------------------------------


def _undo_choice_of_keys(gm: GraphModule, sdpa: Node) -> Tensor | None:
    """Lets attention read keys and values as they are before an earlier slicing chose one for every head; gives which
    it had chosen, int64 ``[heads]``."""
    chosen = list(sdpa.args[1:3])
    if any(not isinstance(node, Node) or node.target is not aten.index_select.default for node in chosen):
        return None
    index: Any = chosen[0].args[2]  # type: ignore[union-attr]
    if index.op != "get_attr":
        return None
    sdpa.args = (sdpa.args[0], *(node.args[0] for node in chosen), *sdpa.args[3:])  # type: ignore[union-attr]
    fx.eliminate_dead_code(gm)
    held: Tensor = fx.attribute(gm, str(index.target))
    return held.cpu()


def _match_keys(
    gm: GraphModule,
    sdpa: Node,
    keep: Tensor,
    kept_groups: Tensor,
    keys: int,
    key_of_head: Tensor | None,
    site: str,
) -> list[Node]:
    """Gives every kept query head its key and value where groups lost different numbers of heads.

    Args:
        keys: heads of keys and values before any of them goes: one for each group, or one for each head.
        key_of_head: which of them each query head reads, where that was chosen before.
    """
    groups, shared = len(kept_groups), len(keep) // len(kept_groups)
    each = keys // groups
    heads = torch.arange(len(keep))
    read = (heads if each > 1 else heads // shared) if key_of_head is None else key_of_head
    position = (kept_groups.cumsum(0) - 1)[read // each] * each + read % each
    position = position[keep]
    sizes = keep.view(groups, shared).sum(1)[kept_groups]
    is_even = len(sizes.unique()) == 1 and (each == 1 or int(sizes[0]) == shared)
    if is_even and key_of_head is None:
        return []
    index = fx.insert_buffer(gm, f"{site.replace('.', '_')}_key_of_head", position, before=sdpa)
    args: list[Any] = list(sdpa.args)
    for place in (1, 2):
        args[place] = fx.insert_call(gm, aten.index_select.default, (args[place], 1, index), like=sdpa)
    sdpa.args = tuple(args)
    sdpa.kwargs = {name: item for name, item in sdpa.kwargs.items() if name != "enable_gqa"}
    return args[1:3]


def _slice_mask(gm: GraphModule, attention: Attention, keep: Tensor) -> list[Node]:
    """A mask with an axis of heads loses those that go, at this attention and nowhere else."""
    mask, sdpa = attention.mask_of_heads, attention.sdpa
    if mask is None:
        return []
    index = fx.insert_buffer(gm, f"{sdpa.name}_mask_heads", keep.nonzero().flatten(), before=sdpa)
    chosen = fx.insert_call(gm, aten.index_select.default, (mask, len(shape_of(mask)) - 3, index), like=sdpa)
    sdpa.replace_input_with(mask, chosen)
    return [chosen]
