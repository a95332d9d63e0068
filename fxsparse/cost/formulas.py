"""FLOPs of one operator of the training IR: of its forward pass, and of the gradient of each of its inputs.

What counts as a FLOP is what ``torch.utils.flop_counter`` counts. A matrix product ``[m, k] x [k, n]`` is ``2 m k n``
FLOPs, and so is the gradient of either factor; elementwise work, norms, softmax, losses, embeddings, copies and Fourier
transforms are 0 FLOPs and show as bytes.

An operator may hold several products: attention is ``scores = q k^T`` and ``out = softmax(scores + mask) v``. The
gradient of ``q`` passes through ``scores``, the gradient of ``v`` does not, so the cost of a gradient is not a sum over
inputs; it is one over the products on the way. A formula therefore returns the products in order, each with the FLOPs
of every gradient:

    scores: q -> u, k -> u, mask -> 0        out: scores -> u, v -> u
    u = 2 * heads * queries * keys * head_dim

Formulas are plain arithmetic on shapes: they give integers for integer shapes and sympy expressions for symbolic ones.
Those of our own operators stand in their records (`fxsparse.ops`).

Two counts differ from torch's counter on purpose: it counts nothing for ``mv``, ``dot``, ``addmv`` and ``addbmm``, and
the weight gradient of a grouped convolution as often as there are groups.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from fxsparse.graph import traits
from fxsparse.graph.traits import Work
from fxsparse.ops.flops import Formula, Operand, Product, Size
from fxsparse.ops.operator import operator_of

Kind = Literal["product"] | Work


_FORMULAS: dict[str, Formula] = {}


def formula(*operators: str) -> Callable[[Formula], Formula]:
    """Registers the FLOPs of operators, such as ``@formula("mylib::my_linear")``.

    The function is called as ``f(out, *args, **kwargs)``: ``args`` and ``kwargs`` are those of the operator with every
    tensor replaced by an `Operand`; ``out`` is the operand of its output (a tuple for several). It returns the
    products, in order.
    """

    def register(function: Formula) -> Formula:
        _FORMULAS.update(dict.fromkeys(operators, function))
        return function

    return register


def formula_of(target: Any) -> Formula | None:
    """The formula of an operator, in-place variants included; None where there is none."""
    ours = operator_of(target)
    if ours is not None and ours.backward is not None:
        return ours.flops
    return _FORMULAS.get(_name(target))


def _name(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    if schema is None:
        return ""
    return str(schema.name if schema.name.endswith("__") else schema.name.removesuffix("_"))


def _product(flops: Size, *factors: Operand) -> tuple[Product, ...]:
    return (Product(flops, dict.fromkeys(factors, flops)),)


# --- products of dense tensors ----------------------------------------------------------------------------------------


@formula("aten::mm", "aten::bmm", "aten::matmul", "aten::mv", "aten::dot", "aten::vdot", "aten::inner")
def _matmul(out: Operand, a: Operand, b: Operand) -> Sequence[Product]:
    return _product(2 * out.numel * a.shape[-1], a, b)


@formula("aten::addmm", "aten::addmv", "aten::baddbmm", "aten::_addmm_activation")
def _addmm(out: Operand, bias: Operand, a: Operand, b: Operand, **scaling: Any) -> Sequence[Product]:
    return _matmul(out, a, b)


@formula("aten::addbmm")
def _addbmm(out: Operand, bias: Operand, a: Operand, b: Operand, **scaling: Any) -> Sequence[Product]:
    return _product(2 * out.numel * a.shape[0] * a.shape[-1], a, b)


@formula("aten::_grouped_mm", "transformers::grouped_mm_fallback")
def _grouped_matmul(out: Operand, tokens: Operand, experts: Operand, *rest: Any, **named: Any) -> Sequence[Product]:
    # [tokens, in] x [experts, in, out]: every token meets one expert. Torch's counter counts nothing for it.
    return _product(2 * tokens.numel * experts.shape[-1], tokens, experts)


@formula("aten::linear")
def _linear(out: Operand, x: Operand, weight: Operand, bias: Operand | None = None) -> Sequence[Product]:
    return _product(2 * out.numel * x.shape[-1], x, weight)


@formula("aten::conv1d", "aten::conv2d", "aten::conv3d")
def _convolve(out: Operand, x: Operand, weight: Operand, *options: Any, **named: Any) -> Sequence[Product]:
    # weight [out, in / groups, *kernel]: one product per output element and weight of its output channel.
    return _product(2 * out.numel * math.prod(weight.shape[1:]), x, weight)


@formula("aten::conv_transpose1d", "aten::conv_transpose2d", "aten::conv_transpose3d")
def _convolve_transposed(out: Operand, x: Operand, weight: Operand, *options: Any, **named: Any) -> Sequence[Product]:
    # weight [in, out / groups, *kernel]: one product per input element and weight of its input channel.
    return _product(2 * x.numel * math.prod(weight.shape[1:]), x, weight)


@formula("aten::convolution")
def _convolution(
    out: Operand,
    x: Operand,
    weight: Operand,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    *rest: Any,
) -> Sequence[Product]:
    return (_convolve_transposed if transposed else _convolve)(out, x, weight)


@formula("aten::scaled_dot_product_attention")
def _attention(
    out: Operand,
    query: Operand,
    key: Operand,
    value: Operand,
    attn_mask: Operand | None = None,
    *rest: Any,
    **named: Any,
) -> Sequence[Product]:
    # The math form. A fused kernel recomputes the scores and pays every gradient at once: 5 products, all or none.
    rows = math.prod(out.shape[:-1])
    scored, mixed = 2 * rows * key.shape[-2] * query.shape[-1], 2 * rows * key.shape[-2] * value.shape[-1]
    masked: dict[Operand | Product, Size] = {attn_mask: 0} if isinstance(attn_mask, Operand) else {}
    scores = Product(scored, {query: scored, key: scored, **masked}, "scores")
    return scores, Product(mixed, {scores: mixed, value: mixed}, "out")


@formula("aten::einsum")
def _einsum(
    out: Operand, equation: str, tensors: Sequence[Operand], *, path: Sequence[int] | None = None
) -> Sequence[Product]:
    inputs, output = _einsum_labels(equation, [len(t.shape) for t in tensors])
    sizes: dict[str, Size] = {}
    for labels, tensor in zip(inputs, tensors, strict=True):
        for label, size in zip(labels, tensor.shape, strict=True):
            if sizes.get(label, 1) == 1:
                sizes[label] = size

    factors: list[tuple[set[str], Operand | Product]] = [
        (set(labels), t) for labels, t in zip(inputs, tensors, strict=True)
    ]
    steps = iter(path or ())
    products: list[Product] = []
    while len(factors) > 1:
        i, j = sorted((next(steps), next(steps))) if path else (0, 1)
        (b_labels, b), (a_labels, a) = factors.pop(j), factors.pop(i)
        kept = set(output).union(*(labels for labels, _ in factors))
        contracted = (a_labels & b_labels) - kept
        # A label of one factor only is summed first; without a contracted label the product is elementwise.
        left = ((a_labels | b_labels) & kept) | contracted
        flops = 2 * math.prod(sizes[label] for label in left) if contracted else 0
        products.append(Product(flops, {a: flops, b: flops}, f"product{len(products)}"))
        factors.insert(len(factors) if path else 0, (left - contracted, products[-1]))
    return products or (Product(0),)


def _einsum_labels(equation: str, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """The labels of every operand and of the output, an ellipsis spelt out as ``...0``, ``...1`` from the right."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    hidden = [
        rank - len(term.replace("...", "")) if "..." in term else 0 for term, rank in zip(terms, ranks, strict=True)
    ]

    def spell(term: str, count: int) -> list[str]:
        before, _, after = term.partition("...")
        dots = [f"...{i}" for i in reversed(range(count))] if "..." in term else []
        return [*before, *dots, *after]

    inputs = [spell(term, count) for term, count in zip(terms, hidden, strict=True)]
    if arrow:
        return inputs, spell(right, max(hidden))
    seen = list(itertools.chain(*inputs))
    once = sorted(label for label in set(seen) if seen.count(label) == 1 and not label.startswith("..."))
    return inputs, [*spell("...", max(hidden)), *once]


# --- what costs no FLOPs ----------------------------------------------------------------------------------------------

_PYTHON_MODULES = {"_operator", "operator", "math", "builtins"}


def kind(target: Any) -> Kind | None:
    """What an operator does, as far as its cost goes; None where that is not known.

    ``product``: has a formula. The others are `fxsparse.graph.traits.Traits.work`; what is created passes no gradient
    on.
    """
    if formula_of(target) is not None:
        return "product"
    if not isinstance(target, torch._ops.OpOverload):
        is_size_arithmetic = getattr(target, "__module__", None) in _PYTHON_MODULES or getattr(
            target, "__name__", ""
        ).startswith("sym_")
        return "free" if is_size_arithmetic else None
    return traits.of(target).work


# --- operators without a formula: run them ----------------------------------------------------------------------------


class _Leaves(TorchDispatchMode):
    """Notes whether everything that runs is known to the counter or known to cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.known = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        backward = _name(func).endswith(("_backward", "_backward_data"))
        self.known &= (
            func.overloadpacket in flop_registry
            or kind(func) in {"view", "elementwise", "gather", "create", "free"}
            or backward
        )
        return func(*args, **(kwargs or {}))


def measure(target: Any, args: Any, kwargs: Any) -> Sequence[Product] | None:
    """The FLOPs of a composite operator without a formula, by running it on meta tensors under torch's counter.

    Args:
        target: the operator.
        args, kwargs: its arguments with every tensor replaced by an `Operand` of integer shape.

    Returns:
        One product, or None where the operator does not run, runs something that nothing is known of, or has gradients
        whose costs do not add up over its inputs.
    """
    operands = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Operand)]
    floating = [operand for operand in operands if operand.dtype.is_floating_point]
    try:
        forward, _ = _run(target, args, kwargs, ())
        gradients = {operand: _run(target, args, kwargs, [operand])[1] for operand in floating}
        together = _run(target, args, kwargs, floating)[1]
    except Exception:  # whatever the operator dislikes about meta tensors: it stays uncounted, which is reported
        return None
    if forward is None or together is None or together != sum(cost or 0 for cost in gradients.values()):
        return None
    return (Product(forward, {operand: cost or 0 for operand, cost in gradients.items()}),)


def _run(target: Any, args: Any, kwargs: Any, wanted: Iterable[Operand]) -> tuple[int | None, int | None]:
    """FLOPs of the forward pass and of the gradients of ``wanted``; None where an unknown operator ran."""
    made: dict[Operand, Tensor] = {}

    def make(operand: Operand) -> Tensor:
        tensor = torch.empty(operand.shape, dtype=operand.dtype, device="meta")
        made[operand] = tensor.requires_grad_(any(operand is other for other in wanted))
        return made[operand]

    args, kwargs = tree_map_only(Operand, make, (args, kwargs))
    leaves, counter = _Leaves(), FlopCounterMode(display=False)
    with torch.enable_grad(), counter, leaves:
        outputs = [leaf for leaf in tree_flatten(target(*args, **kwargs))[0] if isinstance(leaf, Tensor)]
        forward = counter.get_total_flops()
        outputs = [output for output in outputs if output.requires_grad]
        if outputs:
            torch.autograd.grad(
                outputs,
                [made[operand] for operand in wanted],
                [torch.empty_like(o) for o in outputs],
                allow_unused=True,
            )
    total = counter.get_total_flops()
    return (forward, total - forward) if leaves.known else (None, None)
