"""``fxsparse passes``: every pass and recipe, with its options and defaults."""

from __future__ import annotations

import inspect
from dataclasses import MISSING
from typing import Any

import click

from fxsparse.cli.options import json_option
from fxsparse.cli.output import show
from fxsparse.document import Document, Line, Table
from fxsparse.errors import OptionError, nearest
from fxsparse.options import Option, options_of
from fxsparse.passes.base import Pass, pass_classes
from fxsparse.passes.text import write
from fxsparse.recipes import RECIPES, TAUGHT


@click.command()
@click.argument("name", required=False)
@json_option
def passes(name: str | None, as_json: bool) -> None:
    """List passes and recipes; of one NAME, all its options."""
    classes = {name: cls for name, cls in sorted(pass_classes().items()) if cls.__module__.startswith("fxsparse.")}
    recipes = {**TAUGHT, **RECIPES}
    if name is None:
        show(_every(classes, recipes), as_json)
    elif name in classes:
        show(_one(classes[name]), as_json)
    elif name in recipes:
        show(Document([Line(f"{name} = {recipes[name]}")], {"name": name, "passes": recipes[name]}), as_json)
    else:
        raise OptionError(
            f"no pass or recipe is called {name!r}; {nearest(name, [*classes, *recipes])}`fxsparse passes` lists them"
        )


def _every(classes: dict[str, type[Pass]], recipes: dict[str, str]) -> Document:
    rows = [(name, _summary(cls)) for name, cls in classes.items()]
    parts: list[Line | Table] = [
        Table((("pass", "what it does"), *rows), header=True),
        Line(),
        Table((("recipe", "its passes"), *recipes.items()), header=True),
        Line(),
        Line("`fxsparse passes NAME` lists the options of a pass"),
    ]
    data = {"passes": [_data(cls) for cls in classes.values()], "recipes": recipes}
    return Document(parts, data)


def _one(cls: type[Pass]) -> Document:
    options = _data(cls)["options"]
    parts: list[Line | Table] = [Line(f"{cls.name}, {cls.__name__}", "title"), Line(_summary(cls))]
    if options:
        rows = [(option["name"], option["default"], option["allowed"], option["doc"]) for option in options]
        parts += [Line(), Table((("option", "default", "allowed", "what it means"), *rows), header=True)]
    return Document(parts, _data(cls))


def _data(cls: type[Pass]) -> dict[str, Any]:
    return {
        "name": cls.name,
        "class": cls.__name__,
        "summary": _summary(cls),
        "options": [
            {"name": option.name, "default": _default(option), "allowed": option.allowed, "doc": _plain(option.doc)}
            for option in options_of(cls)
            if option.in_text
        ],
    }


def _summary(cls: type[Pass]) -> str:
    return " ".join(inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].split())


def _default(option: Option) -> str:
    return "required" if option.default is MISSING else write(option.default)


def _plain(doc: str) -> str:
    return doc.replace("``", "")
