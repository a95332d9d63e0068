"""A report as text, at a terminal, in a notebook and as data."""

from __future__ import annotations

import copy
import io
import json
import pickle

import pytest

import fxsparse
from fxsparse.document import WIDTH, Document, Line, Table
from fxsparse.graph.record import record_of
from tests.support.traced import traced


@pytest.fixture(scope="module")
def explained() -> Document:
    return fxsparse.explain(fxsparse.rewrite(traced("opt")[1], "nm-masks{pattern=2:4},double-prune"))


def test_it_is_its_text(explained: Document) -> None:
    assert isinstance(explained, str) and explained == str(explained) == repr(explained)
    assert explained.startswith("fxsparse ") and "lm_head" in explained
    for other in (copy.deepcopy(explained), pickle.loads(pickle.dumps(explained))):
        assert other == explained and other.to_dict() == explained.to_dict()


def test_at_a_terminal_it_fits(explained: Document) -> None:
    console = pytest.importorskip("rich.console").Console
    for columns, width in ((80, 80), (200, WIDTH)):
        narrow = console(width=columns, record=True, file=io.StringIO(), force_terminal=True)
        narrow.print(explained)
        shown = narrow.export_text().rstrip()
        assert max(len(line.rstrip()) for line in shown.splitlines()) <= width
        assert "double-prune" in shown and "tied" in shown


def test_into_a_pipe_rich_prints_whole_lines(explained: Document) -> None:
    console, file = pytest.importorskip("rich.console").Console, io.StringIO()
    console(width=80, file=file).print(explained, highlight=False, soft_wrap=True)
    assert file.getvalue() == f"{explained}\n"


def test_a_notebook_gets_html() -> None:
    document = Document([Line("a < b", "title"), Table((("x", "y"), ("<i>", "1")), header=True, right=(1,))], {})
    html = document._repr_html_()
    assert "a &lt; b" in html and "&lt;i&gt;" in html and "<i>" not in html and "text-align:right" in html
    assert str(document) == "a < b\nx    y\n<i>  1"


def test_as_data_it_says_what_the_record_says() -> None:
    gm = fxsparse.rewrite(traced("opt")[1], "nm-masks{pattern=2:4}")
    record, data = record_of(gm), fxsparse.explain(gm).to_dict()
    (entry,) = record.entries
    assert json.loads(json.dumps(data)) == data
    (item,) = data["passes"]
    assert item["text"] == entry.text and item["after"]["step_flops"] == entry.after.step_flops
    assert [change["site"] for change in item["rewritten"]] == [change.site for change in entry.rewritten] != []
    assert [change["reason"] for change in item["skipped"]] == [change.detail for change in entry.skipped] != []
