"""A package imports only from the lines below it: nothing lower knows what is above, and siblings not each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (
    "errors version text optimizers files exclusive",
    "typed options document",
    "graph ops stored",
    "modules",
    "analysis cost tracing codegen",
    "passes lowering",
    "recipes conversion",
    "backend",
    "rewriting schedule checkpoint dense_state reporting history inspection page autoprumux integrations",
    "cli",
    "__main__",
)
"""From the lowest to the highest; the top package itself, which only exports, is above all."""

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}
TOP = set(LAYERS[-3].split())


def modules() -> list[Path]:
    folders = (ROOT / name for name in ("fxsparse", "passes", "codegen"))
    return [
        path for folder in folders for path in sorted(folder.rglob("*.py")) if path != ROOT / "fxsparse/__init__.py"
    ]


def package_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "fxsparse" else parts[0]


def imported(path: Path) -> set[tuple[str, int]]:
    """Packages of fxsparse that a file imports, also inside functions, and the line."""
    found: set[tuple[str, int]] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            whole = node.module == "fxsparse"
            names = [f"fxsparse.{alias.name}" for alias in node.names] if whole else [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {(name.split(".")[1], node.lineno) for name in names if name.startswith("fxsparse.")}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_run_down(path: Path) -> None:
    own = package_of(path)
    for package, line in imported(path):
        same = package == own or (own in TOP and package in TOP)
        assert same or LEVEL[package] < LEVEL[own], f"{path}:{line}: {own} imports {package}, which is not below it"


def test_every_package_has_a_layer() -> None:
    assert {package_of(path) for path in modules()} == set(LEVEL)
