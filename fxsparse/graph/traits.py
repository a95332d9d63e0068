"""What an operator does to its tensors: one table for every analysis and every rewrite.

    of(aten.split_with_sizes.default)  ->  axes="slices", dim="dim", pieces="split_sizes", work="view"
    of(aten.relu_.default)             ->  axes="pointwise", keeps_zero="first", work="elementwise"

The table says the same of an operator to all that ask. An operator that it does not have stays unknown, and whoever
needs to know refuses it. Three things need no row of their own: in-place variants are what their functional forms are,
torch's own tag says which operators are pointwise, and a schema says which results are views.

The table stands by columns: first what becomes of axes, then values, then memory. Arguments go by their names in the
schema. ``tests/graph/test_traits.py`` runs every operator that a row names and compares what it does with what the row
says.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from fxsparse.graph.values import arguments, value

Axes = Literal[
    "pointwise",  # an element follows from the elements of the operands at its place; they are broadcast
    "broadcast",  # the same of one operand whose axes of size 1 are repeated, and new ones put before
    "reshape",  # the elements in their order, in another shape
    "permute",  # the axes in another order
    "slices",  # one or several runs of positions along `dim`
    "select",  # one position along `dim`, which goes
    "along",  # anything along `dim`; the other axes stay, and apart
    "reduce",  # the axes of `dim`, or all, become one number
    "softmax",  # as along
    "join",  # tensors one after the other along `dim`
    "index",  # positions along the first axes
    "product",  # `product` says of what
    "norm",  # over the last axes, as many as `sizes` has, with a weight and a bias of their shape
    "embedding",  # rows of a table
    "bag",  # sums of rows of a table
    "convolution",
    "item",  # one of several results
]
Work = Literal["view", "elementwise", "gather", "create", "free"]


@dataclass(frozen=True)
class Product:
    """The arguments of a product with a weight, and whether the weight is ``[in, out]`` (else ``[out, in]``)."""

    input: str
    weight: str
    bias: str | None
    transposed: bool


@dataclass(frozen=True)
class Traits:
    """What is known of an operator. Names are those of arguments in its schema.

    Attributes:
        axes: how the axes of the result follow from those of the first operand, or of all.
        dim: the dimension, or dimensions, that it works along.
        sizes: a list of sizes of the result's axes: of the last ones, or, where there is a `dim`, of those from it on.
        pieces: the size, or sizes, of the slices along `dim`.
        positions: where along `dim` slices begin and end.
        length: how long a slice is that has only a beginning.
        reduction: what is reduced to, for those whose zeros do not matter but for the count.
        product: the operands of a product.
        keeps_zero: which operands must be zero somewhere for the result to be zero there. An exponent must be positive
            for it (:func:`keeps_zero`).
        copies: whether the result, which holds the elements of the first operand as they are or converted, is a copy.
        shaped_like: the operand of which nothing but sizes, dtype and device are read.
        typed_like: the operand of which nothing but dtype and device are read.
        dropout: it drops elements, or channels, with probability ``p`` where ``train``.
        detaches: it passes no gradient on.
        number: its result is an element's value as a number.
        asserts: it has no result and is there to fail.
        work: memory that it touches. ``view``: none. ``elementwise``: reads its inputs and writes its outputs
            (reductions and norms too). ``gather``: reads as much as it writes, not the whole table. ``create``: writes
            only. ``free``: no tensors.
    """

    axes: Axes | None = None
    dim: str = ""
    sizes: str = ""
    pieces: str = ""
    positions: tuple[str, ...] = ()
    length: str = ""
    reduction: Literal["mean", "sum"] | None = None
    product: Product | None = None
    keeps_zero: Literal["first", "any", "all"] | None = None
    copies: Literal["never", "if needed", "always"] | None = None
    shaped_like: str = ""
    typed_like: str = ""
    dropout: bool = False
    detaches: bool = False
    number: bool = False
    asserts: bool = False
    work: Work | None = None


# --- the table --------------------------------------------------------------------------------------------------------

ROWS: dict[str, dict[str, Any]] = {}
"""Facts by operator: ``view`` for all overloads of ``aten::view``, ``view.default`` for one, ``fxsparse::mux``."""


def _row(names: str, **facts: Any) -> None:
    for name in names.split():
        row = ROWS.setdefault(name, {})
        assert not row.keys() & facts.keys(), f"two rows say the same of {name}"
        row.update(facts)


# What becomes of axes. Torch tags what is pointwise but for these.
_row("hardswish rsub masked_fill where.self where.ScalarOther where.ScalarSelf where.Scalar", axes="pointwise")
_row("to _to_copy type_as contiguous clone detach detach_copy alias lift_fresh_copy", axes="pointwise")
_row("__and__ __or__ __xor__ __lshift__ __rshift__", axes="pointwise")
_row("dropout alpha_dropout feature_dropout feature_alpha_dropout native_dropout", axes="pointwise")
_row("zeros_like ones_like full_like empty_like", axes="pointwise")
_row("expand broadcast_to", axes="broadcast", sizes="size")
_row("expand_as", axes="broadcast")
_row("view.default _unsafe_view _reshape_alias", axes="reshape", sizes="size")
_row("reshape", axes="reshape", sizes="shape")
_row("view_as reshape_as ravel atleast_1d.default atleast_2d.default atleast_3d.default", axes="reshape")
_row("unflatten.int", axes="reshape", sizes="sizes", dim="dim")
_row("flatten.using_ints unsqueeze squeeze.default squeeze.dim squeeze.dims", axes="reshape")
_row("permute transpose.int t numpy_T mT swapaxes swapdims movedim moveaxis", axes="permute")
_row("slice.Tensor", axes="slices", dim="dim", positions=("start", "end"))
_row("narrow.default", axes="slices", dim="dim", positions=("start",), length="length")
_row("split.Tensor split.sizes", axes="slices", dim="dim", pieces="split_size")
_row("split_with_sizes", axes="slices", dim="dim", pieces="split_sizes")
_row("chunk", axes="slices", dim="dim")
_row("select.int", axes="select", dim="dim", positions=("index",))
_row("index_select.default cumsum.default", axes="along", dim="dim")
_row("roll", axes="along", dim="dims")
_row("mean.dim", axes="reduce", dim="dim", reduction="mean")
_row("sum.dim_IntList linalg_vector_norm", axes="reduce", dim="dim", reduction="sum")
_row("softmax.int _softmax", axes="softmax", dim="dim")
_row("cat.default", axes="join", dim="dim")
_row("index.Tensor", axes="index")
_row("linear", axes="product", product=Product("input", "weight", "bias", transposed=False))
_row("addmm.default", axes="product", product=Product("mat1", "mat2", "self", transposed=True))
_row("mm.default", axes="product", product=Product("self", "mat2", None, transposed=True))
_row("matmul", axes="product", product=Product("self", "other", None, transposed=True))
_row("layer_norm rms_norm", axes="norm", sizes="normalized_shape")
_row("embedding", axes="embedding")
_row("embedding_bag", axes="bag")
_row("conv1d conv2d conv3d convolution", axes="convolution")

# Values.
_row("abs asin asinh atan celu ceil elu erf expm1 floor gelu hardshrink hardswish leaky_relu", keeps_zero="first")
_row("log1p mish neg positive pow relu relu6 round selu sign silu sin sinh softshrink", keeps_zero="first")
_row("sqrt square tan tanh trunc div", keeps_zero="first")
_row("to _to_copy type_as contiguous clone detach detach_copy alias lift_fresh_copy", keeps_zero="first")
_row("dropout feature_dropout native_dropout expand broadcast_to expand_as", keeps_zero="first")
_row("view.default _unsafe_view _reshape_alias reshape view_as reshape_as ravel unflatten.int", keeps_zero="first")
_row("atleast_1d.default atleast_2d.default atleast_3d.default flatten.using_ints unsqueeze", keeps_zero="first")
_row("squeeze.default squeeze.dim squeeze.dims permute transpose.int t numpy_T mT", keeps_zero="first")
_row("swapaxes swapdims movedim moveaxis select.int index.Tensor", keeps_zero="first")
_row("slice.Tensor narrow.default split.Tensor split.sizes split_with_sizes chunk", keeps_zero="first")
_row("index_select.default cumsum.default roll", keeps_zero="first")
_row("mul fxsparse::mux", keeps_zero="any")
_row("add sub cat.default lerp.Scalar", keeps_zero="all")
_row("detach alias", copies="never")
_row("to contiguous type_as", copies="if needed")
_row("_to_copy clone detach_copy lift_fresh_copy", copies="always")
_row("zeros_like ones_like full_like empty_like rand_like randn_like", shaped_like="self")
_row("sym_size.int sym_numel sym_stride.int sym_storage_offset", shaped_like="self")
_row("normal_functional uniform bernoulli.p bernoulli.Tensor exponential geometric", shaped_like="self")
_row("log_normal cauchy", shaped_like="self")
_row("expand_as view_as reshape_as", shaped_like="other")
_row("new_ones new_zeros new_full new_empty new_empty_strided", typed_like="self")
_row("to.other type_as", typed_like="other")
_row("dropout alpha_dropout feature_dropout feature_alpha_dropout native_dropout", dropout=True)
_row("detach detach_copy", detaches=True)
_row("item _local_scalar_dense", number=True)
_row("_assert_async _assert_scalar _assert_tensor_metadata _functional_assert_async", asserts=True)

# Memory, where neither a schema that returns a view nor a tag says it.
_row(
    "embedding embedding_bag gather index index_select masked_select select_copy take take_along_dim",
    work="gather",
)
_row(
    """
    arange cauchy empty empty_like empty_strided exponential eye full full_like geometric linspace log_normal
    new_empty new_empty_strided new_full new_ones new_zeros normal normal_functional ones ones_like rand rand_like
    randint randint_like randn randn_like randperm scalar_tensor tril_indices triu_indices uniform zeros zeros_like
    """,
    work="create",
)
_row(
    """
    __and__ __lshift__ __or__ __rshift__ __xor__ _fused_dropout _log_softmax _safe_softmax _softmax _to_copy
    _unsafe_index_put _unsafe_view adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d all
    alpha_dropout aminmax any argmax argmin argsort as_strided_scatter avg_pool1d avg_pool2d batch_norm bernoulli
    binary_cross_entropy binary_cross_entropy_with_logits bincount bucketize cat celu channel_shuffle clamp clone col2im
    concat concatenate constant_pad_nd contiguous copy cosine_embedding_loss cosine_similarity count_nonzero
    cross_entropy_loss cummax cummin cumprod cumsum diag_embed diagonal_scatter diff dropout dstack erf
    feature_alpha_dropout feature_dropout fft_fft fft_fft2 fft_fftn fft_hfft fft_ifft fft_ifft2 fft_ifftn fft_ihfft
    fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftn fill flip floor_divide fmod fold fused_layer_norm
    gelu glu group_norm gumbel_softmax hinge_embedding_loss histc hstack huber_loss im2col index_add index_copy
    index_fill index_put instance_norm interpolate isin kl_div kthvalue l1_loss layer_norm lerp lift lift_fresh
    lift_fresh_copy
    linalg_vector_norm log_sigmoid log_sigmoid_forward log_softmax logcumsumexp logsumexp margin_ranking_loss
    masked_fill masked_scatter max max_pool1d max_pool2d max_pool3d mean median meshgrid min mse_loss multinomial
    nan_to_num nansum native_batch_norm native_dropout native_group_norm native_layer_norm nll_loss nll_loss2d
    nll_loss_forward nll_loss_nd nonzero normalize one_hot pad pairwise_distance pixel_shuffle pixel_unshuffle
    poisson_nll_loss prod quantile reflection_pad1d reflection_pad2d relu6 renorm repeat repeat_interleave
    replication_pad1d replication_pad2d rms_norm roll rot90 rrelu scatter scatter_add scatter_reduce searchsorted
    select_scatter selu slice_scatter smooth_l1_loss soft_margin_loss softmax softplus sort split_copy
    split_with_sizes_copy stack std std_mean sum tile to topk trace tril triplet_margin_loss triu type_as unfold_copy
    unique_consecutive upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d
    var var_mean vstack _weight_norm where zero
    """,
    work="elementwise",
)
_row(
    """
    _assert_async _assert_scalar _assert_tensor_metadata _functional_assert_async _local_scalar_dense dim is_nonzero
    item sym_constrain_range sym_constrain_range_for_size sym_is_contiguous sym_numel sym_size sym_storage_offset
    sym_stride
    """,
    work="free",
)

_MODE_SWITCHES = {
    torch._C._set_grad_enabled,
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
}


# --- queries ----------------------------------------------------------------------------------------------------------


@functools.cache
def of(target: Any) -> Traits:
    """What is known of what a node calls; `Traits` without any where nothing is."""
    if target is operator.getitem:
        return Traits(axes="item", keeps_zero="first")
    if not isinstance(target, OpOverload):
        return Traits()
    form = functional(target) or target
    name = _name(form) if form.namespace == "aten" else f"{form.namespace}::{_name(form)}"
    facts = {**ROWS.get(name, {}), **ROWS.get(f"{name}.{form._overloadname}", {})}
    if torch.Tag.pointwise in form.tags:
        facts.setdefault("axes", "pointwise")
    if torch.Tag.inplace_view in target.tags and "copies" not in facts:
        facts.pop("axes", None)  # the operand itself has other axes afterwards
    facts.setdefault("work", _work(form))
    return Traits(**facts)


@functools.cache
def functional(target: OpOverload) -> OpOverload | None:
    """The functional operator of the same arguments: ``div_.Tensor`` -> ``div.Tensor``, ``__ior__`` -> ``__or__``."""
    name = _name(target)
    names = [f"{name}_functional", name] if target._schema.is_mutable else [name]
    for packet in (getattr(getattr(torch.ops, target.namespace), each, None) for each in names):
        overloads = packet.overloads() if packet is not None else []
        for overload in sorted(overloads, key=lambda overload: overload != target._overloadname):
            form: OpOverload = getattr(packet, overload)
            if _signature(form) == _signature(target) and not form._schema.is_mutable:
                return form
    return None


def _name(target: OpOverload) -> str:
    """The name of the functional form, without the namespace."""
    name = target._schema.name.rpartition("::")[2]
    if name.startswith("__i") and name.endswith("__") and target._schema.is_mutable:
        return f"__{name[3:]}"
    return name if name.endswith("__") else name.removesuffix("_")


def _signature(target: OpOverload) -> list[tuple[str, str]]:
    """Names and types of the arguments; the first is ``self`` here and ``input`` there."""
    first, *rest = target._schema.arguments
    return [("", str(first.type)), *((argument.name, str(argument.type)) for argument in rest)]


def _work(target: OpOverload) -> Work | None:
    if any(result.alias_info and not result.alias_info.is_write for result in target._schema.returns):
        return "view"
    if torch.Tag.pointwise in target.tags or getattr(torch.Tag, "reduction", None) in target.tags:
        return "elementwise"
    return None


def switches_mode(node: Node) -> bool:
    """Whether a call switches gradients or autocast on or off for all that follows; nobody reads its result."""
    return node.target in _MODE_SWITCHES


def keeps_zero(node: Node) -> Literal["first", "any", "all"] | None:
    """`Traits.keeps_zero` of a call."""
    keeps = of(node.target).keeps_zero
    exponent = arguments(node).get("exponent", 1) if isinstance(node.target, OpOverload) else 1
    return keeps if isinstance(exponent, (int, float)) and exponent > 0 else None


def values_read(node: Node) -> list[Node]:
    """The inputs of a call that it reads values of, not only sizes, dtype or device."""
    return _inputs_but(node, of(node.target).shaped_like, of(node.target).typed_like)


def operands(node: Node) -> list[Node]:
    """The inputs of a call that it reads values or sizes of, not only dtype or device."""
    return _inputs_but(node, of(node.target).typed_like)


def _inputs_but(node: Node, *lent: str) -> list[Node]:
    if not any(lent):
        return node.all_input_nodes
    read: dict[Node, None] = {}
    for name, argument in arguments(node).items():
        if name not in lent:
            torch.fx.node.map_arg(argument, lambda item: read.setdefault(item))
    return list(read)


def dims(node: Node) -> frozenset[int]:
    """The dimensions of its first operand that a call works along, counted from the left; all where it names none."""
    rank = value(node.all_input_nodes[0]).dim()
    named = arguments(node).get(of(node.target).dim)
    listed = named if isinstance(named, (list, tuple)) else [] if named is None else [named]
    return frozenset(dim % rank for dim in listed) or frozenset(range(rank))


def permutation(node: Node) -> tuple[int, ...] | None:
    """For a call that permutes, the axis of its operand that each axis of its result is; None for any other."""
    if of(node.target).axes != "permute":
        return None
    source: Any = node.args[0]
    told_apart = torch.empty(list(range(2, 2 + value(source).dim())), device="meta")
    result: Tensor = node.target(told_apart, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return tuple(size - 2 for size in result.shape)
