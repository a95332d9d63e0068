"""The grammar of passes as text: ``nm-masks{pattern=2:4,keep_first=false}``; a pipeline is passes joined by commas.

Values are words (``2:4``, ``magnitude``), numbers, ``true``, ``false``, ``none``, JSON strings, lists ``[a,b]`` and
dictionaries ``{"*.fc1":2:4}``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from fxsparse.errors import OptionError


class FrozenMapping(tuple[tuple[str, Any], ...]):
    """A mapping an option can hold: hashable, equal by its items in order, written as a dictionary."""

    __slots__ = ()

    def __new__(cls, items: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> FrozenMapping:
        return super().__new__(cls, items.items() if isinstance(items, Mapping) else items)


_WORD = re.compile(r"[^\s,{}\[\]\"=]+")


_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


_CONSTANTS = {"true": True, "false": False, "none": None}


def write(item: Any) -> str:
    """A value as text; the inverse of what :func:`read` reads."""
    if item is None or isinstance(item, bool):
        return {None: "none", True: "true", False: "false"}[item]
    if isinstance(item, (int, float)):
        return repr(item)
    if isinstance(item, str):
        plain = _WORD.fullmatch(item) and isinstance(_constant(item), str)
        return item if plain else json.dumps(item)
    if isinstance(item, FrozenMapping):
        return "{" + ",".join(f"{json.dumps(key)}:{write(entry)}" for key, entry in item) + "}"
    if isinstance(item, (list, tuple)):
        return "[" + ",".join(write(entry) for entry in item) + "]"
    raise OptionError(f"a value of type {type(item).__name__} cannot be written as text: {item!r}")


def _constant(word: str) -> Any:
    if word in _CONSTANTS:
        return _CONSTANTS[word]
    for convert in (int, float):
        try:
            return convert(word)
        except ValueError:
            continue
    return word


def read(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The names and options written in ``text``; OptionError names the position where it cannot be read."""
    return _Reader(text).passes()


class _Reader:
    """A recursive-descent reader of the text form."""

    def __init__(self, text: str):
        self.text, self.at = text, 0

    def passes(self) -> list[tuple[str, dict[str, Any]]]:
        found = [self._pass()]
        while self._take(","):
            found.append(self._pass())
        if self._peek():
            self._fail("expected a comma or the end")
        return found

    def _pass(self) -> tuple[str, dict[str, Any]]:
        name = self._match(_WORD, "a pass name")
        options: dict[str, Any] = {}
        if self._take("{") and not self._take("}"):
            while True:
                key = self._match(_WORD, "an option name")
                self._expect("=")
                if key in options:
                    self._fail(f"option {key!r} is given twice")
                options[key] = self._value()
                if not self._take(","):
                    break
            self._expect("}")
        return name, options

    def _value(self) -> Any:
        if self._take("["):
            return tuple(self._until("]", self._value))
        if self._take("{"):
            return dict(self._until("}", self._item))
        if self._peek() == '"':
            return self._string()
        return _constant(self._match(_WORD, "a value"))

    def _item(self) -> tuple[str, Any]:
        key = self._string()
        self._expect(":")
        return key, self._value()

    def _until(self, end: str, read: Any) -> list[Any]:
        items: list[Any] = []
        if self._take(end):
            return items
        items.append(read())
        while self._take(","):
            items.append(read())
        self._expect(end)
        return items

    def _string(self) -> str:
        return str(json.loads(self._match(_STRING, "a string in double quotes")))

    def _match(self, pattern: re.Pattern[str], what: str) -> str:
        self._peek()
        match = pattern.match(self.text, self.at)
        if not match:
            self._fail(f"expected {what}")
        self.at = match.end()
        return match.group()

    def _peek(self) -> str:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.text[self.at : self.at + 1]

    def _take(self, char: str) -> bool:
        if self._peek() != char:
            return False
        self.at += 1
        return True

    def _expect(self, char: str) -> None:
        if not self._take(char):
            self._fail(f"expected {char!r}")

    def _fail(self, message: str) -> NoReturn:
        raise OptionError(f"cannot read passes: {message} at position {self.at} of {self.text!r}")
