"""The documentation's code runs, and prints what the documentation says it prints.

In a page under ``docs/`` every ``python`` block runs, in order and in one namespace, and a ``text`` block that follows
one is its output. ``FXSPARSE_UPDATE_GOLDEN=1`` writes the outputs anew. Lines of ``...`` stand for any lines left out,
and ``# not run`` in the first line of a block keeps it from running.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?", re.MULTILINE | re.DOTALL)
# What differs between two runs: times, the folder of generated sources, names of symbols, numbers of frames.
VARYING = (
    (re.compile(r"\d+(\.\d+)? ms"), "N ms"),
    (re.compile(r"\S*/kernels/"), ".../kernels/"),
    (re.compile(r"(Dynamo's|graph) \d+/0"), r"\1 0/0"),
)


def run(code: str, namespace: dict[str, Any]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "<documentation>", "exec"), namespace)
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXSPARSE_CACHE_DIR", str(tmp_path))
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
