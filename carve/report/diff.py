"""Two conversions side by side: settings, figures, passes and layers."""

from __future__ import annotations

from collections.abc import Callable
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from carve.report.charts import Bar, bars
from carve.report.fields import Field, reading
from carve.report.files import Source
from carve.report.page import figure, grid, page, section, table
from carve.report.shown import (
    Format,
    Shown,
    amount,
    escape,
    fixed,
    name,
    nbytes,
    percent,
    plain,
    seconds,
    shorter,
    show,
)
from carve.report.summary import summary
from carve.report.text import table as text_table

FIGURES: dict[str, tuple[tuple[str, ...], Format]] = {
    "budget asked": (("budget", "asked"), plain),
    "active compute, of dense": (("budget", "realised"), percent(2)),
    "active FFNs": (("ffn_active",), percent(2)),
    "skipped": (("skip", "realised"), percent(2)),
    "MACs a token": (("summary", "macs"), amount),
    "bytes": (("bytes",), nbytes),
    "bytes a token reads": (("summary", "reads"), nbytes),
    "perplexity": (("quality", "perplexity"), fixed(3)),
    "dense perplexity": (("quality", "dense_perplexity"), fixed(3)),
    "KL": (("quality", "kl"), fixed(5)),
    "top-1 agreement": (("quality", "top1_agreement"), percent(2)),
    "cosine": (("quality", "cosine_mean"), fixed(5)),
    "cosine p5": (("quality", "cosine_p5"), fixed(5)),
    "decode, tokens/s": (("speed", "decode", "routed"), fixed(1)),
    "decode over dense": (("speed", "decode", "ratio"), fixed(3)),
    "prefill, tokens/s": (("speed", "prefill", "routed"), fixed(1)),
    "prefill over dense": (("speed", "prefill", "ratio"), fixed(3)),
    "conversion": (("seconds",), seconds),
    "peak MB": (("peak_rss_mb",), fixed(0)),
}
_PASS: dict[str, tuple[tuple[str, ...], Format]] = {
    "time": (("seconds",), seconds),
    "perplexity": (("quality", "perplexity"), fixed(3)),
    "cosine": (("quality", "cosine_mean"), fixed(5)),
}
_LAYER: dict[str, tuple[tuple[str, ...], Format]] = {
    "active": (("active",), percent(2)),
    "loss": (("loss",), fixed(5, signed=True)),
    "entropy": (("entropy",), fixed(3)),
}
Forms = dict[str, tuple[tuple[str, ...], Format]]


def diff(a: Source, b: Source) -> dict[str, Any]:
    """What differs from ``a`` to ``b``; ``change`` is always b less a.

    ``settings``: those of the recipes that differ, None where one side's are not known;
    ``figures``, ``passes`` and ``layers``: both sides and the change, None where a side has none.

    Raises:
        UserError: a report cannot be read.
    """
    with reading(f"{a.path} or {b.path}"):
        left, right = (
            Field({**s.report, "summary": summary(s.report)}, source=f"{s.path.name}")
            for s in (a, b)
        )
        for side in (left, right):
            side["passes"].needed()
        passes = [{p["name"].text(): p for p in side["passes"].each()} for side in (left, right)]
        layers = [dict(side["layers"].items()) for side in (left, right)]
        return {
            "a": str(a.path),
            "b": str(b.path),
            "settings": _settings(a.recipe, b.recipe) if a.recipe and b.recipe else None,
            "figures": _both(left, right, FIGURES),
            "passes": _rows(passes[0], passes[1], _PASS),
            "layers": _rows(layers[0], layers[1], _LAYER),
        }


def _settings(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    flat = [_flat(a), _flat(b)]
    keys = list(dict.fromkeys([*flat[0], *flat[1]]))
    both = [(k, flat[0].get(k), flat[1].get(k)) for k in keys]
    return [{"key": k, "a": x, "b": y} for k, x, y in both if x != y]


def _flat(table: dict[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        way = f"{before}{key}"
        found |= _flat(value, f"{way}.") if isinstance(value, dict) else {way: value}
    return found


def _both(a: Field, b: Field, forms: Forms) -> dict[str, dict[str, float | None]]:
    found = {}
    for label, (way, _) in forms.items():
        x, y = a, b
        for key in way:
            x, y = x[key], y[key]
        old, new = x.number(), y.number()
        if old is None and new is None:
            continue
        change = None if old is None or new is None else new - old
        found[label] = {"a": old, "b": new, "change": change}
    return found


def _rows(a: dict[str, Field], b: dict[str, Field], forms: Forms) -> list[dict[str, Any]]:
    """Members of either side, in an order that keeps both."""
    names: list[str] = []
    left, right = list(a), list(b)
    for _, i, j, k, m in SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        names += [*left[i:j], *right[k:m]]
    nothing = Field(None)
    return [
        {"name": n, **_both(a.get(n, nothing), b.get(n, nothing), forms)}
        for n in dict.fromkeys(names)
    ]


def _told(value: Any) -> str:
    return "-" if value is None else str(value)[:200]


def _change(form: Format) -> Format:
    return lambda v: form(v) if v < 0 or form(v).startswith("+") else f"+{form(v)}"


def _cells(
    forms: Forms, found: Field, shown: Callable[[Shown], str]
) -> list[tuple[str, list[str]]]:
    """By figure that either side has: both sides and the change."""
    return [
        (
            label,
            [
                *(shown(show(found[label][side], form)) for side in ("a", "b")),
                shown(show(found[label]["change"], _change(form))),
            ],
        )
        for label, (_, form) in forms.items()
        if found[label]
    ]


def render_diff(found: dict[str, Any]) -> str:
    """As text tables."""
    d = Field(found)

    def text(s: Shown) -> str:
        return s.text

    parts = [f"a: {found['a']}\nb: {found['b']}"]
    settings = [[s["key"], _told(s["a"]), _told(s["b"])] for s in found["settings"] or ()]
    parts.append(text_table([["setting", "a", "b"], *settings]) if settings else _alike(found))
    rows = [[label, *cells] for label, cells in _cells(FIGURES, d["figures"], text)]
    parts.append(text_table([["figure", "a", "b", "b - a"], *rows]))
    for key, forms in (("passes", _PASS), ("layers", _LAYER)):
        head, rows = _table(d[key], forms, text)
        if rows:
            parts.append(text_table([[key, *head], *rows]))
    return "\n\n".join(parts)


def _alike(found: dict[str, Any]) -> str:
    """What to say where no setting is listed."""
    if found["settings"] is None:
        return "the settings of one are not known: give its folder, which holds recipe.toml"
    return "no setting differs"


def _table(
    items: Field, forms: Forms, shown: Callable[[Shown], str]
) -> tuple[list[str], list[list[str]]]:
    used = [k for k in forms if any(each[k] for each in items.each())]
    head = [f"{k} {side}" for k in used for side in ("a", "b", "b - a")]
    rows = []
    for each in items.each():
        by = dict(_cells(forms, each, shown))
        rows.append([each["name"].text(), *(c for k in used for c in by.get(k, ["-"] * 3))])
    return head, rows


def diff_html(found: dict[str, Any]) -> str:
    """As one offline HTML file; every figure carries the way to its value in ``found``."""
    d = Field(found, source="the difference")
    title = f"{Path(found['a']).name} and {Path(found['b']).name}"

    def html(s: Shown) -> str:
        return s.html

    settings = [
        [name(s["key"]), name(_told(s["a"])), name(_told(s["b"]))] for s in found["settings"] or ()
    ]
    rows = [[escape(label), *cells] for label, cells in _cells(FIGURES, d["figures"], html)]
    tables = {}
    for key, forms in (("passes", _PASS), ("layers", _LAYER)):
        head, body = _table(d[key], forms, html)
        tables[key] = table(["", *head], [[name(r[0]), *r[1:]] for r in body], "stack three")
    return page(
        f"{title}: carve report",
        f'<header><h1><span class="name">{escape(title)}</span>, side by side</h1>'
        f'<p class="soft">a: {name(found["a"])} · b: {name(found["b"])}</p></header>'
        + table(["", "a", "b", "b - a"], rows, "first")
        + section(
            "Settings that differ",
            "",
            table(["setting", "a", "b"], settings, "words") or f"<p>{_alike(found)}</p>",
        )
        + section("Passes", "", tables["passes"])
        + section("Layers", "", _layer_chart(d["layers"]), tables["layers"]),
    )


def _layer_chart(layers: Field) -> str:
    names = shorter([each["name"].text() for each in layers.each()])
    charts = []
    for key, heading in (("active", "Active share of each FFN"), ("loss", "Lost by layer")):
        form = _LAYER[key][1]
        rows = [
            Bar(names[each["name"].text()], each[key]["b"].number(), show(each[key]["b"], form),
                mark=each[key]["a"].number(), mark_shown=show(each[key]["a"], form))
            for each in layers.each()
            if each[key]
        ]  # fmt: skip
        if rows:
            charts.append(
                figure(heading, bars(heading, "Bar: b; mark: a", rows), "Bar: b; mark: a.")
            )
    return grid(*charts)
