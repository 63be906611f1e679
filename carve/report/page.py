"""The page around a report: one HTML file without scripts, fonts or links, and its tables."""

from __future__ import annotations

from collections.abc import Sequence

from carve.report.shown import escape

_STYLE = """
:root{--bg:#fcfcfb;--ink:#1b1f24;--soft:#57606a;--rule:#d8dce0;--card:#f3f4f5;--plain:#2b6a8c;
--loss:#b1422a;--gain:#2a7548;--l0:#8a94a0;--l1:#b08a2e;--l2:#7a5aa6;--l3:#2a7548;--l4:#b1422a;
--l5:#2b6a8c;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--bg:#13161a;--ink:#e4e7ea;--soft:#9ba5af;--rule:#30363d;
--card:#1c2127;--plain:#6ab0d2;--loss:#e5876b;--gain:#6cc08b;--l0:#7f8994;--l1:#d1ac55;
--l2:#ab8ed6;--l3:#6cc08b;--l4:#e5876b;--l5:#6ab0d2}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,
"Segoe UI",Roboto,"Liberation Sans",sans-serif;font-variant-numeric:tabular-nums;
-webkit-text-size-adjust:100%}
main{max-width:1080px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:24px;line-height:1.25;margin:0 0 4px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:17px;margin:44px 0 4px;padding-top:14px;border-top:1px solid var(--rule)}
h3{font-size:14px;margin:0 0 6px;font-weight:600}
p{margin:0 0 10px;max-width:72ch}
.soft,.lead{color:var(--soft)}
.lead{font-size:14px;margin-bottom:14px}
.verdict{font-size:18px;line-height:1.45;margin:16px 0 18px;max-width:62ch}
.verdict b{font-weight:650}
.loss{color:var(--loss)}.gain{color:var(--gain)}
.name{overflow-wrap:anywhere}[data-at]{white-space:nowrap}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(320px,100%),1fr));gap:26px 44px}
.grid+.grid,.grid+table{margin-top:28px}
.top{display:grid;grid-template-columns:minmax(0,1.25fr) minmax(0,1fr);gap:10px 56px}
.top figure+figure{margin-top:20px}.top .lead{margin-top:10px}
@media(max-width:860px){.top{grid-template-columns:minmax(0,1fr)}}
figure{margin:0;min-width:0}
figcaption{font-size:13px;color:var(--soft);margin-top:4px;max-width:56ch}
svg{display:block;width:100%;max-width:470px;height:auto;overflow:visible}
svg.chip{display:inline-block;width:10px;height:10px;margin-right:5px}
svg text{font-size:11px;fill:var(--ink)}
svg text.tick,svg text.name{fill:var(--soft)}
svg text.loss{fill:var(--loss)}svg text.gain{fill:var(--gain)}
rect.plain,circle.plain{fill:var(--plain)}rect.total{fill:var(--l0)}
rect.loss{fill:var(--loss)}rect.gain{fill:var(--gain)}
rect.empty{fill:var(--rule)}
.c0{fill:var(--l5);background:var(--l5)}.c1{fill:var(--l1);background:var(--l1)}
.c2{fill:var(--l2);background:var(--l2)}.c3{fill:var(--l3);background:var(--l3)}
.c4{fill:var(--l4);background:var(--l4)}.c5{fill:var(--l0);background:var(--l0)}
path{fill:none}
.axis{stroke:var(--rule)}.join{stroke:var(--l0);stroke-dasharray:2 2}
.mark{stroke:var(--ink);stroke-width:2}.range{stroke:var(--plain);stroke-width:3;opacity:.45}
.line{stroke-width:1.4}.line.last{stroke-width:2.4}
.l0{stroke:var(--l0);color:var(--l0)}.l1{stroke:var(--l1);color:var(--l1)}
.l2{stroke:var(--l2);color:var(--l2)}.l3{stroke:var(--l3);color:var(--l3)}
.l4{stroke:var(--l4);color:var(--l4)}.l5,.line.last{stroke:var(--l5);color:var(--l5)}
.dot{fill:currentColor;stroke:none}
.key{display:inline-block;width:10px;height:10px;margin:0 5px 0 0;border-radius:2px}
.keyed{margin-right:14px;white-space:nowrap}
table{border-collapse:collapse;width:100%;font-size:14px}
th,td{padding:5px 0 5px 16px;text-align:right;border-bottom:1px solid var(--rule);
vertical-align:top}
th{font-weight:600;font-size:12.5px;color:var(--soft);vertical-align:bottom}
th:first-child,td:first-child{text-align:left;padding-left:0}
table.words td{text-align:left;overflow-wrap:anywhere}table.words th{text-align:left}
table.first{max-width:760px}table.first td:first-child{color:var(--soft)}
details{margin-top:16px}summary{cursor:pointer;color:var(--soft);font-size:14px}
code{font:13px ui-monospace,"DejaVu Sans Mono",monospace}
@media(max-width:600px){
main{padding:18px 16px 40px}h1{font-size:21px}.verdict{font-size:17px}
table.stack thead{display:none}
table.stack tr{display:grid;grid-template-columns:1fr 1fr;gap:0 18px;padding:9px 0;
border-bottom:1px solid var(--rule)}
table.stack td{border:0;padding:1px 0;display:flex;justify-content:space-between;gap:10px}
table.stack td:first-child{grid-column:1/-1;font-weight:600}
table.stack td:not(:first-child)::before{content:attr(data-label);color:var(--soft);font-size:13px;
text-align:left}
table.three tr{grid-template-columns:repeat(3,1fr)}
table.three td:not(:first-child){flex-direction:column;gap:0;text-align:left}
table.words{table-layout:fixed}
table.first th,table.first td{padding-left:8px}
table.first th:first-child,table.first td:first-child{padding-left:0}
table.first{font-size:14px}
}
@media print{body{font-size:12px}h2{break-after:avoid}figure,tr{break-inside:avoid}}
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(title: str, body: str) -> str:
    """A whole document. Its policy forbids whatever is not in the file itself."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def section(heading: str, lead: str, *parts: str) -> str:
    """A section; nothing where there is nothing to show. ``lead`` and ``parts`` are HTML."""
    shown = [p for p in parts if p]
    if not shown:
        return ""
    said = f'<p class="lead">{lead}</p>' if lead else ""
    return f"<section><h2>{escape(heading)}</h2>{said}{''.join(shown)}</section>\n"


def figure(heading: str, chart: str, caption: str = "") -> str:
    """A chart with its heading; ``chart`` and ``caption`` are HTML."""
    said = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure><h3>{escape(heading)}</h3>{chart}{said}</figure>"


def grid(*figures: str) -> str:
    """Figures side by side where there is room."""
    shown = [f for f in figures if f]
    return f'<div class="grid">{"".join(shown)}</div>' if shown else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "stack") -> str:
    """A table; ``head`` is text, cells are HTML. On a phone a ``stack`` becomes a list of rows."""
    if not rows:
        return ""
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td data-label="{escape(h)}">{cell}</td>' for h, cell in zip(head, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f'<table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def details(heading: str, body: str) -> str:
    """What is folded away until it is asked for."""
    return f"<details><summary>{escape(heading)}</summary>{body}</details>" if body else ""


def legend(items: Sequence[tuple[str, str]]) -> str:
    """Classes of colour and, as HTML, what they stand for."""
    return "".join(
        f'<span class="keyed"><span class="key {kind}"></span>{text}</span> '
        for kind, text in items
    )
