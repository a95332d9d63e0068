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
from fxsparse.analysis.axes import losses
from fxsparse.analysis.expert_channels import ExpertMLP
from fxsparse.analysis.experts import Mixture
from fxsparse.analysis.probing import between, shape_of
from fxsparse.analysis.sections import Section
from fxsparse.analysis.structures import MLP
from fxsparse.errors import RewriteError
from fxsparse.graph import Linear, traits
from fxsparse.graph.resize import CannotResize, DoesNotFit, Losses, Patches, patches_for, resize

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

    What lies between the two, a norm perhaps, is run on zeros and must give zeros.

    Raises:
        RewriteError: the linear's result is not added to anything, or zeros do not stay zeros on the way.
    """
    reached, pending = {linear.node}, [linear.node]
    for node in pending:  # in order of execution, until a sum takes all of them in
        for user in sorted(node.users):
            if user not in reached and _has_tensor(user):
                reached.add(user)
                pending.append(user)
    for total in sorted(reached):
        term, stream = _terms(total, reached)
        if term is None or stream is None:
            continue
        inside = {linear.node, *between({linear.node}, [term])}
        readers = {user for node in inside for user in node.users if _has_tensor(user) or user.op == "output"}
        if readers - inside - {total}:
            raise RewriteError("its result is read more than once, so it cannot be taken out", site=site)
        section = Section({linear.node: ()}, [term], 0)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            result = section.run({linear.node: torch.zeros(section.shape(linear.node))}, {})[term]
        if bool(result.ne(0).any()):
            raise RewriteError(
                "what is done to its result makes something of zeros, so it cannot be taken out", site=site
            )
        fx.replace(total, stream)
        return
    raise RewriteError("its result goes into no sum with its stream", site=site)


def _has_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (Tensor, tuple, list))


def _terms(node: Node, reached: set[Node]) -> tuple[Node | None, Node | None]:
    """Of a sum, the term that was reached and the one, of the sum's shape, that was not; None for any other node."""
    if node.target not in (aten.add.Tensor, aten.add_.Tensor):
        return None, None
    terms = [term for term in node.args[:2] if isinstance(term, Node)]
    term = next((term for term in terms if term in reached), None)
    stream = next((other for other in terms if other not in reached and shape_of(other) == shape_of(node)), None)
    return term, stream


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
