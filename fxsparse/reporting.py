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
from fxsparse.backend.compiled import CompiledGraph, compiled_graphs
from fxsparse.graph.record import Change, Costs, Entry, Record, record_of
from fxsparse.lowering.choice import Choice
from fxsparse.text import quantity, ranges, shortened, table

_COSTS = (
    ("forward FLOPs", "forward_flops", 1000),
    ("training step FLOPs", "step_flops", 1000),
    ("step FLOPs on n:m hardware", "nm_step_flops", 1000),
    ("parameters", "parameters", 1000),
    ("parameter bytes", "parameter_bytes", 1024),
    ("mask and index bytes", "buffer_bytes", 1024),
    ("optimizer bytes (two moments)", "optimizer_bytes", 1024),
)


_LONGEST_PASS = 160  # characters


def explain(subject: Any) -> str:
    """A readable report of the changes made to a model.

    Args:
        subject: a traced or rewritten graph module, the module that `fxsparse.to_module` made of one, a
            :class:`Record`, or a compiled model or function (``torch.compile(..., backend="fxsparse")``) that has run
            at least once.

    Returns:
        text: the costs before and after; then, for every pass, the rewritten sites, and the skipped ones with reasons.
    """
    if isinstance(subject, Record):
        return explain_record(subject)
    if isinstance(subject, nn.Module) and not isinstance(subject, torch._dynamo.OptimizedModule):
        module = fx.module_form_of(subject)
        subject = fx.unwrapped(subject) if module is None else module
    if isinstance(subject, GraphModule) or (subject is not None and fx.module_form_of(subject) is subject):
        return explain_record(record_of(fx.rewritten_of(subject, "fxsparse.explain")))
    graphs = compiled_graphs(subject)
    compiled = isinstance(subject, torch._dynamo.OptimizedModule)
    if not graphs and not compiled and getattr(subject, "_compiled_call_impl", True) is None:
        return (
            f"{type(subject).__name__} was neither rewritten nor compiled, so there is nothing to explain: pass what "
            'fxsparse.rewrite(model, passes, kwargs=batch) or torch.compile(model, backend="fxsparse") returned'
        )
    return explain_compiled(graphs)


def explain_record(record: Record) -> str:
    """The report of one record."""
    lines = [f"fxsparse {record.version}: {len(record.entries)} {_plural('pass', len(record.entries))}"]
    lines += [f"  note: {note}" for note in record.notes]
    if record.entries:
        lines += ["", *costs_table(record.entries[0].before, record.entries[-1].after)]
    for position, entry in enumerate(record.entries, 1):
        lines += ["", *_entry(position, entry)]
    return "\n".join(lines)


def explain_compiled(graphs: Sequence[CompiledGraph]) -> str:
    """The report of the compiled graphs: the implementation of every operator, and why it was chosen."""
    if not graphs:
        return "no graph was compiled yet: call the compiled model once"
    lines = []
    for position, graph in enumerate(graphs, 1):
        lines += [f"graph {position} of {len(graphs)} (Dynamo's {graph.name})"]
        lines += [f"  note: {note}" for note in graph.notes]
        if graph.record is not None:
            lines += [f"  {line}" if line else "" for line in explain_record(graph.record).splitlines()]
        rows = [("  operator", "runs", "where", "why")]
        rows += [(f"  {c.op}", c.implementation, where, c.reason) for c, where in _choices(graph.choices)]
        nothing = ["  no fxsparse operator and no frozen N:M weight: all of it is Inductor's"]
        lines += table(rows) if graph.choices else nothing
        if graph.launches:
            kernels = [("  generated kernel", "launches", "source")]
            counts = sorted(graph.launches.items(), key=lambda item: -item[1])
            kernels += [(f"  {file.stem.rpartition('_')[0]}", str(count), str(file)) for file, count in counts]
            lines += table(kernels, right=(1,))
        lines += [""]
    return "\n".join(lines[:-1])


def _choices(choices: Iterable[Choice]) -> list[tuple[Choice, str]]:
    """Choices with their sites; choices that differ only in one number of their site share one entry."""
    groups: dict[tuple[str, str, str], tuple[Choice, list[Change]]] = {}
    for choice in choices:
        key = (choice.op, choice.implementation, choice.reason)
        groups.setdefault(key, (choice, []))[1].append(Change(choice.site, True, ""))
    return [(choice, site) for choice, sites in groups.values() for _, site, _ in grouped(sites)]


def costs_table(before: Costs, after: Costs) -> list[str]:
    """A line for each cost: before, after, and their ratio."""
    rows = [("", "before", "after", "ratio")]
    for label, field, base in _COSTS:
        was, now = getattr(before, field), getattr(after, field)
        if field == "nm_step_flops" and _tells_nothing(before, after):
            continue
        rows.append((label, quantity(was, base), quantity(now, base), f"{now / was:.3f}" if was else "-"))
    return table(rows, right=(1, 2, 3))


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


def _entry(position: int, entry: Entry) -> list[str]:
    costs = [
        f"{label} {quantity(getattr(entry.before, field), base)} -> {quantity(getattr(entry.after, field), base)}"
        for label, field, base in _COSTS
        if getattr(entry.before, field) != getattr(entry.after, field)
        and not (field == "nm_step_flops" and _tells_nothing(entry.before, entry.after))
    ]
    rows = [
        ("  rewritten" if rewritten else "  skipped", site, detail)
        for rewritten, site, detail in grouped(entry.changes)
    ]
    return [heading(position, entry), *(f"  {line}" for line in costs), *table(rows)]


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
