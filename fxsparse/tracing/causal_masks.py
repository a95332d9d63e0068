"""Attention that is causal says so, and attention that sees everything has no mask.

Capture writes a model's mask out: ``arange``, compare, expand, and the result goes into
``scaled_dot_product_attention`` as ``attn_mask``, which rules out the flash kernels on a GPU. Where such a mask depends
on sizes only and is the lower triangle at every size, the attention gets ``is_causal=True`` instead; where it hides
nothing, it goes. A mask that depends on an input's values (padding), on a parameter (a learnt bias) or that hides more
(a sliding window) stays. A window that is longer than the example hides nothing more up to its own length: there the
attention is causal, under the condition that no longer input comes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fxsparse import graph as fx
from fxsparse.graph.traits import values_read
from fxsparse.tracing.modes import is_random

aten = torch.ops.aten

_SDPA = aten.scaled_dot_product_attention.default
_DEFAULTS = (None, None, None, None, 0.0, False)  # query, key, value, attn_mask, dropout_p, is_causal

_CONSTANT = re.compile(r"(.*\.)?(lifted_tensor_|_tensor_constant)\d+")
"""Names that capture gives to tensors written in the code; a buffer could be loaded with other values."""

_LENGTHS = (2, 3, 5, 8, 17)
_LONGEST_PROBE = 2048
_LONGEST_WINDOW = 8192  # a mask of that length is made once, to see whether it is causal
_UNBOUNDED = 2**31  # a slice to the end is written as a slice to the largest integer


def restore_is_causal(gm: GraphModule, longest: dict[Any, int] | None = None) -> int:
    """Turns explicit causal masks into ``is_causal=True`` wherever they are provably the same; other masks stay.

    Args:
        gm: a training-IR graph; edited in place, nodes that only built such masks are erased. Call ``recompile`` after.
        longest: if given, masks that are causal up to some length count as well, and it takes the longest sequence, by
            its symbol, for which the graph is still right.

    Returns:
        the number of attentions changed.
    """
    return _replace_masks(gm, _is_lower_triangle, is_causal=True, longest=longest)


def drop_open_masks(gm: GraphModule) -> int:
    """Drops explicit masks that provably hide nothing; they too rule out the flash kernels.

    Args and result as :func:`restore_is_causal`.
    """
    return _replace_masks(gm, _is_open, is_causal=False)


def _replace_masks(
    gm: GraphModule, keeps: Callable[[Tensor], bool], *, is_causal: bool, longest: dict[Any, int] | None = None
) -> int:
    proved: dict[Node, bool] = {}
    changed = 0
    for node in gm.graph.find_nodes(op="call_function", target=_SDPA):
        arguments = [*node.args, *_DEFAULTS[len(node.args) :]]
        for position, name in ((3, "attn_mask"), (4, "dropout_p"), (5, "is_causal")):
            arguments[position] = node.kwargs.get(name, arguments[position])
        mask = arguments[3]
        if not isinstance(mask, Node) or (is_causal and not _same_length(*arguments[:2])):
            continue
        if mask not in proved:
            proved[mask] = _holds_at_every_size(gm, mask, keeps)
            limit = None if proved[mask] or longest is None else _holds_up_to(gm, mask, keeps)
            if limit is not None and longest is not None:
                length = _expression(fx.value(mask).shape[-1])
                longest[length] = min(limit, longest.get(length, limit))
                proved[mask] = True
        if proved[mask]:
            arguments[3], arguments[5] = None, is_causal
            node.args = tuple(arguments)
            node.kwargs = {name: item for name, item in node.kwargs.items() if name in {"scale", "enable_gqa"}}
            changed += 1
    for mask, is_proved in proved.items():
        if is_proved:
            _erase_unused(mask)
    return changed


def _same_length(query: Node, key: Node) -> bool:
    queries, keys = fx.value(query).shape[-2], fx.value(key).shape[-2]
    return _expression(queries) == _expression(keys)


def _expression(size: int | SymInt) -> Any:
    return size.node.expr if isinstance(size, SymInt) else size


def _holds_at_every_size(gm: GraphModule, mask: Node, keeps: Callable[[Tensor], bool]) -> bool:
    cone = _cone(mask)
    probes = _probes(cone, mask) if cone else None
    return cone is not None and probes is not None and _holds_at(gm, mask, cone, probes, keeps)


def _holds_up_to(gm: GraphModule, mask: Node, keeps: Callable[[Tensor], bool]) -> int | None:
    """The largest constant of a mask up to which it holds at every length, if the example is no longer, else None."""
    cone, length = _cone(mask), _expression(fx.value(mask).shape[-1])
    if not cone or not isinstance(length, sympy.Symbol):
        return None
    example = fx.value(mask).shape[-1].node.hint
    for limit in sorted({constant for constant in _constants(cone) if example <= constant <= _LONGEST_WINDOW})[::-1]:
        lengths = sorted({*(short for short in _LENGTHS if short < limit), example, limit})
        if _holds_at(gm, mask, cone, _sizes(cone, [length], lengths), keeps):
            return limit
    return None


def _holds_at(
    gm: GraphModule, mask: Node, cone: list[Node], probes: list[dict[Any, int]], keeps: Callable[[Tensor], bool]
) -> bool:
    for sizes in probes:
        try:
            found = _evaluate(gm, cone, sizes)[mask]
        except Exception:  # an operator that has no kernel for these sizes proves nothing: the mask stays
            return False
        if not keeps(found):
            return False
    return True


def _is_lower_triangle(mask: Tensor) -> bool:
    """Whether a boolean or an additive mask keeps exactly the keys up to the query."""
    if mask.dim() < 2 or mask.shape[-1] != mask.shape[-2]:
        return False
    kept = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    if mask.dtype is torch.bool:
        return bool((mask == kept).all())
    if not mask.is_floating_point():
        return False
    return bool(torch.where(kept, mask == 0, mask <= torch.finfo(mask.dtype).min).all())


def _is_open(mask: Tensor) -> bool:
    """Whether a boolean or an additive mask keeps every key."""
    return bool((mask if mask.dtype is torch.bool else mask == 0).all())


def _cone(mask: Node) -> list[Node] | None:
    """The calls that ``mask`` is computed by, in order, writes into views included; None where a value decides it."""
    found: set[Node] = set()
    pending = [mask]
    while pending:
        node = pending.pop()
        if node in found:
            continue
        if node.op == "get_attr" and not _CONSTANT.fullmatch(str(node.target)):
            return None
        if node.op not in {"get_attr", "call_function"}:
            return None
        if is_random(node):
            return None
        found.add(node)
        pending.extend(values_read(node))
        pending.extend(write for write in _writes_to(node) if write not in found)
    position = {node: index for index, node in enumerate(mask.graph.nodes)}
    if max(position[node] for node in found) > min(position[user] for user in mask.users if user.target is _SDPA):
        return None  # written into after it was read
    return sorted(found, key=position.__getitem__)


def _writes_to(node: Node) -> Iterator[Node]:
    """The in-place calls that write into ``node`` or a view of it."""
    for user in node.users:
        schema = getattr(user.target, "_schema", None)
        if schema is None:
            continue
        aliased = [
            spec.alias_info
            for spec, arg in zip(schema.arguments, user.args, strict=False)
            if arg is node and spec.alias_info
        ]
        if any(info.is_write for info in aliased):
            yield user
        if aliased:
            yield from _writes_to(user)


def _probes(cone: list[Node], mask: Node) -> list[dict[Any, int]] | None:
    """Values for the symbols that sizes are made of, chosen to show what a mask does at any size.

    Where the sequence length is a symbol, lengths just beyond every constant in the cone are among them: a window of 4
    looks causal up to length 4. None where a constant is too large to look beyond.
    """
    lasts = fx.value(mask).shape[-2:]
    in_length = sorted({s for size in lasts for s in getattr(_expression(size), "free_symbols", ())}, key=str)
    lengths = set(_LENGTHS)
    if in_length:
        constants = set(_constants(cone))
        if any(constant > _LONGEST_PROBE for constant in constants):
            return None
        lengths |= {constant + 2 for constant in constants}
    return _sizes(cone, in_length, sorted(lengths))


def _sizes(cone: list[Node], in_length: list[Any], lengths: list[int]) -> list[dict[Any, int]]:
    """Values for all symbols of a cone, for each of these lengths of those in ``in_length``."""
    symbols = {symbol for node in cone for symbol in _symbols(node)}
    return [
        {symbol: length + in_length.index(symbol) if symbol in in_length else 1 + index % 3 for symbol in symbols}
        for index, length in enumerate(lengths)
    ]


def _symbols(node: Node) -> set[Any]:
    values = [fx.value(n) for n in (node, *node.all_input_nodes) if "val" in n.meta]
    leaves = pytree.tree_leaves(values)
    sizes = [size for item in leaves for size in (item.shape if isinstance(item, Tensor) else [item])]
    return {symbol for size in sizes if isinstance(size, SymInt) for symbol in _expression(size).free_symbols}


def _constants(cone: list[Node]) -> Iterator[int]:
    for node in cone:
        for item in pytree.tree_leaves((node.args, node.kwargs)):
            if isinstance(item, (int, float)) and not isinstance(item, bool) and 0 < abs(item) < _UNBOUNDED:
                yield abs(int(item))


def _evaluate(gm: GraphModule, cone: list[Node], sizes: dict[Any, int]) -> dict[Node, Any]:
    """The values of a cone at given sizes, on the CPU."""
    results: dict[Node, Any] = {}

    def concrete(size: int | SymInt) -> int:
        expression = _expression(size)
        return expression if isinstance(expression, int) else int(expression.subs(sizes))

    def load(node: Node) -> Any:
        if node in results:
            return results[node]
        fake = fx.value(node)  # outside the cone: only its sizes are read
        return torch.empty([concrete(size) for size in fake.shape], dtype=fake.dtype)

    with torch.no_grad(), torch.device("cpu"):
        for node in cone:
            if node.op == "get_attr":
                results[node] = fx.attribute(gm, str(node.target)).detach().to("cpu", copy=True)
                continue
            args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), load)
            args, kwargs = pytree.tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
            results[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return results


def _erase_unused(node: Node) -> None:
    """Erases ``node`` and then what only it read, as far as erasing has no effect."""
    schema = getattr(node.target, "_schema", None)
    if node.users or node.op == "placeholder" or (schema is not None and schema.is_mutable):
        return
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for source in inputs:
        _erase_unused(source)
