"""The grammar of passes as text: ``nm-masks{pattern=2:4,keep_first=false}``; a pipeline is passes joined by commas.

Values are words (``2:4``, ``magnitude``), numbers, ``true``, ``false``, ``none``, JSON strings, lists ``[a,b]`` and
dictionaries ``{"*.fc1":2:4}``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from fxsparse.errors import OptionError
from fxsparse.options import MOST_ITEMS, FrozenMapping, shown

LONGEST = 2**24
"""Characters of a text: that of a materialized model lists every unit it keeps."""
DEEPEST = 8
"""Levels of lists and mappings inside each other."""
MOST_PASSES = 1000
LONGEST_NUMBER = 40
"""Characters of a word that may be a number."""

_T = TypeVar("_T")
_WORD = re.compile(r"[^\s,{}\[\]\"=]+")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_SPACE = re.compile(r"\s*")
_CONSTANTS = {"true": True, "false": False, "none": None}


def write(item: Any, depth: int = 0) -> str:
    """A value as text; the inverse of what :func:`read` reads.

    Raises:
        OptionError: text cannot carry it.
    """
    if depth > DEEPEST:
        raise OptionError(f"a value cannot be written as text: it nests more than {DEEPEST} lists: {shown(item)}")
    if item is None or isinstance(item, bool):
        return {None: "none", True: "true", False: "false"}[item]
    if isinstance(item, (int, float)):
        return repr(item)
    if isinstance(item, str):
        plain = _WORD.fullmatch(item) and isinstance(_constant(item), str)
        return item if plain else json.dumps(item)
    if isinstance(item, FrozenMapping):
        return "{" + ",".join(f"{json.dumps(key)}:{write(entry, depth + 1)}" for key, entry in item) + "}"
    if isinstance(item, (list, tuple)):
        return "[" + ",".join(write(entry, depth + 1) for entry in item) + "]"
    raise OptionError(f"a value of type {type(item).__name__} cannot be written as text: {shown(item)}")


def _constant(word: str) -> Any:
    if word in _CONSTANTS:
        return _CONSTANTS[word]
    for convert in (int, float) if len(word) <= LONGEST_NUMBER else ():
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
        if not isinstance(text, str):
            raise OptionError(f"passes are read from text, not from {type(text).__name__}: {shown(text)}")
        self.text, self.at = text, 0
        if len(text) > LONGEST:
            raise OptionError(
                f"cannot read passes: the text has {len(text):,} characters, at most {LONGEST:,} are read"
            )

    def passes(self) -> list[tuple[str, dict[str, Any]]]:
        found = [self._pass()]
        while self._take(","):
            if len(found) == MOST_PASSES:
                self._fail(f"more than {MOST_PASSES} passes")
            found.append(self._pass())
        if self._peek():
            self._fail("expected a comma or the end")
        return found

    def _pass(self) -> tuple[str, dict[str, Any]]:
        name = self._match(_WORD, "a pass name")
        options = self._mapping(self._option, "option") if self._take("{") else {}
        return name, options

    def _option(self) -> tuple[str, Any]:
        key = self._match(_WORD, "an option name")
        self._expect("=")
        return key, self._value(0)

    def _value(self, depth: int) -> Any:
        if depth > DEEPEST:
            self._fail(f"more than {DEEPEST} lists inside each other")
        if self._take("["):
            return tuple(self._until("]", lambda: self._value(depth + 1)))
        if self._take("{"):
            return self._mapping(lambda: self._item(depth + 1), "key")
        if self._peek() == '"':
            return self._string()
        return _constant(self._match(_WORD, "a value"))

    def _item(self, depth: int) -> tuple[str, Any]:
        key = self._string()
        self._expect(":")
        return key, self._value(depth)

    def _mapping(self, read: Callable[[], tuple[str, Any]], what: str) -> dict[str, Any]:
        items: dict[str, Any] = {}
        for key, value in self._until("}", read):
            if key in items:
                self._fail(f"{what} {shown(key)} is given twice")
            items[key] = value
        return items

    def _until(self, end: str, read: Callable[[], _T]) -> list[_T]:
        items: list[_T] = []
        if self._take(end):
            return items
        items.append(read())
        while self._take(","):
            if len(items) == MOST_ITEMS:
                self._fail(f"more than {MOST_ITEMS:,} items in a list")
            items.append(read())
        self._expect(end)
        return items

    def _string(self) -> str:
        written = self._match(_STRING, "a string in double quotes")
        try:
            return str(json.loads(written))
        except ValueError as error:
            self._fail(f"a string that JSON does not know ({error})")

    def _match(self, pattern: re.Pattern[str], what: str) -> str:
        self._peek()
        match = pattern.match(self.text, self.at)
        if not match:
            self._fail(f"expected {what}")
        self.at = match.end()
        return match.group()

    def _peek(self) -> str:
        self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
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
        before, after = self.text[max(0, self.at - 60) : self.at], self.text[self.at : self.at + 60]
        more = "..." if self.at > 60 else "", "..." if self.at + 60 < len(self.text) else ""
        raise OptionError(
            f"cannot read passes: {message} at position {self.at} of {more[0]}{before + after!r}{more[1]}"
        )
