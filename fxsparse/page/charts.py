"""Bars and lines as SVG, in the colours of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

ROW = 20  # pixels of a line of a graph
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 520, 120, 58, 18


def chart(points: Sequence[tuple[int, float]]) -> str:
    """A line of values over optimizer steps."""
    steps, values = zip(*points, strict=True)
    low, high = min(values), max(values)
    first, last = steps[0], steps[-1]
    span, range_ = max(1, last - first), (high - low) or 1.0

    def place(step: int, value: float) -> tuple[float, float]:
        across = _LEFT + (step - first) / span * (_WIDTH - _LEFT - 6)
        return round(across, 1), round(6 + (high - value) / range_ * (_HEIGHT - _BOTTOM - 12), 1)

    path = " ".join(f"{x},{y}" for x, y in (place(step, value) for step, value in points))
    lower = _HEIGHT - _BOTTOM - 6
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="from {low:.4g} to {high:.4g} over steps {first} to {last}">'
        f'<line x1="{_LEFT}" y1="{lower}" x2="{_WIDTH}" y2="{lower}"/>'
        f'<text x="{_LEFT - 6}" y="12" text-anchor="end">{high:.4g}</text>'
        f'<text x="{_LEFT - 6}" y="{lower}" text-anchor="end">{low:.4g}</text>'
        f'<text x="{_LEFT}" y="{_HEIGHT - 4}">{first}</text>'
        f'<text x="{_WIDTH - 6}" y="{_HEIGHT - 4}" text-anchor="end">step {last}</text>'
        f'<polyline points="{path}"/></svg>'
    )


def raster(chosen: Mapping[int, Sequence[str]], last: int) -> str:
    """A row for every tensor that was ever trained, filled while it is."""
    names = sorted({name for each in chosen.values() for name in each})
    height = max(2, min(12, 480 // max(1, len(names))))
    starts = [*chosen, last + 1]
    span = max(1, last + 1 - starts[0])
    bars = []
    for begin, end, each in zip(starts, starts[1:], chosen.values(), strict=False):
        for name in each:
            x, width = (begin - starts[0]) / span * _WIDTH, (end - begin) / span * _WIDTH
            title = f"<title>{escape(name)}: steps {begin} to {end - 1}</title>"
            y = names.index(name) * height
            bars.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height - 1}">{title}</rect>')
    size = f"0 0 {_WIDTH} {len(names) * height}"
    return f'<svg class="raster" viewBox="{size}" role="img" aria-label="trained tensors">{"".join(bars)}</svg>'


def arcs(reads: Sequence[Sequence[int]]) -> str:
    """Curves from each line to the lines before it that it reads; ``reads[i]`` are numbers of lines."""
    height = len(reads) * ROW
    paths = []
    for to, sources in enumerate(reads):
        for source in sources:
            low, high = source * ROW + ROW // 2, to * ROW + ROW // 2
            bulge = min(46, 8 + abs(to - source) * 2)
            curve = f"M58 {low}C{58 - bulge} {low} {58 - bulge} {high} 58 {high}"
            paths.append(f'<path d="{curve}" data-a="{source}" data-b="{to}"/>')
    return f'<svg class="arcs" width="60" height="{height}" aria-hidden="true">{"".join(paths)}</svg>'
