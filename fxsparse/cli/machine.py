"""``env`` and ``completion``: what is installed here, and completing commands in a shell."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import click
import torch
from click.shell_completion import get_completion_class

from fxsparse.cli.options import json_option
from fxsparse.cli.output import show
from fxsparse.codegen.cpu import instruction_sets
from fxsparse.codegen.cpu.build import BuildError, compiler
from fxsparse.codegen.source import cache_dir
from fxsparse.document import Document, Table
from fxsparse.errors import OptionError
from fxsparse.version import __version__

_PACKAGES = ("torch", "triton", "transformers", "numpy", "safetensors", "peft", "accelerate", "lightning")


@click.command()
@json_option
def env(as_json: bool) -> None:
    """Show versions, devices and what kernels are made for; add it to a report of a bug."""
    facts = {
        "fxsparse": __version__,
        "Python": f"{platform.python_version()}, {platform.platform()}",
        **{name: _version(name) for name in _PACKAGES},
        "GPUs": ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) or "none",
        "processor": f"{instruction_sets.processor()}, {os.cpu_count()} processors, {torch.get_num_threads()} threads",
        "kernels for": _instruction_set(),
        "C++ compiler": _compiler(),
        "cache": str(cache_dir()),
        "variables": ", ".join(
            f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith("FXSPARSE")
        )
        or "none",
    }
    show(Document([Table(tuple(facts.items()))], facts), as_json)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _instruction_set() -> str:
    try:
        return str(instruction_sets.chosen())
    except OptionError as error:
        return str(error)


def _compiler() -> str:
    try:
        return " ".join(compiler())
    except BuildError as error:
        return str(error)


@click.command()
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what completes commands, passes and options; source it, or add it to the shell's start-up file.

    bash: eval "$(fxsparse completion bash)"
    """
    cls = get_completion_class(shell)
    assert cls is not None
    click.echo(cls(ctx.find_root().command, {}, "fxsparse", "_FXSPARSE_COMPLETE").source())
