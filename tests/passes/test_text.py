"""Passes as text: what is written reads back as the same pass, and what cannot be read says where."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from torch.fx import GraphModule

from fxsparse.errors import OptionError, RewriteError
from fxsparse.options import FrozenMapping
from fxsparse.passes import AddLowRankBranches, Change, DoublePruneBackward, InsertNMMasks, Pass, Pipeline
from fxsparse.passes.base import pass_classes


@dataclass(frozen=True)
class Everything(Pass):
    name: ClassVar[str] = "test-everything"
    word: str = "a"
    number: float = 0.5
    flag: bool = False
    nothing: str | None = "x"
    several: tuple[Any, ...] = ()
    mapping: FrozenMapping = field(default_factory=lambda: FrozenMapping({}))

    def __post_init__(self) -> None:
        object.__setattr__(self, "several", tuple(self.several))
        object.__setattr__(self, "mapping", FrozenMapping(self.mapping))

    def rewrite(self, graph: GraphModule) -> Iterable[Change]:
        return ()


PIPELINES = [
    Pipeline([]),
    Pipeline([InsertNMMasks("2:4")]),
    Pipeline([InsertNMMasks("1:2", criterion="random", seed=7), DoublePruneBackward()]),
    Pipeline([InsertNMMasks({"*.layers.[0-5].*": "2:4", "*.layers.[6-9].*": "2:8"}, exclude=("*.q", "k,v=[]{}"))]),
    Pipeline([InsertNMMasks(storage="masked", dynamic=True, decay=6e-6, every=4, keep_first=False)]),
    Pipeline([InsertNMMasks("4:8"), DoublePruneBackward("2:4", every=0), AddLowRankBranches(rank=4, start=0.0)]),
    Pipeline([InsertNMMasks(), AddLowRankBranches(ratio=0.0625, layers=("*.q_proj",))]),
    Pipeline([Everything()]),
    Pipeline(
        [
            Everything(
                "true", 1e-30, True, None, ("1", 2, 2.5, "none", 'quo"te\\', "", ("a",)), FrozenMapping({"a b": 1})
            )
        ]
    ),
    Pipeline([Everything("spaced word", -3.0, nothing="1e3", several=(True, None, float("inf")))]),
]


@pytest.mark.parametrize("pipeline", PIPELINES, ids=str)
def test_text_reads_back_as_the_same_pipeline(pipeline: Pipeline) -> None:
    assert Pipeline.parse(str(pipeline)) == pipeline
    assert hash(Pipeline.parse(str(pipeline))) == hash(pipeline)
    assert str(Pipeline.parse(str(pipeline))) == str(pipeline)


def test_text_is_what_a_person_would_write() -> None:
    assert str(Pipeline([InsertNMMasks("2:4"), DoublePruneBackward(every=5)])) == (
        "nm-masks{pattern=2:4},double-prune{every=5}"
    )
    spaced = ' nm-masks { pattern = {"*.fc1": 2:4, "*.fc2": 1:4} , keep_head = false } , double-prune '
    assert Pipeline.parse(spaced) == Pipeline(
        [InsertNMMasks({"*.fc1": "2:4", "*.fc2": "1:4"}, keep_head=False), DoublePruneBackward()]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nm-mask", "unknown pass 'nm-mask'; did you mean 'nm-masks'. known passes: .*nm-masks"),
        ("nm-masks{patern=2:4}", "unknown option 'patern'; did you mean 'pattern'. its options: pattern"),
        ("nm-masks{pattern=2:4", "expected '}' at position 20"),
        ("nm-masks{pattern}", "expected '=' at position 16"),
        ("nm-masks{pattern=}", "expected a value at position 17"),
        ("nm-masks,,double-prune", "expected a pass name at position 9"),
        ("nm-masks double-prune", "expected a comma or the end at position 9"),
        ("nm-masks{seed=1,seed=2}", "option 'seed' is given twice"),
        ("nm-masks{pattern={fc1:2:4}}", "expected a string in double quotes"),
        ("nm-masks{pattern=4:2}", "4:2"),
        ("nm-masks{criterion=best}", "criterion='best' must be one of magnitude, random, wanda"),
        ("nm-masks{dynamic=true}", 'storage="masked"'),
        ("nm-masks{every=0}", "every=0"),
        ("nm-masks{decay=-1.0}", "decay"),
        ("nm-masks{pattern={}}", "a mapping from texts to .*not empty"),
        ("double-prune{every=-1}", "every=-1"),
        ("low-rank{rank=4,ratio=0.5}", "rank or ratio, not both"),
        ("low-rank{rank=0}", "rank=0"),
        ("low-rank{ratio=2.0}", r"\(0, 1\]"),
        ("nm-masks{decay=nan}", "decay=nan must be a number of at least 0"),
        ("nm-masks{every=2.5}", "every=2.5 must be a whole number of at least 1"),
        ("nm-masks{keep_first=x}", "keep_first='x' must be true or false"),
        ('nm-masks{pattern={"a":2:4,"a":1:4}}', "key 'a' is given twice"),
        (r'nm-masks{exclude="\q"}', "a string that JSON does not know .* at position 21"),
        ("nm-masks{exclude=" + "[" * 100_000, "more than 8 lists inside each other"),
        ("nm-masks{seed=" + "9" * 5000 + "}", r"seed='9+\.\.\.9+' must be a whole number"),
        (",".join(["recompute"] * 1001), "more than 1000 passes"),
        ("x" * 2**24 + "y", "characters, at most"),
        ("low-rank{start=1.5}", r"\[0, 1\]"),
    ],
)
def test_what_cannot_be_read_says_why(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        Pipeline.parse(text)
    assert isinstance(caught.value, RewriteError)


def test_a_pipeline_takes_passes_and_text_together() -> None:
    mixed = Pipeline(["nm-masks{pattern=2:4}", DoublePruneBackward()])
    assert mixed == Pipeline.parse("nm-masks,double-prune")
    with pytest.raises(OptionError, match="not of int"):
        Pipeline([3])  # type: ignore[list-item]


def test_passes_of_others_are_known_by_their_name() -> None:
    assert pass_classes()["test-everything"] is Everything
    assert {"nm-masks", "double-prune", "low-rank"} <= set(pass_classes())


def test_what_text_cannot_carry_does_not_count_in_a_comparison() -> None:
    calibrated = InsertNMMasks(criterion="wanda", calibration=[1])
    assert Pipeline.parse(str(calibrated)) == Pipeline(calibrated)
