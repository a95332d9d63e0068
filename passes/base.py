"""What a pass is, and how passes are written as text.

A pass is a frozen dataclass: its options are its fields, its name a class variable. The graph is valid before and after
(``torch.fx.passes.infra.pass_base.PassBase``), and for every site it looked at the pass yields a :class:`Change`.

As text a pass is its name and its options, ``nm-masks{pattern=2:4,keep_first=false}``; a pipeline is passes joined
by commas. Values are words (``2:4``, ``magnitude``), numbers, ``true``, ``false``, ``none``, JSON strings, lists
``[a,b]`` and dictionaries ``{"*.fc1":2:4}``.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, ClassVar, NoReturn

import torch
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxsparse.errors import OptionError, nearest
from fxsparse.passes.event import Event
from fxsparse.record import Change


@dataclass(frozen=True)
class Pass(PassBase):
    """Base of all passes; subclass it as a frozen dataclass, set ``name`` and write :meth:`rewrite`.

    A pass may edit the graph and the module tree it is given, a copy that shares the model's parameters; it must
    replace parameters and buffers, never write into them. It raises :class:`~fxsparse.errors.RewriteError` when it
    cannot do what was asked: the model then stays as it was.

    Attributes:
        name: the pass in text.
        must_follow: names of passes one of which must have run before.
        cannot_follow: names of passes after which this one makes no sense.
        ends: names of passes whose part in the model is over after this one, so that they may run anew.
    """

    name: ClassVar[str]
    must_follow: ClassVar[tuple[str, ...]] = ()
    cannot_follow: ClassVar[tuple[str, ...]] = ()
    ends: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def rewrite(self, graph: GraphModule) -> Iterable[Change]:
        """Rewrites ``graph`` in place and yields what it did, or why not, for every site it looked at."""

    def recorded(self) -> Pass:
        """The pass as the record names it once it has run: with what it found out, where a replay needs to know."""
        return self

    def schedule(self, graph: GraphModule, optimizer: torch.optim.Optimizer, total_steps: int) -> Iterable[Event]:
        """What varies while a rewritten graph trains; nothing by default."""
        return ()

    def call(self, graph_module: GraphModule) -> PassResult:
        """``PassBase``'s form: runs on ``graph_module`` itself, so that torch's own pass managers can run a pass."""
        changes = list(self.rewrite(graph_module))
        graph_module.graph.lint()
        graph_module.recompile()
        return PassResult(graph_module, any(change.rewritten for change in changes))

    def __str__(self) -> str:
        options = _options(self)
        # The first option says what a pass is about, so it is written even where it has its default.
        about = [option.name for option in options[:1] if getattr(self, option.name) is not None]
        shown = [option for option in options if option.name in about or _differs(self, option)]
        written = ",".join(f"{option.name}={write(getattr(self, option.name))}" for option in shown)
        return f"{self.name}{{{written}}}" if written else self.name


def _options(item: Pass | type[Pass]) -> list[Field[Any]]:
    """The options that text carries; a field that does not compare (calibration data, a model) is not text."""
    return [option for option in fields(item) if option.compare and option.init]


def _differs(item: Pass, option: Field[Any]) -> bool:
    default = option.default if option.default is not MISSING else None
    if option.default_factory is not MISSING:
        default = option.default_factory()
    return bool(getattr(item, option.name) != default)


def pass_classes() -> dict[str, type[Pass]]:
    """Every pass class by its name: fxsparse's own and any subclass that was imported."""
    found: dict[str, type[Pass]] = {}
    pending: list[type[Pass]] = [Pass]  # type: ignore[type-abstract]
    while pending:
        for cls in pending.pop().__subclasses__():
            pending.append(cls)
            if "name" in vars(cls):
                found[cls.name] = cls
    return found


def build(name: str, options: Mapping[str, Any]) -> Pass:
    """The pass called ``name``; OptionError where the name or an option is unknown, with what exists."""
    classes = pass_classes()
    if name not in classes:
        raise OptionError(f"unknown pass {name!r}; {nearest(name, classes)}known passes: {', '.join(sorted(classes))}")
    known = [option.name for option in _options(classes[name])]
    for option in options:
        if option not in known:
            raise OptionError(
                f"unknown option {option!r}; {nearest(option, known)}its options: {', '.join(known) or 'none'}",
                pass_name=name,
            )
    return classes[name](**options)


class FrozenMapping(tuple[tuple[str, Any], ...]):
    """A mapping an option can hold: hashable, equal by its items in order, written as a dictionary."""

    __slots__ = ()

    def __new__(cls, items: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> FrozenMapping:
        return super().__new__(cls, items.items() if isinstance(items, Mapping) else items)


# --- text -------------------------------------------------------------------------------------------------------------

_WORD = re.compile(r"[^\s,{}\[\]\"=]+")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_CONSTANTS = {"true": True, "false": False, "none": None}


def write(item: Any) -> str:
    """A value as text; the inverse of what :func:`parse_passes` reads."""
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


def parse_passes(text: str) -> tuple[Pass, ...]:
    """The passes written in ``text``; OptionError names the position where it cannot be read."""
    return tuple(build(name, options) for name, options in _Reader(text).passes())


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
