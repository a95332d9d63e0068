"""Readable reports of a rewrite: the changes of every pass, and the costs of the model before and after.

`explain` takes a rewritten graph module, a record or a compiled model. Changes that differ in one number of their site
are drawn together, ``layers.{0-31}.fc1``, so that a report of a deep model stays short.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fxsparse import graph as fx
from fxsparse import typed
from fxsparse.backend.compiled import CompiledGraph, compiled_graphs
from fxsparse.document import Document, Line, Table
from fxsparse.graph.record import Change, Costs, Entry, Record, record_of
from fxsparse.lowering import timings
from fxsparse.lowering.choice import Choice
from fxsparse.text import quantity, ranges, shortened

COSTS = (
    ("forward FLOPs", "forward_flops", 1000),
    ("training step FLOPs", "step_flops", 1000),
    ("step FLOPs on n:m hardware", "nm_step_flops", 1000),
    ("parameters", "parameters", 1000),
    ("parameter bytes", "parameter_bytes", 1024),
    ("mask and index bytes", "buffer_bytes", 1024),
    ("optimizer bytes (two moments)", "optimizer_bytes", 1024),
)


_LONGEST_PASS = 160  # characters
_NOT_COMPILED = 'no graph was compiled by backend="fxsparse" yet: call the compiled model once'


def explain(subject: Any) -> Document:
    """A readable report of the changes made to a model.

    Args:
        subject: a traced or rewritten graph module, the module that `fxsparse.to_module` made of one, a
            :class:`Record`, or a compiled model or function (``torch.compile(..., backend="fxsparse")``). Of a compiled
            one that has run, what was compiled is explained.

    Returns:
        text: the costs before and after; then, for every pass, the rewritten sites, and the skipped ones with reasons.
        ``rich.print`` and notebooks show it as tables, and ``to_dict()`` gives it as data.
    """
    record, graphs = examined(subject)
    compiled = isinstance(subject, torch._dynamo.OptimizedModule)
    if record is not None and not compiled:
        return explain_record(record)
    if record is not None:
        parts, data = [*_record_parts(record), Line(), Line(_NOT_COMPILED)], record_data(record)
        return Document(parts, {**data, "message": _NOT_COMPILED})
    if not graphs and not compiled and getattr(subject, "_compiled_call_impl", True) is None:
        text = (
            f"{type(subject).__name__} was neither rewritten nor compiled, so there is nothing to explain: pass what "
            'fxsparse.rewrite(model, passes, kwargs=batch) or torch.compile(model, backend="fxsparse") returned'
        )
        return Document([Line(text)], {"graphs": [], "message": text})
    return explain_compiled(graphs)


def examined(subject: Any) -> tuple[Record | None, list[CompiledGraph]]:
    """The record of a rewritten model or its module form, in whatever wraps it; of anything else, and of a compiled
    model that has run, None and the graphs compiled for it."""
    if isinstance(subject, Record):
        return subject, []
    graphs = compiled_graphs(subject) if isinstance(subject, torch._dynamo.OptimizedModule) else []
    if isinstance(subject, nn.Module) and not graphs:
        module = fx.module_form_of(subject)
        if module is None and isinstance(inner := fx.unwrapped(subject), GraphModule):
            module = inner
        if module is not None:
            return record_of(fx.rewritten_of(module, "fxsparse.explain")), []
    return None, graphs or compiled_graphs(subject)


def explain_record(record: Record) -> Document:
    """The report of one record."""
    return Document(_record_parts(record), record_data(record))


def explain_compiled(graphs: Sequence[CompiledGraph]) -> Document:
    """The report of the compiled graphs: the implementation of every operator, and why it was chosen."""
    if not graphs:
        return Document([Line(_NOT_COMPILED)], {"graphs": [], "message": _NOT_COMPILED})
    parts: list[Line | Table] = []
    for position, graph in enumerate(graphs, 1):
        parts += [*([Line()] if parts else []), *_graph_parts(position, len(graphs), graph)]
    return Document(parts, {"graphs": [graph_data(graph) for graph in graphs]})


# --- for a person -----------------------------------------------------------------------------------------------------


def _record_parts(record: Record, indent: int = 0) -> list[Line | Table]:
    count = len(record.entries)
    parts: list[Line | Table] = [
        Line(f"fxsparse {record.version}: {count} {_plural('pass', count)}", "title", indent),
        *(Line(f"note: {note}", "note", indent + 2) for note in record.notes),
    ]
    if record.entries:
        parts += [Line(), costs_table(record.entries[0].before, record.entries[-1].after, indent)]
    for position, entry in enumerate(record.entries, 1):
        parts += [Line(), *_entry(position, entry, indent)]
    return parts


def _graph_parts(position: int, count: int, graph: CompiledGraph) -> list[Line | Table]:
    parts: list[Line | Table] = [
        Line(f"graph {position} of {count} (Dynamo's {graph.name})", "title"),
        *(Line(f"note: {note}", "note", 2) for note in graph.notes),
    ]
    if graph.record is not None:
        parts += _record_parts(graph.record, 2)
    rows = [(c.op, c.implementation, where, c.reason) for c, where in grouped_choices(graph.choices)]
    if rows:
        parts += [Table((("operator", "runs", "where", "why"), *rows), header=True, indent=2)]
    else:
        parts += [Line("no fxsparse operator and no frozen N:M weight: all of it is Inductor's", indent=2)]
    counts = [(name, str(launches), file) for name, launches, file in launched(graph)]
    if counts:
        parts += [Table((("generated kernel", "launches", "source"), *counts), header=True, right=(1,), indent=2)]
    return parts


def launched(graph: CompiledGraph) -> list[tuple[str, int, str]]:
    """The generated kernels that ran: name, number of launches and source file, most launched first."""
    counts = sorted(graph.launches.items(), key=lambda item: -item[1])
    return [(file.stem.rpartition("_")[0], count, str(file)) for file, count in counts]


def grouped_choices(choices: Iterable[Choice]) -> list[tuple[Choice, str]]:
    """Choices with their sites; choices that differ only in one number of their site share one entry."""
    groups: dict[tuple[str, str, str], tuple[Choice, list[Change]]] = {}
    for choice in choices:
        key = (choice.op, choice.implementation, choice.reason)
        groups.setdefault(key, (choice, []))[1].append(Change(choice.site, True, ""))
    return [(choice, site) for choice, sites in groups.values() for _, site, _ in grouped(sites)]


def costs_table(before: Costs, after: Costs, indent: int = 0) -> Table:
    """A row for each cost: before, after, and their ratio."""
    rows = [("", "before", "after", "ratio")]
    for label, field, base in COSTS:
        was, now = getattr(before, field), getattr(after, field)
        if field == "nm_step_flops" and _tells_nothing(before, after):
            continue
        rows.append((label, quantity(was, base), quantity(now, base), f"{now / was:.3f}" if was else "-"))
    return Table(tuple(rows), header=True, right=(1, 2, 3), indent=indent)


def _tells_nothing(*costs: Costs) -> bool:
    """Whether no n:m product makes a difference, or an earlier version did not count it."""
    return any(cost.nm_step_flops is None for cost in costs) or all(
        cost.nm_step_flops == cost.step_flops for cost in costs
    )


def heading(position: int, entry: Entry) -> str:
    """The pass, how many sites it rewrote and skipped, and its time, in a line."""
    return (
        f"{position}. {shortened(entry.text, _LONGEST_PASS)}: {len(entry.rewritten)} rewritten, "
        f"{len(entry.skipped)} skipped, {entry.milliseconds:.0f} ms"
    )


def _entry(position: int, entry: Entry, indent: int) -> list[Line | Table]:
    costs = [
        f"{label} {quantity(getattr(entry.before, field), base)} -> {quantity(getattr(entry.after, field), base)}"
        for label, field, base in COSTS
        if getattr(entry.before, field) != getattr(entry.after, field)
        and not (field == "nm_step_flops" and _tells_nothing(entry.before, entry.after))
    ]
    rows = tuple(
        ("rewritten" if rewritten else "skipped", site, detail) for rewritten, site, detail in grouped(entry.changes)
    )
    parts: list[Line | Table] = [Line(heading(position, entry), "pass", indent)]
    parts += [Line(cost, indent=indent + 2) for cost in costs]
    return [*parts, *([Table(rows, indent=indent + 2)] if rows else [])]


def grouped(changes: Iterable[Change]) -> list[tuple[bool, str, str]]:
    """Rows of (rewritten, site, detail).

    Changes that differ only in one number of their site share a row: ``layers.{0-31}.fc1``.
    """
    groups: dict[tuple[bool, str, str, str], list[int]] = {}
    for change in changes:
        match = re.search(r"(?<![^.])\d+(?![^.])", change.site)
        if match:
            key = (change.rewritten, change.site[: match.start()], change.site[match.end() :], change.detail)
            groups.setdefault(key, []).append(int(match.group()))
        else:
            groups.setdefault((change.rewritten, change.site, "", change.detail), [])
    rows = []
    for (rewritten, head, tail, detail), numbers in groups.items():
        middle = ranges(numbers)
        rows.append((rewritten, f"{head}{{{middle}}}{tail}" if len(numbers) > 1 else f"{head}{middle}{tail}", detail))
    return rows


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}es"


# --- as data ----------------------------------------------------------------------------------------------------------


def record_data(record: Record) -> dict[str, Any]:
    """A record as plain data: its passes with what each rewrote and skipped and the costs around it."""
    return {
        "version": record.version,
        "notes": list(record.notes),
        "passes": [
            {
                "text": entry.text,
                "milliseconds": entry.milliseconds,
                "rewritten": [{"site": change.site, "detail": change.detail} for change in entry.rewritten],
                "skipped": [{"site": change.site, "reason": change.detail} for change in entry.skipped],
                "before": typed.write(entry.before),
                "after": typed.write(entry.after),
            }
            for entry in record.entries
        ],
        "weights": typed.write(record.weights),
    }


def graph_data(graph: CompiledGraph) -> dict[str, Any]:
    """A compiled graph as plain data: its record, the choice for every operator, and the kernels that ran."""
    return {
        "name": graph.name,
        "notes": list(graph.notes),
        "record": None if graph.record is None else record_data(graph.record),
        "choices": [
            {
                "operator": choice.op,
                "site": choice.site,
                "runs": choice.implementation,
                "why": choice.reason,
                "problem": None if choice.problem is None else timings.key(choice.problem),
            }
            for choice in graph.choices
        ],
        "kernels": [{"name": name, "launches": count, "source": file} for name, count, file in launched(graph)],
    }
