"""Random texts of passes: whatever is written, it is passes or an OptionError that is short, and soon."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from fxsparse.errors import OptionError
from fxsparse.options import options_of
from fxsparse.passes.base import Pass, build, parse_passes
from fxsparse.passes.text import write
from tests.fuzz import pipelines

WORDS = (
    "nan", "inf", "-inf", "1e400", "-0", "1_0", "0x10", "\u0661", "2:4", "4:2", "0:0", "true", "false", "none", "None",
    "9" * 50, "9" * 5000, "-1", "2.5", "1e-320", "x", "*", "[", "\x00", "=", "\u2028", "😀", "__class__", "self",
)  # fmt: skip
CHARACTERS = '{}[],=:"\\ \n0123456789.-+eanbx*_'


@st.composite
def _values(draw: Callable[[Any], Any], depth: int = 0) -> str:
    kind = draw(st.integers(0, 9))
    if kind < 5 or depth > 3:
        return draw(st.sampled_from(WORDS))
    if kind == 5:
        return json.dumps(draw(st.text(max_size=8)))
    if kind == 6:
        return '"' + draw(st.text(max_size=8)) + '"'
    if kind == 7:
        return str(draw(st.one_of(st.integers(), st.floats())))
    several = draw(st.lists(_values(depth + 1), max_size=3))
    if kind == 8:
        return "[" + ",".join(several) + "]"
    return "{" + ",".join(f"{json.dumps(draw(st.text(max_size=4)))}:{value}" for value in several) + "}"


@st.composite
def _written(draw: Callable[[Any], Any]) -> str:
    """A pass of ours with values of any kind."""
    name = draw(st.sampled_from(sorted(pipelines.PASSES)))
    known = [option.name for option in options_of(pipelines.PASSES[name])] or ["none"]
    names = st.one_of(st.sampled_from(known), st.sampled_from(known), st.sampled_from(WORDS))
    options = draw(st.lists(st.tuples(names, _values()), max_size=3))
    return name + "{" + ",".join(f"{option}={value}" for option, value in options) + "}"


@st.composite
def _damaged(draw: Callable[[Any], Any]) -> str:
    """A text that can be read, with some characters changed, taken out or repeated."""
    text = ",".join(draw(pipelines.pipelines()))
    for _ in range(draw(st.integers(1, 4))):
        at, length = draw(st.integers(0, len(text))), draw(st.integers(0, 3))
        put = draw(st.one_of(st.text(CHARACTERS, max_size=3), st.text(max_size=2), st.just(text[at : at + 20] * 2)))
        text = text[:at] + put + text[at + length :]
    return text


@st.composite
def _long(draw: Callable[[Any], Any]) -> str:
    part = draw(st.sampled_from(["[", "{", '{"a":', "nm-masks,", "nm-masks{", "[[", '"', "\\", "9", " ", "a=", "x"]))
    return draw(st.sampled_from(["", "nm-masks{pattern=", "nm-masks{exclude=["])) + part * draw(
        st.sampled_from([50, 3000])
    )


def texts() -> st.SearchStrategy[str]:
    return st.one_of(
        _written(), _written(), _damaged(), st.text(CHARACTERS, max_size=60), st.text(max_size=30), _long()
    )


def check(text: str) -> tuple[str, str]:
    """Reads a text; anything but passes that write themselves the same, or a short OptionError, is a bug."""
    start = time.process_time()
    try:
        read = parse_passes(text)
    except OptionError as error:
        assert len(str(error)) < 1000, f"an error of {len(str(error))} characters"
        assert time.process_time() - start < 2, "reading took long"
        return "refused", ""
    assert parse_passes(",".join(map(str, read))) == read, "text both ways"
    for item in read:
        _also_as_objects(item)
    return "read", ""


def _also_as_objects(item: Pass) -> None:
    """The options as Python values make the same pass, and every value can be written."""
    options = {option.name: getattr(item, option.name) for option in options_of(type(item)) if option.name not in
               ("calibration", "teacher")}  # fmt: skip
    try:
        again = build(item.name, {name: value for name, value in options.items() if value is not None})
    except OptionError as error:  # a default that was filled in excludes another option
        raise AssertionError(f"{item} cannot be built from its own options: {error}") from error
    assert str(again) == str(item) and all(write(value) for value in options.values())
