"""The sections of a page on the widths of weights and on the places of experts."""

from __future__ import annotations

from collections.abc import Sequence

from carve.report.charts import Bar, Cell, bars, heat
from carve.report.fields import Field
from carve.report.page import details, figure, grid, legend, section, table
from carve.report.shown import Shown, fixed, name, nbytes, percent, plain, scaled, shorter, show

_UNITS = {
    "throughput": scaled(1e6, 3, "µs"),
    "latency": scaled(1e6, 3, "µs"),
    "affinity": fixed(3),
    "moetuner": fixed(3),
    "exflow": fixed(3),
}


def metrics(r: Field, of: str) -> Field:
    """What a pass measured; a field of None where it was not run."""
    for p in r["passes"].each():
        if p["name"].text() == of:
            return p["metrics"]
    return Field(None)


def bits_section(r: Field, names: dict[str, str]) -> str:
    """Bits by weight and by expert, and how routing fared."""
    found = metrics(r, "quantize")
    if not found:
        return ""
    chosen = metrics(r, "choose_widths")
    names = names or shorter([n for n, _ in found["experts"].items()])
    rows, seen = [], set()
    for n, each in found["experts"].items():
        cells: list[Cell | None] = []
        for f in (found["bits"][n], *each["bits"].each()):
            bits = f.number()
            seen.add(bits)
            cells.append(None if bits is None else Cell("plain", _depth(bits), show(f, plain)))
        rows.append((names.get(n, n), cells))
    others = [f for n, f in found["bits"].items() if n not in dict(found["experts"].items())]
    mixed = len(seen) > 1 or len({f.number() for f in others}) > 2
    said = f"{show(found['effective_bits'][0], fixed(2)).html} bits a weight with scales."
    if chosen:
        said += (
            f" Chosen: {show(chosen['average'], fixed(2)).html} bits on average, predicted loss "
            f"{show(chosen['predicted'], fixed(4)).html} before fitting (no choice is under "
            f"{show(chosen['bound'], fixed(4)).html})."
        )
    key = " ".join(
        f'<span class="keyed"><svg class="chip" viewBox="0 0 10 10"><rect class="plain" width="10" '
        f'height="10" fill-opacity="{_depth(b):.2f}"/></svg><span class="tick">{b:.0f} bits</span>'
        "</span>"
        for b in sorted(b for b in seen if b is not None)
    )
    chart = ""
    if rows and mixed:
        chart = grid(
            figure(
                "Bits by expert",
                heat(
                    "Bits of the shared expert and of every routed one",
                    "Fuller colour is more bits",
                    rows,
                    "column",
                    ("shared", "last expert"),
                ),
                f"{key}<br>The first column is the shared expert.",
            )
        )
    agreement = [
        Bar(names.get(n, n), f.number(), show(f, percent())) for n, f in found["agreement"].items()
    ]
    linears = [
        [name(n), show(f, plain).html, show(found["error"][n], fixed(5)).html]
        for n, f in found["bits"].items()
    ]
    return section(
        "Widths of the weights",
        said,
        chart,
        grid(
            figure(
                "Same experts as before quantizing",
                bars("Tokens whose experts stay the same", "By layer", agreement),
                "Share of tokens that take exactly the experts they took.",
            )
            if agreement
            else ""
        ),
        details(
            "Every weight",
            table(["weight", "bits", "relative error of its result"], linears, "words"),
        ),
    )


def _depth(bits: float) -> float:
    return {2.0: 0.2, 3.0: 0.35, 4.0: 0.55, 8.0: 1.0}.get(bits, min(1.0, max(0.1, bits / 8)))


def placement_section(r: Field, placement: Field) -> str:
    """Where the experts are, how good that is, and how good it could be."""
    found = metrics(r, "place")
    if not found:
        return ""
    objective = found["objective"].text()
    form = _UNITS.get(objective, plain)
    value, bound = found["value"], found["bound"]
    devices = [n for n, _ in found["memory"].items()]
    names = shorter([n for n, _ in placement["assignment"].items()])
    classes = {i: f"c{i % 6}" for i in range(len(devices))}
    rows: list[tuple[str, Sequence[Cell | None]]] = []
    for n, layer in placement["assignment"].items():
        cells: list[Cell | None] = []
        for held in layer.each():
            home = held[0].number()
            at = -1 if home is None else int(home)
            where = devices[at] if 0 <= at < len(devices) else "-"
            cells.append(Cell(classes.get(at, "empty"), 1.0, Shown(where)))
        rows.append((names[n], cells))
    memory = [
        [
            name(d),
            show(use[0], nbytes).html,
            show(use[1], nbytes).html,
            show(found["load"][d], fixed(2)).html,
        ]
        for d, use in found["memory"].items()
    ]
    load = [Bar(d, f.number(), show(f, fixed(2))) for d, f in found["load"].items()]
    scores = [
        [name(who), *(show(by[k], _UNITS.get(k, plain)).html for k in _score_names(found))]
        for who, by in found["scores"].items()
    ]
    where = legend([(classes[i], name(d)) for i, d in enumerate(devices)])
    per = "a token" if objective in ("throughput", "latency") else "hops a token"
    return section(
        "Placement",
        f"{name(objective)}: {show(value, form).html} {per}; no placement is under "
        f"{show(bound, form).html} (gap {show(found['gap'], percent()).html}).",
        grid(
            figure(
                "Value and bound",
                bars(
                    "Placement and its bound",
                    "Objective and lower bound",
                    [
                        Bar("placed", value.number(), show(value, form), kind="plain"),
                        Bar("bound", bound.number(), show(bound, form), kind="total"),
                    ],
                ),
            ),
            figure(
                "Experts a token by device",
                bars("Experts a token by device", "Mean over tokens", load),
            ),
            figure(
                "Where every expert is",
                heat(
                    "Device of every expert",
                    "By layer and expert",
                    rows,
                    "expert",
                    ("first expert", "last"),
                ),
                where,
            )
            if rows
            else "",
        ),
        table(["device", "experts", "room", "experts a token"], memory),
        details(
            "By every objective, on the half of the trace that placed nothing",
            table(["", *_score_names(found)], scores),
        ),
    )


def _score_names(found: Field) -> list[str]:
    first = next((by for _, by in found["scores"].items()), Field(None))
    return [n for n, _ in first.items()]
