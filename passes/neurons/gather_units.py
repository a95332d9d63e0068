"""Leaving units of a structure out of what a graph computes: heads of an attention, channels of an MLP.

The projections compute the rows of the units that take part and the output linear reads their columns, both through
``gather_linear``, so weights stay whole and which units take part is data. Between the two, sizes that were written
into the graph (of views, expansions, slices) shrink with their number: by what one unit takes away, times how many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse import graph as fx
from fxsparse.analysis.axes import Mixed, losses_of_unit
from fxsparse.analysis.probing import between, shape_of
from fxsparse.analysis.structures import MLP, Attention
from fxsparse.graph import Linear, live, traits
from fxsparse.graph.resize import CannotResize, DoesNotFit, Losses, patches_for, resize
from fxsparse.ops.gather_linear import LONGEST_RUN, gather_linear
from fxsparse.passes.structured.slice_heads import applications, heads_beside

aten = torch.ops.aten


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

    def run(self, block: int) -> int:
        """The longest run, a power of two up to `LONGEST_RUN`, that :meth:`of` consists of whichever units are chosen,
        ``block`` at a time: consecutive positions, of which the first is a multiple of the run's length."""
        owner = torch.full((self.index.numel() + len(self.rest),), -1)
        owner[self.index] = (torch.arange(len(self.index)) // block)[:, None].expand_as(self.index)
        run = LONGEST_RUN
        while len(owner) % run or not owner.view(-1, run).eq(owner[::run, None]).all():
            run //= 2
        return run


@dataclass(frozen=True)
class Site(live.Live):
    """A structure whose units can be left out.

    Attributes:
        path: module path.
        kind: ``heads`` or ``channels``.
        units: how many; under grouped queries a unit is a key head with its query heads.
        projections: rows of the linears that compute the units.
        output: columns of the linear that reads them.
        group: query heads of a unit; 0 for channels.
        block: units that are chosen together.
    """

    path: str
    kind: str
    units: int
    projections: tuple[Part, ...]
    output: Part
    group: int
    block: int = 1

    def moved(self, old: str, new: str, rows: int) -> Site:
        parts = [replace(part, name=new) if part.name == old else part for part in self.parts]
        return replace(self, projections=tuple(parts[:-1]), output=parts[-1])

    def without(self, gone: Callable[[str], bool]) -> Site | None:
        return None if any(gone(part.name) for part in self.parts) else self

    @property
    def key(self) -> str:
        """A name of its own, also where attention and MLP share a module."""
        return self.output.name

    @property
    def weights(self) -> tuple[str, ...]:
        return tuple(part.name for part in self.parts)

    @property
    def parts(self) -> tuple[Part, ...]:
        return (*self.projections, self.output)

    def in_blocks(self, units: Tensor) -> bool:
        """Whether chosen units, int64, are whole blocks, which kernels rely on."""
        chosen = torch.zeros(self.units, dtype=torch.bool, device=units.device).index_fill_(0, units, True)
        blocks = chosen.view(-1, self.block)
        return torch.equal(blocks.any(1), blocks.all(1))


def site_of(found: Attention | MLP, block: int) -> Site:
    """The units of a structure, without its nodes; of channels so many are chosen together."""
    if isinstance(found, MLP):
        units, kind, group = found.channels, "channels", 0
    else:
        units, kind, group = found.kv_heads, "heads", found.heads // found.kv_heads
    rows: dict[Node, list[Tensor]] = {}
    linears: dict[Node, Linear] = {}
    for projection in found.projections:
        linears[projection.linear.node] = projection.linear
        rows.setdefault(projection.linear.node, []).append(projection.index.reshape(units, -1))
    projections = tuple(_part(linears[node], torch.cat(index, 1), is_rows=True) for node, index in rows.items())
    output = _part(found.output.linear, found.output.index.reshape(units, -1), is_rows=False)
    return Site(found.path, kind, units, projections, output, group, block if kind == "channels" else 1)


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


def units_name(site: Site) -> str:
    return f"{site.output.name}_units"


def magnitudes_name(site: Site) -> str:
    return f"{site.output.name}_magnitudes"


def batches_name(site: Site) -> str:
    return f"{site.output.name}_batches"


def selection(site: Site, units: Tensor) -> dict[str, Tensor]:
    """The index buffers that let ``units``, int64, take part, by name."""
    buffers = {rows_name(part): part.of(units) for part in site.projections}
    buffers[columns_name(site)] = site.output.of(units)
    if site.kind == "heads":
        buffers[units_name(site)] = units.sort().values
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
    linears = linears_of(gm, found)[:-1]
    try:
        _gather_rows(gm, found, site, linears, site.units - kept)
    except DoesNotFit as error:
        reason = str(error.reason).partition("\n")[0]
        raise CannotShrink(f"{error.node.name} cannot be made smaller: {reason}") from error
    except (CannotResize, Mixed) as error:
        raise CannotShrink(str(error)) from error
    output = found.output.linear
    source = output.input
    if rescale:
        source = fx.insert_call(gm, aten.mul.Tensor, (source, site.units / kept), like=output.node)
    columns = fx.insert_attribute(gm, columns_name(site), before=output.node)
    if shape_of(source)[-1] != len(fx.attribute(gm, columns_name(site))):
        raise CannotShrink(f"{source.name} did not become as small as the units that take part")
    if observe:
        _observe(gm, site, source, output.node)
    _gather(gm, output, source, None, columns, site.output.run(site.block))


def linears_of(gm: GraphModule, found: Attention | MLP) -> list[Linear]:
    """The linears of a structure, the output last."""
    if isinstance(found, Attention):
        return [*applications(gm, found), found.output.linear]
    return [*{rows.linear.node: rows.linear for rows in found.projections}.values(), found.output.linear]


def _gather_rows(gm: GraphModule, found: Attention | MLP, site: Site, linears: Sequence[Linear], omitted: int) -> None:
    """Lets the projections compute the rows of chosen units, and all up to the output linear follow."""
    source = found.output.linear.input
    path = between({linear.node for linear in linears}, [source])
    lost, lost_last = _losses(linears, site, source, omitted)
    patches = patches_for(lost)
    sizes = {node: _sizes(node) for node in path}
    changed = _select_beside(gm, site, lost, lost_last) if isinstance(found, Attention) else []
    parts = {part.name: part for part in site.projections}
    for linear in linears:
        part = parts[linear.name]
        rows = fx.insert_attribute(gm, rows_name(part), before=linear.node)
        changed.append(_gather(gm, linear, linear.input, rows, None, part.run(site.block)))
    resize(gm, patches, changed, nodes=path)
    inside = {*path, *changed, found.output.linear.node}
    for node in path:
        outside = [user for user in node.users if user not in inside and isinstance(user.meta.get("val"), Tensor)]
        if outside and node in sizes and _sizes(node) != sizes[node]:
            raise CannotShrink(f"{node.name} is also read by {outside[0].name}, which would lack what is left out")


def _sizes(node: Node) -> tuple[str, ...]:
    value = node.meta.get("val")
    return tuple(map(str, value.shape)) if isinstance(value, Tensor) else ()


def _gather(gm: GraphModule, linear: Linear, source: Node, rows: Node | None, columns: Node | None, run: int) -> Node:
    node = linear.node
    product = traits.of(node.target).product
    assert product is not None
    weight = fx.arguments(node)[product.weight]
    if product.transposed:
        weight = fx.insert_call(gm, aten.t.default, (weight,), like=node)
    args = (source, weight, rows, columns, linear.bias, run)
    gathered = fx.insert_call(gm, gather_linear.overload, args, like=node)
    fx.replace(node, gathered)
    return gathered


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


def _select_beside(gm: GraphModule, site: Site, lost: Losses, lost_last: Losses) -> list[Node]:
    """What has an axis of units and comes from elsewhere loses the units left out, where it is read."""
    changed = []
    of_last = {(user, operand, axis): positions for user, operand, axis, positions in heads_beside(lost_last)}
    for user, operand, axis, positions in heads_beside(lost):
        size = _size_in_axis(positions.bool(), of_last[user, operand, axis].bool(), site.units)
        if size is None:
            raise CannotShrink(f"{operand.name} has no axis on which units follow one another")
        units = fx.insert_attribute(gm, units_name(site), before=user)
        smaller = _select(gm, operand, axis, units, site.units, size, user)
        user.replace_input_with(operand, smaller)
        changed.append(smaller)
    return changed


def _size_in_axis(first: Tensor, last: Tensor, units: int) -> int | None:
    """How many positions one unit has, side by side, on an axis of all units, perhaps of those of each example; None
    where the positions of the first unit and of the last one do not lie so."""
    size = int(first.long().cumprod(0).sum())
    if not size or len(first) % (units * size):
        return None
    blocks = first.view(-1, units, size), last.view(-1, units, size)
    expected = torch.arange(units) == 0, torch.arange(units) == units - 1
    alike = all(torch.equal(own, which[:, None].expand_as(own)) for own, which in zip(blocks, expected, strict=True))
    return size if alike else None


def _select(gm: GraphModule, operand: Node, axis: int, index: Node, units: int, size: int, before: Node) -> Node:
    """The units of ``index`` of an operand, whose axis holds ``size`` positions of each, perhaps for each example."""
    if size == 1 and fx.value(operand).shape[axis] == units:
        return fx.insert_call(gm, aten.index_select.default, (operand, axis, index), like=before)

    def chosen(x: Tensor, kept: Tensor) -> Tensor:
        apart = x.unflatten(axis, (-1, units, size))
        return apart.index_select(axis + 1, kept).flatten(axis, axis + 2)

    node: Node = fx.insert_function(gm, chosen, operand, index, before=before)
    return node


# --- sizes ------------------------------------------------------------------------------------------------------------


def _losses(linears: Sequence[Linear], site: Site, source: Node, omitted: int) -> tuple[Losses, Losses]:
    """What nodes between the linears and what the output linear reads lose, for ``omitted`` fewer units that are like
    the first, and like the last."""
    first, last = (_losses_of_unit(linears, site, source, unit, omitted) for unit in (0, site.units - 1))
    patches, others = patches_for(first), patches_for(last)
    for node in (*patches, *others):
        if patches.get(node) != others.get(node):
            raise CannotShrink(f"{node.name} treats units differently")
    return first, last


def _losses_of_unit(linears: Sequence[Linear], site: Site, source: Node, unit: int, omitted: int) -> Losses:
    indices = {part.name: part.index[unit] for part in site.projections}
    return losses_of_unit({linear.node: indices[linear.name] for linear in linears}, [source], count=omitted)
