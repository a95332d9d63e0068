"""Random pipelines: values are drawn from the declarations of the options, orders mostly from those that make sense."""

from __future__ import annotations

import collections.abc
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from hypothesis import strategies as st

from fxsparse.errors import OptionError
from fxsparse.ops.nm import PatternText
from fxsparse.options import FrozenMapping, Glob, options_of
from fxsparse.passes import Pass
from fxsparse.passes.base import pass_classes
from fxsparse.passes.order import after, misplaced

PASSES = {name: cls for name, cls in sorted(pass_classes().items()) if cls.__module__.startswith("fxsparse.")}
PATTERNS = ("2:4", "1:4", "1:2", "2:8", "4:8", "3:4", "1:3", "2:5")
PATHS = ("*", "*up", "*down", "*.q", "*attention*", "blocks.0.*", "blocks.1.mlp", "head", "*0*", "nowhere")
TENSORS = ("*", "*weight", "*bias", "blocks.1.*", "*down*", "*attention*", "norm*", "head.weight", "nothing")
STACKS = ("blocks", "*", "other")

_WRITTEN_BY_SCHEDULES = {("materialize", "kept"), ("select-tensors", "chosen"), ("select-neurons", "now")}
_NOT_TEXT = {"calibration", "teacher", "width"}
_GLOBS = {"tensors": TENSORS, "fraction": STACKS, "count": STACKS, "indices": STACKS, "stack": STACKS}
_HIGHEST = {"rank": 9, "permutations": 5, "n": 4, "ensemble": 4, "layers": 3, "multiple": 8, "count": 3, "ignore": 30}
"""Values above which a small model has nothing new to show, for whole numbers; 4 where nothing is said."""


def values_of(declared: Any, name: str = "") -> st.SearchStrategy[Any]:
    """Values that fit a declaration, small ones mostly."""
    if declared is PatternText or declared == PatternText:
        return st.sampled_from(PATTERNS)
    if declared == Glob:
        return st.sampled_from(_GLOBS.get(name, PATHS))
    base, bounds = (
        (get_args(declared)[0], declared.__metadata__) if get_origin(declared) is Annotated else (declared, ())
    )
    origin, members = get_origin(base), get_args(base)
    if origin in (Union, types.UnionType):
        return st.one_of([values_of(member, name) for member in members])
    if origin is Literal:
        return st.sampled_from(members)
    if origin is tuple:
        return _tuples(members, _single(bounds), name)
    if origin is collections.abc.Mapping:
        keys = st.sampled_from(_GLOBS.get(name, PATHS))
        entries = st.lists(
            st.tuples(keys, values_of(members[1], name)), min_size=1, max_size=2, unique_by=lambda i: i[0]
        )
        return entries.map(FrozenMapping)
    if base is bool:
        return st.booleans()
    return _numbers(base, _single(bounds), name) if base in (int, float) else st.none()


def _single(bounds: Any) -> list[Any]:
    return [bound for group in bounds for bound in (group if hasattr(group, "__iter__") else (group,))]


def _tuples(members: tuple[Any, ...], bounds: list[Any], name: str) -> st.SearchStrategy[Any]:
    if len(members) == 2 and members[1] is Ellipsis:
        least = max([bound.min_length for bound in bounds if isinstance(bound, MinLen)], default=0)
        most = min([bound.max_length for bound in bounds if isinstance(bound, MaxLen)], default=3)
        return st.lists(values_of(members[0], name), min_size=least, max_size=most).map(tuple)
    return st.tuples(*(values_of(member, name) for member in members))


def _numbers(base: type, bounds: list[Any], name: str) -> st.SearchStrategy[Any]:
    least = max(
        [getattr(bound, "ge", getattr(bound, "gt", 0)) for bound in bounds if isinstance(bound, (Ge, Gt))], default=0
    )
    most = min(
        [getattr(bound, "le", getattr(bound, "lt", 1)) for bound in bounds if isinstance(bound, (Le, Lt))], default=2
    )
    if base is int:
        least = max(least, -3)
        return st.integers(least, min(most, _HIGHEST.get(name, 4)))
    inside = [least + (most - least) * at / 20 for at in range(21)]
    if any(isinstance(bound, Gt) for bound in bounds):
        inside = inside[1:]
    if any(isinstance(bound, Lt) for bound in bounds):
        inside = inside[:-1]
    return st.sampled_from(inside)


@st.composite
def passes(draw: Callable[[Any], Any], name: str) -> str:
    """The text of a pass with some of its options set; one whose options contradict each other now and then."""
    cls: type[Pass] = PASSES[name]
    options = [
        option
        for option in options_of(cls)
        if option.name not in _NOT_TEXT and (name, option.name) not in _WRITTEN_BY_SCHEDULES
    ]
    given = {option.name: draw(values_of(option.declared, option.name)) for option in options if draw(_SOMETIMES)}
    try:
        return str(cls(**given))
    except OptionError:
        return str(cls(**dict(list(given.items())[:1]))) if _fits(cls, dict(list(given.items())[:1])) else name


_SOMETIMES = st.sampled_from([False, False, True])


def _fits(cls: type[Pass], options: dict[str, Any]) -> bool:
    try:
        cls(**options)
    except OptionError:
        return False
    return True


@st.composite
def pipelines(draw: Callable[[Any], Any], most: int = 4) -> tuple[str, ...]:
    """One to ``most`` passes; one in ten may come where it is misplaced."""
    chosen: list[str] = []
    done: list[str] = []
    for _ in range(draw(st.integers(1, most))):
        anywhere = draw(st.integers(0, 9)) == 9
        names = [name for name in PASSES if anywhere or misplaced(name, done) is None]
        name = draw(st.sampled_from(names))
        chosen.append(draw(passes(name)))
        done = after(done, name)
    return tuple(chosen)
