"""The page of a report: every figure is the report's, and whatever a file holds is harmless."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import report_samples as samples
from report_samples import LAYERS, Page, holds

from carve import cli
from carve.errors import UserError
from carve.report import render
from carve.report.fields import reading
from carve.report.html import render_html
from carve.report.summary import summary

Report = dict[str, Any]
# Words of the page with digits in them that are no figures.
WORDS = {"top-1", "Top-1", "p5", "p95", "5th", "95th", "fp32", "0", "1"}
TAGS = {
    "html", "head", "meta", "title", "style", "body", "main", "header", "section", "div", "h1",
    "h2", "h3", "p", "b", "br", "span", "code", "figure", "figcaption", "table", "thead", "tbody",
    "tr", "th", "td", "details", "summary", "svg", "desc", "g", "path", "rect", "circle", "text",
    "tspan",
}  # fmt: skip
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>\x1b[31m"


def whole(report: Report) -> Report:
    return {**report, "summary": summary(report)}


def page(report: Report) -> str:
    return render_html(report, samples.manifest(), samples.placement())


def check(text: str, report: Report) -> Page:
    """Every number in a page is a figure of the report, rounded; gives the page."""
    found = Page(text)
    for way, shown in found.figures:
        assert holds(report, way, shown), (way, shown)
    for part in found.other:
        numbers = {w.strip("().,:;") for w in re.findall(r"\S*\d\S*", part)}
        assert numbers <= WORDS, part
    return found


def test_every_figure_is_in_the_report() -> None:
    report = whole(samples.report())
    found = check(page(report), report)
    ways = {json.dumps(way[:2]) for way, _ in found.figures}
    for key in ("budget", "quality", "speed", "dense", "skip", "positions", "layers", "passes"):
        assert any(f'"{key}"' in w for w in ways), key
    passes = {way[1] for way, _ in found.figures if way[0] == "passes"}
    assert passes == set(range(len(report["passes"])))
    assert len(found.figures) > 150


def test_a_figure_that_is_another_would_be_seen() -> None:
    report = whole(samples.report())
    text = page(report)
    for change in (("quality", "kl"), ("speed", "decode"), ("layers", LAYERS[1])):
        other = copy.deepcopy(report)
        value = other[change[0]][change[1]]
        if isinstance(value, dict):
            for key in value:
                value[key] = 7.77
        else:
            other[change[0]][change[1]] = 7.77
        with pytest.raises((AssertionError, TypeError)):
            check(text, other)
    with pytest.raises(AssertionError):
        check(text.replace("Most was lost", "42 was lost"), report)


def test_the_first_screen_says_what_was_gained_and_lost_and_where() -> None:
    said = Page(page(samples.report()))
    verdict = re.search(r'class="verdict">(.*?)</p>', page(samples.report()))
    assert verdict is not None
    words = re.sub(r"<[^>]*>", "", verdict[1])
    assert "takes 59.9 %" in words
    assert "1.44 times" in words
    assert "from 20.00 to 23.53" in words
    assert "in the pass route_ridge (KL +0.0912)" in words
    assert f"at the layer {LAYERS[0]}" in words
    assert any("median" in part for part in said.other)


def test_where_the_figures_of_the_summary_come_from() -> None:
    report = samples.report()
    s = summary(report)
    assert s["measure"] == "KL"
    assert s["loss"] == report["quality"]["kl"]
    changes = {p["name"]: p["change"] for p in s["passes"]}
    assert sum(changes.values()) == pytest.approx(0.1153)
    assert changes["gate"] == pytest.approx(0.1034 - 0.0912)
    assert s["worst_pass"]["name"] == "route_ridge"
    assert s["worst_layer"] == {"name": LAYERS[0], "loss": 0.0456}
    assert s["ratio"]["bytes"] == pytest.approx(4_567_890 / 31_234_567)
    assert s["ratio"]["reads"] == pytest.approx(0.098)
    assert s["macs"] == pytest.approx(0.5987 * 9e6)


def encoder() -> Report:
    """The same for an encoder: cosines, and no speed."""
    report = samples.report()
    for part in (report, *report["passes"]):
        if part["quality"]:
            cosine = 1 - part["quality"]["kl"]
            part["quality"] = {"cosine_mean": cosine, "cosine_p5": cosine - 0.05, "tokens": 99}
    del report["speed"]
    return report


def test_an_encoder() -> None:
    report = whole(encoder())
    text = page(report)
    check(text, report)
    assert "Embeddings keep a mean cosine of" in text
    assert "carve bench" not in text
    assert "Perplexity" not in text


def test_a_report_of_an_earlier_carve_shows_what_it_has() -> None:
    report = samples.report()
    for key in ("dense", "layers", "positions", "recipe", "speed"):
        del report[key]
    for p in report["passes"]:
        p.pop("state", None)
    text = render_html(report)
    check(text, whole(report))
    assert "carve bench" in text
    assert "Perplexity over the passes" in text
    assert "Active compute over the passes" not in text
    assert "Routing" not in text


def test_nothing_comes_from_elsewhere() -> None:
    text = page(samples.report())
    found = Page(text)
    assert set(found.tags) <= TAGS
    assert not {k for k, _ in found.attributes} & {"src", "href", "xlink:href", "style", "action"}
    for mark in ("http:", "https:", "//", "url(", "@import", "@font-face", "javascript"):
        assert mark not in text
    assert "default-src 'none'" in text
    for heading in ("Routing", "Skipped tokens", "Widths of the weights", "Placement"):
        assert f"<h2>{heading}</h2>" in text
    charts = text.count("<svg role=")
    assert charts == len(
        re.findall(r"<svg role=[^>]*><title>[^<]+</title><desc>[^<]+</desc>", text)
    )
    assert charts > 12


def renamed(value: Any, evil: str) -> Any:
    """A report with every name and text in it, but those the page looks for, replaced."""
    known = {"quantize", "gate", "place", "allocate", "choose_widths", "latency"}
    if isinstance(value, dict):
        names = {*LAYERS, samples.BLOCK, "hub", "box", "lm_head", "placed", "parity", "routings"}
        return {evil + k if k in names else k: renamed(v, evil) for k, v in value.items()}
    if isinstance(value, list):
        return [renamed(v, evil) for v in value]
    return evil + value if isinstance(value, str) and value not in known else value


def test_names_cannot_become_markup() -> None:
    about = renamed(samples.manifest(), EVIL)
    about["targets"] = {EVIL: {}}
    report = renamed(samples.report(), EVIL)
    text = render_html(report, about, renamed(samples.placement(), EVIL))
    found = check(text, whole(report))
    assert set(found.tags) <= TAGS
    assert not [k for k, _ in found.attributes if k.startswith("on") or k == "src"]
    assert any(EVIL[:20] in n for n in found.names)
    assert "\x1b" not in text
    assert "\x1b" not in render(renamed(samples.report(), EVIL))


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), 10**400, -1e300])
def test_what_is_no_number_is_a_dash(value: Any) -> None:
    report = samples.report()
    report["quality"]["perplexity"] = value
    report["layers"][LAYERS[0]]["entropy"] = value
    report["layers"][LAYERS[0]]["load"][1] = value
    report["passes"][2]["state"]["error"][LAYERS[1]] = value
    report["passes"][2]["state"]["bytes"] = value
    text = page(report)
    check(text, whole(report))
    assert not re.search(r"\b(nan|inf|None)\b", text)
    assert "<span>-</span>" in text


BROKEN: list[tuple[str, Callable[[Report], Any], str]] = [
    ("no passes", lambda r: r.pop("passes"), "passes"),
    ("no budget", lambda r: r.pop("budget"), "budget"),
    ("passes are no list", lambda r: r.update(passes={"a": 1}), "passes"),
    ("a pass is a number", lambda r: r["passes"].append(3), "passes[8]"),
    ("a pass without a name's type", lambda r: r["passes"][0].update(name=[1]), "passes[0].name"),
    ("a text for a number", lambda r: r["quality"].update(kl="0.1"), "quality.kl"),
    ("true for a number", lambda r: r["macs"].update(dense=True), "macs.dense"),
    ("loads are no list", lambda r: r["layers"][LAYERS[0]].update(load={}), "load"),
]


@pytest.mark.parametrize(("change", "where"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_a_report_of_another_shape(
    change: Callable[[Report], Any],
    where: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = samples.report()
    change(report)
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report))
    assert cli.main(["report", str(file), "--html", str(tmp_path / "page.html"), "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "report"
    assert where in error["message"]
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def ways(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything in a report, of alike things in a list or by layer to the first."""
    if before:
        yield before
    if isinstance(value, dict):
        for key, each in value.items():
            if key not in (LAYERS[1], "box"):
                yield from ways(each, (*before, key))
    elif isinstance(value, list):
        for i, each in enumerate(value):
            if i == 0 or before == ("passes",):
                yield from ways(each, (*before, i))


ODD: list[Any] = [None, "x", 5, -1e99, [], [[]], {}, {"a": {}}, True]


@pytest.mark.parametrize("turn", range(2))
def test_whatever_stands_anywhere_is_read_or_refused(turn: int) -> None:
    refused = 0
    every = list(ways(samples.report()))
    for i, way in enumerate(every):
        report = samples.report()
        at = report
        for key in way[:-1]:
            at = at[key]
        at[way[-1]] = ODD[(i + turn * 4) % len(ODD)]
        for show in (page, text):
            try:
                show(report)
            except UserError as e:
                assert e.code == "report"
                refused += 1
    assert len(every) > 150
    assert 50 < refused < 2 * len(every)


def text(report: Report) -> str:
    with reading("report.json"):
        return render(report)


def test_the_loss_is_split_between_carving_quantizing_and_tuning() -> None:
    report = samples.report()
    passes = report["passes"]
    at = next(i for i, p in enumerate(passes) if p["name"] == "quantize")
    before, after = (passes[i]["quality"]["perplexity"] for i in (at - 1, at))
    carved, rounded = (math.log(p / 20.0) for p in (before, after))
    line = f"{rounded:+.4f}: {carved:+.4f} by carving, {rounded - carved:+.4f} by quantizing; KL"
    assert f"log-perplexity {line} 0.1153, 0.1034 before quantizing" in text(report)
    quality = {**passes[at]["quality"], "perplexity": 22.0, "kl": 0.1}
    passes.insert(at + 1, {**passes[at], "name": "tune_grids", "metrics": {}, "quality": quality})
    tuned = math.log(1.1)
    line = line.replace(f"{rounded:+.4f}:", f"{tuned:+.4f}:").replace("; KL", "")
    line += f", {tuned - rounded:+.4f} by training grids; KL 0.1000, 0.1034 before quantizing"
    assert f"log-perplexity {line}" in text(report)
    # An encoder whose weights alone were rounded.
    for p in passes:
        if p["quality"]:
            p["quality"] = {"cosine_mean": 0.9, "cosine_p5": 0.8, "tokens": 10}
    report["passes"] = passes[at : at + 1]
    assert "1 - cosine +0.1000: +0.1000 by quantizing\n" in text(report)
