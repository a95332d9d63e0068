"""Formats numbers and tables as text."""

from __future__ import annotations

from collections.abc import Sequence


def ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2,5``."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


def quantity(amount: int, base: int) -> str:
    """A count with a unit prefix: ``1.50 G`` (base 1000) or ``1.50 GiB`` (base 1024)."""
    size, units = float(amount), ("", "K", "M", "G", "T", "P")
    step = 0
    while size >= base and step < len(units) - 1:
        size, step = size / base, step + 1
    unit = f"{units[step]}iB" if base == 1024 and step else ("B" if base == 1024 else units[step])
    return f"{amount} {unit}".strip() if step == 0 else f"{size:.2f} {unit}"


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Rows of equal length as aligned lines; columns whose number is in ``right`` are aligned to the right."""
    if not rows:
        return []
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    cells = [
        [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
    return ["  ".join(line).rstrip() for line in cells]


def shortened(text: str, length: int) -> str:
    """``text``, cut after ``length`` characters: options recorded for a replay may list every unit of a model."""
    return text if len(text) <= length else f"{text[:length]} ..."
