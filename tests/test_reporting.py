"""What a person reads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse.graph.record import Change, Record, record_of
from fxsparse.reporting import grouped
from fxsparse.text import quantity, ranges, table
from tests.support.traced import traced


def test_explain_says_what_happened_to_every_weight() -> None:
    gm = fxsparse.rewrite(traced("opt")[1], "nm-masks{pattern=2:4},double-prune")
    text = fxsparse.explain(gm)
    lines = text.splitlines()
    assert lines[0] == f"fxsparse {fxsparse.__version__}: 2 passes"
    assert "1. nm-masks{pattern=2:4}: 15 rewritten, 4 skipped" in text
    assert any("skipped" in line and "lm_head" in line and "tied to the embedding" in line for line in lines)
    assert any("rewritten" in line and "model.decoder.layers.{0-2}.fc1" in line and "2:4" in line for line in lines)
    costs = next(line for line in lines if line.startswith("training step FLOPs"))
    before, after = record_of(gm).entries[0].before, record_of(gm).entries[-1].after
    assert quantity(before.step_flops, 1000) in costs and f"{after.step_flops / before.step_flops:.3f}" in costs
    assert fxsparse.explain(record_of(gm)) == text
    assert fxsparse.explain(Record.from_json(record_of(gm).to_json())) == text


def test_a_pass_that_names_every_unit_is_cut_short() -> None:
    gm = fxsparse.rewrite(traced("opt")[1], "gates{target=0.5,score=random},materialize")
    assert len(record_of(gm).entries[-1].text) > 400
    (line,) = (line for line in fxsparse.explain(gm).splitlines() if line.startswith("2. materialize{kept={"))
    assert " ...: " in line and len(line) < 240


def test_explain_of_a_model_nothing_was_done_to() -> None:
    gm = fxsparse.trace(nn.Linear(4, 4), (torch.randn(2, 4),))
    assert fxsparse.explain(gm) == f"fxsparse {fxsparse.__version__}: 0 passes"


def test_explain_of_a_compiled_model() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4))
    options = {"passes": "nm-masks{pattern=2:4}", "compiler": "eager"}
    compiled = torch.compile(model, backend="fxsparse", options=options)
    assert "call the compiled model once" in fxsparse.explain(compiled)
    compiled(torch.randn(3, 8))
    text = fxsparse.explain(compiled)
    assert "graph 1 of 1" in text and "1. nm-masks{pattern=2:4}: 1 rewritten, 2 skipped" in text
    assert "masked_linear" in text and "2.weight" in text


def test_sites_that_differ_in_one_number_are_drawn_together() -> None:
    changes = [Change(f"h.{layer}.fc", True, "2:4") for layer in (0, 1, 2, 5)]
    changes += [Change("h.3.fc", False, "no"), Change("head", True, "2:4"), Change("h4.x", True, "2:4")]
    assert grouped(changes) == [
        (True, "h.{0-2,5}.fc", "2:4"),
        (False, "h.3.fc", "no"),
        (True, "head", "2:4"),
        (True, "h4.x", "2:4"),
    ]


@pytest.mark.parametrize(("numbers", "text"), [([], ""), ([3], "3"), ([2, 1, 0], "0-2"), ([0, 2, 3, 9], "0,2-3,9")])
def test_ranges(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text


@pytest.mark.parametrize(
    ("amount", "base", "text"),
    [(0, 1000, "0"), (999, 1000, "999"), (1500, 1000, "1.50 K"), (10**18, 1000, "1000.00 P"), (1023, 1024, "1023 B"),
     (3 * 2**29, 1024, "1.50 GiB")],
)  # fmt: skip
def test_quantities(amount: int, base: int, text: str) -> None:
    assert quantity(amount, base) == text


def test_tables_align() -> None:
    assert table([("a", "10"), ("bcd", "5")], right=(1,)) == ["a    10", "bcd   5"]
    assert table([]) == []
