"""Arguments and options that commands share, and completing them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from fxsparse.errors import RewriteError
from fxsparse.passes import Pipeline
from fxsparse.passes.base import pass_classes
from fxsparse.recipes import RECIPES, TAUGHT, recipe

Command = TypeVar("Command", bound=Callable[..., Any])


class Passes(click.ParamType):
    """Passes as text, or the name of a recipe."""

    name = "passes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Pipeline:
        if isinstance(value, Pipeline):
            return value
        try:
            return recipe(value) if value in {**RECIPES, **TAUGHT} else Pipeline.parse(value)
        except RewriteError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",")
        names = [*pass_classes(), *(() if comma else RECIPES)]
        return [CompletionItem(f"{before}{comma}{name}") for name in sorted(names) if name.startswith(last)]


def model_argument(command: Command) -> Command:
    """MODEL, and the size of the example that it is traced with."""
    for decorate in (
        click.option("--seed", default=0, show_default=True, help="Of the example's tokens and of weights made anew."),
        click.option("--tokens", default=64, show_default=True, help="Length of the example.", type=click.IntRange(2)),
        click.option("--batch", default=2, show_default=True, help="Rows of the example.", type=click.IntRange(1)),
        click.argument("model", type=click.Path(path_type=str)),
    ):
        command = decorate(command)
    return command


def passes_option(command: Command) -> Command:
    """PASSES, which a command cannot do without."""
    return click.option("--passes", type=Passes(), required=True, help="As text, or a recipe's name.")(command)


def json_option(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(command)


def out_option(what: str) -> Callable[[Command], Command]:
    """Where the result is written."""

    def decorate(command: Command) -> Command:
        command = click.option("--force", is_flag=True, help=f"Replace the {what} if it exists.")(command)
        return click.option("--out", type=click.Path(path_type=Path), required=True, help=f"The {what} to write.")(
            command
        )

    return decorate
