"""The documentation's code runs, and prints what the documentation says it prints.

In the README and in a page under ``docs/`` every ``python`` block runs, in order and in one namespace, and a ``text``
block that follows one is its output. ``FXSPARSE_UPDATE_GOLDEN=1`` writes the outputs anew. Lines of ``...`` stand for
any lines left out, and ``# not run`` in the first line of a block keeps it from running. Links lead somewhere, and
every public name has an entry.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fxsparse
from fxsparse import graph, integrations, passes

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks/RESULTS.md"]
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?", re.MULTILINE | re.DOTALL)
# What differs between two runs: times, the folder of generated sources, names of symbols, numbers of frames.
VARYING = (
    (re.compile(r"\d+(\.\d+)? ms"), "N ms"),
    (re.compile(r"\S*/kernels/"), ".../kernels/"),
    (re.compile(r"(Dynamo's|graph) \d+/0"), r"\1 0/0"),
)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def run(code: str, namespace: dict[str, Any]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "<documentation>", "exec", dont_inherit=True), namespace)
    text = printed.getvalue()
    for pattern, replacement in VARYING:
        text = pattern.sub(replacement, text)
    symbols: dict[str, str] = {}
    text = re.sub(r"\bs\d+\b", lambda name: symbols.setdefault(name[0], f"s{len(symbols)}"), text)
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines()) + "\n"


def equal(written: str, printed: str) -> bool:
    """Whether the output is as written, where ``...`` on a line of its own stands for any lines."""
    parts = re.split(r"^[ #]*\.\.\.\n", written, flags=re.MULTILINE)
    return re.fullmatch(r"(?:.*\n)*?".join(map(re.escape, parts)), printed) is not None


def without_inductor(compile: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` whose default compiler is not Inductor, which would take a minute a block."""

    def compiled(model: Any, *, backend: str = "fxsparse", options: Any = None, **further: Any) -> Any:
        return compile(model, backend=backend, options={"compiler": "eager"} | (options or {}), **further)

    return compiled


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if BLOCK.search(page.read_text())],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXSPARSE_CACHE_DIR", str(tmp_path))
    if page.name == "README.md":
        monkeypatch.setattr(torch, "compile", without_inductor(torch.compile))
    monkeypatch.chdir(tmp_path)
    text, namespace = page.read_text(), {"__name__": "documentation"}

    def check(block: re.Match[str]) -> str:
        code, output = block["code"], block["output"]
        if code.startswith("# not run"):
            return block[0]
        torch.manual_seed(0)
        printed = run(code, namespace)
        if output is None or equal(output, printed):
            return block[0]
        assert os.environ.get("FXSPARSE_UPDATE_GOLDEN"), f"{page.name} says\n{output}\nbut this was printed\n{printed}"
        return block[0].replace(f"```text\n{output}```", f"```text\n{printed}```")

    updated = BLOCK.sub(check, text)
    if updated != text:
        page.write_text(updated)


LINK = re.compile(r"\]\((?!https?:|mailto:)(?P<target>[^)#\s]*)(?:#(?P<anchor>[^)\s]+))?\)")


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.finditer(without_code(page.read_text())):
        target = (page.parent / link["target"]).resolve() if link["target"] else page
        assert target.exists(), f"{page.name}: {link[0]} leads nowhere"
        assert not link["anchor"] or link["anchor"] in anchors(target), f"{page.name}: {link[0]} has no such heading"


def test_every_public_name_has_an_entry() -> None:
    texts = "\n".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    headings = set(re.findall(r"^## `([\w.]+)`$", texts, re.MULTILINE))
    expected = {f"fxsparse.{name}" for name in fxsparse.__all__ if name != "__version__"}
    expected |= {f"fxsparse.passes.{name}" for name in passes.__all__ if name not in {"Pass", "Pipeline"}}
    expected |= {f"fxsparse.integrations.{name}" for name in integrations.__all__}
    expected |= {f"fx.{name}" for name in graph.__all__}
    assert headings == expected
    assert len(re.findall(r"^::: \S+$", texts, re.MULTILINE)) == len(headings)


def test_every_method_has_a_page_with_its_parts() -> None:
    for page in (ROOT / "docs/methods").glob("*.md"):
        headings = re.findall(r"^## (.+)$", page.read_text(), re.MULTILINE)
        assert headings == ["Run it", "Options", "What it cost and gave", "Limits"], page.name


def test_the_readme_starts_from_nothing() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 160
    first = BLOCK.search(text)
    assert first is not None and "from_pretrained(" in first["code"] and first["output"]


def test_plots_are_drawn_from_the_tables(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    drawn = {path.name for path in plots.draw(tmp_path)}
    assert drawn == set(re.findall(r"docs/plots/(\w+\.png)", (ROOT / "README.md").read_text()))
    assert all((ROOT / "docs/plots" / name).exists() for name in drawn)
    assert plots.greentrainer()[0][1:] == (1.0, 1.0) and len(plots.prumux()) == 12


def test_the_site_is_built(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    page = (tmp_path / "site/api/rewriting.html").read_text()
    assert "dynamic_batch" in page and (tmp_path / "site/CONTRIBUTING.html").exists()
