"""The work of every pass, counted from sizes: see `carve.estimate` for what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from carve.budget import Split
from carve.lineup import LAYER_TOKENS, Tokens
from carve.passbase import Pass
from carve.program import Program
from carve.rates import Work
from carve.sites import FFNSite

_STRENGTHS = 4
"""Ridge strengths that `carve.statistics.pulled_ridge` is given by its callers."""


@dataclass(frozen=True)
class Scene:
    """A program, the widths that are planned for it, and tokens for all of it.

    ``length``: of a row; ``rows``: of a batch.
    """

    program: Program
    splits: Mapping[str, Split | None]
    tokens: Tokens
    length: int
    rows: int = 8

    @property
    def layerwise(self) -> int:
        """Tokens that layer-wise passes see."""
        return min(self.tokens.calibration, LAYER_TOKENS)

    @property
    def vocabulary(self) -> int:
        """Columns of the logits; 0 for programs without."""
        size = self.program.config.get("vocab_size")
        decoder = self.program.kind == "decoder"
        return int(size) if decoder and isinstance(size, int) else 0

    @property
    def carved(self) -> list[tuple[FFNSite, Split]]:
        """Sites that are to be carved."""
        found = [(s, self.splits.get(s.name)) for s in self.program.sites]
        return [(s, split) for s, split in found if split is not None]

    def body(self, tokens: float) -> Work:
        """A forward pass without the head, dense FFNs."""
        p = self.program
        width = max((s.dense.up.shape[1] for s in p.sites), default=0)
        macs = sum(s.dense.macs for s in p.sites) + p.attention_macs
        scores = len(p.attention) * self.length * width
        hidden = sum(s.dense.intermediate_size for s in p.sites)
        seen = 3 * hidden + len(p.sites) * 12 * width + len(p.attention) * 4 * self.length
        runs = max(1.0, tokens / (self.rows * self.length))
        steps = runs * len(p.module.graph.nodes)
        return Work(products=tokens * (macs + scores), elements=tokens * seen, steps=steps)

    def head(self, tokens: float) -> Work:
        """The head's product."""
        width = self.program.sites[0].dense.down.shape[0]
        return Work(products=tokens * width * self.vocabulary)

    def forward(self, tokens: float) -> Work:
        """A whole forward pass."""
        return self.body(tokens) + self.head(tokens)

    def judged(self, tokens: float) -> Work:
        """A forward pass and the comparison with the dense logits."""
        return self.forward(tokens) + Work(elements=12 * tokens * self.vocabulary)


def _gram(tokens: float, width: float) -> Work:
    return Work(products=tokens * width * width)


def _ridge(width: float, outputs: float, strengths: int) -> Work:
    """Factorizations and solves of `carve.statistics.pulled_ridge`."""
    seen = min(outputs, 256) if outputs > 512 else outputs
    each = width**3 / 3 + 2 * width * width * seen
    last = width**3 / 3 + 2 * width * width * outputs
    check = Work(products=(strengths + 1) * width * width * seen)
    return Work(solving=strengths * each + last) + check


def _refit_down(site: FFNSite, split: Split, tokens: float) -> Work:
    d = site.dense.down.shape[0]
    width = site.dense.intermediate_size + split.num_experts + 1
    hidden = site.dense.macs - site.dense.down.numel()
    fit = Work(products=tokens * (hidden + width * d), elements=8 * tokens * width)
    return fit + _gram(tokens, width) + _ridge(width, d, _STRENGTHS)


def _walk(scene: Scene, tokens: float) -> Work:
    """Two copies of the text, side by side."""
    return scene.body(tokens) * 2 + Work(elements=8 * tokens * len(scene.program.sites) * 256)


def _profile(scene: Scene, p: Pass[Any]) -> Work:
    t = scene.layerwise
    work = Work()
    for s in scene.program.sites:
        hidden = s.dense.macs - s.dense.down.numel()
        m = s.dense.intermediate_size
        work += Work(products=t * (hidden + s.dense.macs), elements=40 * t * m)
    return work


def _allocate(scene: Scene, p: Pass[Any]) -> Work:
    t = min(scene.layerwise, p.config.tokens)
    work = Work()
    for s in scene.program.sites:
        m, kept = s.dense.intermediate_size, p.config.probe * s.dense.intermediate_size
        hidden = s.dense.macs - s.dense.down.numel()
        solved = kept * kept * (m - kept)
        work += Work(products=t * (hidden + s.dense.macs) + solved, solving=m**3 / 3)
        work += _gram(t, m) + scene.judged(scene.tokens.judge)
    return work


def _carve(scene: Scene, p: Pass[Any]) -> Work:
    t = min(scene.layerwise, p.config.tokens)
    work = Work()
    for s, split in scene.carved:
        hidden = s.dense.macs - s.dense.down.numel()
        n = split.num_experts * split.expert_size
        grouping = p.config.iterations * n * split.num_experts * t
        work += Work(products=t * (hidden + s.dense.macs) + grouping, elements=20 * t * n)
        # The transport problem's solver, in units of its variables.
        work += Work(elements=2000 * n * split.num_experts)
    return work


def _route(scene: Scene, p: Pass[Any]) -> Work:
    t = min(scene.layerwise, p.config.tokens)
    tries = len(getattr(p.config, "strengths", ())) + 1
    work = Work()
    for s, split in scene.carved:
        d, e = s.dense.up.shape[1], split.num_experts
        fits = _gram(t, d) + Work(products=t * d * e, solving=2 * d**3 / 3)
        outputs = s.dense.macs + s.dense.macs  # the dense result, and every expert's
        work += Work(products=t * outputs, elements=12 * t * s.dense.intermediate_size)
        work += fits * tries
    return work


def _refit(scene: Scene, p: Pass[Any]) -> Work:
    work = _walk(scene, scene.layerwise) + scene.judged(scene.tokens.judge) * 2
    for s, split in scene.carved:
        work += _refit_down(s, split, scene.layerwise)
    return work


def _distill(scene: Scene, p: Pass[Any]) -> Work:
    work = _refit(scene, p)
    steps = int(p.config.steps_for([s.dense.macs for s, _ in scene.carved]))
    for s, _ in scene.carved:
        m, weights = s.dense.intermediate_size, s.dense.macs
        batch = min(p.config.batch, scene.layerwise)
        # Forward and backward; activations; and Adam on every weight.
        elements = 30.0 * batch * m + 14.0 * weights
        work += Work(training=3.0 * batch * weights, elements=elements, steps=150) * steps
        work += Work(products=3 * scene.layerwise / 20 * weights)
    return work


def _finetune(scene: Scene, p: Pass[Any]) -> Work:
    t = float(p.config.tokens)
    weights = sum(s.dense.macs for s, _ in scene.carved)
    batches = t / (scene.rows * scene.length)
    forward = scene.forward(t)
    backward = Work(training=2 * (forward.products + t * weights), elements=4 * forward.elements)
    dense = Work(training=forward.products, elements=forward.elements, steps=forward.steps)
    loss = Work(elements=20.0 * t * scene.vocabulary)
    adam = Work(elements=14.0 * weights * batches)
    return dense * 2 + backward + loss + adam


def _quantize(scene: Scene, p: Pass[Any]) -> Work:
    t = min(scene.layerwise, p.config.tokens)
    sweeps = p.config.sweeps
    work = scene.body(t) * 2
    logits = scene.program.module.graph.output_node().args[0]
    first = logits[0] if isinstance(logits, (tuple, list)) else logits
    for unit in scene.program.linears:
        n, k = unit.weight.shape
        if unit.output in {s.output for s in scene.program.sites}:
            continue
        work += _rounding(t, n, k, sweeps)
        if unit.output is first:
            groups = min(64, 16_384 // k, n // 32)
            work += _gram(t, k) * groups + Work(elements=6 * t * n) + _roots(k) * (2 * groups)
    for s, split in scene.carved:
        d, m, e = s.dense.up.shape[1], s.dense.intermediate_size, split.num_experts
        into = s.dense.macs // s.dense.down.numel() - 1
        work += _rounding(t, into * split.shared_size, d, sweeps)
        each = _rounding(t * split.top_k / e, into * split.expert_size, d, sweeps)
        work += each * e + _rounding(t, d, m + e + 1, sweeps)
        hidden = s.dense.macs - s.dense.down.numel()
        work += Work(products=6 * t * hidden, elements=40 * t * (m + d))
        if p.config.realign:
            steps = p.config.realign_steps
            work += _gram(t, d) * 2 + _roots(d) * 2
            work += Work(products=2 * steps * t * d * e, elements=20 * steps * t * e)
    return work


def _roots(width: float) -> Work:
    return Work(products=width**3)


def _rounding(tokens: float, rows: float, width: float, sweeps: int) -> Work:
    """One matrix: moments, correction, GPTQ and coordinate descent."""
    moments = _gram(tokens, width) + Work(products=tokens * rows * width)
    descent = Work(products=(1 + sweeps) * rows * width * width)
    search = Work(elements=400 * rows * width, steps=width * (12 + 12 * sweeps))
    return moments + _ridge(width, rows, _STRENGTHS) + descent + search + _roots(width)


def _compensate(scene: Scene, p: Pass[Any]) -> Work:
    t = min(scene.layerwise, p.config.tokens)
    work = Work()
    for s, _ in scene.carved:
        work += Work(products=3 * t * s.dense.macs) + scene.judged(scene.tokens.judge)
    return work


COUNTED: dict[str, Callable[[Scene, Pass[Any]], Work]] = {
    "profile": _profile,
    "allocate": _allocate,
    "carve": _carve,
    "route_ridge": _route,
    "route_analytical": _route,
    "compensate": _compensate,
    "refit": _refit,
    "distill": _distill,
    "finetune": _finetune,
    "quantize": _quantize,
}
"""Passes whose work is counted; the others are short beside them, or searches with a limit."""


def around(scene: Scene, passes: Sequence[str]) -> dict[str, Work]:
    """What a conversion does besides its passes' own work: after each, before them and at last."""
    t = scene.tokens
    streams = min(256, t.after_pass)
    layers = scene.judged(min(1024, t.after_pass)) * (len(scene.program.sites) + 1)
    use = scene.body(min(t.final, 4 * scene.rows * scene.length))
    return {
        "calibration": scene.forward(scene.layerwise),
        "dense model": scene.judged(t.final) + scene.judged(t.judge),
        "after each pass": (scene.judged(t.after_pass) + scene.body(streams)) * len(passes),
        "held-out text": scene.judged(t.final) + use + layers,
    }
