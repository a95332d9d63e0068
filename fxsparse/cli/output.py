"""What commands print, progress, and writing files whole or not at all.

Results go to standard output: tables where that is a terminal, plain text where it is not, one JSON object with
``--json``. Progress and notes go to standard error.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

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
    """A folder beside ``path`` that takes its place when the block ends well, and is removed when it does not."""
    path = path.absolute()
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield unfinished
        mask = os.umask(0)
        os.umask(mask)
        unfinished.chmod(0o777 & ~mask)
        previous = unfinished.with_name(f"{unfinished.name}.previous")
        if path.exists():
            path.rename(previous)
        unfinished.rename(path)
        if previous.is_dir():
            shutil.rmtree(previous)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file beside ``path`` that takes its place when the block ends well, and is removed when it does not."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
