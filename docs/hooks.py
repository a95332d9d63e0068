"""Hooks of mkdocs: pages that stand outside ``docs/``, and the package as it installs.

Links from ``docs/`` to ``../CONTRIBUTING.md`` work in a folder and on a forge; in the site the file becomes a page.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/RESULTS.md")
_LINK = re.compile(r"\]\((?P<up>(?:\.\./)*)(?P<target>[\w./-]+\.(?:md|png))(?P<anchor>#[\w-]+)?\)")


@event_priority(100)  # before mkdocstrings reads its options
def on_config(config: Any) -> Any:
    """Shows mkdocstrings the package as it installs: ``passes/`` and ``codegen/`` inside ``fxsparse/``."""
    tree = Path(tempfile.mkdtemp(prefix="fxsparse-docs-")) / "fxsparse"
    tree.mkdir()
    for path in (*(ROOT / "fxsparse").iterdir(), ROOT / "passes", ROOT / "codegen"):
        (tree / path.name).symlink_to(path)
    config.plugins["mkdocstrings"].config.handlers.setdefault("python", {})["paths"] = [str(tree.parent)]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that stand outside."""
    for name in OUTSIDE:
        files.append(File.generated(config, name, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links to what stands outside, and from there into ``docs/``."""
    folder = Path(page.file.src_uri).parent
    in_site = page.file.src_uri in OUTSIDE

    def link(match: re.Match[str]) -> str:
        base = ROOT / folder if in_site else ROOT / "docs" / folder
        target = (base / match["up"] / match["target"]).resolve()
        for root in (ROOT / "docs", ROOT):
            if target.is_relative_to(root):
                place = target.relative_to(root).as_posix()
                if root == ROOT and place not in OUTSIDE:
                    return match[0]
                up = "../" * len(folder.parts)
                return f"]({up}{place}{match['anchor'] or ''})"
        return match[0]

    return _LINK.sub(link, markdown)
