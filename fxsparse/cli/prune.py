"""``fxsparse prune``: N:M weights in a Hugging Face folder, chosen once with the help of a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from fxsparse.cli.models import read_model
from fxsparse.cli.options import json_option, out_option
from fxsparse.cli.output import check_free, show, working
from fxsparse.cli.rewriting import write_model
from fxsparse.document import Document, Line, Table
from fxsparse.errors import CheckpointError, OptionError
from fxsparse.graph.record import record_of
from fxsparse.passes import InsertNMMasks, Pipeline
from fxsparse.passes.nm.rules import CRITERIA, Criterion
from fxsparse.reporting import costs_table, heading

_DATA_FREE = {"magnitude", "random"}


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@out_option("folder")
@click.option("--pattern", default="2:4", show_default=True, help="n of every m weights are kept.")
@click.option("--criterion", default="sparsegpt", show_default=True, type=click.Choice(tuple(CRITERIA)))
@click.option("--calibration", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A text file.")
@click.option(
    "--evaluate",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Another text: the loss on it, before and after.",
)
@click.option("--exclude", multiple=True, metavar="GLOB", help="Module paths that stay dense; may be repeated.")
@click.option("--rows", default=32, show_default=True, type=click.IntRange(1), help="Rows of text to calibrate with.")
@click.option("--tokens", default=256, show_default=True, type=click.IntRange(2), help="Tokens in a row.")
@click.option("--batch", default=4, show_default=True, type=click.IntRange(1), help="Rows at a time.")
@click.option("--compressed", is_flag=True, help="Write compressed weights, for fxsparse.from_pretrained alone.")
@json_option
def prune(
    model: Path,
    out: Path,
    force: bool,
    pattern: str,
    criterion: Criterion,
    calibration: Path | None,
    evaluate: Path | None,
    exclude: tuple[str, ...],
    rows: int,
    tokens: int,
    batch: int,
    compressed: bool,
    as_json: bool,
) -> None:
    """Prune the linears of a folder of Hugging Face to n:m, and write a folder.

    sparsegpt and wanda read the model's activations on a text (--calibration). The result is an ordinary checkpoint
    with zeros, which transformers reads and torch.compile(model, backend="fxsparse") runs compressed.
    """
    if criterion not in _DATA_FREE and calibration is None:
        raise click.UsageError(f"{criterion} reads activations: give it a text, --calibration FILE")
    check_free(out, force)
    loaded = read_model(str(model), batch=2, tokens=min(tokens, 64), seed=0)
    if loaded.weightless:
        raise CheckpointError(f"{model} holds no weights to prune")
    tokenizer = _tokenizer(model) if calibration or evaluate else None
    config: Any = loaded.model.config
    length = min(tokens, getattr(config.get_text_config(), "max_position_embeddings", None) or tokens)
    needs = criterion not in _DATA_FREE and calibration is not None
    batches = _batches(tokenizer, calibration, rows, length, batch) if needs else []
    item = InsertNMMasks(pattern, criterion=criterion, exclude=exclude, calibration=batches or None)
    gm = loaded.rewritten(loaded.traced(), Pipeline(item))
    losses = {}
    if evaluate is not None:
        held_out = _batches(tokenizer, evaluate, rows, length, batch)
        losses = {"before": _loss(loaded.model, held_out), "after": _loss(gm, held_out)}
    write_model(loaded, gm, out, "module" if compressed else "dense")
    entry = record_of(gm).entries[-1]
    data = {
        "out": str(out),
        "rewritten": len(entry.rewritten),
        "skipped": [{"site": change.site, "reason": change.detail} for change in entry.skipped],
        "tokens": sum(batch["input_ids"].numel() for batch in batches),
        "loss": losses or None,
    }
    parts: list[Line | Table] = [Line(heading(1, entry), "pass"), costs_table(entry.before, entry.after)]
    if losses:
        parts += [Line(), _losses(evaluate, losses)]
    reader = "fxsparse.from_pretrained" if compressed else "transformers"
    show(Document([*parts, Line(), Line(f"wrote {out}, for {reader}")], data), as_json)


def _losses(text: Path | None, losses: dict[str, float]) -> Table:
    rows = [(when, f"{loss:.4f}", f"{math.exp(min(loss, 700)):.2f}") for when, loss in losses.items()]
    return Table(((str(text), "loss", "perplexity"), *rows), header=True, right=(1, 2))


def _tokenizer(folder: Path) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise CheckpointError(
            f"{folder} holds no tokenizer that can be read: {type(error).__name__}: {error}"
        ) from error


def _batches(tokenizer: Any, file: Path | None, rows: int, tokens: int, batch: int) -> list[dict[str, Tensor]]:
    """The first rows of a text, without padding."""
    assert file is not None
    ids = tokenizer(file.read_text(errors="replace"), return_tensors="pt", verbose=False)["input_ids"][0]
    count = min(rows, len(ids) // tokens)
    if not count:
        raise OptionError(
            f"{file} has {len(ids)} tokens, fewer than one row of {tokens}; give a longer text or --tokens"
        )
    whole = ids[: count * tokens].reshape(count, tokens)
    return [{"input_ids": part, "labels": part.clone()} for part in whole.split(batch)]


@torch.no_grad()
def _loss(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> float:
    """The mean loss of a token."""
    model.eval()
    with working("measuring the loss", len(batches)) as advance:
        total, count = 0.0, 0
        for batch in batches:
            total += float(model(**batch).loss) * len(batch["input_ids"])
            count += len(batch["input_ids"])
            advance("")
    return total / count
