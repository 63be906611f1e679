"""Reports as plain text tables; the figures are those of ``report.json``."""

from __future__ import annotations

import math
from typing import Any


def table(rows: list[list[str]]) -> str:
    """Rows as aligned columns: the first left, the others right; a rule under the head."""
    rows = [[_printable(cell) for cell in r] for r in rows]
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]

    def line(row: list[str]) -> str:
        cells = [
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join(
        [line(rows[0]), "  ".join("-" * w for w in widths), *(line(r) for r in rows[1:])]
    )


def _printable(text: str) -> str:
    """Names come from files: nothing of them may steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _number(value: Any, digits: int = 3) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def render(report: dict[str, Any]) -> str:
    """A conversion's report: the whole, then a line a pass."""
    macs, quality = report["macs"], report["quality"] or {}
    budget = report["budget"]
    asked = "-" if budget["asked"] is None else f"{budget['asked']:.3f}"
    head = [
        ["", "dense", "routed", "ratio"],
        [
            "multiply-accumulates a token, blocks",
            f"{macs['dense'] / 1e6:.2f} M",
            f"{macs['routed'] / 1e6:.2f} M",
            f"{budget['realised']:.3f}",
        ],
    ]
    if "perplexity" in quality:
        old, new = quality["dense_perplexity"], quality["perplexity"]
        head.append(["perplexity, held-out text", f"{old:.2f}", f"{new:.2f}", f"{new / old:.3f}"])
    lines = [
        f"budget asked {asked}, realised {budget['realised']:.3f}; "
        f"FFN active {report['ffn_active']:.3f}; {_bits(report)} bits; "
        f"{report.get('bytes', 0) / 1e6:.1f} MB; {report['seconds']:.0f} s; "
        f"peak {report['peak_rss_mb'] / 1e3:.2f} GB",
        "",
        table(head),
        "",
    ]
    skip = report.get("skip") or {}
    if skip.get("blocks"):
        lines[1:1] = [
            f"skipped tokens asked {skip['asked']}, realised {skip['realised']:.3f} of the tokens "
            f"at {len(skip['blocks'])} gated blocks"
        ]
    text = report.get("calibration") or {}
    if text.get("told_again"):
        lines[1:1] = [
            f"{text['told_again']} of {text['tokens']} calibration tokens told by the model, "
            "for the text is short"
        ]
    lines.append(pass_table(report["passes"], quality))
    lines += _allocation(report)
    lines += _gates(report)
    lines += _widths(report)
    lines += _placement(report)
    return "\n".join(_printable(line) for text in lines for line in text.split("\n"))


def pass_table(passes: list[dict[str, Any]], quality: dict[str, Any] | None = None) -> str:
    """A row a pass, and ``quality`` on all held-out text."""
    encoder = any("cosine_mean" in (p["quality"] or {}) for p in passes)
    names = ["cosine_mean", "cosine_p5"] if encoder else ["perplexity", "kl", "top1_agreement"]

    def figures_of(q: dict[str, Any]) -> list[str]:
        return [_number(q.get(n), 4 if n != "perplexity" else 2) for n in names]

    rows = [["pass", "seconds", "peak MB", *names]]
    for p in passes:
        cost = [f"{p['seconds']:.1f}", f"{p['peak_rss_mb']:.0f}"]
        rows.append([p["name"], *cost, *figures_of(p["quality"] or {})])
    if quality:
        rows.append(["all held-out text", "", "", *figures_of(quality)])
    return table(rows)


def _placement(report: dict[str, Any]) -> list[str]:
    """Where the experts went, and how far from the best that can be."""
    from carve.placement.table import memory_table, scores_table, value_line

    found = {p["name"]: p["metrics"] for p in report["passes"]}.get("place")
    if not found:
        return []
    return [
        "",
        value_line(found["objective"], found["value"], found["bound"], found["gap"]),
        memory_table(found["memory"], found["load"]),
        "",
        scores_table(found["scores"]),
    ]


def _widths(report: dict[str, Any]) -> list[str]:
    """What quantizing cost beside carving, where the bits went, and how the experts fared."""
    by_name = {p["name"]: p for p in report["passes"]}
    quantized = by_name.get("quantize")
    if not quantized:
        return []
    found = quantized["metrics"]
    lines = ["", _split_loss(report["passes"])]
    chosen = by_name.get("choose_widths", {}).get("metrics")
    if chosen:
        lines.append(
            f"widths chosen: {chosen['average']:.2f} bits on average, predicted loss "
            f"{chosen['predicted']:.4f} before fitting (bound {chosen['bound']:.4f})"
        )
    rows = [
        ["routed FFN", "shared", "experts by bits", "same experts", "clean", "overlap", "margin",
         "SQNR p5", "median", "of weights", "of activations", "tokens p5", "prior p50"]
    ]  # fmt: skip
    for site, e in found["experts"].items():
        counts = {b: e["bits"].count(b) for b in sorted(set(e["bits"]))}
        rows.append(
            [
                site,
                str(found["bits"].get(site, "-")),
                ", ".join(f"{n} x {b}" for b, n in counts.items()),
                f"{found['agreement'][site]:.3f}",
                f"{found['agreement_clean'][site]:.3f}",
                f"{found['jaccard'][site]:.3f}",
                f"{found['margin'][site]:.3f}",
                f"{_percentile(e['sqnr'], 0.05):.1f}",
                f"{_percentile(e['sqnr'], 0.5):.1f}",
                f"{_percentile(e['sqnr_weights'], 0.5):.1f}",
                f"{_percentile(e['sqnr_activations'], 0.5):.1f}",
                f"{_percentile(e['tokens'], 0.05):.0f}",
                f"{_percentile(e['prior'], 0.5):.2f}",
            ]
        )
    if len(rows) > 1:
        lines += ["", table(rows)]
    lines += _realigned(found.get("alignment", {}))
    linears = {k: b for k, b in found["bits"].items() if k not in found["experts"]}
    counts = {b: sorted(linears.values()).count(b) for b in sorted(set(linears.values()))}
    lines.append(
        f"{found['effective_bits'][0]:.2f} bits a weight with scales; other weights: "
        + ", ".join(f"{n} at {b} bits" for b, n in counts.items())
    )
    return lines


def _realigned(alignment: dict[str, dict[str, float]]) -> list[str]:
    """How many routers were fitted again, and what each way of it brought; [] where none could."""
    tried = [a for a in alignment.values() if a]
    if not tried:
        return []
    kept = sum(max(a.values()) > a["former"] for a in tried)
    means = ", ".join(f"{name} {sum(a[name] for a in tried) / len(tried):.3f}" for name in tried[0])
    return [f"routers fitted again: {kept} of {len(tried)}; same experts by router, mean: {means}"]


def _split_loss(passes: list[dict[str, Any]]) -> str:
    """The loss of carving, of quantizing and of training grids, from the figures in between."""
    at = next(i for i, p in enumerate(passes) if p["name"] == "quantize")
    before = next((p["quality"] for p in reversed(passes[:at]) if p["quality"]), None)
    after = passes[at]["quality"] or {}
    tuned = next((p["quality"] for p in passes[at:] if p["name"] == "tune_grids"), None)
    named = [("carving", before), ("quantizing", after), ("training grids", tuned)]
    last = tuned or after
    if "perplexity" in last:
        name, former = "log-perplexity", math.log(last["dense_perplexity"])
        losses = [(n, math.log(q["perplexity"])) for n, q in named if q]
        kl = 0.0 if before is None else before["kl"]
        end = f"; KL {last['kl']:.4f}, {kl:.4f} before quantizing"
    elif "cosine_mean" in last:
        name, former, end = "1 - cosine", 0.0, ""
        losses = [(n, 1 - q["cosine_mean"]) for n, q in named if q]
    else:
        return "quality was not measured"
    total = losses[-1][1] - former
    parts = []
    for each, loss in losses:
        parts.append(f"{loss - former:+.4f} by {each}")
        former = loss
    return f"{name} {total:+.4f}: {', '.join(parts)}{end}"


def _percentile(values: list[float], share: float) -> float:
    """The value below which ``share`` of them lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def _bits(report: dict[str, Any]) -> str:
    """The asked width; where widths are mixed, what they come to."""
    asked = report["bits"]
    return str(asked) if isinstance(asked, int) else f"{asked} (mixed)"


def _gates(report: dict[str, Any]) -> list[str]:
    """What every gate was asked, what it does on held-out text, and what it leaves behind."""
    found = next((p["metrics"] for p in report["passes"] if p["name"] == "gate"), None)
    realised = (report.get("skip") or {}).get("blocks")
    if not found or not realised:
        return []
    rows = [["gated block", "asked", "skipped, held-out", "bridge", "error it adds"]]
    for name, share in realised.items():
        rows.append(
            [
                name,
                f"{found['asked'][name]:.3f}",
                f"{share:.3f}",
                found["bridge"][name],
                f"{found['error'][name]:.4f}",
            ]
        )
    return ["", table(rows)]


def _allocation(report: dict[str, Any]) -> list[str]:
    """How the budget was shared out, and its predicted loss beside what came of it."""
    by_name = {p["name"]: p for p in report["passes"]}
    found = by_name.get("allocate", {}).get("metrics")
    if not found:
        return []
    splits = by_name.get("carve", {}).get("metrics", {}).get("splits", {})
    rows = [["site", "active", "loss at the probe", "shared", "experts", "mean k"]]
    for site, active in found["active"].items():
        s = splits.get(site)
        widths = (
            ["dense", "-", "-"]
            if s is None
            else [
                str(s["shared_size"]),
                f"{s['num_experts']} x {s['expert_size']}",
                str(s["top_k"]),
            ]
        )
        rows.append([site, f"{active:.3f}", f"{found['sensitivity'][site]:.5f}", *widths])
    losses = [
        (p["name"], p["quality"].get("kl", 1.0 - p["quality"].get("cosine_mean", 1.0)))
        for p in report["passes"]
        if p["quality"]
        and p["name"] not in ("profile", "allocate", "carve", "choose_widths", "smooth")
    ]
    realised = ", ".join(f"{value:.4f} after {name}" for name, value in losses)
    return [
        "",
        table(rows),
        f"predicted loss {found['predicted']:.4f} (uniform widths {found['predicted_uniform']:.4f},"
        f" bound {found['bound']:.4f}); realised {realised}",
    ]


def figures(result: dict[str, Any]) -> str:
    """A flat table of an evaluation's figures."""
    rows = [["figure", "value"]]
    for key, value in result.items():
        if isinstance(value, dict):
            rows += [[f"{key}.{k}", _number(v, 4)] for k, v in value.items()]
        else:
            rows.append([key, _number(value, 4)])
    return table(rows)


def bench_table(result: dict[str, Any]) -> str:
    """Decode and prefill, dense beside routed."""
    rows = [["", "dense tok/s", "routed tok/s", "ratio"]]
    for key in ("decode", "prefill"):
        part = result[key]
        rows.append([key, f"{part['dense']:.1f}", f"{part['routed']:.1f}", f"{part['ratio']:.3f}"])
    notes = (
        f"{result['bits']} bits, {result['threads']} threads, medians of {result['repeats']} "
        f"interleaved pairs; decode after {result['context']} tokens, prefill of "
        f"{result['prefill_tokens']} tokens"
    )
    return f"{table(rows)}\n{notes}"


def gate_table(stats: dict[str, Any], width: int = 16) -> str:
    """What gates skipped: by block, then by position in spans of ``width`` tokens."""
    if not stats["blocks"]:
        return "this model has no skip gates"
    rows = [["gated block", "asked", "skipped"]]
    for name, each in stats["blocks"].items():
        rows.append([name, f"{each['asked']:.3f}", f"{each['skipped']:.3f}"])
    spans = [["positions", "skipped"]]
    values = stats["by_position"]
    for at in range(0, len(values), width):
        part = values[at : at + width]
        spans.append([f"{at} to {at + len(part) - 1}", f"{sum(part) / len(part):.3f}"])
    return (
        f"{table(rows)}\n\n{table(spans)}\n"
        f"prompt {stats['prompt']:.3f}, generated {stats['generated']:.3f}"
    )
