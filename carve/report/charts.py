"""Charts as inline SVG. Colours are classes that the page's style sheet gives, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from carve.report.shown import NOTHING, Shown, escape

WIDTH = 360.0
_LABEL, _VALUE, _ROW = 96.0, 62.0, 21.0


def _svg(title: str, text: str, height: float, body: Sequence[str], width: float = WIDTH) -> str:
    return (
        f'<svg role="img" viewBox="0 0 {width:.0f} {height:.0f}"><title>{escape(title)}</title>'
        f"<desc>{escape(text)}</desc>{''.join(body)}</svg>"
    )


def _clip(text: str, most: int = 16) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _name(x: float, y: float, text: str, most: int = 16, anchor: str = "start") -> str:
    return (
        f'<text class="name" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"<title>{escape(text)}</title>{escape(_clip(text, most))}</text>"
    )


def _value(x: float, y: float, shown: Shown, kind: str = "", anchor: str = "end") -> str:
    return (
        f'<text class="value {kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{shown.svg}</text>"
    )


def _rect(x: float, y: float, w: float, h: float, kind: str, opacity: float = 1.0) -> str:
    faint = "" if opacity >= 1.0 else f' fill-opacity="{opacity:.2f}"'
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{max(w, 0.8):.1f}" '
        f'height="{h:.1f}"{faint}'
    )


@dataclass(frozen=True)
class Bar:
    """A bar from ``base`` to ``value``, and a ``mark`` where another figure of the row lies.

    ``kind``: ``total``, ``loss``, ``gain`` or ``plain``.
    """

    label: str
    value: float | None
    shown: Shown
    base: float = 0.0
    kind: str = "plain"
    mark: float | None = None
    mark_shown: Shown = NOTHING


def bars(
    title: str, text: str, rows: Sequence[Bar], *, low: float | None = None, joined: bool = False
) -> str:
    """Horizontal bars with their figures at the right.

    ``low``: where the axis begins, by default 0 or the least value; ``joined``: a line from every
    bar's end to the next one's base, as a waterfall has.
    """
    ends = [v for r in rows for v in (r.value, r.base, r.mark) if v is not None]
    least = min(0.0, *ends) if low is None else low
    most = max([*ends, least])
    span = (most - least) or 1.0
    room = WIDTH - _LABEL - _VALUE - 8

    def at(v: float) -> float:
        return _LABEL + room * (min(max(v, least), most) - least) / span

    body = []
    if low is None:
        body.append(
            f'<path class="axis" d="M{at(0):.1f} 2V{_ROW * len(rows) + 2:.0f}" fill="none"/>'
        )
    for i, r in enumerate(rows):
        y = 4 + i * _ROW
        body.append(_name(0, y + 11, r.label))
        if r.value is not None:
            start = least if r.kind == "total" else r.base
            a, b = sorted((at(start), at(r.value)))
            body.append(f"{_rect(a, y + 2, b - a, 11, r.kind)}>{r.shown.title(r.label)}</rect>")
            if joined and i + 1 < len(rows):
                x = at(r.value)
                body.append(f'<path class="join" d="M{x:.1f} {y + 13:.1f}v{_ROW - 11:.1f}"/>')
        if r.mark is not None:
            x = at(r.mark)
            body.append(
                f'<path class="mark" d="M{x:.1f} {y - 0.5:.1f}v16">'
                f"{r.mark_shown.title(r.label)}</path>"
            )
        body.append(_value(WIDTH, y + 11, r.shown, r.kind))
    return _svg(title, text, _ROW * len(rows) + 6, body)


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map: its class, how full its colour is, and its figure."""

    kind: str
    fill: float
    shown: Shown


def heat(
    title: str,
    text: str,
    rows: Sequence[tuple[str, Sequence[Cell | None]]],
    column: str,
    ends: tuple[str, str] | None = None,
) -> str:
    """Rows of cells; ``column`` names what the columns are, ``ends`` the first and the last."""
    left = 72.0
    count = max((len(cells) for _, cells in rows), default=1)
    size = max(3.0, (WIDTH - left) / max(count, 1))
    width = left + size * count
    tall = 15.0
    body = []
    for i, (label, cells) in enumerate(rows):
        y = i * tall
        body.append(_name(0, y + 11, label, 12))
        for j, cell in enumerate(cells):
            if cell is not None:
                tip = cell.shown.title(f"{label}, {column} {j}")
                gap = 1.0 if size > 5 else 0.3
                rect = _rect(left + j * size, y + 1, size - gap, tall - 2, cell.kind, cell.fill)
                body.append(f"{rect}>{tip}</rect>")
    y = len(rows) * tall + 12
    first, last = ends or ("", "")
    for x, anchor, label in ((left, "start", first), (width, "end", last)):
        body.append(f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">')
        body.append(f"{escape(label)}</text>")
    return _svg(title, text, y + 4, body, width)


@dataclass(frozen=True)
class Line:
    """A line of a chart: a figure a place, None where there is none."""

    label: str
    values: Sequence[float | None]
    shown: Sequence[Shown]


def lines(title: str, text: str, names: Sequence[str], series: Sequence[Line]) -> str:
    """Lines over places in order, from 0; the legend below with each line's last figure."""
    left, tall, top = 8.0, 130.0, 16.0
    values = [v for s in series for v in s.values if v is not None]
    most = max([*values, 0.0]) or 1.0
    step = (WIDTH - 2 * left) / max(1, len(names) - 1)

    def at(i: int, v: float) -> tuple[float, float]:
        return left + i * step, top + tall * (1 - max(v, 0.0) / most)

    body = [f'<path class="axis" d="M{left} {top + tall}H{WIDTH - left}"/>']
    for k, s in enumerate(series):
        kind = f"line l{k % 6}{' last' if k == len(series) - 1 else ''}"
        points = [at(i, v) if v is not None else None for i, v in enumerate(s.values)]
        path, pen = "", "M"
        for p in points:
            if p is None:
                pen = "M"
                continue
            path += f"{pen}{p[0]:.1f} {p[1]:.1f}"
            pen = "L"
        body.append(f'<path class="{kind}" d="{path}"/>')
        for i, p in enumerate(points):
            if p is not None:
                tip = s.shown[i].title(f"{s.label}, {names[i]}")
                dot = f'class="{kind} dot" cx="{p[0]:.1f}" cy="{p[1]:.1f}" r="2.2"'
                body.append(f"<circle {dot}>{tip}</circle>")
    every = max(1, -(-len(names) // 12))
    y = top + tall + 14
    for i in range(0, len(names), every):
        anchor = "start" if i == 0 else "end" if i == len(names) - 1 else "middle"
        body.append(_name(at(i, 0)[0], y, names[i], 9, anchor))
    for k, s in enumerate(series):
        y = top + tall + 34 + k * 16
        kind = f"line l{k % 6}{' last' if k == len(series) - 1 else ''}"
        body.append(f'<path class="{kind}" d="M{left} {y - 4}h22"/>')
        body.append(_name(left + 28, y, s.label, 30))
        last = [x for x, v in zip(s.shown, s.values, strict=True) if v is not None]
        body.append(_value(WIDTH, y, last[-1] if last else NOTHING))
    return _svg(title, text, top + tall + 26 + 16 * len(series), body)


@dataclass(frozen=True)
class Range:
    """From ``low`` to ``high`` with a dot at ``mid``."""

    label: str
    low: float | None
    mid: float | None
    high: float | None
    shown: Shown


def ranges(title: str, text: str, rows: Sequence[Range]) -> str:
    """Horizontal ranges from 0 with the figure of their middle at the right."""
    ends = [v for r in rows for v in (r.low, r.mid, r.high) if v is not None]
    most, least = max([*ends, 0.0]) or 1.0, min([*ends, 0.0])
    room = WIDTH - _LABEL - _VALUE - 8

    def at(v: float) -> float:
        return _LABEL + room * (v - least) / ((most - least) or 1.0)

    body = [f'<path class="axis" d="M{at(0):.1f} 2V{_ROW * len(rows) + 2:.0f}"/>']
    for i, r in enumerate(rows):
        y = 4 + i * _ROW + 7
        body.append(_name(0, y + 4, r.label))
        if r.low is not None and r.high is not None:
            body.append(f'<path class="range" d="M{at(r.low):.1f} {y}H{at(r.high):.1f}"/>')
        if r.mid is not None:
            body.append(f'<circle class="plain" cx="{at(r.mid):.1f}" cy="{y}" r="3.5"/>')
        body.append(_value(WIDTH, y + 4, r.shown))
    return _svg(title, text, _ROW * len(rows) + 6, body)
