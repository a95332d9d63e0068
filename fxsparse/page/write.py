"""`report`: one self-contained page on a rewritten or compiled model."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse.backend.compiled import CompiledGraph, compiled_graphs
from fxsparse.errors import OptionError
from fxsparse.graph.history import kept, text_of
from fxsparse.graph.record import Record, record_of
from fxsparse.history import LOSS, History
from fxsparse.lowering import timings
from fxsparse.page import charts
from fxsparse.page.backward import backward_text
from fxsparse.page.block import CHANGED, INSERTED, REMOVED, SAME, Call, Line, calls, chosen_block, inside, side_by_side
from fxsparse.page.layers import layers_of
from fxsparse.reporting import COSTS, grouped_choices, launched
from fxsparse.text import quantity, shortened
from fxsparse.version import __version__

_FORWARD = ("forward_in_training", "forward")
_SIDES = ("before", "after")
_SHORT = 90  # characters of a pass in a label


def report(
    subject: Any,
    path: str | os.PathLike[str],
    *,
    before: GraphModule | None = None,
    history: Any = None,
    title: str = "",
) -> Path:
    """Writes a page on what was done to a model: one HTML file, for a browser without a network.

    It shows the costs before and after each pass; the sites of the model by layer, with what each pass did there or why
    it did nothing; one block of the graph before and after, forward and backward; numbers of a training; and of a
    compiled model what runs each operator, with measured times, and the sources of the kernels.

    Args:
        subject: as of `explain`: a rewritten graph module, the module that `to_module` made of one, a record, or a
            compiled model that has run.
        path: the file.
        before: the traced graph module that was rewritten, to show a block of it beside the rewritten one. Without it
            the graphs that a pipeline kept (``keep_graphs=True``) serve, which have no backward pass.
        history: a `Schedule` or its ``history``.
        title: of the page; by default the class of the model.

    Returns:
        the file.

    Raises:
        OptionError: ``subject`` was neither rewritten nor compiled.
        ImportError: jinja2 is not installed (``pip install fxsparse[report]``).
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("fxsparse.report needs jinja2: pip install 'fxsparse[report]'") from error
    gm, record, graphs = _parts(subject)
    if record is None and not graphs:
        raise OptionError(
            "there is nothing to report: pass what fxsparse.rewrite returned, or a compiled model that has run"
        )
    files = resources.files("fxsparse.page")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files / "template.html").read_text())
    page = template.render(
        title=title or _name(subject, gm),
        version=record.version if record is not None else __version__,
        style=(files / "style.css").read_text(),
        script=(files / "script.js").read_text(),
        record=record,
        ledger=[] if record is None else _ledger(record),
        layers=[] if record is None else layers_of(record.entries),
        passes=[] if record is None else [shortened(entry.text, _SHORT) for entry in record.entries],
        blocks=[] if gm is None else _blocks(gm, before),
        series=_series(history),
        graphs=[_compiled(graph, _device(subject)) for graph in graphs],
    )
    Path(path).write_text(page, encoding="utf-8")
    return Path(path)


def _parts(subject: Any) -> tuple[GraphModule | None, Record | None, list[CompiledGraph]]:
    """The rewritten graph, its record and the compiled graphs, as far as there are any."""
    if isinstance(subject, Record):
        return None, subject, []
    graphs = compiled_graphs(subject) if callable(subject) else []
    inner = fx.unwrapped(subject)
    form = fx.module_form_of(inner)
    if form is not None:
        return None, record_of(form), graphs
    if isinstance(inner, GraphModule) and "fxsparse" in inner.meta:
        return inner, record_of(inner), graphs
    records = [graph.record for graph in graphs if graph.record is not None]
    return None, records[0] if records else None, graphs


def _name(subject: Any, gm: GraphModule | None) -> str:
    original = getattr(gm, "original_class", None)
    inner = fx.unwrapped(subject)
    return "fxsparse" if isinstance(inner, Record) else (original or type(inner)).__name__


def _device(subject: Any) -> str:
    inner = fx.unwrapped(subject)
    tensors = fx.tensors_of(inner).values() if isinstance(inner, nn.Module) else ()
    return next((tensor.device.type for tensor in tensors), "cuda" if torch.cuda.is_available() else "cpu")


# --- costs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """One bar of the ledger.

    Attributes:
        label: the pass after which this is the cost.
        amount: the cost itself.
        text: the amount with a unit.
        share: of the largest bar, in percent.
        ratio: to the cost before all passes.
    """

    label: str
    amount: int
    text: str
    share: float
    ratio: float


def _ledger(record: Record) -> list[tuple[str, list[Bar]]]:
    """The bars of every cost: as traced, and after each pass."""
    if not record.entries:
        return []
    stages = [("as traced", record.entries[0].before)]
    stages += [(f"{n}. {entry.name}", entry.after) for n, entry in enumerate(record.entries, 1)]
    ledger = []
    for name, field, base in COSTS:
        amounts = [getattr(costs, field) for _, costs in stages]
        if any(amount is None for amount in amounts) or not any(amounts):
            continue
        most, first = max(amounts), amounts[0]
        bars = [
            Bar(label, amount, quantity(amount, base), 100 * amount / most, amount / first if first else float("nan"))
            for (label, _), amount in zip(stages, amounts, strict=True)
        ]
        ledger.append((name, bars))
    return ledger


# --- graphs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A block of a graph, before and after.

    Attributes:
        title: of which graph it is a block.
        path: of the block.
        lines: its rows.
        arcs: which lines read which, of both columns.
        note: what is missing, and why.
    """

    title: str
    path: str
    lines: list[Line]
    arcs: tuple[Any, Any]
    note: str = ""

    @property
    def counts(self) -> dict[str, int]:
        marked = ((side, line) for line in self.lines for side in _SIDES if getattr(line, side) is not None)
        states = [line.style(side) for side, line in marked]
        return {
            state: count // 2 if state == CHANGED else count
            for state in (INSERTED, REMOVED, CHANGED)
            if (count := states.count(state))
        }


def _blocks(gm: GraphModule, before: GraphModule | None) -> list[Block]:
    """One block of the forward and of the backward pass."""
    earlier = kept(gm)
    first = text_of(before) if before is not None else earlier.get(0)
    note = "" if first is not None else "the graph before was not kept: give report(before=...) or keep_graphs=True"
    was, now = calls(first or ""), _forward(text_of(gm))
    path = chosen_block(was, now)
    blocks = [_block("forward", path, inside(was, path), inside(now, path), note)]
    texts = []
    for each in (before, gm):
        try:
            texts.append(backward_text(each, path) if each is not None else "")
        except Exception as error:  # a page without it is worth more than none
            return [
                *blocks,
                Block("backward", path, [], ("", ""), f"it cannot be shown: {type(error).__name__}: {error}"),
            ]
    note = "" if before is not None else "the backward pass before needs report(before=...), the traced graph module"
    return [*blocks, _block("backward", path, calls(texts[0])[:400], calls(texts[1])[:400], note)]


def _forward(text: str) -> list[Call]:
    """The calls in training, where that is another graph."""
    found = (calls(text, name) for name in _FORWARD)
    return next((each for each in found if each), [])


def _block(title: str, path: str, before: list[Call], after: list[Call], note: str) -> Block:
    lines = side_by_side(before, after) if before or not note else [Line(SAME, None, call) for call in after]
    arcs = [charts.arcs(_reads([getattr(line, side) for line in lines])) for side in _SIDES]
    return Block(title, path, lines, (arcs[0], arcs[1]), note)


def _reads(column: Iterable[Call | None]) -> list[list[int]]:
    """By row, the rows whose results it reads."""
    rows = list(column)
    place = {call.name: row for row, call in enumerate(rows) if call is not None}
    return [[] if call is None else [place[name] for name in call.reads if name in place] for call in rows]


# --- training ---------------------------------------------------------------------------------------------------------


def _series(history: Any) -> list[tuple[str, Any, str]]:
    """Name, chart and the last value of every number of a training; which tensors were trained comes last."""
    history = getattr(history, "history", history)
    if not isinstance(history, History) or not history.points:
        return []
    series = history.series()
    ordered = sorted(series, key=lambda name: (name != LOSS, name))
    drawn = [(name, charts.chart(series[name]), f"{series[name][-1][1]:.4g} at the end") for name in ordered]
    if history.trained:
        last = int(history.points[-1]["step"])
        count = len({name for names in history.trained.values() for name in names})
        drawn.append(
            ("trained tensors", charts.raster(history.trained, last), f"{count} tensors were trained at a time")
        )
    return drawn


# --- compiled ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operator:
    """An operator of a compiled graph.

    Attributes:
        name: of the operator.
        site: where, with numbers that differ drawn together.
        runs: the implementation.
        why: the reason.
        times: of each implementation that was measured: name, microseconds, share of the slowest in percent.
    """

    name: str
    site: str
    runs: str
    why: str
    times: list[tuple[str, float, float]]


@dataclass(frozen=True)
class Compiled:
    """A compiled graph: its name, notes, operators, and kernels with name, launches, file and source."""

    name: str
    notes: list[str]
    operators: list[Operator]
    kernels: list[tuple[str, int, str, str]]


def _compiled(graph: CompiledGraph, device: str) -> Compiled:
    operators = []
    for choice, site in grouped_choices(graph.choices):
        times = {} if choice.problem is None else timings.times(choice.problem, device)
        slowest = max(times.values(), default=1.0)
        ranked = sorted(times.items(), key=lambda item: item[1])
        shown = [(name, time * 1e3, 100 * time / slowest) for name, time in ranked]
        operators.append(Operator(choice.op, site, choice.implementation, choice.reason, shown))
    kernels = [(name, count, file, _source(Path(file))) for name, count, file in launched(graph)]
    return Compiled(graph.name, list(graph.notes), operators, kernels)


def _source(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else "the file is gone from the cache"
