"""What commands print, progress, and writing files whole or not at all.

Results go to standard output: tables where that is a terminal, plain text where it is not, one JSON object with
``--json``. Progress and notes go to standard error.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click

from fxsparse import files
from fxsparse.document import Document


def show(document: Document, as_json: bool) -> None:
    """Prints a result."""
    if as_json:
        click.echo(json.dumps(document.to_dict(), indent=1))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(document)
    else:
        click.echo(str(document))


def note(text: str) -> None:
    """Says something beside the result."""
    click.echo(click.style(text, dim=True), err=True)


@contextmanager
def working(what: str, total: int | None = None) -> Iterator[Callable[[str], None]]:
    """Shows that something is going on: a bar at a terminal, a line in a pipe.

    Args:
        what: is being done.
        total: of its steps; unknown by default.

    Returns:
        what to call after each step, with a word on the next one.
    """
    if not sys.stderr.isatty():
        start = time.monotonic()
        click.echo(f"{what} ...", err=True)

        def say(word: str) -> None:
            if time.monotonic() - start > 2:
                click.echo(f"{what}: {word}", err=True)

        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)

        def advance(word: str) -> None:
            progress.update(task, advance=1, description=f"{what}: {word}" if word else what)

        yield advance


def check_free(path: Path, force: bool) -> None:
    """Refuses, before the work is done, what is already there."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() and not force:
        raise click.UsageError(f"{path} exists; --force replaces it")
    if not path.absolute().parent.is_dir():
        raise click.UsageError(f"the folder {path.absolute().parent} of {path.name} does not exist")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write files to, which take the place of those in ``path`` when the block ends well."""
    existed = path.exists()
    try:
        with files.unfinished(path, path.name) as unfinished:
            yield unfinished
            files.put_all(unfinished, path, [entry.name for entry in path.iterdir() if entry.is_file()])
    finally:
        if not existed:
            with suppress(OSError):
                path.rmdir()  # which only an empty one lets happen


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write to, which takes the place of ``path`` when the block ends well."""
    with files.unfinished(path.parent, path.name) as unfinished:
        yield unfinished / path.name
        files.put(unfinished / path.name, path)
