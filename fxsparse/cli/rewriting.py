"""``explain``, ``rewrite`` and ``report``: a model, passes, and what became of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import click
from torch.fx import GraphModule

from fxsparse.checkpoint import save
from fxsparse.cli.models import Loaded, read_model
from fxsparse.cli.options import json_option, model_argument, out_option, passes_option
from fxsparse.cli.output import check_free, new_file, new_folder, note, show, working
from fxsparse.conversion.convert import to_module
from fxsparse.document import Document, Line
from fxsparse.errors import CheckpointError
from fxsparse.integrations.huggingface import save_pretrained
from fxsparse.page.write import report as write_page
from fxsparse.passes import Pipeline
from fxsparse.reporting import explain as explain_model

TENSORS = "model.safetensors"
# What a folder of Hugging Face holds beside weights and configuration.
_COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "*.model",
    "preprocessor_config.json",
    "chat_template*",
)


@click.command()
@model_argument
@passes_option
@json_option
def explain(model: str, passes: Pipeline, as_json: bool, **sizes: Any) -> None:
    """Say what PASSES would do to MODEL: the costs before and after, and every site rewritten or skipped, and why."""
    loaded = read_model(model, values=False, **sizes)
    show(explain_model(loaded.rewritten(loaded.traced(), passes)), as_json)


@click.command()
@model_argument
@passes_option
@out_option("folder")
@click.option("--dense", is_flag=True, help="Write dense weights, with zeros where weights were pruned.")
@click.option("--graph", is_flag=True, help=f"Write the graph's tensors for fxsparse.load, as {TENSORS}.")
@json_option
def rewrite(
    model: str, passes: Pipeline, out: Path, force: bool, dense: bool, graph: bool, as_json: bool, **sizes: Any
) -> None:
    """Rewrite MODEL by PASSES and write the result to a folder.

    A model of Hugging Face becomes a folder of its class: compressed for fxsparse.from_pretrained, or --dense, which
    transformers reads too where every size has a place in its configuration. Of any other model the graph is written.
    """
    if dense and graph:
        raise click.UsageError("--dense and --graph exclude each other")
    check_free(out, force)
    loaded = read_model(model, **sizes)
    if loaded.weightless:
        raise CheckpointError(f"{model} holds no weights to rewrite; `fxsparse explain` needs none")
    gm = loaded.rewritten(loaded.traced(), passes)
    explanation = explain_model(gm)
    form = write_model(loaded, gm, out, "graph" if graph or loaded.folder is None else "dense" if dense else "module")
    data = {"out": str(out), "form": form, **explanation.to_dict()}
    show(Document([*explanation.parts, Line(), Line(_how_to_read(out, form))], data), as_json)


def write_model(loaded: Loaded, gm: GraphModule, out: Path, form: str) -> str:
    """Writes a rewritten model as a ``module``, a ``dense`` one, or a ``graph``; returns the form."""
    with working(f"writing {out}"), new_folder(out) as folder:
        if form == "graph":
            save(gm, folder / TENSORS)
        elif form == "dense":
            save_pretrained(gm, loaded.model, folder)
        else:
            save_pretrained(to_module(gm, loaded.model), folder)
        for pattern in _COMPANIONS:
            for file in [] if loaded.folder is None else loaded.folder.glob(pattern):
                shutil.copy2(file, folder)
    return form


def _how_to_read(out: Path, form: str) -> str:
    if form == "graph":
        return f'wrote {out / TENSORS}; read it with fxsparse.load("{out / TENSORS}", model, ...)'
    return f'wrote {out}; read it with fxsparse.from_pretrained("{out}")'


@click.command()
@model_argument
@passes_option
@out_option("page")
@json_option
def report(model: str, passes: Pipeline, out: Path, force: bool, as_json: bool, **sizes: Any) -> None:
    """Write a page on what PASSES do to MODEL: layers, costs, and the graph of a block before and after."""
    check_free(out, force)
    loaded = read_model(model, values=False, **sizes)
    before = loaded.traced()
    gm = loaded.rewritten(before, passes)
    with working(f"writing {out}"), new_file(out) as file:
        write_page(gm, file, before=before, title=str(model))
    data: dict[str, Any] = {"out": str(out), "bytes": out.stat().st_size, **explain_model(gm).to_dict()}
    show(Document([Line(f"wrote {out}, {out.stat().st_size / 1e3:.0f} kB")], data), as_json)
    if loaded.weightless:
        note("there are no weights here: what depends on their values is not shown")
