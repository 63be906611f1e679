"""Figures as they are shown, each with the way to its value in the JSON it is made from."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from dataclasses import dataclass

from carve.report.fields import Field, Key

Format = Callable[[float], str]


def fixed(digits: int, unit: str = "", signed: bool = False) -> Format:
    """So many decimals, a sign if asked."""
    sign = "+" if signed else ""
    return lambda v: f"{v:{sign}.{digits}f}{unit}"


def percent(digits: int = 1, signed: bool = False) -> Format:
    """A share in percent."""
    sign = "+" if signed else ""
    return lambda v: f"{100 * v:{sign}.{digits}f} %"


def scaled(factor: float, digits: int, unit: str) -> Format:
    """A multiple with its unit."""
    return lambda v: f"{v * factor:.{digits}f} {unit}"


def _sized(v: float, unit: str) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(v) >= factor * 0.9995:
            digits = max(0, 2 - len(str(int(abs(v) / factor))) + 1)
            return f"{v / factor:.{digits}f} {prefix}{unit}"
    return f"{v:.0f} {unit}".rstrip()


def amount(v: float) -> str:
    """A count of three figures: 7.86 M."""
    return _sized(v, "")


def nbytes(v: float) -> str:
    """A size of three figures: 7.32 MB."""
    return _sized(v, "B")


def plain(v: float) -> str:
    """A setting as it was given: 0.6, 4."""
    return f"{v:.6g}"


def seconds(v: float) -> str:
    """A time: 12.3 s."""
    return f"{v:.1f} s" if v < 100 else f"{v:.0f} s"


def escape(text: str) -> str:
    """Text for HTML and SVG; control characters, which no file should hold, as ``?``."""
    return html.escape("".join(c if c.isprintable() else "?" for c in text), quote=True)


def pointer(path: tuple[Key, ...]) -> str:
    """The attribute that names the way to a figure."""
    return f'data-at="{escape(json.dumps(path))}"'


@dataclass(frozen=True)
class Shown:
    """A figure's text, ``-`` where there is none, and the way to its value."""

    text: str
    path: tuple[Key, ...] = ()

    @property
    def html(self) -> str:
        """In a page."""
        if not self.path:
            return f"<span>{escape(self.text)}</span>"
        return f"<span {pointer(self.path)}>{escape(self.text)}</span>"

    @property
    def svg(self) -> str:
        """Inside an SVG text."""
        if not self.path:
            return f"<tspan>{escape(self.text)}</tspan>"
        return f"<tspan {pointer(self.path)}>{escape(self.text)}</tspan>"

    def title(self, label: str) -> str:
        """As a tooltip behind ``label``."""
        way = f" {pointer(self.path)}" if self.path else ""
        return f"<title{way}>{escape(label)}: {escape(self.text)}</title>"


NOTHING = Shown("-")


def show(field: Field, form: Format) -> Shown:
    """A number of a report; ``-`` where it is missing or not finite."""
    value = field.number()
    return NOTHING if value is None else Shown(form(value), field.path)


def name(text: str, short: str | None = None) -> str:
    """A name out of a file, with the whole of it as a tooltip where it is shortened."""
    if short is None or short == text:
        return f'<span class="name">{escape(text)}</span>'
    return f'<span class="name" title="{escape(text)}">{escape(short)}</span>'


def shorter(names: list[str]) -> dict[str, str]:
    """Names without the parts that all of them begin or end with, where that leaves any."""
    split = [n.split(".") for n in dict.fromkeys(names)]
    if len(split) < 2:
        return {n: n for n in names}
    least = min(map(len, split))
    front = 0
    while front < least - 1 and len({s[front] for s in split}) == 1:
        front += 1
    back = 0
    while back < least - 1 - front and len({s[-1 - back] for s in split}) == 1:
        back += 1
    return {".".join(s): ".".join(s[front : len(s) - back]) for s in split}
