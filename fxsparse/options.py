"""Options with declared types: an annotation says type and range once, and every value is checked against it.

    every: Count = 1                                              Annotated[int, Interval(ge=1, le=...)]
    rho: Annotated[float, Interval(gt=0, le=1)] | None = None
    metric: Literal["importance", "delta", "gradient"] = "importance"
    layers: Globs | None = None                                   tuple[Glob, ...]

`checked` brings a value into its declared form: whole and real numbers of other libraries become Python's, lists become
tuples, one value stands for a tuple of one, a mapping becomes a `FrozenMapping`. What does not fit is an
:class:`~fxsparse.errors.OptionError` with the option, what was given and what is allowed. True is no number, and a
float is finite. Bounds are those of ``annotated_types``. What cannot be declared for one option alone (two that exclude
each other) is checked by the class that has them.

An annotation may be ``bool``, ``int``, ``float``, ``str``, ``None``, ``Literal``, ``tuple[T, ...]``, ``tuple[A, B]``,
``Mapping[str, T]``, unions of these, ``Annotated`` of them, ``Any``, and any class, which is checked by ``isinstance``.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import itertools
import math
import numbers
import re
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, GroupedMetadata, Gt, Interval, Le, Len, Lt, MaxLen, MinLen

from fxsparse.errors import OptionError, nearest

MOST_ITEMS = 100_000
"""Of a list or a mapping."""
LONGEST_TEXT = 1_000_000
"""Characters of a text in an option: a record may list every unit of a layer."""


class FrozenMapping(tuple[tuple[str, Any], ...]):
    """A mapping an option can hold: hashable, equal by its items in order, written as a dictionary."""

    __slots__ = ()

    def __new__(cls, items: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> FrozenMapping:
        return super().__new__(cls, items.items() if isinstance(items, Mapping) else items)


@dataclass(frozen=True)
class Written:
    """Metadata of a ``str`` that has a form.

    Attributes:
        form: what it is called in a message.
        pattern: a regular expression that the whole text matches.
        canonical: gives the one spelling of a text of this form; its OptionError is part of the message.
        also: types whose ``str`` is such a text.
    """

    form: str
    pattern: str = r".*"
    canonical: Callable[[str], str] = str
    also: tuple[type, ...] = ()


Count = Annotated[int, Interval(ge=1, le=2**31 - 1)]
Share = Annotated[float, Interval(ge=0, le=1)]
Weight = Annotated[float, Interval(ge=0)]
Positive = Annotated[float, Interval(gt=0)]
Index = Annotated[int, Interval(ge=0, le=2**31 - 1)]
Whole = Annotated[int, Interval(ge=-(2**63), le=2**63 - 1)]
Seed = Whole
Glob = Annotated[str, Len(1, 1000)]
Globs = tuple[Glob, ...]


class _Misfit(Exception):
    """A value that does not fit: the path to it within the option, the value, what is allowed there, and more."""

    def __init__(self, value: Any, declared: Any, path: str = "", more: str = ""):
        super().__init__(path)
        self.value, self.declared, self.path, self.more = value, declared, path, more

    def within(self, path: str) -> _Misfit:
        return _Misfit(self.value, self.declared, path + self.path, self.more)


def checked(name: str, value: Any, declared: Any, *, pass_name: str | None = None) -> Any:
    """``value`` in the form that ``declared`` has.

    Args:
        name: of the option, for the message.
        value: what was given.
        declared: a type, with its range as metadata.
        pass_name: the pass's textual name.

    Raises:
        OptionError: it does not fit.
    """
    try:
        return _fit(value, declared)
    except _Misfit as misfit:
        more = f": {misfit.more}" if misfit.more else ""
        given = shown(misfit.value)
        message = f"{name}{misfit.path}={given} must be {allowed(misfit.declared)}{more}"
    raise OptionError(message, pass_name=pass_name)


def check_fields(item: Any, *, pass_name: str | None = None) -> None:
    """Brings every field of a frozen dataclass into its declared form, in place; for ``__post_init__``."""
    for field, declared in declared_fields(item.__class__).items():
        object.__setattr__(item, field, checked(field, getattr(item, field), declared, pass_name=pass_name))


@functools.cache
def declared_fields(cls: type) -> dict[str, Any]:
    """The annotation of every field that ``cls`` is constructed with; ``Any`` where a name in it cannot be resolved."""
    every: dict[str, Any] = {}
    for field in fields(cls):
        owner = next(base for base in cls.__mro__ if field.name in inspect.get_annotations(base))
        if field.init:
            every[field.name] = _resolved(field.type, owner)
    return every


def _resolved(annotation: Any, owner: type) -> Any:
    """An annotation that ``from __future__ import annotations`` left as text; a class inside a function is unknown."""
    holder = type("holder", (), {"__annotations__": {"x": annotation}})
    scope = vars(sys.modules[owner.__module__]) if owner.__module__ in sys.modules else {}
    try:
        return typing.get_type_hints(holder, dict(scope), dict(vars(owner)), include_extras=True)["x"]
    except (NameError, AttributeError, TypeError):
        return Any


def shown(value: Any) -> str:
    """``repr``, shortened: what is echoed may be as long as its sender likes."""
    return _SHORT.repr(value)


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring, self.maxother, self.maxlevel = 80, 80, 3

    def repr_int(self, value: int, level: int) -> str:
        bits = value.bit_length()
        return super().repr_int(value, level) if bits < 10_000 else f"a number of {bits} bits"


_SHORT = _Short()


# --- fitting ----------------------------------------------------------------------------------------------------------


def _fit(value: Any, declared: Any) -> Any:
    if declared is Any:
        return value
    base, metadata = _split(declared)
    if metadata:
        return _within_bounds(value, declared, base, metadata)
    origin = get_origin(base)
    if origin in (Union, types.UnionType):
        return _fit_union(value, base)
    if origin is Literal:
        return _fit_literal(value, base)
    if origin is tuple:
        return _fit_tuple(value, base)
    if origin is collections.abc.Mapping:
        return _fit_mapping(value, base)
    return _fit_class(value, base if origin is None else origin, declared)


def _fit_class(value: Any, cls: Any, declared: Any) -> Any:
    if cls is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if cls is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
        raise _Misfit(value, declared)
    if cls is str and isinstance(value, str) and len(value) <= LONGEST_TEXT:
        return str.__str__(value)
    if cls is FrozenMapping and isinstance(value, Mapping):
        return FrozenMapping(value)
    if cls in (int, float, str) or not _is_instance(value, cls):
        raise _Misfit(value, declared)
    return value


def _is_instance(value: Any, cls: Any) -> bool:
    """True too where nothing can be said, of a type variable say."""
    try:
        return isinstance(value, types.NoneType if cls is None else cls)
    except TypeError:
        return True


def _fit_union(value: Any, declared: Any) -> Any:
    misfits = []
    for member in get_args(declared):
        try:
            return _fit(value, member)
        except _Misfit as misfit:
            misfits.append(misfit)
    inside = [misfit for misfit in misfits if misfit.path or misfit.more]
    raise inside[0] if len(inside) == 1 else _Misfit(value, declared)


def _fit_literal(value: Any, declared: Any) -> Any:
    words = get_args(declared)
    for word in words:
        if isinstance(value, type(word)) and isinstance(value, bool) == isinstance(word, bool) and value == word:
            return word
    raise _Misfit(value, declared, more=nearest(value, words).strip() if isinstance(value, str) else "")


def _fit_tuple(value: Any, declared: Any) -> Any:
    members = get_args(declared)
    of_any_length = len(members) == 2 and members[1] is Ellipsis
    if isinstance(value, (str, bytes, Mapping, FrozenMapping)) or not isinstance(value, Iterable):
        if not of_any_length:
            raise _Misfit(value, declared)
        try:
            return (_fit(value, members[0]),)
        except _Misfit as misfit:
            raise _Misfit(value, declared, more=misfit.more) from None
    try:
        items = list(itertools.islice(iter(value), MOST_ITEMS + 1))
    except TypeError:  # a tensor of no dimension
        raise _Misfit(value, declared) from None
    if len(items) > MOST_ITEMS:
        raise _Misfit(value, declared, more=f"it has more than {MOST_ITEMS:,} items")
    types_of = members[:1] * len(items) if of_any_length else members
    if len(items) != len(types_of):
        raise _Misfit(value, declared)
    return tuple(_fit_at(f"[{at}]", *pair) for at, pair in enumerate(zip(items, types_of, strict=True)))


def _fit_mapping(value: Any, declared: Any) -> FrozenMapping:
    if not isinstance(value, (Mapping, FrozenMapping)):
        raise _Misfit(value, declared)
    if len(value) > MOST_ITEMS:
        raise _Misfit(value, declared, more=f"it has more than {MOST_ITEMS:,} items")
    key_type, item_type = get_args(declared)
    try:
        items = dict(value).items()
    except (TypeError, ValueError):  # a FrozenMapping of something else than pairs
        raise _Misfit(value, declared) from None
    return FrozenMapping((_fit(key, key_type), _fit_at(f"[{shown(key)}]", item, item_type)) for key, item in items)


def _fit_at(path: str, value: Any, declared: Any) -> Any:
    try:
        return _fit(value, declared)
    except _Misfit as misfit:
        raise misfit.within(path) from None


def _within_bounds(given: Any, declared: Any, base: Any, metadata: list[Any]) -> Any:
    forms = [bound for bound in metadata if isinstance(bound, Written)]
    also = tuple(cls for form in forms for cls in form.also)
    try:
        value = _fit(str(given) if isinstance(given, also) else given, base)
    except _Misfit as misfit:
        raise misfit if misfit.path else _Misfit(given, declared, more=misfit.more) from None
    if not all(_holds(value, bound) for bound in metadata):
        raise _Misfit(given, declared)
    for form in forms:
        try:
            value = form.canonical(value)
        except OptionError as error:
            raise _Misfit(given, declared, more=str(error)) from None
    return value


def _holds(value: Any, bound: Any) -> bool:
    if isinstance(bound, Gt):
        return bool(value > bound.gt)
    if isinstance(bound, Ge):
        return bool(value >= bound.ge)
    if isinstance(bound, Lt):
        return bool(value < bound.lt)
    if isinstance(bound, Le):
        return bool(value <= bound.le)
    if isinstance(bound, MinLen):
        return len(value) >= bound.min_length
    if isinstance(bound, MaxLen):
        return len(value) <= bound.max_length
    return not isinstance(bound, Written) or re.fullmatch(bound.pattern, value, re.DOTALL) is not None


def _split(declared: Any) -> tuple[Any, list[Any]]:
    """A type without its metadata, and the metadata in single bounds."""
    if get_origin(declared) is not Annotated:
        return declared, []
    base, *metadata = get_args(declared)
    groups = (item if isinstance(item, GroupedMetadata) else (item,) for item in metadata)
    return base, list(itertools.chain.from_iterable(groups))


# --- saying what is allowed -------------------------------------------------------------------------------------------


def allowed(declared: Any) -> str:
    """What may be given, as a noun: ``a number in (0, 1]``, ``one of magnitude, random``."""
    base, metadata = _split(declared)
    origin = get_origin(base)
    written = [item for item in metadata if isinstance(item, Written)]
    if written:
        return written[0].form
    if origin in (Union, types.UnionType):
        return _allowed_of(get_args(base))
    if origin is Literal:
        return f"one of {', '.join(map(str, get_args(base)))}"
    if origin is tuple:
        return _allowed_tuple(get_args(base)) + _bounds(metadata)
    if origin is collections.abc.Mapping:
        return f"a mapping from texts to {_plural(allowed(get_args(base)[1]))}{_bounds(metadata)}"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", types.NoneType: "none"}
    return names.get(base, f"of type {getattr(origin or base, '__name__', base)}") + _bounds(metadata)


def _allowed_of(members: tuple[Any, ...]) -> str:
    return " or ".join(allowed(member) for member in sorted(members, key=lambda member: member is types.NoneType))


def _allowed_tuple(members: tuple[Any, ...]) -> str:
    if len(members) == 2 and members[1] is Ellipsis:
        return f"a list of {_plural(allowed(members[0]))}"
    each = list(map(allowed, members))
    if len(set(each)) == 1:
        return f"a list of {len(each)} {_plural(each[0])}"
    return f"a list of {len(each)}: {', '.join(each)}"


def _plural(noun: str) -> str:
    """``a whole number in [0, 1]``: ``whole numbers in [0, 1]``; ``one of a, b``: ``any of a, b``."""
    noun = re.sub(r"^one of", "any of", noun)
    return re.sub(r"^a ((?:whole )?(?:number|text|list|mapping))\b", r"\1s", noun)


def _bounds(metadata: Iterable[Any]) -> str:
    """The bounds in words: those of a number as an interval, those of a length as such."""
    low, high, least, most = "(", ")", -math.inf, math.inf
    shortest, longest = 0, None
    for bound in metadata:
        if isinstance(bound, (Gt, Ge)):
            low, least = ("[", bound.ge) if isinstance(bound, Ge) else ("(", bound.gt)  # type: ignore[assignment]
        elif isinstance(bound, (Lt, Le)):
            high, most = ("]", bound.le) if isinstance(bound, Le) else (")", bound.lt)  # type: ignore[assignment]
        elif isinstance(bound, MinLen):
            shortest = bound.min_length
        elif isinstance(bound, MaxLen):
            longest = bound.max_length
    length = ", not empty" if shortest else ""
    length += f", of at most {longest:,} characters" if longest is not None else ""
    return _interval(low, least, most, high) + length


def _interval(low: str, least: float, most: float, high: str) -> str:
    if (least, most) == (-(2**63), 2**63 - 1):
        return " of 64 bits"
    if most in (math.inf, 2**31 - 1) and least > -math.inf:  # the most that a count can be says nothing to a reader
        return f" of at least {least}" if low == "[" else f" above {least}"
    return f" in {low}{least}, {most}{high}" if (least, most) != (-math.inf, math.inf) else ""


# --- listing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """An option as it is declared.

    Attributes:
        name: of the field.
        declared: its annotation.
        allowed: what may be given, in words.
        default: its value where nothing is given; ``dataclasses.MISSING`` if it must be.
        doc: what the class's docstring says of it.
        in_text: whether text carries it; that is so for what counts when two instances are compared.
    """

    name: str
    declared: Any
    allowed: str
    default: Any
    doc: str
    in_text: bool = True


def options_of(cls: type) -> tuple[Option, ...]:
    """The options of a frozen dataclass in the order of its fields."""
    docs, declared = dict(_attribute_docs(cls)), declared_fields(cls)
    options = []
    for field in fields(cls):
        if field.init:
            kind, doc = declared[field.name], docs.get(field.name, "")
            options.append(Option(field.name, kind, allowed(kind), _default(field), doc, field.compare))
    return tuple(options)


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _attribute_docs(cls: type) -> Iterator[tuple[str, str]]:
    """Names and texts of the ``Attributes`` section of a docstring; one entry may be of several names."""
    section = re.search(r"^Attributes:\n((?: +.*\n|\n)*)", f"{inspect.getdoc(cls)}\n", re.MULTILINE)
    entries = re.findall(r"^    (\w[\w, ]*): (.*(?:\n {8}.*)*)", section[1] if section else "", re.MULTILINE)
    for names, text in entries:
        for name in names.split(","):
            yield name.strip(), re.sub(r"\s+", " ", text).strip()
