"""``tune`` and ``kernels``: times of implementations on this machine, and the sources of generated kernels."""

from __future__ import annotations

from typing import Any

import click
import torch
from torch.utils import _pytree as pytree

from fxsparse.backend.compiled import kernels as launched
from fxsparse.backend.tune import tune as measure
from fxsparse.cli.models import read_model
from fxsparse.cli.options import Passes, json_option, model_argument, passes_option
from fxsparse.cli.output import show, working
from fxsparse.codegen.source import cache_dir
from fxsparse.document import Document, Line, Table
from fxsparse.errors import OptionError
from fxsparse.lowering import timings
from fxsparse.lowering.measure import Measurement
from fxsparse.ops.operator import DENSE, REFERENCE
from fxsparse.passes import Pipeline

_SOURCES = {"Triton": ("kernels", "*.py"), "C++": ("cpu", "*.cpp")}


@click.command()
@model_argument
@passes_option
@click.option("--rows", multiple=True, type=click.IntRange(1), help="Batch times length; may be repeated.")
@click.option("--seconds", default=60.0, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option("--again", is_flag=True, help="Measure also what was measured before.")
@json_option
def tune(
    model: str, passes: Pipeline, rows: tuple[int, ...], seconds: float, again: bool, as_json: bool, **sizes: Any
) -> None:
    """Measure what runs the operators of a rewritten MODEL here, for torch.compile to choose by."""
    loaded = read_model(model, **sizes)
    gm = loaded.rewritten(loaded.traced(), passes)
    measured = measure(gm, rows=rows or None, seconds=seconds, again=again, progress=True)
    rows_ = [row for measurement in measured for row in _rows(measurement)]
    header = ("product", "implementation", "us", "of dense")
    parts = (
        [Table((header, *rows_), header=True, right=(2, 3))] if rows_ else [Line("all was measured before; --again")]
    )
    data = [
        {"product": timings.key(each.problem), "milliseconds": each.milliseconds, "failed": each.failed}
        for each in measured
    ]
    show(Document([*parts, Line(f"kept in {cache_dir() / 'measured'}")], {"measured": data}), as_json)


def _rows(measurement: Measurement) -> list[tuple[str, ...]]:
    times = sorted(measurement.milliseconds.items(), key=lambda item: item[1])
    base = measurement.milliseconds.get(DENSE) or measurement.milliseconds.get(REFERENCE)
    name = timings.key(measurement.problem)
    rows: list[tuple[str, ...]] = [
        (name if not at else "", which, f"{time * 1e3:.0f}", f"{time / base:.2f}" if base else "-")
        for at, (which, time) in enumerate(times)
    ]
    return rows or [(name, "nothing", "; ".join(measurement.failed.values()), "-")]


@click.command()
@click.argument("model", required=False)
@click.option("--passes", type=Passes(), help="As text, or a recipe's name.")
@click.option("--batch", default=2, show_default=True, type=click.IntRange(1))
@click.option("--tokens", default=64, show_default=True, type=click.IntRange(2))
@click.option("--train/--no-train", default=True, show_default=True, help="Also run a backward pass.")
@json_option
def kernels(model: str | None, passes: Pipeline | None, batch: int, tokens: int, train: bool, as_json: bool) -> None:
    """List generated kernels: those in the cache, or those that a compiled MODEL launches with PASSES."""
    if model is None:
        show(_cached(), as_json)
        return
    if passes is None:
        raise click.UsageError("of a MODEL, --passes says what it is rewritten by")
    loaded = read_model(model, batch=batch, tokens=tokens, seed=0)
    gm = loaded.rewritten(loaded.traced(), passes)
    compiled = torch.compile(gm.train(train), backend="fxsparse")
    with working("compiling and running"):
        output = compiled(*loaded.args, **loaded.kwargs)
        if train:
            loss_of(output).backward()
    ran = launched(compiled)
    rows = [(kernel.name, str(kernel.count), str(kernel.file)) for kernel in ran]
    nothing = "no generated kernel ran: `fxsparse tune` measures whether one is faster, and explain says what runs"
    parts = [Table((("kernel", "launches", "source"), *rows), header=True, right=(1,))] if rows else [Line(nothing)]
    data = [{"name": kernel.name, "launches": kernel.count, "source": str(kernel.file)} for kernel in ran]
    show(Document(parts, {"kernels": data}), as_json)


def loss_of(output: Any) -> torch.Tensor:
    """The loss of a model's output; where it has none, the mean of its first floating-point tensor."""
    loss = getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss
    leaves = pytree.tree_leaves(output)
    tensor = next((leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad), None)
    if tensor is None:
        raise OptionError("the model returns nothing that can be trained; --no-train runs it in inference")
    return tensor.float().mean()


def _cached() -> Document:
    files = [
        (kind, file.stem.rpartition("_")[0], str(file))
        for kind, (folder, glob) in _SOURCES.items()
        for file in sorted((cache_dir() / folder).glob(glob))
    ]
    nothing = Line(f"no kernel was generated yet in {cache_dir()}")
    parts = [Table((("in", "kernel", "source"), *files), header=True)] if files else [nothing]
    data = [{"language": kind, "name": name, "source": file} for kind, name, file in files]
    return Document(parts, {"kernels": data})
