"""Looking at graphs: after every pass, and as the compiler is given them."""

from __future__ import annotations

import ast
import copy
import re

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Pipeline
from fxsparse.graph.record import Record, record_of
from tests.support.families import FAMILIES
from tests.support.traced import traced

SLOPE = "nm-masks{pattern=2:4},double-prune"


def small() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4)), torch.randn(3, 8)


def test_the_graph_after_every_pass() -> None:
    gm = fxsparse.rewrite(traced("llama")[1], Pipeline(SLOPE, keep_graphs=True))
    stages = fxsparse.graphs(gm)
    assert [re.sub(r"\d+ ms", "n ms", stage.title) for stage in stages] == [
        "0. traced",
        "1. nm-masks{pattern=2:4}: 18 rewritten, 4 skipped, n ms",
        "2. double-prune: 18 rewritten, 4 skipped, n ms",
    ]
    counts = [(stage.code.count("fxsparse.nm_linear("), stage.code.count("weight_column_mask:")) for stage in stages]
    assert counts == [(0, 0), (18, 0), (18, 18)]
    for stage in stages:
        assert str(stage).startswith(f"# {stage.title}\n") and ast.parse(str(stage))
    assert copy.deepcopy(gm).meta["fxsparse_graphs"].keys() == {0, 1, 2}
    assert Record.from_json(record_of(gm).to_json()) == record_of(gm)  # texts are no part of it


def test_a_second_pipeline_goes_on_where_the_first_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small()
    monkeypatch.setenv("FXSPARSE_KEEP_GRAPHS", "1")
    once = fxsparse.rewrite(model, "nm-masks", (x,))
    monkeypatch.setenv("FXSPARSE_KEEP_GRAPHS", "0")
    twice = fxsparse.rewrite(once, "double-prune,low-rank{rank=2,start=0.0}")
    kept = [bool(stage.code) for stage in fxsparse.graphs(twice)]
    assert kept == [True, True, False, True]
    assert (
        "keep_graphs=True" in fxsparse.graphs(twice)[2].title and ast.parse(str(fxsparse.graphs(twice)[2])) is not None
    )
    assert "nm_linear_low_rank" in fxsparse.graphs(twice)[3].code
    assert fxsparse.graphs(once)[-1] == fxsparse.graphs(twice)[1]


def test_without_being_asked_only_the_last_graph_is_there() -> None:
    model, x = small()
    gm = fxsparse.rewrite(model, "nm-masks", (x,))
    before, after = fxsparse.graphs(gm)
    assert not before.code and "not kept" in before.title and "fxsparse.nm_linear(" in after.code
    (only,) = fxsparse.graphs(fxsparse.trace(model, (x,)))
    assert only.title == "0. traced" and "aten.linear(" in only.code


@pytest.mark.parametrize("rewritten", [True, False], ids=["rewritten", "one-line"])
def test_the_graphs_a_compiler_is_given(rewritten: bool) -> None:
    model, x = small()
    options: dict[str, object] = {"compiler": "aot_eager"}
    if rewritten:
        compiled = torch.compile(fxsparse.rewrite(model, SLOPE, (x,)), backend="fxsparse", options=options)
    else:
        compiled = torch.compile(model, backend="fxsparse", options={**options, "passes": SLOPE})
    assert fxsparse.graphs(compiled) == []
    loss = compiled(x).sum()
    (forward,) = fxsparse.graphs(compiled)
    assert re.fullmatch(r"graph \d+/0 for aot_eager, forward", forward.title)
    loss.backward()
    forward, backward = fxsparse.graphs(compiled)
    assert re.fullmatch(r"graph \d+/0 for aot_eager, backward", backward.title)
    assert backward.code.startswith("def backward(")
    call = next(line for line in backward.code.splitlines() if "grad_input(" in line)
    if rewritten:
        assert "fxsparse.nm_linear(" in forward.code
        assert call.lstrip().startswith("nm_linear_grad_input = fxsparse.nm_linear_grad_input(")
        assert "self[2].weight_values, self[2].weight_indices, self[2].weight_column_mask, 2, 4)" in call
    else:
        assert "fxsparse.masked_linear(" in forward.code and "self[2].weight" in call and "column_mask" in call
    for text in (forward, backward):
        ast.parse(str(text))


def test_the_graph_that_runs_in_eager_mode_is_dynamos() -> None:
    family = FAMILIES["sequential"]()
    compiled = torch.compile(family.model, backend="fxsparse", options={"compiler": "eager"})
    compiled(**family.make_batch())
    (text,) = fxsparse.graphs(compiled)
    assert re.fullmatch(r"graph \d+/0 for eager, forward", text.title)
    assert "layers[0].weight, layers[0].bias" in text.code
    ast.parse(str(text))


@pytest.mark.inductor
def test_the_graphs_that_inductor_is_given(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, x = small()
    gm = fxsparse.rewrite(model, SLOPE, (x,))
    for is_cached in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(gm, backend="fxsparse")
        compiled(x).sum().backward()
        texts = fxsparse.graphs(compiled)
        if is_cached:
            assert len(texts) == 1 and "compile caches" in texts[0].title and not texts[0].code
        else:
            assert [text.title.rpartition(", ")[2] for text in texts] == ["forward", "backward"]
            assert "fxsparse.nm_linear(" in texts[0].code and "weight_column_mask, 2, 4)" in texts[1].code
