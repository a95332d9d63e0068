"""A sample of the census: two families and some of their columns, other ones every day.

``FXSPARSE_TEST_ALL=1`` takes twelve families and all columns; ``python -m benchmarks.families`` runs the whole.
"""

from __future__ import annotations

import functools
import os
import random
from pathlib import Path

import pytest
import torch

from benchmarks.families import page, running
from benchmarks.families.cells import ALL, PASSES, Bench, cell
from benchmarks.families.tiny import build, classes

DAY = int(os.environ["FXSPARSE_TEST_DAY"])
WHOLE = os.environ.get("FXSPARSE_TEST_ALL") == "1"
QUICK = ("trace", "masks", "low-rank", "layers", "gates", "folder: masks", "folder: layers")
RIGHT = ("ok", "partial", "refused")


def _sample() -> list[str]:
    """Of the families that the page has traced, without a wrong, crashed or silent cell."""
    rows = [line.split("|") for line in page.PAGE.read_text().splitlines() if line.startswith("| ")]
    wide = [[part.strip() for part in row[1:-1]] for row in rows if len(row) == len(ALL) + 4]
    right = [row[0] for row in wide[1:] if row[2].endswith(" s") and not {"X", "!", "?"} & set(row)]
    return random.Random(DAY).sample(right, 12 if WHOLE else 2)


@pytest.mark.parametrize("name", _sample())
def test_no_cell_is_wrong_or_silent(name: str) -> None:
    bench = Bench(name)
    columns = ALL if WHOLE else ("trace", *random.Random(DAY).sample(QUICK[1:], 3))
    results = {column: cell(bench, column) for column in columns}
    wrong = {column: f"{r.state}: {r.detail}" for column, r in results.items() if r.state not in RIGHT}
    assert not wrong, f"{name} (FXSPARSE_TEST_DAY={DAY}): {wrong}"
    assert results["trace"].state in ("ok", "partial"), "nothing else was tried"


@functools.cache
def llama() -> Bench:
    return Bench("llama")


def test_a_tiny_model_keeps_the_structure_of_its_family() -> None:
    model = llama().family.model
    assert model.config.hidden_size == 32 and len(model.model.layers) == 2
    assert type(build("bert").model).__name__ == "BertForMaskedLM"
    assert len(classes()) > 300


def test_a_lost_weight_makes_a_cell_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that leaves a linear out of its record without a word, in a pipeline that does not look for such."""
    from fxsparse.passes import pipeline
    from fxsparse.passes.nm import masks

    bench = llama()
    assert cell(bench, "masks").state == "ok"
    whole = masks.fx.linears
    monkeypatch.setattr(masks.fx, "linears", lambda gm: [each for each in whole(gm) if "up_proj" not in each.path])
    monkeypatch.setattr(pipeline, "unreported", lambda *_: [])
    result = cell(bench, "masks")
    assert result.state == "silent" and "layers.0.mlp.up_proj.weight" in result.detail


def test_another_number_makes_a_cell_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = llama()
    whole = bench.rewritten

    def off(column: str) -> torch.fx.GraphModule:
        gm = whole(column)
        with torch.no_grad():
            gm.get_parameter("model.layers.0.mlp.down_proj.weight_values").mul_(1.001)
        return gm

    monkeypatch.setattr(bench, "rewritten", off)
    assert cell(bench, "masks").state == "wrong"


def test_results_go_on_where_they_stopped(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text(
        '{"family": "a", "column": "model", "state": "ok", "class": "A"}\n'
        '{"family": "a", "column": "trace", "state": "crash", "detail": "", "oracle": false, "counts": null}\n'
        '{"family": "b", "column": "model", "state": "no", "detail": "too large"}\n'
    )
    results = running.read(file)
    assert running.missing("a", ["trace", "masks"], results, []) == ["masks"]
    assert running.missing("a", ["trace", "masks"], results, ["crash"]) == ["trace", "masks"]
    assert running.missing("b", ["trace"], results, []) == []
    assert running.missing("b", ["trace"], results, ["no"]) == ["trace"]


def test_the_page_shows_every_state() -> None:
    lines = {("a", "model"): {"family": "a", "column": "model", "state": "ok", "class": "AForCausalLM"}}
    cells = {
        "masks": {"state": "ok", "oracle": True},
        "layers": {"state": "refused", "detail": "drop-layers: a.b.c has 1 layer"},
        "gates": {"state": "partial", "counts": [2, 3], "detail": "its norm spans all heads"},
        "mux": {"state": "wrong", "detail": "1 is not 2"},
    }
    for column, about in cells.items():
        line = {"family": "a", "column": column, "detail": "", "oracle": False, "counts": None, **about}
        lines["a", column] = line
    text = page.page(lines, "5")
    assert "1 families, 0 of them under every column; 4 cells: 1 ok, 1 partial, 1 refused, 1 wrong, 0 crash" in text
    assert f"| layers | `{PASSES['layers']}` | 1 | 0 |" in text and "| save |  | 0 | 0 |" in text
    row = next(line for line in text.splitlines() if line.startswith("| a | AForCausalLM"))
    at = {name: part.strip() for name, part in zip(ALL, row.split("|")[3:-1], strict=True)}
    assert (at["masks"], at["gates"], at["layers"], at["mux"], at["dims"]) == ("=", "2/3", "R1", "X", "")
    assert "drop-layers: … has N layer" in text and set(PASSES) <= set(ALL)
