"""The page: its numbers, its diff, and what it does in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Pipeline
from fxsparse.graph.record import record_of
from fxsparse.history import History
from fxsparse.page import backward
from fxsparse.page.block import CHANGED, INSERTED, REMOVED, REPLACED, SAME, calls, side_by_side
from fxsparse.page.layers import block_of, layers_of
from fxsparse.page.write import COSTS
from tests.support.traced import traced

pytest.importorskip("jinja2")
from markupsafe import escape

SLOPE = "nm-masks{pattern=2:4},double-prune,low-rank{rank=4}"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """What a page refers to, and the costs it shows."""

    def __init__(self, text: str):
        super().__init__()
        self.references: list[str] = []
        self.costs: list[tuple[str, int, int]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = dict(attrs)
        self.references += [of[name] or "" for name in ("src", "href", "srcset", "action", "data") if name in of]
        if "data-amount" in of:
            self.costs.append((str(of["data-cost"]), int(of["data-stage"] or 0), int(of["data-amount"] or 0)))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, fxsparse.Record]:
    before = traced("llama")[1]
    gm = fxsparse.rewrite(before, SLOPE)
    history = History(4)
    for step in range(1, 5):
        history.add(step, {"low-rank.started": float(step > 2)}, loss=2.0 / step)
    history.chose(1, ["a.weight", "b.weight"])
    history.chose(3, ["b.weight"])
    path = tmp_path_factory.mktemp("page") / "page.html"
    return fxsparse.report(gm, path, before=before, history=history), record_of(gm)


def test_its_numbers_are_the_records(page: tuple[Path, fxsparse.Record]) -> None:
    path, record = page
    shown = Page(path.read_text())
    stages = [record.entries[0].before, *(entry.after for entry in record.entries)]
    expected = [(name, at, getattr(costs, field)) for name, field, _ in COSTS for at, costs in enumerate(stages)]
    assert shown.costs == expected
    text = path.read_text()
    for entry in record.entries:
        assert all(change.site.rpartition(".")[2] in text and escape(change.detail) in text for change in entry.changes)


def test_it_asks_for_nothing(page: tuple[Path, fxsparse.Record]) -> None:
    text = page[0].read_text()
    assert all(reference.startswith(("data:", "#")) for reference in Page(text).references)
    assert "default-src 'none'" in text and not re.search(r"url\(|@import|fetch\(|XMLHttpRequest", text)
    assert len(text) < 500_000


def test_layers_hold_every_change() -> None:
    record = record_of(fxsparse.rewrite(traced("opt")[1], "nm-masks,double-prune"))
    layers = layers_of(record.entries)
    assert sum(len(layer.rows) for layer in layers) == sum(len(entry.changes) for entry in record.entries)
    assert [layer.path for layer in layers] == ["", *(f"model.decoder.layers.{n}" for n in range(3))]
    assert block_of("h.10.mlp.fc") == "h.10" and block_of("lm_head") == ""


def test_inserts_and_removals_of_a_block(page: tuple[Path, fxsparse.Record]) -> None:
    text = page[0].read_text()
    marked = re.search(r"<summary>forward(.*?)</summary>", text)
    assert marked is not None and re.findall(r"(\d+) (\w+)<", marked[1]) == [("7", "inserted"), ("7", "removed")]
    assert "nm_linear_low_rank_grad" in text or "nm_linear_grad_input(" in text  # the backward pass after
    assert text.count('<li class="inserted"') > 7 and "it cannot be shown" not in text


def test_lines_that_differ() -> None:
    before = """def forward(
    self,
):

    # h.0
    a = aten.add(x, 1)                    # f32[2]
    # h.0.fc    weight: f32[2, 2]
    linear = aten.linear(a, fc.weight)    # f32[2]
    b = aten.mul(linear, 2)               # f32[2]
"""
    after = before.replace("linear = aten.linear(a, fc.weight)", "nm = fxsparse.nm(a, fc.values)")
    after = after.replace("aten.mul(linear, 2)", "aten.mul(nm, 3)").replace("aten.add(x, 1)", "aten.add(y, 1)")
    lines = side_by_side(calls(before), calls(after))
    assert [line.state for line in lines] == [SAME, REPLACED, CHANGED]
    assert (lines[1].style("before"), lines[1].style("after")) == (REMOVED, INSERTED)
    assert calls(before)[1].path == "h.0.fc" and calls(before)[2].reads == ("linear",)


def test_the_backward_pass_of_a_block_is_that_of_the_model() -> None:
    _, gm = traced("opt")
    text = backward.backward_text(fxsparse.rewrite(gm, "nm-masks,double-prune"), "model.decoder.layers.1")
    assert text.startswith("def backward(") and text.count("fxsparse.nm_linear_grad_input(") == 6
    assert text.count("fxsparse.nm_linear_grad_values(") == 6
    dense = backward.backward_text(gm, "model.decoder.layers.1")
    assert "fxsparse." not in dense and dense.count("aten.mm(") == 12


def test_kept_graphs_serve_where_none_is_given(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4))
    gm = fxsparse.rewrite(model, Pipeline("nm-masks", keep_graphs=True), (torch.randn(3, 8),))
    text = fxsparse.report(gm, tmp_path / "page.html").read_text()
    assert "1 inserted" in text and "needs report(before=...)" in text
    text = fxsparse.report(record_of(gm), tmp_path / "record.html").read_text()
    assert "2:4, magnitude" in text and "One block" not in text
    with pytest.raises(fxsparse.OptionError, match="nothing to report"):
        fxsparse.report(nn.Linear(2, 2), tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


def test_a_compiled_model(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4))
    x = torch.randn(3, 8)
    compiled = torch.compile(
        fxsparse.rewrite(model, "nm-masks", (x,)), backend="fxsparse", options={"compiler": "eager"}
    )
    compiled(x)
    text = fxsparse.report(compiled, tmp_path / "page.html").read_text()
    choice = fxsparse.explain(compiled).to_dict()["graphs"][0]["choices"][0]
    assert choice["operator"] in text and escape(choice["why"]) in text and f"<b>{choice['runs']}</b>" in text


# --- in a browser -----------------------------------------------------------------------------------------------------

SCRIPT = """
<script>
const problems = [];
addEventListener("error", (event) => problems.push(event.message));
addEventListener("load", () => {
  const seen = {}, search = document.getElementById("search"), root = document.documentElement;
  const visible = () => [...document.querySelectorAll("tr.s")].filter((row) => !row.hidden).length;
  const pressed = (key) => new KeyboardEvent("keydown", { key, bubbles: true });
  const press = (key, target = document.body) => target.dispatchEvent(pressed(key));
  seen.all = visible();
  press("/");
  seen.focus = document.activeElement === search;
  search.value = "lm_head";
  search.dispatchEvent(new Event("input"));
  seen.found = visible();
  seen.said = document.getElementById("found").textContent;
  press("Escape", search);
  seen.back = visible();
  search.blur();
  press("c");
  seen.closed = document.querySelectorAll("details[open]").length;
  press("e");
  seen.open = document.querySelectorAll("details:not([open])").length;
  const panel = document.querySelector(".scroll");
  for (const key of ["ArrowDown", "ArrowDown"]) press(key, panel);
  seen.line = panel.querySelectorAll("li.at").length;
  seen.arcs = panel.querySelectorAll("path.on").length;
  press("t");
  seen.theme = root.dataset.theme;
  seen.back_color = getComputedStyle(document.body).backgroundColor;
  seen.wide = root.scrollWidth <= root.clientWidth;
  seen.problems = problems;
  seen.requests = performance.getEntriesByType("resource").length;
  document.body.textContent = JSON.stringify(seen);
});
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [400, 1400])
def test_in_a_browser(page: tuple[Path, fxsparse.Record], tmp_path: Path, width: int) -> None:
    path, record = page
    scripted = tmp_path / "scripted.html"
    scripted.write_text(path.read_text().replace("<header>", f"{SCRIPT}<header>", 1))
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", f"--window-size={width},900", "--virtual-time-budget=2000", "--dump-dom"]
    result = subprocess.run([*command, scripted.as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in result.stderr
    seen = json.loads(re.search(r"\{.*\}", re.sub(r"(?s)^.*<body>", "", result.stdout))[0].replace("&quot;", '"'))  # type: ignore[index]
    changes = sum(len(entry.changes) for entry in record.entries) + len(record.entries)
    assert seen["all"] == seen["back"] == changes and 0 < seen["found"] < 5 and seen["said"] == f"{seen['found']} found"
    assert seen["focus"] and seen["closed"] == 0 and seen["open"] == 0
    assert seen["line"] == 1 and seen["arcs"] >= 1
    assert seen["theme"] in {"dark", "light"} and seen["wide"]
    assert seen["problems"] == [] and seen["requests"] == 0
