"""The sections of a page that go layer by layer: widths, routing, errors, gates, places."""

from __future__ import annotations

from carve.report.charts import Bar, Cell, Line, Range, bars, heat, lines, ranges
from carve.report.fields import Field
from carve.report.page import details, figure, grid, section, table
from carve.report.shown import (
    fixed,
    name,
    percent,
    plain,
    shorter,
    show,
)
from carve.report.summary import NOTICED
from carve.report.weights import bits_section, metrics, placement_section

MOST = 8
"""Layers on the first screen."""


def layer_sections(r: Field, placement: Field) -> list[str]:
    """The sections in order, empty where a conversion has nothing of the kind."""
    names = shorter([n for n, _ in r["layers"].items()])
    return [
        _errors(r, names),
        _allocation(r, names),
        _routing(r, names),
        _gates(r),
        bits_section(r, names),
        placement_section(r, placement),
    ]


def lost_by_layer(r: Field, most: int | None = None) -> list[Bar]:
    """What every layer lost, in order; or the ``most`` that lost most, largest first."""
    found = [
        (n, each["loss"], v)
        for n, each in r["layers"].items()
        if (v := each["loss"].number()) is not None
    ]
    names = shorter([n for n, _ in r["layers"].items()])
    if most is not None:
        found = sorted(found, key=lambda f: -f[2])[:most]
    change = fixed(4, signed=True)
    return [
        Bar(names[n], v, show(field, change), kind="loss" if v > 0 else "gain")
        for n, field, v in found
    ]


def _errors(r: Field, names: dict[str, str]) -> str:
    series: list[Line] = []
    for p in r["passes"].each():
        found = [p["state"]["error"][n] for n in names]
        values = [f.number() for f in found]
        if not any(v is not None and v > 1e-6 for v in values):
            continue
        if series and list(series[-1].values) == values:
            continue
        series.append(Line(p["name"].text(), values, [show(f, fixed(4)) for f in found]))
    if not series:
        return ""
    chart = lines(
        "Relative error of the stream by layer",
        "A line a pass; squared error over the squared dense stream",
        list(names.values()),
        series[-6:],
    )
    return section(
        "Error by layer",
        "How far the stream behind each FFN is from the dense model's, after every pass that moved "
        "it: squared error over squared size, on held-out tokens. At the right of each pass, the "
        "last layer's figure.",
        grid(
            figure("Relative error of the stream", chart),
            figure(
                "Lost by layer",
                bars("Loss by layer", "What the dense FFN would give back", lost_by_layer(r)),
                "What the whole model's loss falls by when this FFN alone is the dense one again.",
            )
            if len(names) > MOST
            else "",
        ),
    )


def _allocation(r: Field, names: dict[str, str]) -> str:
    planned = metrics(r, "allocate")
    rows, cells = [], []
    for n, each in r["layers"].items():
        active, asked = each["active"], planned["active"][n]
        share = show(active, percent())
        rows.append(
            Bar(
                names[n],
                active.number(),
                share,
                mark=asked.number(),
                mark_shown=show(asked, percent()),
            )
        )
        experts: list[str] = ["dense", "-"]
        if each["num_experts"]:
            count, size = show(each["num_experts"], plain), show(each["expert_size"], plain)
            experts = [f"{count.html} × {size.html}", show(each["shared_size"], plain).html]
        cells.append(
            [
                name(n, names[n]),
                show(asked, percent()).html,
                share.html,
                experts[1],
                experts[0],
                show(each["experts_per_token"]["mean"], fixed(2)).html,
                show(planned["sensitivity"][n], fixed(5)).html,
                show(each["loss"], fixed(5, signed=True)).html,
            ]
        )
    if not rows:
        return ""
    head = ["layer", "planned", "realised", "shared", "experts", "mean k", "loss at probe", "loss"]
    said = ""
    if planned:
        said = (
            f"Predicted loss {show(planned['predicted'], fixed(4)).html}, with uniform widths "
            f"{show(planned['predicted_uniform'], fixed(4)).html}, no choice is under "
            f"{show(planned['bound'], fixed(4)).html}. Realised: {_realised(r)}."
        )
    chart = bars("Active share of each FFN", "Bar: realised; mark: planned", rows)
    return section(
        "Allocation, predicted and realised",
        said,
        grid(
            figure(
                "Active share of each FFN",
                chart,
                "Bar: held-out tokens, those that skip it counted as none; mark: as planned.",
            ),
        ),
        details("By layer", table(head, cells)),
    )


def _realised(r: Field) -> str:
    """The loss that came of it, after the passes that touch quality."""
    found = []
    before: float | None = None
    for p in r["passes"].each():
        q = p["quality"]
        field = q["kl"] if q["kl"] else q["cosine_mean"]
        value = field.number()
        first = p["name"].text() in ("profile", "allocate", "carve")
        if value is None or value == before or first or (q["kl"] and value < NOTICED):
            continue
        before = value
        kind = "KL" if q["kl"] else "cosine"
        found.append(f"{kind} {show(field, fixed(4)).html} after {name(p['name'].text())}")
    return ", ".join(found) or "not measured"


def _routing(r: Field, names: dict[str, str]) -> str:
    routed = [(n, each) for n, each in r["layers"].items() if each["load"]]
    if not routed:
        return ""
    loads = [f.number() or 0.0 for _, e in routed for f in e["load"].each()]
    most = max([*loads, 0.0]) or 1.0
    rows = []
    for n, each in routed:
        cells = [
            Cell("plain", 0.06 + 0.94 * max(0.0, f.number() or 0.0) / most, show(f, percent()))
            for f in each["load"].each()
        ]
        rows.append((names[n], cells))
    longest = max(len(c) for _, c in rows)
    entropy = [
        Bar(names[n], e["entropy"].number(), show(e["entropy"], fixed(3))) for n, e in routed
    ]
    margins = [
        Range(
            names[n],
            e["margin"]["p5"].number(),
            e["margin"]["p50"].number(),
            e["margin"]["p95"].number(),
            show(e["margin"]["p50"], fixed(3)),
        )
        for n, e in routed
    ]
    cells_ = [
        [
            name(n, names[n]),
            show(e["load_min"], percent()).html,
            show(e["load_max"], percent()).html,
            show(e["balance"], fixed(3)).html,
            show(e["entropy"], fixed(3)).html,
            *(show(e["margin"][p], fixed(3)).html for p in ("p5", "p50", "p95")),
            " to ".join(show(e["experts_per_token"][p], fixed(1)).html for p in ("p5", "p95")),
        ]
        for n, e in routed
    ]
    head = [
        "layer",
        "least load",
        "most load",
        "balance",
        "entropy",
        "margin p5",
        "median",
        "p95",
        "experts p5 to p95",
    ]
    return section(
        "Routing",
        "Held-out tokens. Load is the share of tokens that take an expert; full colour is the "
        "busiest of all. Entropy is 0 where routers are sure, 1 where all experts are alike to "
        "them. A margin is the lowest score of the chosen experts less the highest of the others, "
        "over the scores' spread: tokens near 0 are the ones that rounding may send elsewhere.",
        grid(
            figure(
                "Load of the experts",
                heat(
                    "Load of the experts by layer",
                    "Full colour is the busiest expert of all",
                    rows,
                    "expert",
                    ("first expert", "last" if longest > 8 else ""),
                ),
            ),
            figure(
                "Entropy of the router",
                bars("Router entropy", "Mean over tokens, of the most possible", entropy),
            ),
            figure(
                "Margin of the choice",
                ranges("Router margins", "5th to 95th percentile", margins),
                "5th percentile to 95th; dot: median.",
            ),
        ),
        details("By layer", table(head, cells_)),
    )


def _gates(r: Field) -> str:
    found, blocks = metrics(r, "gate"), r["skip"]["blocks"].items()
    if not blocks:
        return ""
    names = shorter([n for n, _ in blocks])
    rows, cells = [], []
    for n, share in blocks:
        asked = found["asked"][n]
        rows.append(
            Bar(
                names[n],
                share.number(),
                show(share, percent()),
                mark=asked.number(),
                mark_shown=show(asked, percent()),
            )
        )
        cells.append(
            [
                name(n, names[n]),
                show(asked, percent()).html,
                show(share, percent()).html,
                name(found["bridge"][n].text("-")),
                show(found["error"][n], fixed(4)).html,
            ]
        )
    spans = r["positions"]["blocks"].items()
    width = show(r["positions"]["width"], plain)
    by_place = [
        (
            shorter([m for m, _ in spans]).get(n, n),
            [
                None
                if (v := f.number()) is None
                else Cell("plain", 0.05 + 0.95 * min(max(v, 0.0), 1.0), show(f, percent()))
                for f in each.each()
            ],
        )
        for n, each in spans
    ]
    chart = ""
    if by_place:
        chart = figure(
            "By position",
            heat(
                "Skipped share by block and position",
                "Full colour: every token is skipped",
                by_place,
                "span",
                ("first tokens", "last"),
            ),
            f"Columns are spans of {width.html} positions; full colour: all tokens skip.",
        )
    return section(
        "Skipped tokens",
        f"{show(r['skip']['realised'], percent()).html} of the tokens that may skip a gated block "
        "do so on held-out text.",
        grid(
            figure(
                "By block",
                bars("Skipped share by block", "Bar: realised; mark: asked", rows),
                "Bar: held-out text; mark: as asked.",
            ),
            chart,
        ),
        details(
            "By block",
            table(["block", "asked", "skipped", "bridge", "error it adds"], cells),
        ),
    )
