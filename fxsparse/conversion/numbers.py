"""The numbers that the modules of an attention store, of heads and of their features, where it has lost heads.

A class writes them under names of its own (``self.num_heads``, ``self.inner_dim``) and shapes its tensors by them.
Which of them follow is told by their values in the original: what says how many heads there are shrinks as the columns
of the attention's output do, and what is as large as all heads together has their new size. Whoever sets them compares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.analysis.heads import Attention, common_path
from fxsparse.analysis.structures import attentions
from fxsparse.conversion.depth import Shortened, renumber
from fxsparse.conversion.heads import Chosen, Heads, heads_of, stored_numbers

_ONE_HEAD = ("dim", "size", "per_head")
_KEYS = ("key_value", "kv")


@dataclass(frozen=True)
class _Shrunk:
    """An attention that has lost heads: features before and now, of all queries' results and of all keys."""

    path: str
    queries: tuple[int, int]
    keys: tuple[int, int]


def heads_to_try(
    gm: GraphModule, model: nn.Module, before: Mapping[str, Chosen], shortened: Shortened
) -> Iterator[Heads]:
    """What attentions may have to select, the likeliest first, by their paths after layers were dropped.

    First the heads alone; then the numbers that modules store with them: those of heads, then those of features too.

    Args:
        gm: the graph.
        model: the model from which it was traced.
        before: the heads that ``model`` selects already, see `fxsparse.conversion.heads.heads_of`.
        shortened: the layers that were dropped.
    """
    heads = heads_of(gm, model, before)
    for each in (heads, *_with_numbers(heads, gm, model)):
        yield {renumber(path, shortened): chosen for path, chosen in each.items()}


def _with_numbers(heads: Heads, gm: GraphModule, model: nn.Module) -> Iterator[Heads]:
    shrunk = list(_shrunk(gm, model))
    for features_too in (False, True):
        found = {path: dict(chosen) for path, chosen in heads.items()}
        for item in shrunk:
            for path, module in model.get_submodule(item.path).named_modules(prefix=item.path):
                numbers = _numbers(module, item, features_too=features_too)
                if numbers:
                    found[path] = {**found.get(path, {}), **numbers}
        if shrunk:
            yield found


def _shrunk(gm: GraphModule, model: nn.Module) -> Iterator[_Shrunk]:
    before = dict(model.named_parameters(remove_duplicate=False))
    for attention in attentions(gm):
        output = attention.output.linear
        linears = [rows.linear for rows in attention.projections]
        if any(linear.name not in before for linear in (output, *linears)):
            continue
        was = _features(before[output.name].shape, transposed=output.transposed)[1]
        key_rows = _key_rows(attention)
        if was == output.in_features:
            continue
        names = [fx.module_path(linear.name) for linear in (output, *linears)]
        keys = (0, 0)
        if key_rows is not None and (linear := key_rows).name in before:
            keys = (_features(before[linear.name].shape, transposed=linear.transposed)[0], linear.out_features)
        yield _Shrunk(common_path(names), (was, output.in_features), keys)


def _key_rows(attention: Attention) -> fx.Linear | None:
    """The linear that makes the keys and nothing else."""
    of_kind: dict[str, set[str]] = {}
    for rows in attention.projections:
        of_kind.setdefault(rows.linear.name, set()).add(rows.kind)
    keys = [rows.linear for rows in attention.projections if rows.kind == "key"]
    return keys[0] if keys and of_kind[keys[0].name] == {"key"} else None


def _features(shape: tuple[int, ...], *, transposed: bool) -> tuple[int, int]:
    """``(out, in)`` of a weight."""
    return (shape[1], shape[0]) if transposed else (shape[0], shape[1])


def _numbers(module: nn.Module, shrunk: _Shrunk, *, features_too: bool) -> dict[str, int]:
    if isinstance(getattr(module, "weight", None), nn.Parameter):
        return {}  # a linear's features follow its weight
    found = {}
    for name, number in stored_numbers(module).items():
        if "head" in name and not any(word in name for word in _ONE_HEAD):
            before, now = shrunk.keys if any(word in name for word in _KEYS) and all(shrunk.keys) else shrunk.queries
            if "group" not in name and number * now % before == 0:
                found[name] = number * now // before
        elif features_too and number in (shrunk.queries[0], shrunk.keys[0]) and number:
            found[name] = shrunk.queries[1] if number == shrunk.queries[0] else shrunk.keys[1]
    return found
