"""Options are declared once: what fits takes its declared form, and what does not is said."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, replace
from fractions import Fraction
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from annotated_types import Interval, MinLen
from torch import nn

import fxsparse
from fxsparse.errors import OptionError
from fxsparse.ops.nm import Pattern, PatternText
from fxsparse.options import Count, FrozenMapping, Glob, Globs, Option, allowed, check_fields, checked, options_of
from fxsparse.passes import DropLayers, InsertNMMasks, Pass, Pipeline
from fxsparse.passes.base import parse_passes, pass_classes

Word = Literal["one", "two"]
Stage = tuple[Annotated[float, Interval(gt=0, le=1)], int]
OURS = {name: cls for name, cls in pass_classes().items() if cls.__module__.startswith("fxsparse.")}


@pytest.mark.parametrize(
    ("given", "declared", "expected"),
    [
        (np.int64(3), int, 3),
        (3, float, 3.0),
        (np.float32(0.5), float, 0.5),
        (Fraction(1, 4), float, 0.25),
        ("one", Word, "one"),
        ("a", Globs, ("a",)),
        (["a", "b"], Globs, ("a", "b")),
        (range(3), tuple[int, ...], (0, 1, 2)),
        (4, tuple[int, ...] | None, (4,)),
        (None, int | None, None),
        ([[1, 2]], tuple[Stage, ...], ((1.0, 2),)),
        ({"a": 1}, float | Mapping[str, float], FrozenMapping({"a": 1.0})),
        (FrozenMapping({"a": [1]}), Mapping[str, tuple[int, ...]], FrozenMapping({"a": (1,)})),
        (" 2:4", PatternText, "2:4"),
        (Pattern(1, 4), PatternText, "1:4"),
        ((nn, 1), Any, (nn, 1)),
    ],
    ids=lambda value: str(value) if isinstance(value, (str, int, float)) else None,
)
def test_what_fits_takes_its_declared_form(given: Any, declared: Any, expected: Any) -> None:
    value = checked("x", given, declared)
    assert value == expected and type(value) is type(expected)
    assert repr(value) == repr(expected)  # so that it is written as text the same


@pytest.mark.parametrize(
    ("given", "declared", "message"),
    [
        (True, int, "x=True must be a whole number"),
        (2.0, int, "x=2.0 must be a whole number"),
        ("2", int, "x='2' must be a whole number"),
        (0, Count, "x=0 must be a whole number of at least 1"),
        (2**40, Count, "x=1099511627776 must be a whole number of at least 1"),
        (True, float, "x=True must be a number"),
        (float("nan"), float, "x=nan must be a number"),
        (float("inf"), float, "x=inf must be a number"),
        (10**400, float, "x=10{10,}.* must be a number"),
        (1, bool, "x=1 must be true or false"),
        ("True", bool, "x='True' must be true or false"),
        (0.0, Annotated[float, Interval(gt=0, le=1)] | None, r"x=0.0 must be a number in \(0, 1\] or none"),
        ("ones", Word, "x='ones' must be one of one, two: did you mean 'one'"),
        (1, Literal[True], "x=1 must be one of True"),
        (3, Globs, "x=3 must be a list of texts"),
        (["a", 3], Globs, r"x\[1\]=3 must be a text"),
        ("", Glob, "x='' must be a text, not empty"),
        ([], Annotated[tuple[int, ...], MinLen(1)], "must be a list of whole numbers, not empty"),
        ([[0.5]], tuple[Stage, ...], r"x\[0\]=\[0.5\] must be a list of 2: a number in \(0, 1\], a whole number"),
        ([[0.5, 1.5]], tuple[Stage, ...], r"x\[0\]\[1\]=1.5 must be a whole number"),
        ({"a": "b"}, float | Mapping[str, float], r"x\['a'\]='b' must be a number"),
        ({1: 2.0}, Mapping[str, float], "x=1 must be a text"),
        ("4:2", PatternText, "x='4:2' must be n:m .* did you mean 2:4"),
        (torch.tensor(3), tuple[int, ...], r"x=tensor\(3\) must be a list of whole numbers"),
        (3, nn.Module | None, "x=3 must be of type Module or none"),
        ("y" * 10_000, int, r"x='y+\.\.\.y+' must be a whole number"),
        (range(10**9), tuple[int, ...], "more than 100,000 items"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_fit_is_said(given: Any, declared: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        checked("x", given, declared)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", OURS)
def test_every_option_of_every_pass_is_declared_and_documented(name: str) -> None:
    options = options_of(OURS[name])
    assert all(option.declared is not Any and option.doc for option in options), options
    assert all(option.default is not MISSING for option in options)
    for option in options:
        assert allowed(option.declared) == option.allowed


def test_options_can_be_listed() -> None:
    listed = {option.name: option for option in options_of(InsertNMMasks)}
    assert listed["every"] == Option(
        "every", Count, "a whole number of at least 1", 1, "optimizer steps between two masks of a dynamic pass."
    )
    assert listed["storage"].allowed == "one of compressed, masked"
    assert {option.doc for option in options_of(OURS["drop-dims"]) if option.name in ("begin", "end")} == {
        "shares of the training between which it does; after ``end`` the choice stays."
    }


@pytest.mark.parametrize("name", OURS)
def test_no_option_takes_what_it_is_not_declared_for(name: str) -> None:
    wrong = (float("nan"), object(), b"x", -(2**70), [[[["a"]]]], {"": {}}, "\0no", 1.5, True)
    for option in options_of(OURS[name]):
        refused = 0
        for value in wrong:
            try:
                item = OURS[name](**{option.name: value})
            except OptionError as error:
                refused += 1
                assert option.name in str(error), (option, value, error)
            else:
                replace(item)
        assert refused >= 3, option


def test_equal_options_have_equal_text() -> None:
    pairs = [
        (InsertNMMasks(decay=1), InsertNMMasks(decay=1.0)),
        (InsertNMMasks(seed=np.int64(3)), InsertNMMasks(seed=3)),
        (InsertNMMasks(exclude="a"), InsertNMMasks(exclude=["a"])),
        (DropLayers(indices=[2, 1, 2]), DropLayers(indices=(1, 2))),
    ]
    for left, right in pairs:
        assert left == right and str(left) == str(right) and hash(left) == hash(right)
        assert parse_passes(str(left)) == (right,)


@dataclass(frozen=True)
class Plain:
    """A dataclass that is no pass.

    Attributes:
        size: how many.
        kind: of them.
    """

    size: Count
    kind: Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        check_fields(self)


def test_any_frozen_dataclass_can_declare_options() -> None:
    assert Plain(np.int64(2)) == Plain(2)
    assert [(option.name, option.default is MISSING, option.doc) for option in options_of(Plain)] == [
        ("size", True, "how many."),
        ("kind", False, "of them."),
    ]
    with pytest.raises(OptionError, match="kind='c' must be one of a, b"):
        Plain(2, "c")  # type: ignore[arg-type]


def test_a_pass_of_a_users_own_is_checked_where_its_annotations_can_be_read() -> None:
    class Local:
        pass

    @dataclass(frozen=True)
    class Scale(Pass):
        name = "test-scale"
        factor: Annotated[float, Interval(gt=0)] = 1.0
        unknown: Local | None = None

        def rewrite(self, graph: Any) -> Any:
            return ()

    assert Scale(2, unknown="x").factor == 2.0  # type: ignore[arg-type]  a class inside a function cannot be looked up
    with pytest.raises(OptionError, match="test-scale: factor=-1 must be a number above 0"):
        Scale(-1)
    with pytest.raises(OptionError, match="test-scale: factor='x'"):
        Pipeline("test-scale{factor=x}")


def test_hostile_texts_are_refused_soon() -> None:
    start = time.process_time()
    for text in (
        "x" * 1_000_000,
        "[" * 1_000_000,
        "nm-masks{exclude=" + "[" * 1_000_000,
        'nm-masks{exclude="' + "\\" * 1_000_000,
        " " * 1_000_000 + "?",
        "nm-masks{" + ",".join(f"a{at}=1" for at in range(200_000)),
        "nm-masks{exclude=[" + "1," * 200_000 + "1]}",
        'materialize{kept={"a":"' + "1-" * 400_000 + '"}}',
    ):
        with pytest.raises(OptionError) as caught:
            Pipeline.parse(text)
        assert len(str(caught.value)) < 600
    assert time.process_time() - start < 5


def test_functions_check_their_options_too() -> None:
    model = nn.Linear(8, 8)
    gm = fxsparse.trace(model, (torch.randn(2, 8),))
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    for wrong in (2.5, "3", None, float("nan"), True):
        with pytest.raises(OptionError, match=r"total_steps=.* must be a whole number of at least 1"):
            fxsparse.Schedule(gm, optimizer, total_steps=wrong)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="signals"):
        fxsparse.Schedule(gm, optimizer, total_steps=2, signals={"a": 1})  # type: ignore[dict-item]
    with pytest.raises(OptionError, match="seconds=nan"):
        fxsparse.tune(gm, seconds=float("nan"))
    with pytest.raises(OptionError, match=r"rows\[1\]=0.5"):
        fxsparse.tune(gm, rows=[1, 0.5])  # type: ignore[list-item]
    with pytest.raises(OptionError, match="not NoneType"):
        fxsparse.rewrite(gm, None)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="recipe=3"):
        fxsparse.recipe(3)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="dynamic_batch='yes'"):
        fxsparse.trace(model, (torch.randn(2, 8),), dynamic_batch="yes")  # type: ignore[arg-type]
