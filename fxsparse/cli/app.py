"""The group of commands, and what becomes of an error.

    0    done
    1    refused: the model, the passes or a file; the message says what to do
    2    the command line itself is wrong
    3    a bug of fxsparse
    130  interrupted; nothing is half written

With ``--json`` an error is an object too. A traceback is shown only with ``--debug``.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import click

from fxsparse.cli.output import note
from fxsparse.errors import FxsparseError, InternalError
from fxsparse.version import __version__, how_to_report

COMMANDS = {
    "passes": "catalogue",
    "explain": "rewriting",
    "rewrite": "rewriting",
    "report": "rewriting",
    "prune": "prune",
    "tune": "measuring",
    "bench": "bench",
    "kernels": "measuring",
    "env": "machine",
    "completion": "machine",
}
"""The module of each command, which is imported when it is used: some need transformers."""

REFUSED, USAGE, BUG, INTERRUPTED = 1, 2, 3, 130


class Commands(click.Group):
    """The commands in the order they are met, each imported when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"fxsparse.cli.{COMMANDS[cmd_name]}")
        command: click.Command = getattr(module, cmd_name)
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fxsparse")
@click.option("--debug", is_flag=True, help="Show tracebacks; it may stand anywhere.")
def group(debug: bool) -> None:
    """Makes transformers cheaper to train and to serve.

    MODEL is a folder of Hugging Face, a config.json, or module:function, a function that returns a model and an example
    of its inputs. PASSES are written as text, nm-masks{pattern=2:4},double-prune, or name a recipe; `fxsparse passes`
    lists both. Exit codes: 0 done, 1 refused, 2 wrong usage, 3 a bug of fxsparse, 130 interrupted.
    """


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns the exit code."""
    with warnings.catch_warnings(), _terminations_interrupt():
        warnings.showwarning = _warning
        return _run(arguments)


def _run(arguments: Sequence[str]) -> int:
    words = [word for word in arguments if word != "--debug"]
    debug, as_json = len(words) < len(arguments), "--json" in words
    try:
        group.main(args=words, prog_name="fxsparse", standalone_mode=False)
        return 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        note("interrupted; nothing is half written")
        return INTERRUPTED
    except click.ClickException as error:
        if debug:
            traceback.print_exc()
        _complain(error.format_message(), "UsageError", as_json, hint=_usage(error))
        return USAGE
    except BrokenPipeError:
        sys.stderr.close()  # nobody reads on
        return REFUSED
    except Exception as error:
        if debug:
            traceback.print_exc()
        bug = isinstance(error, InternalError) or not isinstance(error, (FxsparseError, OSError, ImportError))
        text = str(error)
        if bug and not isinstance(error, InternalError):
            text = f"{type(error).__name__}: {error}. {how_to_report()}"
        _complain(text, type(error).__name__, as_json, hint="--debug shows the traceback" if bug and not debug else "")
        return BUG if bug else REFUSED


def _usage(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return "" if context is None else f"try `{context.command_path} --help`"


def _complain(text: str, kind: str, as_json: bool, *, hint: str) -> None:
    if as_json:
        click.echo(json.dumps({"error": {"type": kind, "message": text}}, indent=1))
        return
    click.echo(click.style("error: ", fg="red", bold=True, reset=True) + text, err=True)
    if hint:
        note(hint)


@contextlib.contextmanager
def _terminations_interrupt() -> Iterator[None]:
    """Lets SIGTERM end a command as Ctrl-C does, so that what is half written is removed."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _warning(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    if not issubclass(category, (DeprecationWarning, FutureWarning)):
        click.echo(click.style("warning: ", fg="yellow") + str(message), err=True)
