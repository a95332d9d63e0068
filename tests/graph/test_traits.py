"""Every row of the table of operators against what torch computes, on random operands: a wrong row fails."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from fxsparse.graph import traits
from fxsparse.graph.traits import ROWS, Traits, functional, of
from fxsparse.graph.values import arguments

aten = torch.ops.aten
SHAPE = (2, 3, 4)
Arguments = dict[str, Any]


def everything() -> Iterator[OpOverload]:
    """The operators of ATen that have a tensor operand and return something new, or what they wrote into."""
    names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")}
    for name in sorted(names):
        packet = getattr(aten, name.removeprefix("aten::"), None)
        for overload in getattr(packet, "overloads", list)():
            target = getattr(packet, overload)
            specs = target._schema.arguments
            named_dimensions = any(str(spec.type) in ("str", "Dimname", "List[Dimname]") for spec in specs)
            if any("Tensor" in str(spec.type) for spec in specs) and not named_dimensions and "out" not in overload:
                yield target


EVERYTHING = list(everything())


def those(holds: Callable[[Traits], Any]) -> list[Any]:
    return [pytest.param(target, id=str(target).removeprefix("aten.")) for target in EVERYTHING if holds(of(target))]


# --- calls ------------------------------------------------------------------------------------------------------------

WRITTEN: dict[str, Arguments] = {
    "view view_as reshape_as": {"size": [6, 4], "other": torch.empty(6, 4)},
    "_unsafe_view": {"size": [2, 12]},
    "_reshape_alias": {"size": [6, 4], "stride": [4, 1]},
    "reshape": {"shape": [4, -1]},
    "unflatten": {"dim": -1, "sizes": [2, 2]},
    "flatten": {"start_dim": 1},
    "unsqueeze": {"dim": 1},
    "squeeze.dim": {"dim": 0},
    "squeeze.dims": {"dim": [0, 3]},
    "expand broadcast_to expand_as": {"size": [5, 2, 3, 4], "other": torch.empty(5, 2, 3, 4)},
    "permute": {"dims": [2, 0, 1]},
    "transpose swapdims": {"dim0": 0, "dim1": -1},
    "swapaxes": {"axis0": 0, "axis1": -1},
    "movedim.int moveaxis.int": {"source": 0, "destination": 2},
    "movedim.intlist moveaxis.intlist": {"source": [0, 1], "destination": [1, 2]},
    "slice": {"dim": 2, "start": 1, "end": 3},
    "narrow": {"dim": 2, "start": 1, "length": 2},
    "split.Tensor": {"split_size": 3, "dim": 2},
    "split.sizes": {"split_size": [1, 3], "dim": 2},
    "split_with_sizes": {"split_sizes": [1, 3], "dim": 2},
    "chunk": {"chunks": 2, "dim": 2},
    "select": {"dim": 1, "index": 2},
    "index_select": {"dim": 1, "index": torch.tensor([2, 0])},
    "index": {"indices": [torch.tensor([1, 0, 1])]},
    "cumsum": {"dim": 1},
    "roll": {"shifts": [1], "dims": [1]},
    "mean sum linalg_vector_norm": {"dim": [1]},
    "softmax _softmax": {"dim": 1, "half_to_float": False},
    "layer_norm": {"normalized_shape": [3, 4], "weight": torch.rand(3, 4), "bias": torch.rand(3, 4)},
    "rms_norm": {"normalized_shape": [4], "weight": torch.rand(4)},
    "layer_norm rms_norm": {"eps": 1e-12},
    "clamp.default clip.default": {"min": 0.3, "max": 0.6},
    "clamp.Tensor clip.Tensor": {"min": torch.rand(SHAPE) / 2, "max": torch.rand(SHAPE)},
    "div": {"rounding_mode": "floor"},
    "where": {"condition": torch.rand(SHAPE) > 0.5},
    "masked_fill": {"mask": torch.rand(SHAPE) > 0.5},
    "masked_fill.Tensor": {"value": torch.tensor(0.3)},
    "to.device": {"device": "cpu", "dtype": torch.float64},
    "to.dtype": {"dtype": torch.float64},
}
"""Arguments that cannot be made up, by names of functional operators."""

MADE_UP = {"number": 0.5, "float": 0.5, "int": 1, "bool": True, "List[int]": [2, 2], "int?": 0}


def written(target: OpOverload) -> Arguments:
    form = functional(target) or target
    name = form._schema.name.removeprefix("aten::")
    both = {name, f"{name}.{form._overloadname}"}
    groups = [group for names, group in WRITTEN.items() if both & set(names.split())]
    return {key: value for group in groups for key, value in group.items()}


def call(target: OpOverload, **given: Any) -> Arguments:
    """Arguments of an operator: random operands ``[2, 3, 4]`` in (0.2, 0.8), written ones, defaults."""
    name = target._schema.name.removeprefix("aten::").removesuffix("_")
    shape = (3, 4) if name in ("t", "numpy_T") else (1, 2, 3, 1, 4) if name == "squeeze" else SHAPE
    given = {**written(target), **given}
    values: Arguments = {}
    for spec in target._schema.arguments:
        if spec.name in given:
            values[spec.name] = given[spec.name]
        elif spec.has_default_value():
            values[spec.name] = spec.default_value
        elif str(spec.type) in ("Tensor", "List[Tensor]"):
            tensors = [torch.rand(shape) * 0.6 + 0.2 for _ in range(2)]
            values[spec.name] = tensors[0] if str(spec.type) == "Tensor" else tensors
        else:
            values[spec.name] = MADE_UP.get(str(spec.type))
    return values


def as_integers(values: Arguments, dtype: torch.dtype) -> Arguments:
    def convert(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return (leaf * 10).to(dtype) if leaf.is_floating_point() else leaf
        return int(leaf + 1) if isinstance(leaf, float) else leaf

    return pytree.tree_map(convert, values)


def run(target: OpOverload, values: Arguments) -> list[Any]:
    """The results, with the same random numbers every time; what the operator writes into are copies."""
    positional, named = split(target, pytree.tree_map_only(Tensor, Tensor.clone, values))
    torch.manual_seed(3)
    return pytree.tree_leaves(target(*positional, **named))


def runnable(target: OpOverload, **given: Any) -> Arguments:
    """Arguments that an operator runs on, of the first type that it knows."""
    values = call(target, **given)
    doubles = pytree.tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, values)
    for attempt in (values, as_integers(values, torch.int64), as_integers(values, torch.bool), doubles):
        try:
            run(target, attempt)
        except (RuntimeError, NotImplementedError) as error:
            reason = error
            continue
        return attempt
    raise AssertionError(f"{target} runs on none of the made up arguments: {reason}")


def node_of(target: OpOverload, values: Arguments) -> Node:
    """A call in a graph whose operands are placeholders with values."""
    graph = Graph()

    def read(tensor: Tensor) -> Node:
        node = graph.placeholder("x")
        node.meta["val"] = tensor
        return node

    return graph.call_function(target, *split(target, pytree.tree_map_only(Tensor, read, values)))


def split(target: OpOverload, values: Arguments) -> tuple[tuple[Any, ...], Arguments]:
    """Positional and keyword-only arguments."""
    keyword_only = {spec.name for spec in target._schema.arguments if spec.kwarg_only}
    positional = tuple(value for name, value in values.items() if name not in keyword_only)
    return positional, {name: values[name] for name in keyword_only}


def first(target: OpOverload) -> str:
    return str(target._schema.arguments[0].name)


def same(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise equality, NaN included."""
    return a.eq(b) | (a.isnan() & b.isnan()) if a.is_floating_point() else a.eq(b)


def reached(target: OpOverload, values: Arguments, name: str, place: Any) -> list[Tensor]:
    """Which elements of the results follow from those of an operand at ``place``."""
    other = values[name].clone()
    part = other[place]
    other[place] = ~part if part.dtype == torch.bool else part + (0.13 if part.is_floating_point() else 1)
    results = run(target, values), run(target, {**values, name: other})
    return [~same(a, b) for a, b in zip(*results, strict=True) if isinstance(a, Tensor)]


# --- axes -------------------------------------------------------------------------------------------------------------


def check_pointwise(target: OpOverload) -> None:
    values = runnable(target)
    lent = (of(target).shaped_like, of(target).typed_like)
    for name, value in values.items():
        if isinstance(value, Tensor) and name not in lent and value.dim():
            for at in (0, -1):
                for differs in reached(target, values, name, (at,) * value.dim()):
                    differs[(..., *(at,) * value.dim())] = False
                    assert not differs.any(), f"{name} reaches elements at other places"


def check_axes_apart(target: OpOverload) -> None:
    """All axes but those of ``dim`` stay, and what is at one position of them follows from nothing else there."""
    values = call(target)
    source = values[first(target)]
    worked_on = traits.dims(node_of(target, values))
    assert worked_on == {at % 3 for at in pytree.tree_leaves(values[of(target).dim])}
    for axis in {0, 1, 2} - worked_on:
        result = run(target, values)[0]
        at = axis if result.dim() == 3 else axis - sum(gone < axis for gone in worked_on)
        assert result.shape[at] == source.shape[axis]
        for differs in reached(target, values, first(target), (slice(None),) * axis + (1,)):
            differs.select(at, 1).fill_(False)
            assert not differs.any(), f"positions of axis {axis} are mixed"


WORK_ALONG_A_DIMENSION = ("slices", "select", "along", "softmax", "reduce")


@pytest.mark.parametrize("target", those(lambda known: known.axes == "pointwise"))
def test_pointwise(target: OpOverload) -> None:
    check_pointwise(target)


@pytest.mark.parametrize("target", those(lambda known: known.axes in ("reshape", "broadcast", "permute")))
def test_elements_that_only_move(target: OpOverload) -> None:
    values = call(target)
    source, (result,) = values[first(target)], run(target, values)
    if of(target).axes == "reshape":
        assert torch.equal(result.flatten(), source.flatten())
    elif of(target).axes == "broadcast":
        assert torch.equal(result, source.broadcast_to(result.shape))
    else:
        order = traits.permutation(node_of(target, values))
        assert order is not None and torch.equal(result, source.permute(order))


@pytest.mark.parametrize("target", those(lambda known: known.axes in WORK_ALONG_A_DIMENSION))
def test_other_axes_are_kept_apart(target: OpOverload) -> None:
    check_axes_apart(target)


@pytest.mark.parametrize("target", those(lambda known: known.sizes))
def test_sizes_that_are_written(target: OpOverload) -> None:
    values = call(target)
    known, (result,) = of(target), run(target, values)
    sizes = values[known.sizes]
    at = values[known.dim] % 3 if known.dim else result.dim() - len(sizes)
    assert all(size in (-1, found) for size, found in zip(sizes, result.shape[at:], strict=False))


@pytest.mark.parametrize("target", those(lambda known: known.axes in ("slices", "select")))
def test_slices_are_where_they_say(target: OpOverload) -> None:
    values = call(target)
    known, source, results = of(target), values[first(target)], run(target, values)
    dim, size = values[known.dim], source.shape[values[known.dim]]
    begin, end = 0, size
    if known.positions:
        begin = values[known.positions[0]]
        end = values["end"] if len(known.positions) == 2 else begin + (values[known.length] if known.length else 1)
    parts = [part.unsqueeze(dim) if known.axes == "select" else part for part in results]
    assert torch.equal(torch.cat(parts, dim), source.narrow(dim, begin, end - begin))
    if known.pieces:
        sizes = values[known.pieces]
        expected = sizes if isinstance(sizes, list) else [sizes, size - sizes]
        assert [part.shape[dim] for part in results] == expected


@pytest.mark.parametrize("target", those(lambda known: known.reduction))
def test_zeros_do_not_matter_to_sums(target: OpOverload) -> None:
    values = call(target)
    x = values["self"]
    padded = torch.cat([x, torch.zeros(2, 3, 4)], 1)
    (short,), (long,) = run(target, values), run(target, {**values, "self": padded})
    torch.testing.assert_close(long * (2 if of(target).reduction == "mean" else 1), short)


def test_a_call_that_names_no_dimension_works_along_all() -> None:
    assert traits.dims(node_of(aten.roll.default, call(aten.roll.default, dims=[]))) == {0, 1, 2}
    assert traits.dims(node_of(aten.mean.dim, call(aten.mean.dim, dim=None))) == {0, 1, 2}


@pytest.mark.parametrize("target", [aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default])
def test_products(target: OpOverload) -> None:
    product = of(target).product
    assert product is not None
    x, weight, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    named = {product.input: x, product.weight: weight.t() if product.transposed else weight}
    named |= {product.bias: bias} if product.bias is not None else {}
    expected = torch.nn.functional.linear(x, weight, bias if product.bias is not None else None)
    torch.testing.assert_close(target(**named), expected)


@pytest.mark.parametrize("target", those(lambda known: known.axes == "norm"))
def test_norms_are_over_the_last_axes(target: OpOverload) -> None:
    values = call(target)
    count = len(values["normalized_shape"])
    (differs,) = reached(target, values, "input", (1, 1, 1))
    inside = torch.zeros(SHAPE, dtype=torch.bool)
    inside[(1, 1) if count == 1 else 1] = True
    assert differs.any() and not (differs & ~inside).any()
    shift = run(target, {**values, "input": values["input"] * 3})[0] - run(target, values)[0]
    assert shift.abs().max() < 1e-3


@pytest.mark.parametrize("target", those(lambda known: known.axes == "convolution"))
def test_convolutions_mix_channels_and_keep_rows_apart(target: OpOverload) -> None:
    rank = {"conv1d": 1, "conv3d": 3}.get(target._schema.name.removeprefix("aten::"), 2)
    given = {"input": torch.rand(2, 4, *[5] * rank), "weight": torch.rand(6, 4, *[3] * rank), "bias": torch.rand(6)}
    lists = {"stride": [1] * rank, "padding": [0] * rank, "dilation": [1] * rank, "output_padding": [0] * rank}
    values = call(target, **given, **lists, groups=1, transposed=False)
    (result,) = run(target, values)
    assert result.shape[:2] == (2, 6)
    (by_row,), (by_channel,) = (reached(target, values, "weight", 1), reached(target, values, "input", 1))
    assert by_row[:, 1].all() and not by_row[:, [0, 2, 3, 4, 5]].any()
    assert by_channel[1].any() and not by_channel[0].any()


def test_tables_joins_and_indices() -> None:
    table, ids = torch.randn(7, 4), torch.randint(7, (2, 3))
    assert of(aten.embedding.default).axes == "embedding" and of(aten.embedding_bag.default).axes == "bag"
    assert torch.equal(aten.embedding(table, ids), table[ids])
    parts = [torch.randn(2, 3), torch.randn(2, 4)]
    assert of(aten.cat.default).axes == "join" and torch.equal(aten.cat(parts, 1)[:, 3:], parts[1])
    assert of(aten.index.Tensor).axes == "index"
    assert torch.equal(aten.index(table, [torch.tensor([3, 1])]), table[[3, 1]])
    assert of(operator.getitem).axes == "item"


# --- values -----------------------------------------------------------------------------------------------------------


def check_zeros(target: OpOverload) -> None:
    values = runnable(target)
    known = of(target)
    operands = [name for name, value in values.items() if isinstance(value, Tensor) and value.is_floating_point()]
    if known.keeps_zero == "any":
        choices = [[name] for name in operands]
    else:
        choices = [list(values) if known.keeps_zero == "all" else operands[:1]]
    for choice in choices:
        zeros = {name: pytree.tree_map_only((Tensor, float), lambda part: part * 0, values[name]) for name in choice}
        for result in run(target, {**values, **zeros})[: 1 if known.dropout else None]:
            assert not result.any(), f"zeros in {', '.join(choice)} give something else"


@pytest.mark.parametrize("target", those(lambda known: known.keeps_zero))
def test_zeros_stay_zeros(target: OpOverload) -> None:
    if target is not aten.pow.Scalar:  # the power of a number
        check_zeros(target)


def test_a_power_of_zero_is_zero_for_a_positive_exponent_only() -> None:
    for exponent, keeps in ((2, "first"), (0.5, "first"), (0, None), (-1, None)):
        node = node_of(aten.pow.Tensor_Scalar, call(aten.pow.Tensor_Scalar, exponent=exponent))
        assert traits.keeps_zero(node) == keeps
        assert bool(aten.pow.Tensor_Scalar(torch.zeros(2), exponent).any()) == (keeps is None)


@pytest.mark.parametrize("target", those(lambda known: known.copies))
def test_copies(target: OpOverload) -> None:
    source = torch.rand(SHAPE)
    positional, _ = split(
        target, call(target, **{first(target): source, "dtype": torch.float32, "other": torch.rand(2)})
    )
    result = target(*positional)
    assert torch.equal(result, source)
    assert (result.data_ptr() == source.data_ptr()) == (of(target).copies != "always")


@pytest.mark.parametrize("target", those(lambda known: known.shaped_like or known.typed_like))
def test_operands_whose_values_are_not_read(target: OpOverload) -> None:
    values = call(target)
    known = of(target)
    lent = known.shaped_like or known.typed_like
    node = node_of(target, values)
    assert arguments(node)[lent] not in traits.values_read(node)
    assert (arguments(node)[lent] in traits.operands(node)) == bool(known.shaped_like)
    other = torch.rand(values[lent].shape if known.shaped_like else (1,))
    results = run(target, values), run(target, {**values, lent: other})
    for a, b in zip(*results, strict=True):
        if "empty" in str(target):
            assert a.shape == b.shape
        else:
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("target", those(lambda known: known.dropout))
def test_dropout(target: OpOverload) -> None:
    x = torch.rand(20, 30, 4) + 1
    kept, dropped = (target(x.clone(), 0.5, train) for train in (False, True))
    kept, dropped = (result[0] if isinstance(result, tuple) else result for result in (kept, dropped))
    assert torch.equal(kept, x) and 0.3 < (dropped < 1).float().mean() < 0.7
    assert [spec.name for spec in target._schema.arguments[1:3]] == ["p", "train"]


@pytest.mark.parametrize("target", those(lambda known: known.detaches))
def test_detaching(target: OpOverload) -> None:
    x = torch.rand(3, requires_grad=True) * 1
    if target is aten.detach_copy.default:  # comes up below autograd only
        with pytest.raises(RuntimeError, match="derivative for aten::detach_copy is not implemented"):
            target(x).sum().backward()
    else:
        assert not target(x).requires_grad


@pytest.mark.parametrize("target", those(lambda known: known.number))
def test_numbers_of_elements(target: OpOverload) -> None:
    assert target(torch.tensor(2.5)) == 2.5


@pytest.mark.parametrize("target", those(lambda known: known.asserts and known.work == "free"))
def test_assertions(target: OpOverload) -> None:
    if target is aten._assert_tensor_metadata.default:
        with pytest.raises(RuntimeError):
            target(torch.rand(2), dtype=torch.float64)
    elif target is aten._assert_async.default:
        with pytest.raises(RuntimeError):
            target(torch.tensor(False))


@pytest.mark.parametrize("target", those(lambda known: known.work == "create"))
def test_what_is_created_reads_no_values(target: OpOverload) -> None:
    known = of(target)
    reads_bounds = target._schema.name.removeprefix("aten::") in ("linspace", "normal", "full", "randint_like")
    assert known.shaped_like or known.typed_like or reads_bounds


@pytest.mark.parametrize("target", those(lambda known: known.work == "view" and known.axes not in (None, "pointwise")))
def test_views_share_memory(target: OpOverload) -> None:
    values = call(target)
    source = values[first(target)]
    positional, named = split(target, values)
    results = pytree.tree_leaves(target(*positional, **named))
    assert all(part.untyped_storage().data_ptr() == source.untyped_storage().data_ptr() for part in results)


# --- in-place operators, other rows -----------------------------------------------------------------------------------

IN_PLACE = [
    target
    for target in EVERYTHING
    if target._schema.is_mutable and functional(target) is not None and of(target).axes == "pointwise"
]


@pytest.mark.parametrize("target", IN_PLACE, ids=lambda target: str(target).removeprefix("aten."))
def test_in_place_operators_are_their_functional_forms(target: OpOverload) -> None:
    form = functional(target)
    assert form is not None and not form._schema.is_mutable
    assert of(target) == dataclasses.replace(of(form), work=of(target).work)
    values = runnable(target)
    renamed = dict(zip((spec.name for spec in form._schema.arguments), values.values(), strict=True))
    expected, actual = run(form, renamed)[0], run(target, values)[0]
    assert bool(same(actual, expected.to(actual.dtype)).all())


def test_rows_name_operators_and_arguments_that_exist() -> None:
    for key, row in ROWS.items():
        if set(row) == {"work"} or "::" in key:
            continue
        name, _, overload = key.partition(".")
        packet = getattr(aten, name)
        targets = [getattr(packet, overload)] if overload else [getattr(packet, each) for each in packet.overloads()]
        product = row.get("product")
        named = [row.get(fact) for fact in ("dim", "sizes", "pieces", "length", "shaped_like", "typed_like")]
        named += [*row.get("positions", ()), *((product.input, product.weight, product.bias) if product else ())]
        for target in targets:
            known = {spec.name for spec in target._schema.arguments}
            is_out = any(spec.is_out for spec in target._schema.arguments)
            assert is_out or not set(filter(None, named)) - known, (str(target), named)


def test_what_has_no_row_is_unknown() -> None:
    for target in (aten.sort.default, aten.view.dtype, aten.where.default, torch.relu, len, "x"):
        assert of(target).axes is None and of(target).keeps_zero is None
    assert of(aten.transpose_.default).axes is None  # the operand has other axes afterwards
    assert of(aten.transpose_.default).keeps_zero == "first"


@pytest.mark.parametrize(
    ("target", "wrong", "check"),
    [
        (aten.cumsum.default, {"axes": "pointwise"}, check_pointwise),
        (aten.softmax.int, {"axes": "pointwise"}, check_pointwise),
        (aten.roll.default, {"axes": "pointwise"}, check_pointwise),
        (aten.layer_norm.default, {"axes": "along", "dim": "normalized_shape"}, check_axes_apart),
        (aten.exp.default, {"keeps_zero": "first"}, check_zeros),
        (aten.add.Tensor, {"keeps_zero": "any"}, check_zeros),
        (aten.div.Tensor, {"keeps_zero": "any"}, check_zeros),
    ],
)
def test_a_wrong_row_fails(
    target: OpOverload, wrong: dict[str, Any], check: Callable[[OpOverload], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = target._schema.name.removeprefix("aten::")
    row = {**ROWS.get(name, {}), **ROWS.get(f"{name}.{target._overloadname}", {}), **wrong}
    monkeypatch.setitem(ROWS, f"{name}.{target._overloadname}", row)
    of.cache_clear()
    try:
        with pytest.raises(AssertionError):
            check(target)
    finally:
        monkeypatch.undo()
        of.cache_clear()
