"""Leaving units of a structure out of what a graph computes: heads of an attention, channels of an MLP.

The projections compute the rows of the units that take part and the output linear reads their columns, both through
``gather_linear``, so weights stay whole and which units take part is data. Between the two, sizes that were written
into the graph (of views, expansions, slices) shrink with their number. Which do is probed: one unit's rows are set to
NaN, and an axis of which some positions turn NaN altogether is an axis of units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.analysis.probing import between, evaluate, shape_of
from fxsparse.analysis.structures import MLP, Attention
from fxsparse.graph import Linear
from fxsparse.ops import gather_linear  # noqa: F401  registers gather_linear

aten = torch.ops.aten

_SIZED = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default}
_SPLITS = {aten.split_with_sizes.default, aten.split.sizes}


class CannotShrink(Exception):
    """Why a structure's units cannot be left out."""


@dataclass(frozen=True)
class Part:
    """The rows, or columns, of a weight that belong to units.

    Attributes:
        name: full name of the weight.
        bias: full name of the bias that goes with the rows.
        dim: of the parameter as it is stored.
        index: int64 ``[units, n]``.
        rest: int64, those of no unit, which always take part.
    """

    name: str
    bias: str | None
    dim: int
    index: Tensor
    rest: Tensor

    def of(self, units: Tensor) -> Tensor:
        """The positions, ascending, of chosen units and of what belongs to none."""
        own = self.index.to(units.device)[units].flatten()
        return torch.cat([own, self.rest.to(units.device)]).sort().values


@dataclass(frozen=True)
class Site:
    """A structure whose units can be left out.

    Attributes:
        path: module path.
        kind: ``heads`` or ``channels``.
        units: how many; under grouped queries a unit is a key head with its query heads.
        projections: rows of the linears that compute the units.
        output: columns of the linear that reads them.
        heads: int64 ``[units, query heads of a unit]``; empty for channels.
    """

    path: str
    kind: str
    units: int
    projections: tuple[Part, ...]
    output: Part
    heads: Tensor

    @property
    def key(self) -> str:
        """A name of its own, also where attention and MLP share a module."""
        return self.output.name

    @property
    def parts(self) -> tuple[Part, ...]:
        return (*self.projections, self.output)


def site_of(found: Attention | MLP) -> Site:
    """The units of a structure, without its nodes."""
    if isinstance(found, MLP):
        units, kind, heads = found.channels, "channels", torch.empty(found.channels, 0, dtype=torch.int64)
    else:
        units, kind, heads = found.kv_heads, "heads", torch.arange(found.heads).view(found.kv_heads, -1)
    rows: dict[Node, list[Tensor]] = {}
    linears: dict[Node, Linear] = {}
    for projection in found.projections:
        linears[projection.linear.node] = projection.linear
        rows.setdefault(projection.linear.node, []).append(projection.index.reshape(units, -1))
    projections = tuple(_part(linears[node], torch.cat(index, 1), is_rows=True) for node, index in rows.items())
    output = _part(found.output.linear, found.output.index.reshape(units, -1), is_rows=False)
    return Site(found.path, kind, units, projections, output, heads)


def _part(linear: Linear, index: Tensor, *, is_rows: bool) -> Part:
    size = linear.out_features if is_rows else linear.in_features
    owned = torch.zeros(size, dtype=torch.bool).index_fill(0, index.flatten(), True)
    bias = fx.read_of(linear.bias) if is_rows and linear.bias is not None else None
    if bias is not None and bias.op != "get_attr":
        raise CannotShrink(f"the bias of {linear.path} is computed")
    name = None if bias is None else str(bias.target)
    return Part(linear.name, name, int(is_rows == linear.transposed), index, (~owned).nonzero().flatten())


# --- names of what is registered beside a weight ----------------------------------------------------------------------


def rows_name(part: Part) -> str:
    return f"{part.name}_rows"


def columns_name(site: Site) -> str:
    return f"{site.output.name}_columns"


def heads_name(site: Site) -> str:
    return f"{site.output.name}_heads"


def magnitudes_name(site: Site) -> str:
    return f"{site.output.name}_magnitudes"


def batches_name(site: Site) -> str:
    return f"{site.output.name}_batches"


def selection(site: Site, units: Tensor) -> dict[str, Tensor]:
    """The index buffers that let ``units``, int64, take part, by name."""
    buffers = {rows_name(part): part.of(units) for part in site.projections}
    buffers[columns_name(site)] = site.output.of(units)
    if site.kind == "heads":
        buffers[heads_name(site)] = site.heads.to(units.device)[units].flatten().sort().values
    return buffers


# --- the graph --------------------------------------------------------------------------------------------------------


def shrink(gm: GraphModule, found: Attention | MLP, site: Site, kept: int, *, observe: bool, rescale: bool) -> None:
    """Lets ``kept`` of a structure's units take part, in place; the buffers of :func:`selection` must be registered.

    Args:
        gm: the graph module.
        found: the structure, in ``gm``'s graph.
        site: its units.
        kept: how many take part.
        observe: add the mean magnitude of what the output linear reads, column by column, to the buffer
            ``*_magnitudes`` and 1 to ``*_batches`` in every forward pass.
        rescale: multiply what the output linear reads by ``units / kept``.

    Raises:
        CannotShrink: a size between the linears does not follow from the number of units; ``gm`` is half edited then.
    """
    nodes = list({rows.linear.node: rows.linear for rows in found.projections}.values())
    path = between({linear.node for linear in nodes}, [found.output.linear.input])
    patches = _patches(path, nodes, site, site.units - kept)
    for node, arguments in patches.items():
        node.args = arguments
    for part, linear in zip(site.projections, nodes, strict=True):
        rows = fx.insert_attribute(gm, rows_name(part), before=linear.node)
        _gather(gm, linear, linear.input, rows, None)
    if isinstance(found, Attention):
        _select_mask(gm, found, site)
    for node in path:
        if node.op == "call_function":
            try:
                fx.refresh(gm, node)
            except Exception as error:
                reason = str(error).partition("\n")[0]
                raise CannotShrink(f"{node.name} cannot be made smaller: {reason}") from error
    output = found.output.linear
    source = output.input
    if rescale:
        source = fx.insert_call(gm, aten.mul.Tensor, (source, site.units / kept), like=output.node)
    columns = fx.insert_attribute(gm, columns_name(site), before=output.node)
    if shape_of(source)[-1] != len(fx.attribute(gm, columns_name(site))):
        raise CannotShrink(f"{source.name} did not become as small as the units that take part")
    if observe:
        _observe(gm, site, source, output.node)
    _gather(gm, output, source, None, columns)


def _gather(gm: GraphModule, linear: Linear, source: Node, rows: Node | None, columns: Node | None) -> None:
    node = linear.node
    is_linear = node.target is aten.linear.default
    weight = node.args[2] if node.target is aten.addmm.default else node.args[1]
    if not is_linear:
        weight = fx.insert_call(gm, aten.t.default, (weight,), like=node)
    args = (source, weight, rows, columns, linear.bias)
    fx.replace(node, fx.insert_call(gm, torch.ops.fxsparse.gather_linear.default, args, like=node))


def _observe(gm: GraphModule, site: Site, source: Node, before: Node) -> None:
    detached = fx.insert_call(gm, aten.detach.default, (source,), like=before)
    magnitude = fx.insert_call(gm, aten.abs.default, (detached,), like=before)
    dims = list(range(len(shape_of(source)) - 1))
    options = {"dtype": torch.float32}
    mean = fx.insert_call(gm, aten.mean.dim, (magnitude, dims), options, like=before)
    total = fx.insert_attribute(gm, magnitudes_name(site), before=before)
    fx.insert_call(gm, aten.add_.Tensor, (total, mean), like=before)
    batches = fx.insert_attribute(gm, batches_name(site), before=before)
    fx.insert_call(gm, aten.add_.Tensor, (batches, 1), like=before)


def _select_mask(gm: GraphModule, found: Attention, site: Site) -> None:
    """A mask with a head axis (T5's positions, ALiBi) loses the heads left out, at this attention only."""
    sdpa = found.sdpa
    mask: Any = sdpa.kwargs.get("attn_mask", sdpa.args[3] if len(sdpa.args) > 3 else None)
    if not isinstance(mask, Node) or len(shape_of(mask)) < 3 or shape_of(mask)[-3] == 1:
        return
    heads = fx.insert_attribute(gm, heads_name(site), before=sdpa)
    smaller = fx.insert_call(gm, aten.index_select.default, (mask, len(shape_of(mask)) - 3, heads), like=sdpa)
    if "attn_mask" in sdpa.kwargs:
        sdpa.update_kwarg("attn_mask", smaller)
    else:
        sdpa.update_arg(3, smaller)


# --- sizes ------------------------------------------------------------------------------------------------------------


def _patches(path: Sequence[Node], linears: Sequence[Linear], site: Site, omitted: int) -> dict[Node, tuple[Any, ...]]:
    """New arguments of the nodes whose sizes depend on the number of units, for ``omitted`` fewer."""
    first, last = (_patched(path, linears, site, unit, omitted) for unit in (0, site.units - 1))
    if first != last:
        node = next(node for node in path if first.get(node) != last.get(node))
        raise CannotShrink(f"{node.name} treats units differently")
    return first


def _patched(
    path: Sequence[Node], linears: Sequence[Linear], site: Site, unit: int, omitted: int
) -> dict[Node, tuple[Any, ...]]:
    given: dict[Node, Tensor] = {}
    for linear, part in zip(linears, site.projections, strict=True):
        drawn = torch.rand(shape_of(linear.node)) + 0.5
        given[linear.node] = drawn.index_fill_(-1, part.index[unit], torch.nan)
    with torch.no_grad():
        values = evaluate(path, given, {}) if path else dict(given)
    gone = {node: _gone(node, value) for node, value in values.items()}
    return {node: args for node in path if (args := _arguments(node, gone, omitted)) is not None}


_Gone = tuple[int, Tensor]  # an axis, and bool: which of its positions vanish with a unit


def _gone(node: Node, value: Any) -> _Gone | list[_Gone | None] | None:
    if isinstance(value, (tuple, list)):
        return [_gone(node, item) for item in value]  # type: ignore[misc]
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    nan = value.isnan()
    if not bool(nan.any()):
        return None
    for axis in range(nan.dim()):
        positions = nan.movedim(axis, 0).flatten(1).all(1)
        alone = positions.view([-1 if other == axis else 1 for other in range(nan.dim())])
        if not bool(positions.all()) and bool((alone == nan).all()):
            return axis, positions
    raise CannotShrink(f"{node.name} mixes units")


def _arguments(node: Node, gone: Mapping[Node, Any], omitted: int) -> tuple[Any, ...] | None:
    """The arguments of ``node`` with every written size of a vanishing axis made smaller; None where none is."""
    args: list[Any] = list(node.args)
    source = args[0] if args else None
    before = gone.get(source) if isinstance(source, Node) else None
    after = gone.get(node)
    if node.target in _SIZED and isinstance(after, tuple):
        args[1] = _smaller(args[1], after[0], after, omitted)
    elif node.target is aten.unflatten.int and isinstance(after, tuple):
        at = after[0] - args[1] % len(shape_of(source))  # type: ignore[arg-type]
        if 0 <= at < len(args[2]):
            args[2] = _smaller(args[2], at, after, omitted)
    elif node.target in _SPLITS and isinstance(before, tuple) and _dim(node, 2) == before[0]:
        pieces = before[1].split([int(size) for size in args[1]])
        args[1] = [size - omitted * int(piece.sum()) for size, piece in zip(args[1], pieces, strict=True)]
    elif node.target is aten.split.Tensor and isinstance(before, tuple) and _dim(node, 2) == before[0]:
        counts = {int(piece.sum()) for piece in before[1].split(args[1])}
        if len(counts) != 1:
            raise CannotShrink(f"{node.name} splits units unevenly")
        args[1] = args[1] - omitted * counts.pop()
    elif node.target is aten.slice.Tensor and isinstance(before, tuple) and _dim(node, 1) == before[0]:
        args = [*args, *(0, None, None, 1)[len(args) - 1 :]]
        for at in (2, 3):
            if isinstance(args[at], int) and abs(args[at]) <= len(before[1]):
                part = before[1][: args[at]] if args[at] >= 0 else before[1][args[at] :]
                fewer = omitted * int(part.sum())
                args[at] += -fewer if args[at] >= 0 else fewer
    else:
        return None
    return tuple(args) if args != list(node.args) else None


def _dim(node: Node, position: int) -> int:
    """The dimension a node works on, from the left."""
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    return int(dim) % len(shape_of(node.args[0]))  # type: ignore[arg-type]


def _smaller(sizes: Sequence[Any], at: int, gone: _Gone, omitted: int) -> list[Any]:
    new = list(sizes)
    if isinstance(new[at], int) and new[at] == len(gone[1]):
        new[at] -= omitted * int(gone[1].sum())
    return new
