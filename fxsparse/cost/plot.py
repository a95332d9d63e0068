"""Draws a backprop graph with what a selection trains and pays.

    o      loss                                    dx           dW
    o      lm_head linear    [x] weight            1.0 M        1.0 M
    o      add
    | o    fc2 linear        [ ] weight  [x] bias  2.1 M        2.1 M

A row is an operation, in the order in which autograd visits them. A lane is a value on its way down to the operation
that computes it: residual connections stay in their lane, branches go beside them. Operations without parameters and
FLOPs that only pass one gradient on (activations, dropout, views) have no row.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from networkx import DiGraph

from fxsparse.cost.dataflow import reached
from fxsparse.errors import OptionError
from fxsparse.text import quantity

_ROW, _LANE, _LETTER, _MARGIN = 0.24, 0.22, 0.061, 0.3  # inches
_FONT: dict[str, Any] = {"family": "monospace", "fontsize": 7, "va": "center"}
_PAID, _UNPAID, _TRAINED, _INK, _FAINT = "#1a5fb4", "#c8c8c8", "#2e8b57", "#202020", "#909090"


def draw(graph: DiGraph, trained: Collection[str], forward: int, path: Path) -> Path:
    """Writes the picture of a graph, as `fxsparse.BackpropGraph.to_networkx` gives it, and returns its path.

    Needs matplotlib (``pip install fxsparse[plots]``).
    """
    import matplotlib
    from matplotlib.figure import Figure

    rows = condensed(graph)
    depends = paying(rows, trained)
    operations = [name for name in rows if not _is_parameter(rows, name)]
    if not operations:
        raise OptionError("no gradient flows from the loss to a parameter, so there is nothing to draw")
    lane = lanes(rows, operations)
    labels = _labels(rows, operations)
    squares = {name: [source for source in rows[name] if _is_parameter(rows, source)] for name in operations}
    costs = {name: _costs(rows, name, depends) for name in operations}

    left = _MARGIN + _LANE * (max(lane.values()) + 1.5)
    tensors = left + _LETTER * (max(map(len, labels.values())) + 2)
    widest = max(sum(len(_leaf(rows, name, p)) + 4 for p in squares[name]) for name in operations)
    columns = [tensors + _LETTER * (widest + 2)]
    columns.append(columns[0] + _LETTER * (max(len(cost[0][0]) for cost in costs.values()) + 3))
    width = columns[1] + _LETTER * max(len(cost[1][0]) for cost in costs.values()) + _MARGIN
    height = _ROW * (len(operations) + 4)

    with matplotlib.rc_context({"svg.hashsalt": "fxsparse", "svg.fonttype": "none"}):  # text stays text
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.axis("off")
        place = {name: (_MARGIN + _LANE * lane[name], _ROW * (row + 3.5)) for row, name in enumerate(operations)}
        for line, y in zip(_title(graph, trained, forward), (0.9, 1.8), strict=True):
            axes.text(_MARGIN, _ROW * y, line, color=_INK, **_FONT)
        for x, title in ((left, "operation"), (tensors, "tensors"), (columns[0], "dx"), (columns[1], "dW")):
            axes.text(x, _ROW * 2.8, title, color=_FAINT, **_FONT)
        for paid in (False, True):  # what is paid lies above
            for xs, ys in _lines(rows, operations, place, depends, paid):
                color = _PAID if paid else _UNPAID
                axes.plot(xs, ys, color=color, linewidth=1.8 if paid else 0.9, zorder=1 + paid, solid_capstyle="round")
        for name in operations:
            x, y = place[name]
            on = name in depends
            axes.plot(x, y, "o", markersize=5, color=_PAID if on else "white", mec=_PAID if on else _FAINT, zorder=3)
            axes.text(left, y, labels[name], color=_INK if on else _FAINT, **_FONT)
            _draw_tensors(axes, tensors, y, [(_leaf(rows, name, p), p in trained) for p in squares[name]])
            for column, (text, is_paid) in zip(columns, costs[name], strict=True):
                axes.text(column, y, text, color=_PAID if is_paid else _FAINT, **_FONT)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return path


def condensed(graph: DiGraph) -> DiGraph:
    """The operations worth a row: without those that have no FLOPs and pass all of their gradient on to one activation.

    The FLOPs of a gradient that passes through such an operation stand on the edge that takes its place.
    """
    rows = graph.copy()

    def passes_on(name: str) -> bool:
        ahead = rows[name].items()
        return len(ahead) == 1 and not any(_is_parameter(rows, source) or edge["flops"] for source, edge in ahead)

    while some := [name for name in rows if rows.pred[name] and passes_on(name)]:
        for name in some:
            (source,) = rows[name]
            for user, edge in list(rows.pred[name].items()):
                before = rows.edges[user, source]["flops"] if rows.has_edge(user, source) else 0
                rows.add_edge(user, source, flops=before + edge["flops"])
            rows.remove_node(name)
    return rows


def paying(graph: DiGraph, trained: Collection[str]) -> set[str]:
    """What depends on the trained tensors: they and all that their gradients flow through."""
    return reached(graph.reverse(copy=False), [name for name in trained if name in graph])


def lanes(graph: DiGraph, operations: list[str]) -> dict[str, int]:
    """A column for every operation, such that none stands between another and those that use its result."""
    row = {name: position for position, name in enumerate(operations)}
    waiting: list[str | None] = []  # the operation that each lane leads to
    lane: dict[str, int] = {}
    for name in operations:
        if name not in lane:
            lane[name] = _free(waiting)
        waiting[lane[name]] = None
        # The longest connection, a residual one, goes straight on.
        for source in sorted((s for s in graph[name] if s in row), key=row.__getitem__, reverse=True):
            if source not in lane:
                lane[source] = lane[name] if waiting[lane[name]] is None else _free(waiting)
                waiting[lane[source]] = source
    return lane


def _free(waiting: list[str | None]) -> int:
    if None not in waiting:
        waiting.append(None)
    return waiting.index(None)


def _lines(
    rows: DiGraph, operations: list[str], place: dict[str, tuple[float, float]], depends: set[str], paid: bool
) -> Iterator[tuple[list[float], list[float]]]:
    for name in operations:
        for source in rows[name]:
            if source in place and (source in depends) == paid:
                (x, y), (to_x, to_y) = place[name], place[source]
                bend = min(y + _ROW, to_y)
                yield [x, to_x, to_x], [y, bend, to_y]


def _draw_tensors(axes: Any, x: float, y: float, tensors: list[tuple[str, bool]]) -> None:
    for label, is_trained in tensors:
        color = _TRAINED if is_trained else _FAINT
        axes.plot(x + 0.05, y, "s", markersize=5, color=color if is_trained else "white", mec=color)
        axes.text(x + 0.14, y, label, color=color, **_FONT)
        x += _LETTER * (len(label) + 4)


def _costs(rows: DiGraph, name: str, depends: set[str]) -> list[tuple[str, bool]]:
    """What the gradients of activations and of parameters cost at an operation, and whether any of it is paid."""
    texts = []
    for of_parameters in (False, True):
        edges = [
            (source, edge["flops"])
            for source, edge in rows[name].items()
            if _is_parameter(rows, source) == of_parameters
        ]
        full, paid = sum(flops for _, flops in edges), sum(flops for source, flops in edges if source in depends)
        text = "" if not full else _flops(full) if paid in (0, full) else f"{_flops(paid)} of {_flops(full)}"
        texts.append((text, bool(paid)))
    return texts


def _title(graph: DiGraph, trained: Collection[str], forward: int) -> tuple[str, str]:
    depends = paying(graph, trained)
    full = paying(graph, {name for name, is_trainable in graph.nodes(data="trainable") if is_trainable})
    backward, whole = (
        sum(flops for _, source, flops in graph.edges(data="flops") if source in some) for some in (depends, full)
    )
    share = (forward + backward) / (forward + whole) if forward + whole else 1.0
    tensors = sum(1 for name in graph if _is_parameter(graph, name))
    return (
        f"{sum(1 for name in trained if name in graph)} of {tensors} tensors are trained (filled squares)",
        f"forward {_flops(forward)}, backward {_flops(backward)} of {_flops(whole)} FLOPs: "
        f"{share:.1%} of a full training step",
    )


def _flops(number: int) -> str:
    return quantity(number, 1000)


def _labels(rows: DiGraph, operations: list[str]) -> dict[str, str]:
    paths = {name: rows.nodes[name]["module"].split(".") for name in operations}
    inside = [path for path in paths.values() if len(path) > 1]
    shared = 0
    while inside and all(len(path) > shared + 1 and path[shared] == inside[0][shared] for path in inside):
        shared += 1
    labels = {}
    for name, path in paths.items():
        product = name.rpartition(":")[2] if ":" in name else ""
        operator = rows.nodes[name]["operator"].rpartition("::")[2].replace("scaled_dot_product_attention", "attention")
        where = ".".join(path[shared:] if len(path) > shared else path)
        labels[name] = " ".join(filter(None, (where, operator, product)))
    return labels


def _leaf(rows: DiGraph, name: str, parameter: str) -> str:
    """A parameter's name beside an operation: in full where it is another module's."""
    path, _, leaf = parameter.rpartition(".")
    return leaf if path == rows.nodes[name]["module"] else parameter


def _is_parameter(graph: DiGraph, name: str) -> bool:
    return bool(graph.nodes[name]["operator"] == "parameter")
