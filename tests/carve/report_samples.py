"""A small report with something for every section, and a reader of pages. Imports no torch."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

LAYERS = ("model.layers.0.mlp", "model.layers.1.mlp")
BLOCK = "model.layers.0.self_attn"


def report() -> dict[str, Any]:
    """A decoder with gates, mixed widths, a placement and a measured speed."""

    def quality(kl: float) -> dict[str, float]:
        return {"perplexity": 20.0 + 30 * kl, "dense_perplexity": 20.0, "kl": kl,
                "top1_agreement": 1 - kl, "tokens": 1024}  # fmt: skip

    def done(name: str, kl: float, shrunk: float, metrics: dict[str, Any]) -> dict[str, Any]:
        state = {"macs": round(9_000_000 * shrunk), "bytes": 31_234_567 * shrunk,
                 "reads": 30_123_456 * shrunk,
                 "error": {n: kl * (i + 1.37) for i, n in enumerate(LAYERS)}}  # fmt: skip
        return {"name": name, "seconds": 12.34, "peak_rss_mb": 812.5, "metrics": metrics,
                "quality": quality(kl), "state": state}  # fmt: skip

    def layer(active: float, loss: float) -> dict[str, Any]:
        return {"macs": 123456.7, "active": active, "num_experts": 3, "expert_size": 32,
                "shared_size": 96, "load": [0.123, 0.456, 0.789], "load_min": 0.123,
                "load_max": 0.789, "balance": 0.876, "entropy": 0.765, "loss": loss,
                "margin": {"p5": 0.012, "p50": 0.345, "p95": 1.234},
                "experts_per_token": {"mean": 1.368, "p5": 1.0, "p95": 2.0}}  # fmt: skip

    def by_layer(a: Any, b: Any) -> dict[str, Any]:
        return dict(zip(LAYERS, (a, b), strict=True))

    experts = {
        "sqnr": [17.1, 18.2, 19.3],
        "sqnr_weights": [17.4, 18.5, 19.6],
        "sqnr_activations": [38.1, 38.2, 38.3],
        "tokens": [100, 200, 300],
        "prior": [0.1, 0.2, 0.3],
        "bits": [2, 4, 4],
    }
    passes = [
        done("allocate", 0.0, 1.0, {
            "active": by_layer(0.5625, 0.4375), "skips": {}, "skip_sensitivity": {},
            "sensitivity": by_layer(0.03456, 0.01234),
            "predicted": 0.0456, "predicted_uniform": 0.0678, "bound": 0.0454}),
        done("carve", 0.0, 1.002, {"splits": {
            n: {"shared_size": 96, "expert_size": 32, "num_experts": 3, "top_k": 1}
            for n in LAYERS}}),
        done("route_ridge", 0.0912, 0.61, {}),
        done("gate", 0.1034, 0.57, {
            "asked": {BLOCK: 0.25}, "skipped": {BLOCK: 0.251}, "bridge": {BLOCK: "low_rank"},
            "error": {BLOCK: 0.0432}, "tokens": 4000}),
        done("choose_widths", 0.1034, 0.57, {
            "widths": {}, "sensitivity": {}, "predicted": 0.0321, "bound": 0.0319,
            "average": 3.21, "bytes": 4_321_000}),
        done("quantize", 0.1153, 0.098, {
            "bits": {**by_layer(4, 8), "lm_head": 8}, "error": {"lm_head": 0.00123},
            "experts": by_layer(experts, experts), "agreement": by_layer(0.912, 0.823),
            "agreement_clean": by_layer(0.99, 0.98), "jaccard": by_layer(0.95, 0.94),
            "margin": by_layer(0.02, 0.03), "realigned": by_layer(True, False),
            "alignment": by_layer({"former": 0.903, "ridge": 0.907, "kl": 0.912},
                                  {"former": 0.823, "ridge": 0.811, "kl": 0.822}),
            "effective_bits": [4.32]}),
        done("place", 0.1153, 0.098, {
            "objective": "latency", "value": 4.567e-6, "bound": 4.321e-6, "gap": 0.0539,
            "seconds": 5.0, "memory": {"hub": [1.5e6, 2e9], "box": [2.5e6, 3e9]},
            "load": {"hub": 1.11, "box": 2.22},
            "scores": {"placed": {"latency": 4.6e-6, "affinity": 0.52},
                       "round-robin": {"latency": 6.7e-6, "affinity": 1.23}}}),
        {"name": "emit onnx-cpu", "seconds": 3.21, "peak_rss_mb": 900.0, "quality": None,
         "metrics": {"parity": {"worst_error": 0.00123, "routings": 17}}},
    ]  # fmt: skip
    return {
        "budget": {"asked": 0.6, "realised": 0.5987},
        "ffn_active": 0.4876,
        "skip": {"asked": 0.25, "realised": 0.2345, "blocks": {BLOCK: 0.2345}},
        "macs": {"dense": 9_000_000, "attention": 2_000_000, "routed": 5_400_000},
        "quality": quality(0.1178),
        "bits": "auto",
        "size": None,
        "reads": None,
        "effort": "none",
        "seconds": 98.7,
        "peak_rss_mb": 900.1,
        "passes": passes,
        "dense": {"macs": 9_000_000, "bytes": 31_234_567, "reads": 30_123_456},
        "layers": by_layer(layer(0.5512, 0.0456), layer(0.4433, 0.0123)),
        "positions": {"width": 16, "blocks": {BLOCK: [0.111, 0.333, None]}},
        "bytes": 4_567_890,
        "recipe": {"convert": {"budget": 0.6, "bits": "auto"}, "place": {"seconds": 5.0}},
        "speed": {"bits": 4, "threads": 2, "repeats": 5, "context": 50, "prefill_tokens": 256,
                  "decode": {"dense": 101.2, "routed": 145.6, "ratio": 1.4387},
                  "prefill": {"dense": 812.3, "routed": 1023.4, "ratio": 1.2599}},
    }  # fmt: skip


def manifest() -> dict[str, Any]:
    return {
        "schema": 1,
        "carve": "0.1.0",
        "kind": "decoder",
        "source": {"path": "/models/small", "sha256": "0" * 64},
        "targets": {"onnx-cpu": {"model": "onnx/model.onnx", "bits": 4}},
        "model": {
            "vocab_size": 128,
            "max_length": 64,
            "bos_token_id": 0,
            "eos_token_ids": [1],
            "num_layers": 6,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "shared_cache": True,
            "pooling": None,
            "normalize": False,
        },
    }


def placement() -> dict[str, Any]:
    return {"assignment": {n: [[0], [1], [0, 1]] for n in LAYERS}}


class Page(HTMLParser):
    """A page taken apart: its tags and attributes, its figures, and all other text.

    ``figures``: the way to each and its text, a tooltip's behind its label. ``other``: what is
    neither a figure, nor a name out of a file, nor a label of columns.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.figures: list[tuple[list[str | int], str]] = []
        self.names: list[str] = []
        self.other: list[str] = []
        self._open: list[tuple[str, dict[str, str]]] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {k: v or "" for k, v in attrs}
        self.tags.append(tag)
        self.attributes += found.items()
        if tag not in ("meta", "br"):
            self._open.append((tag, found))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(k, v or "") for k, v in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for tag, attributes in reversed(self._open):
            if "data-at" in attributes:
                text = data.rsplit(": ", 1)[-1] if tag == "title" else data
                self.figures.append((json.loads(attributes["data-at"]), text))
                return
            kind = attributes.get("class", "").split()
            if "name" in kind or "tick" in kind or tag in ("style", "title"):
                self.names.append(data)
                return
        self.other.append(data)


_UNITS = {"": 1.0, "%": 1e-2, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "B": 1.0, "kB": 1e3,
          "MB": 1e6, "GB": 1e9, "TB": 1e12, "s": 1.0, "µs": 1e-6}  # fmt: skip
_FIGURE = re.compile(r"([+-]?\d+(?:\.(\d+))?(?:e([+-]\d+))?) ?(\S*)")


def holds(root: Any, way: list[str | int], text: str) -> bool:
    """Whether a figure as it is shown is the value in ``root``, up to its last digit."""
    value = root
    for key in way:
        value = value[key]
    match = _FIGURE.fullmatch(text)
    assert match is not None, text
    unit = _UNITS[match[4]]
    last = 10.0 ** (int(match[3] or 0) - len(match[2] or ""))
    slack = max(0.501 * last, 1e-5 * abs(float(match[1])))
    return abs(float(match[1]) - value / unit) <= slack
