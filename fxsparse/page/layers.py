"""The sites of a model by layer, with what each pass did there, skipped and why."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from fxsparse.graph.record import Entry

_NUMBER = re.compile(r"(?<![^.\[])\d+(?![^.\]])")


def block_of(path: str) -> str:
    """The block that a module path lies in, ``model.layers.3`` of ``model.layers.3.mlp.up_proj``; empty if in none."""
    match = _NUMBER.search(path)
    return path[: match.end()] if match else ""


@dataclass(frozen=True)
class Row:
    """A change of one pass at one site.

    Attributes:
        site: module path or parameter name, within its layer.
        number: of the pass, from 1.
        passed: its name.
        rewritten: whether it changed the site.
        detail: what was changed, or the reason for leaving it.
    """

    site: str
    number: int
    passed: str
    rewritten: bool
    detail: str


@dataclass
class Layer:
    """A block, or the rest of the model.

    Attributes:
        path: of the block; empty for what lies in none.
        rows: the changes in it, by site and then by pass.
    """

    path: str
    rows: list[Row] = field(default_factory=list)

    @property
    def rewritten(self) -> int:
        return sum(row.rewritten for row in self.rows)

    @property
    def skipped(self) -> int:
        return len(self.rows) - self.rewritten


def layers_of(entries: Iterable[Entry]) -> list[Layer]:
    """Every change of a record, by layer; layers in the order they are met, the rest of the model first."""
    layers: dict[str, Layer] = {"": Layer("")}
    order: dict[tuple[str, str], int] = {}
    for number, entry in enumerate(entries, 1):
        name = entry.name
        for change in entry.changes:
            path = block_of(change.site)
            site = change.site[len(path) :].lstrip(".") or change.site
            order.setdefault((path, site), len(order))
            layers.setdefault(path, Layer(path)).rows.append(Row(site, number, name, change.rewritten, change.detail))
    for layer in layers.values():
        layer.rows.sort(key=lambda row: (order[layer.path, row.site], row.number))
    return sorted((layer for layer in layers.values() if layer.rows), key=lambda layer: _natural(layer.path))


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]
