"""A conversion's report as one offline HTML file, from report.json and what stands beside it.

Every figure carries the way to its value in the report (``data-at``).
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from carve.report.charts import Bar, bars
from carve.report.fields import Field, reading
from carve.report.layers import MOST, layer_sections, lost_by_layer
from carve.report.page import details, figure, grid, page, section, table
from carve.report.shown import (
    NOTHING,
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
    show,
)
from carve.report.summary import NOTICED, summary

MEASURES = {
    "KL": ("perplexity", fixed(2)),
    "1 - cosine": ("cosine_mean", fixed(4)),
}


def render_html(
    report: dict[str, Any],
    manifest: dict[str, Any] | None = None,
    placement: dict[str, Any] | None = None,
) -> str:
    """The page.

    Args:
        report: ``report.json``; its summary is made anew.
        manifest: ``manifest.json``, for names.
        placement: ``placement.json``, for where each expert is.

    Raises:
        UserError: something is missing or of another type; the message says what.
    """
    with reading("report.json"):
        r = Field({**report, "summary": summary(report)})
        for key in ("budget", "macs", "passes"):
            r[key].needed()
        about = Field(manifest, source="manifest.json")
        title = PurePath(about["source"]["path"].text("model")).name or "model"
        body = [
            _head(r, about, title),
            _passes(r),
            *layer_sections(r, Field(placement, source="placement.json")),
            _targets(r),
        ]
        return page(f"{title}: carve report", "".join(body))


def _head(r: Field, about: Field, title: str) -> str:
    asked = show(r["budget"]["asked"], plain)
    facts = [
        "carve " + name(about["carve"].text("-")),
        name(about["kind"].text("model")),
        f"budget asked {asked.html}",
        f"{_bits(r).html} bits",
        f"effort {name(r['effort'].text('-'))}",
        f"{show(r['seconds'], seconds).html}",
        "targets " + ", ".join(name(n) for n, _ in about["targets"].items())
        if about["targets"]
        else "",
    ]
    line = " · ".join(f for f in facts if f)
    return (
        f'<header><h1><span class="name">{escape(title)}</span>, dense to routed</h1>'
        f'<p class="soft">{line}</p>{_verdict(r)}</header>'
        f'<div class="top"><div>{_first(r)}</div><div>{_where(r)}</div></div>'
    )


def _bits(r: Field) -> Shown:
    value = r["bits"].value
    if isinstance(value, str):
        return Shown("mixed")
    return show(r["bits"], plain)


def _verdict(r: Field) -> str:
    s = r["summary"]
    macs = show(s["ratio"]["macs"], percent())
    said = [f"A token takes <b>{macs.html}</b> of the dense blocks' multiply-accumulates"]
    ratio = r["speed"]["decode"]["ratio"]
    if ratio:
        said[0] += f" and decodes at <b>{show(ratio, fixed(2)).html} times</b> the dense speed"
    q = r["quality"]
    if s["measure"].text() == "KL":
        said.append(
            f"Perplexity on held-out text goes from {show(q['dense_perplexity'], fixed(2)).html} "
            f"to <b>{show(q['perplexity'], fixed(2)).html}</b>"
        )
    elif s["measure"]:
        said.append(
            f"Embeddings keep a mean cosine of <b>{show(q['cosine_mean'], fixed(4)).html}</b> to "
            "the dense model's"
        )
    worst = []
    if s["worst_pass"]:
        change = show(s["worst_pass"]["change"], fixed(4, signed=True)).html
        worst.append(
            f"in the pass <b>{name(s['worst_pass']['name'].text())}</b> "
            f'({escape(s["measure"].text())} <span class="loss">{change}</span>)'
        )
    if s["worst_layer"]:
        worst.append(f"at the layer <b>{name(s['worst_layer']['name'].text())}</b>")
    if worst:
        said.append("Most was lost " + " and ".join(worst))
    return f'<p class="verdict">{". ".join(said)}.</p>'


def _first(r: Field) -> str:
    s, q, dense = r["summary"], r["quality"], r["dense"]
    ratio = s["ratio"]
    rows = [
        (
            "Active compute, MACs a token",
            show(r["macs"]["dense"], amount),
            show(s["macs"], amount),
            show(ratio["macs"], percent()),
        ),
        (
            "Size of the weights (dense: fp32)",
            show(dense["bytes"], nbytes),
            show(r["bytes"], nbytes),
            show(ratio["bytes"], percent()),
        ),
        (
            "Weights a token reads (dense: fp32)",
            show(dense["reads"], nbytes),
            show(s["reads"], nbytes),
            show(ratio["reads"], percent()),
        ),
    ]
    if s["measure"].text() == "KL":
        rows += [
            (
                "Perplexity",
                show(q["dense_perplexity"], fixed(2)),
                show(q["perplexity"], fixed(2)),
                show(ratio["perplexity"], percent()),
            ),
            ("KL to the dense model, nats", NOTHING, show(q["kl"], fixed(4)), NOTHING),
            ("Top-1 agreement", NOTHING, show(q["top1_agreement"], percent()), NOTHING),
        ]
    elif s["measure"]:
        rows += [
            ("Cosine, mean", NOTHING, show(q["cosine_mean"], fixed(4)), NOTHING),
            ("Cosine, 5th percentile", NOTHING, show(q["cosine_p5"], fixed(4)), NOTHING),
        ]
    speed = r["speed"]
    for key, label in (("decode", "Decode, tokens/s"), ("prefill", "Prefill, tokens/s")):
        part = speed[key]
        if part:
            rows.append(
                (
                    label,
                    show(part["dense"], fixed(1)),
                    show(part["routed"], fixed(1)),
                    show(part["ratio"], percent()),
                )
            )
    note = ""
    if speed:
        note = (
            f"Speed: both at {show(speed['bits'], plain).html} bits in the same engine, "
            f"{show(speed['threads'], plain).html} threads; medians of "
            f"{show(speed['repeats'], plain).html} interleaved pairs."
        )
    elif s["measure"].text() != "1 - cosine":  # bench times decoders
        note = "Speed is not measured yet: <code>carve bench DIR</code> measures and adds it."
    said = f" Quality on {show(q['tokens'], amount).html} held-out tokens." if q else ""
    cells = [[escape(label), a.html, b.html, c.html] for label, a, b, c in rows]
    return (
        table(["", "dense", "routed", "of dense"], cells, "first")
        + f'<p class="lead">{note}{said}</p>'
    )


def _where(r: Field) -> str:
    """Which passes and which layers lost most."""
    s = r["summary"]
    measure = s["measure"].text()
    change = fixed(4, signed=True)
    by_pass = [
        Bar(p["name"].text(), v, show(p["change"], change), kind="loss" if v > 0 else "gain")
        for p in s["passes"].each()
        if (v := p["change"].number()) is not None and abs(v) > NOTICED
    ]
    by_layer = lost_by_layer(r, MOST)
    return "".join(
        (
            figure(
                "Lost by pass",
                bars("Loss by pass", f"Change of {measure} through every pass", by_pass),
                f"Change of {escape(measure)} through the pass; a minus is quality won back.",
            )
            if by_pass
            else "",
            figure(
                "Lost by layer",
                bars("Loss by layer", f"{measure} that the dense FFN would give back", by_layer),
                f"What {escape(measure)} falls by when this FFN alone is the dense one again; "
                "largest first.",
            )
            if by_layer
            else "",
        )
    )


def _passes(r: Field) -> str:
    passes = r["passes"].each()
    quality, form = MEASURES.get(r["summary"]["measure"].text(), ("", plain))
    charts = [
        _waterfall(
            "Active compute",
            "MACs a token as planned",
            r["macs"]["dense"],
            [(p, p["state"]["macs"]) for p in passes],
            amount,
        ),
        _waterfall(
            "Size of the weights",
            "weights alone, fp32 until a pass quantizes",
            r["dense"]["bytes"],
            [(p, p["state"]["bytes"]) for p in passes],
            nbytes,
        ),
        _waterfall(
            "Weights a token reads",
            "what decoding has to wait for",
            r["dense"]["reads"],
            [(p, p["state"]["reads"]) for p in passes],
            nbytes,
        ),
    ]
    if quality == "perplexity":
        found = [p["quality"]["dense_perplexity"] for p in passes if p["quality"]]
        values = [(p, p["quality"]["perplexity"]) for p in passes]
        start = found[0] if found else Field(None)
        charts.append(_waterfall("Perplexity", "held-out text", start, values, form, zero=False))
    elif quality:
        values = [(p, p["quality"][quality]) for p in passes]
        rows = [Bar(p["name"].text(), v.number(), show(v, form)) for p, v in values if v]
        least = min((b.value for b in rows if b.value is not None), default=0.0)
        low = max(0.0, least - 0.02)
        charts.append(
            figure(
                "Cosine", bars("Cosine by pass", "Mean cosine to the dense model", rows, low=low)
            )
        )
    charts.append(_speed(r))
    shown = ["perplexity", "kl", "top1_agreement"]
    if quality == "cosine_mean":
        shown = ["cosine_mean", "cosine_p5"]
    head = {"kl": "KL", "top1_agreement": "top-1", "cosine_mean": "cosine", "cosine_p5": "p5"}
    forms = {"perplexity": fixed(2), "top1_agreement": percent()}
    rows_ = [
        [
            name(p["name"].text()),
            show(p["seconds"], seconds).html,
            show(p["peak_rss_mb"], fixed(0)).html,
            *(show(p["quality"][n], forms.get(n, fixed(4))).html for n in shown),
        ]
        for p in passes
    ]
    return section(
        "What each pass did",
        "From the dense model at the top to the artifact at the bottom. Speed depends on how much "
        "a token computes and reads; it is measured at the end only.",
        grid(*charts),
        details(
            "Time, memory and quality of every pass",
            table(["pass", "time", "peak MB", *(head.get(n, n) for n in shown)], rows_),
        ),
    )


def _waterfall(
    heading: str,
    caption: str,
    start: Field,
    after: list[tuple[Field, Field]],
    form: Format,
    *,
    zero: bool = True,
) -> str:
    first = start.number()
    if first is None:
        return ""
    rows = [Bar("dense", first, show(start, form), kind="total")]
    before = first
    for p, field in after:
        value = field.number()
        if value is None:
            continue
        moved = abs(value - before) > 0.01 * abs(first)
        kind = "plain" if not moved else "loss" if value > before else "gain"
        rows.append(Bar(p["name"].text(), value, show(field, form), before, kind))
        before = value
    if len(rows) < 2:
        return ""
    rows.append(Bar("routed", before, rows[-1].shown, kind="total"))
    values = [b.value for b in rows if b.value is not None]
    least, most = min(values), max(values)
    low = None if zero else max(0.0, least - 0.6 * (most - least or least))
    chart = bars(f"{heading} over the passes", caption, rows, low=low, joined=True)
    note = "" if zero else "; the axis does not begin at zero"
    return figure(heading, chart, escape(caption) + note)


def _speed(r: Field) -> str:
    speed = r["speed"]
    rows = [
        Bar(
            f"{key}, {who}",
            v,
            show(speed[key][who], fixed(1)),
            kind="total" if who == "dense" else "plain",
        )
        for key in ("decode", "prefill")
        for who in ("dense", "routed")
        if (v := speed[key][who].number()) is not None
    ]
    if not rows:
        return ""
    return figure("Speed", bars("Speed", "Tokens a second", rows), "tokens a second, same engine")


def _targets(r: Field) -> str:
    """Whatever the emitters measured: parity with torch above all."""
    rows = []
    for p in r["passes"].each():
        if not p["name"].text().startswith("emit "):
            continue
        for group, found in p["metrics"].items():
            members = found.items() if isinstance(found.value, dict) else [("", found)]
            for key, each in members:
                if isinstance(each.value, int | float) and not isinstance(each.value, bool):
                    label = f"{group} {key}".strip().replace("_", " ")
                    target = p["name"].text().removeprefix("emit ")
                    rows.append([name(target), name(label), show(each, plain).html])
    return section(
        "Checks of what was emitted",
        "Every target is compared with torch on prompts whose routings differ; a mismatch fails "
        "the conversion.",
        details("All figures", table(["target", "figure", "value"], rows, "words")),
    )
