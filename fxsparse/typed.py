"""Plain data read as dataclasses, with the types of their fields checked: for what a file says, which anybody may have
written or damaged."""

from __future__ import annotations

import json
import types
from collections.abc import Hashable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from fxsparse.errors import CheckpointError

T = TypeVar("T")

LONGEST = 16 << 20
"""Characters of a text of JSON."""
MOST = 300_000
"""Lists and dictionaries in it. Both bound the memory that reading takes to 200 MB."""
_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}


def loads(text: str, where: str) -> Any:
    """Reads JSON.

    Raises:
        CheckpointError: it is none, or larger than a record can be; ``where`` says what was read.
    """
    if len(text) > LONGEST or text.count("{") + text.count("[") > MOST:
        raise CheckpointError(f"{where} is larger than a record can be ({len(text):,} characters)")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise CheckpointError(f"{where} is damaged: {reason}") from error


def read(kind: type[T], data: Any, where: str) -> T:
    """An instance of a dataclass from plain data.

    Fields that are missing take their defaults. Fields that the class does not know are kept, as JSON, in its field
    ``further`` if it has one, and `write` gives them back.

    Raises:
        CheckpointError: a field is missing or has another type; ``where`` and the path to it say which.
    """
    if not isinstance(data, dict):
        raise CheckpointError(f"{where} must be an object, not {_shown(data)}")
    hints, known = _hints(cast(Hashable, kind)), {}
    for item in fields(kind):  # type: ignore[arg-type]
        if item.name in data and item.name != "further":
            known[item.name] = _value(hints[item.name], data[item.name], f"{where}.{item.name}")
    if "further" in hints:
        further = ((name, json.dumps(value)) for name, value in data.items() if name not in known)
        known["further"] = tuple(sorted(further))
    try:
        return kind(**known)
    except TypeError as error:
        missing = [item for item in hints if item not in known and not hasattr(kind, item)]
        raise CheckpointError(f"{where} lacks {', '.join(missing)}") from error


def write(item: Any) -> Any:
    """Plain data that `read` reads."""
    if isinstance(item, (list, tuple)):
        return [write(entry) for entry in item]
    if isinstance(item, Mapping):
        return {key: write(entry) for key, entry in item.items()}
    if not hasattr(item, "__dataclass_fields__"):
        return item
    data = {entry.name: write(getattr(item, entry.name)) for entry in fields(item) if entry.name != "further"}
    return data | {name: json.loads(text) for name, text in getattr(item, "further", ())}


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _value(kind: Any, data: Any, where: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return data
    if origin in (Union, types.UnionType):
        allowed = [one for one in args if one is not type(None)]
        fitting = next((one for one in allowed if (get_origin(one) or one) is type(data)), allowed[0])
        return None if data is None and len(allowed) < len(args) else _value(fitting, data, where)
    if origin in (tuple, list) and isinstance(data, list):
        if args[0] in _NAMES and {*map(type, data)} <= {args[0]}:
            return origin(data)  # long ones are mostly right, and naming every place takes most of the time
        return origin(_value(args[0], entry, f"{where}[{place}]") for place, entry in enumerate(data))
    if origin is dict and isinstance(data, dict):
        return {name: _value(args[1], entry, f"{where}[{name[:80]!r}]") for name, entry in data.items()}
    if hasattr(kind, "__dataclass_fields__"):
        return read(kind, data, where)
    if kind is float and type(data) is int:
        return float(data)
    if type(data) is not kind:
        wanted = _NAMES.get(kind, "a list" if origin in (list, tuple) else "an object")
        raise CheckpointError(f"{where} must be {wanted}, not {_shown(data)}")
    return data


def _shown(data: Any) -> str:
    text = repr(data) if not isinstance(data, (list, dict)) else f"a {type(data).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}..."
