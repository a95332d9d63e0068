"""A report that is text, tables at a terminal, tables in a notebook, and data; `fxsparse.explain` returns one.

Its content is a list of lines and tables, which three functions render: `plain` as text, `styled` with rich, and
`html`. All of them show the same words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from fxsparse.text import table

WIDTH = 100  # columns of a terminal, at most
_STYLES = {"title": "bold", "pass": "bold cyan", "note": "yellow"}
_WORDS = {"rewritten": "green", "skipped": "yellow"}


@dataclass(frozen=True)
class Line:
    """A line; an empty one separates.

    Attributes:
        text: of the line.
        style: ``title``, ``pass`` or ``note``; empty for a line like any other.
        indent: spaces before it.
    """

    text: str = ""
    style: str = ""
    indent: int = 0


@dataclass(frozen=True)
class Table:
    """Aligned rows of equal length.

    Attributes:
        rows: the cells; the first row is the heading if ``header``.
        header: whether there is a heading.
        right: numbers of the columns that are aligned to the right.
        indent: spaces before every row.
    """

    rows: tuple[tuple[str, ...], ...]
    header: bool = False
    right: tuple[int, ...] = ()
    indent: int = 0


class Document(str):
    """A report: a string, which is the report as plain text.

    ``rich.print`` draws its tables within 100 columns of a terminal, a notebook shows them as HTML, and :meth:`to_dict`
    gives what they say as data.

    Attributes:
        parts: the lines and tables.
    """

    parts: tuple[Line | Table, ...]
    _data: dict[str, Any]

    def __new__(cls, parts: Sequence[Line | Table], data: dict[str, Any]) -> Document:
        document = super().__new__(cls, plain(parts))
        document.parts, document._data = tuple(parts), data
        return document

    def __getnewargs__(self) -> tuple[Any, ...]:  # of copies and pickles
        return self.parts, self._data

    def __repr__(self) -> str:
        return str(self)

    def __rich__(self) -> Any:
        return _Printed(self.parts)

    def _repr_html_(self) -> str:
        return html(self.parts)

    def to_dict(self) -> dict[str, Any]:
        """The report as data that ``json.dumps`` takes."""
        return dict(self._data)


@dataclass(frozen=True)
class _Printed:
    """What rich prints: tables at a terminal; the plain text into a file or a pipe, where lines are read one by one."""

    parts: tuple[Line | Table, ...]

    def __rich_console__(self, console: Any, options: Any) -> Any:
        from rich.text import Text

        yield styled(self.parts) if console.is_terminal or console.is_jupyter else Text(plain(self.parts))


def plain(parts: Sequence[Line | Table]) -> str:
    """The parts as text."""
    lines: list[str] = []
    for part in parts:
        rows = [part.text] if isinstance(part, Line) else table(part.rows, part.right)
        lines += [f"{' ' * part.indent}{row}" if row else "" for row in rows]
    return "\n".join(lines)


def styled(parts: Sequence[Line | Table]) -> Any:
    """The parts as something that rich prints, at most `WIDTH` columns wide."""
    from rich import box
    from rich.console import Group
    from rich.constrain import Constrain
    from rich.padding import Padding
    from rich.table import Table as RichTable
    from rich.text import Text

    def drawn(part: Line | Table) -> Any:
        if isinstance(part, Line):
            return Padding(Text(part.text, style=_STYLES.get(part.style, "")), (0, 0, 0, part.indent))
        heading = part.rows[0] if part.header else tuple("" for _ in part.rows[0])
        lines = box.SIMPLE_HEAD if part.header else None
        grid = RichTable(box=lines, show_header=part.header, show_edge=False, pad_edge=False)
        for number, title in enumerate(heading):
            grid.add_column(title, justify="right" if number in part.right else "left", overflow="fold")
        for row in part.rows[part.header :]:
            grid.add_row(*(Text(cell, style=_WORDS.get(cell, "")) for cell in row))
        return Padding(grid, (0, 0, 0, part.indent))

    return Constrain(Group(*map(drawn, parts)), WIDTH)


def html(parts: Sequence[Line | Table]) -> str:
    """The parts as HTML without scripts, in the colours of what is around them."""

    def row(cells: Sequence[str], tag: str, right: Sequence[int]) -> str:
        sides = ("right" if number in right else "left" for number in range(len(cells)))
        drawn = (
            f'<{tag} style="text-align:{side};vertical-align:top">{escape(cell)}</{tag}>'
            for cell, side in zip(cells, sides, strict=True)
        )
        return f"<tr>{''.join(drawn)}</tr>"

    def drawn(part: Line | Table) -> str:
        if isinstance(part, Table):
            tags = ["th" if part.header and not at else "td" for at in range(len(part.rows))]
            rows = [row(cells, tag, part.right) for cells, tag in zip(part.rows, tags, strict=True)]
            return f'<table style="margin:.3em 0 .8em {part.indent}ch">{"".join(rows)}</table>'
        text = escape(part.text)
        return f'<div style="margin-left:{part.indent}ch">{f"<b>{text}</b>" if part.style in _STYLES else text}</div>'

    shown = (drawn(part) for part in parts if not (isinstance(part, Line) and not part.text))
    return f'<div class="fxsparse-document">{"".join(shown)}</div>'
