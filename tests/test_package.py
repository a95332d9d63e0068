"""The package as a user meets it: its public names, a light import, its files and the length of its functions."""

from __future__ import annotations

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fxsparse

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[1]
FOLDERS = {"fxsparse": "fxsparse", "passes": "fxsparse.passes", "codegen": "fxsparse.codegen"}
"""Folder at the top of the repository to the package it installs as."""


def in_a_fresh_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout


# --- importing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", fxsparse.__all__)
def test_every_public_name_resolves(name: str) -> None:
    value = getattr(fxsparse, name)
    assert name in dir(fxsparse)
    assert value is getattr(fxsparse, name)
    # A submodule of the same name would take the place of a function as soon as someone imports it.
    is_submodule = (ROOT / "fxsparse" / name).is_dir() or (ROOT / "fxsparse" / f"{name}.py").exists()
    assert is_submodule == isinstance(value, ModuleType)


def test_lazy_names_are_those_that_type_checkers_see() -> None:
    (checked,) = (
        node
        for node in ast.parse((ROOT / "fxsparse/__init__.py").read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    imports = [node for node in checked.body if isinstance(node, ast.ImportFrom)]
    assert len(imports) == len(checked.body)
    seen = {alias.name: node.module for node in imports for alias in node.names}
    submodules = {name for name, module in seen.items() if module == "fxsparse"}
    assert {name: module for name, module in seen.items() if name not in submodules} == fxsparse._DEFINED_IN
    assert seen.keys() <= set(fxsparse.__all__)
    assert set(fxsparse.__all__) - seen.keys() <= vars(fxsparse).keys()


def test_an_unknown_name_is_an_attribute_error() -> None:
    for name in ("no_such_name", "_no_such_name", "__wrapped__"):
        with pytest.raises(AttributeError, match=f"'fxsparse' has no attribute '{name}'"):
            getattr(fxsparse, name)


def test_importing_it_imports_no_compiler() -> None:
    code = """
import json, sys, torch
before = set(sys.modules)
import fxsparse
torch.ops.fxsparse.nm_linear.default, torch.ops.fxsparse.gather_linear.default, torch.ops.fxsparse.mux.default
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    imported = json.loads(in_a_fresh_process(code))
    assert "fxsparse.ops.nm_linear" in imported
    for heavy in ("torch._dynamo", "torch._inductor", "sympy", "networkx", "transformers", "fxsparse.passes"):
        assert heavy not in imported


def test_submodules_and_functions_keep_their_names() -> None:
    code = """
import fxsparse, fxsparse.rewriting, fxsparse.tracing.trace, fxsparse.backend.tune
assert callable(fxsparse.rewrite) and callable(fxsparse.trace) and callable(fxsparse.tune)
assert "slope" in fxsparse.recipes.RECIPES and fxsparse.passes.InsertNMMasks and fxsparse.graph.linears
names = {}
exec("from fxsparse import *", names)
assert set(fxsparse.__all__) <= names.keys()
"""
    in_a_fresh_process(code)


def test_the_backend_is_found_without_an_import() -> None:
    code = """
import sys, torch
print(torch.compile(torch.nn.Linear(4, 4), backend="fxsparse", options={"compiler": "eager"})(torch.ones(1, 4)).shape)
assert "fxsparse" in sys.modules
"""
    assert in_a_fresh_process(code) == f"{torch.Size([1, 4])}\n"


# --- installing -------------------------------------------------------------------------------------------------------


def test_every_package_is_installed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["package-dir"] == {package: folder for folder, package in FOLDERS.items()}
    for folder, package in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            path = init.parent.relative_to(ROOT)
            name = ".".join((package, *path.parts[1:]))
            assert name in setuptools["packages"], f"{path} is not in [tool.setuptools] packages"
        for module in (ROOT / folder).rglob("*.py"):
            assert (module.parent / "__init__.py").exists(), f"{module} is in no package"


def build(kind: str, source: Path, into: Path) -> Path:
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(into)!r}))"
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=source).stdout
    return into / output.splitlines()[-1]


def test_an_sdist_and_its_wheel_hold_every_file(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    for folder in ("tests", "examples", "benchmarks", "docs", ".ci", *FOLDERS):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "out"))
    for pattern in ("*.md", "*.txt", "*.toml", "*.yml", "MANIFEST.in", "LICENSE"):
        for file in ROOT.glob(pattern):
            shutil.copy(file, source)
    files = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    sdist = build("sdist", source, tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
        unpacked = tmp_path / archive.getnames()[0]
    assert files <= {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*")}
    wheel = build("wheel", unpacked, tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        installed = {name for name in archive.namelist() if ".dist-info/" not in name}
    if importlib.util.find_spec("twine") is not None:
        subprocess.run([sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel)], check=True)
    packages = {folder: package.replace(".", "/") for folder, package in FOLDERS.items()}
    parts = (file.partition("/") for file in files)
    assert installed == {f"{packages[folder]}/{rest}" for folder, _, rest in parts if folder in packages}


# --- the source -------------------------------------------------------------------------------------------------------


def test_no_function_is_longer_than_a_screen() -> None:
    """60 lines, without its docstring."""
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[0]
                docstring = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) else 0
                lines = node.end_lineno - node.lineno + 1 - docstring
                assert lines <= 60, f"{path}:{node.lineno}: {node.name} has {lines} lines"
