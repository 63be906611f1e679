"""What was gained and what was lost in a few figures, from a report alone."""

from __future__ import annotations

from typing import Any

from carve.report.fields import Field

NOTICED = 5e-5
"""A change of loss that is worth a word."""


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """Changes from the dense model to the artifact, and where quality went.

    ``measure``: of loss, ``KL`` to the dense model, ``1 - cosine``, or None where none was taken.
    ``loss``: its value on all held-out text. ``passes``: by pass in order
    its increase through the pass, on the text that is run after every pass. ``worst_pass`` and
    ``worst_layer``: the largest increase, and the layer whose dense FFN would give most back
    (`carve.diagnosis.Diagnosis.layers`). ``ratio``: routed over dense, of ``macs`` (held-out text),
    ``bytes`` (the artifact's model over fp32 weights), ``reads`` and ``perplexity``.

    Raises:
        UserError: the report is of another shape.
    """
    r = Field(report)
    passes = r["passes"].each()
    measure = _measure(r)
    before = 0.0
    changes = []
    for p in passes:
        after = _loss(p["quality"], measure)
        if after is not None:
            changes.append({"name": p["name"].text(), "change": after - before})
            before = after
    layers = [
        {"name": name, "loss": loss}
        for name, each in r["layers"].items()
        if (loss := each["loss"].number()) is not None
    ]
    states = [p["state"] for p in passes if p["state"]]
    reads = states[-1]["reads"] if states else Field(None)
    quality = r["quality"]
    return {
        "measure": measure,
        "loss": _loss(quality, measure),
        "passes": changes,
        "worst_pass": _worst(changes, "change"),
        "worst_layer": _worst(layers, "loss"),
        "ratio": {
            "macs": r["budget"]["realised"].number(),
            "bytes": _ratio(r["bytes"], r["dense"]["bytes"]),
            "reads": _ratio(reads, r["dense"]["reads"]),
            "perplexity": _ratio(quality["perplexity"], quality["dense_perplexity"]),
        },
        "macs": _product(r["budget"]["realised"], r["macs"]["dense"]),
        "reads": reads.number(),
    }


def _worst(items: list[dict[str, Any]], key: str) -> dict[str, Any] | None:
    found = max(items, key=lambda i: float(i[key]), default=None)
    return found if found is not None and found[key] > NOTICED else None


def _measure(r: Field) -> str | None:
    for quality in (r["quality"], *(p["quality"] for p in r["passes"].each())):
        if quality["kl"].number() is not None:
            return "KL"
        if quality["cosine_mean"].number() is not None:
            return "1 - cosine"
    return None


def _loss(quality: Field, measure: str | None) -> float | None:
    if measure == "KL":
        return quality["kl"].number()
    cosine = quality["cosine_mean"].number()
    return None if cosine is None else 1.0 - cosine


def _ratio(new: Field, old: Field) -> float | None:
    a, b = new.number(), old.number()
    return None if a is None or not b else a / b


def _product(a: Field, b: Field) -> float | None:
    x, y = a.number(), b.number()
    return None if x is None or y is None else x * y
