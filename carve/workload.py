"""The work of every pass, counted from sizes: see `carve.estimate` for what becomes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from carve.budget import Split
from carve.diagnosis import LAYER_TOKENS, STREAM_TOKENS
from carve.end_to_end import LEAST_STEPS, TrainingConfig
from carve.engine_form import FOREIGN
from carve.ffn import DenseFFN
from carve.lineup import LAYER_TOKENS as SEEN
from carve.lineup import Tokens
from carve.passbase import Pass
from carve.program import Program
from carve.quantize_units import TOGETHER, head_groups
from carve.quantizer import Method
from carve.rates import Work
from carve.retell import ROWS
from carve.sites import FFNSite, Linear
from carve.skip_cost import candidates
from carve.statistics import STRIP

TRACES = 4
"""Times that emitting runs over the graph as capturing does: `torch.onnx` captures it once more,
decomposes it, which traces it again, forward and with all its guards, and then translates it."""
_SINGLE = 0.5
"""Time of a solve in fp32 over that in fp64."""
_CALLS = 12
"""Operators that gather an expert's tokens, run it and add its results, its products apart."""
_STRENGTHS = 4
"""Ridge strengths that `carve.statistics.pulled_ridge` is given by its callers."""


@dataclass(frozen=True)
class Scene:
    """A program, the widths that are planned for it, and tokens for all of it.

    ``length``: of a row; ``rows``: of a batch; ``gated``: blocks that are to have gates;
    ``copied``: bytes of files that the artifact takes over.
    """

    program: Program
    splits: Mapping[str, Split | None]
    tokens: Tokens
    length: int
    rows: int = 8
    gated: Sequence[str] = ()
    copied: float = 0.0

    @property
    def layerwise(self) -> int:
        """Tokens that layer-wise passes see."""
        return min(self.tokens.calibration, SEEN)

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

    @property
    def others(self) -> list[Linear]:
        """Linears beside the FFNs that are to be carved."""
        inside = {t.data_ptr() for s, _ in self.carved for t in s.dense.tensors().values()}
        return [n for n in self.program.linears if n.weight.data_ptr() not in inside]

    @property
    def usual(self) -> int:
        """Positions of a batch."""
        return self.rows * self.length

    def runs(self, tokens: float) -> int:
        """Batches of so many tokens."""
        return math.ceil(tokens / self.usual)

    def body(self, tokens: float) -> Work:
        """A forward pass without the head; what stands for FFNs takes what the dense ones do."""
        return Work(positions=tokens, runs=self.runs(tokens)) + self.head(tokens) * -1.0

    def head(self, tokens: float) -> Work:
        """The head's product."""
        width = self.program.sites[0].dense.down.shape[0]
        return Work(products=tokens * width * self.vocabulary)

    def forward(self, tokens: float) -> Work:
        """A whole forward pass."""
        return self.body(tokens) + self.head(tokens)

    def told(self, tokens: float) -> Work:
        """Text that a decoder makes, a token of every row a run."""
        if self.program.kind != "decoder":
            return Work()
        return Work(positions=tokens, runs=math.ceil(tokens / ROWS))

    def judged(self, tokens: float) -> Work:
        """A forward pass and the comparison with the dense logits."""
        return self.forward(tokens) + Work(elements=28 * tokens * self.vocabulary)

    def routed(self, tokens: float) -> Work:
        """What experts add to a forward pass: each is called for itself, on tokens of its own."""
        calls = elements = 0.0
        for s, split in self.carved:
            calls += _CALLS * split.num_experts
            elements += 2 * tokens * split.top_k * s.dense.up.shape[1]
        return Work(elements=elements, steps=calls * self.runs(tokens))

    def emulated(self, tokens: float) -> Work:
        """What rounding of weights and activations adds to a forward pass, see `routed`."""
        inputs = sum(n.weight.shape[1] for n in self.others)
        weights = sum(n.weight.numel() for n in self.others)
        products = len(self.others)
        for s, split in self.carved:
            into = _entries(s.dense)
            wide = into * s.dense.up.shape[1]
            inputs += wide + split.shared_size + split.top_k * (wide + split.expert_size)
            weights += s.dense.macs
            products += (into + 1) * (1 + split.num_experts)
        runs = self.runs(tokens)
        each = 8 * tokens * inputs + 4 * runs * weights
        return Work(elements=each, steps=20 * runs * products)


def _entries(dense: DenseFFN) -> int:
    """How many matrices read an FFN's inputs: up, and gate where there is one."""
    return 1 if dense.gate is None else 2


def _gram(tokens: float, width: float) -> Work:
    return Work(products=tokens * width * width)


def _mirrored(tokens: float, width: float) -> Work:
    """A Gram matrix by `carve.statistics.add_gram`: little more than half of the products."""
    return Work(products=tokens * width * min(width, (width + STRIP) / 2))


def _ridge(width: float, outputs: float, strengths: int) -> Work:
    """Factorizations and solves of `carve.statistics.pulled_ridge`, which are in fp32."""
    seen = min(outputs, 256) if outputs > 512 else outputs
    each = width**3 / 3 + 2 * width * width * seen
    last = width**3 / 3 + 2 * width * width * outputs
    check = Work(products=(strengths + 1) * width * width * seen)
    return Work(solving=_SINGLE * (strengths * each + last)) + check


def _refit_down(site: FFNSite, split: Split, tokens: float) -> Work:
    d = site.dense.down.shape[0]
    width = site.dense.intermediate_size + split.num_experts + 1
    hidden = site.dense.macs - site.dense.down.numel()
    fit = Work(products=tokens * (hidden + width * d), elements=8 * tokens * width)
    return fit + _mirrored(tokens, width) + _ridge(width, d, _STRENGTHS)


def _walk(scene: Scene, tokens: float) -> Work:
    """Two copies of the text, side by side, one of them through experts."""
    width = scene.program.sites[0].dense.down.shape[0]
    both = scene.body(tokens) * 2 + scene.routed(tokens)
    return both + Work(elements=8 * tokens * len(scene.program.sites) * width)


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
    if p.config.skip:
        blocks = len(candidates(scene.program))
        work += _fit_gates(scene, t, blocks) + scene.judged(scene.tokens.judge) * blocks
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
        # Results of every expert are written, squared and summed.
        work += Work(elements=5 * t * e * d)
        work += fits * tries
    return work


def _refit(scene: Scene, p: Pass[Any]) -> Work:
    judge = scene.tokens.judge
    work = _walk(scene, scene.layerwise) + (scene.judged(judge) + scene.routed(judge)) * 2
    for s, split in scene.carved:
        work += _refit_down(s, split, scene.layerwise)
    return work


def _distill(scene: Scene, p: Pass[Any]) -> Work:
    work = _refit(scene, p)
    steps = int(p.config.steps_for([s.dense.macs for s, _ in scene.carved]))
    batch = min(p.config.batch, scene.layerwise)
    for s, _ in scene.carved:
        weights = s.dense.macs
        work += Work(training=batch * weights, updates=weights) * steps
        work += Work(products=3 * scene.layerwise / 20 * weights)
    return work


def _finetune(scene: Scene, p: Pass[Any]) -> Work:
    t, steps, _ = training(scene, p.config)
    weights = sum(s.dense.macs for s, _ in scene.carved)
    loss = Work(elements=20.0 * t * scene.vocabulary)
    # The dense program runs beside; what is not trained passes gradients on all the same.
    work = Work(training=t * scene.program.num_parameters, updates=weights * steps)
    if not p.config.rank:
        work += Work(products=sum(_orthogonal(s.dense) for s, _ in scene.carved)) * steps
    # What comes again is drawn anew after one run over it.
    again = max(0.0, min(scene.tokens.calibration, t - scene.tokens.calibration))
    drawn = again if p.config.redrawn and scene.program.kind == "decoder" else 0.0
    loss += Work(elements=10.0 * drawn * scene.vocabulary)
    return scene.forward(t + drawn) + work + loss


def training(scene: Scene, config: TrainingConfig) -> tuple[float, float, int]:
    """Tokens that a pass which trains the whole program sees, its steps, and tokens told for it."""
    if not config.serves(scene.program):
        return 0.0, 0.0, 0
    given = scene.tokens.calibration
    told = config.told(scene.program, given)
    t = config.tokens_for(scene.program.num_parameters, given + told)
    steps = t / min(config.batch, scene.usual)
    return (t, steps, told) if steps >= LEAST_STEPS else (0.0, 0.0, told)


def _tune_grids(scene: Scene, p: Pass[Any]) -> Work:
    weights = scene.program.num_parameters
    t, steps, told = training(scene, p.config)
    # The dense program's way forward, and this one's, which costs twice as much backwards; its
    # weights are made of levels and scales at every step, and both move.
    runs = scene.forward(t) * 4 + (scene.routed(t) + scene.emulated(t)) * 2
    made = Work(elements=20.0 * t * scene.vocabulary + 12.0 * steps * weights)
    return runs + made + Work(updates=weights * steps) + scene.told(told)


def _orthogonal(dense: DenseFFN) -> float:
    """Multiply-accumulates of Muon's five Newton-Schulz rounds for the matrices of one FFN."""
    found = 0.0
    for w in (dense.gate, dense.up, dense.down):
        if w is not None:
            least, most = sorted(w.shape)
            found += 5 * (2 * least * least * most + least**3)
    return found


def _quantize(scene: Scene, p: Pass[Any]) -> Work:
    from carve.passes.quantize import METHODS

    method = METHODS[p.config.method].method
    if p.config.method == "carve":
        method = replace(method, sweeps=p.config.sweeps)
    t = min(scene.layerwise, p.config.tokens)
    work = (scene.body(t) + scene.routed(t)) * 2 + scene.emulated(t)
    logits = scene.program.module.graph.output_node().args[0]
    first = logits[0] if isinstance(logits, (tuple, list)) else logits
    for unit in scene.others:
        n, k = unit.weight.shape
        groups = head_groups(n, k) if unit.output is first and method.sweeps else 1
        work += _fitted(t, n, k) + _rounding(n, k, method, max(1, groups))
        if groups > 1:
            work += _mirrored(t, k) * groups + Work(elements=6 * t * n)
    for s, split in scene.carved:
        d, m, e = s.dense.up.shape[1], s.dense.intermediate_size, split.num_experts
        into = _entries(s.dense)
        # In-projections are corrected by what the inputs were: a Gram matrix and a like product.
        work += _mirrored(t, d) + Work(products=t * d * d) + _corrected(d, into * split.shared_size)
        work += _rounding(into * split.shared_size, d, method)
        taken = t * split.top_k
        work += _mirrored(taken, d) + Work(products=taken * d * d)
        work += _corrected(d, into * split.expert_size) * e
        goes = math.ceil(e / max(1, TOGETHER // d**2))
        work += _rounding(into * split.expert_size * e, d, method, e, goes)
        work += _fitted(t, d, m + e + 1) + _rounding(d, m, method)
        hidden = s.dense.macs - s.dense.down.numel()
        work += Work(products=6 * t * hidden, elements=30 * t * (m + d))
        # Every expert is looked at with both roundings and with each.
        work += Work(products=5 * 512 * e * s.dense.macs / m * split.expert_size, steps=200 * e)
        if p.config.realign:
            steps = p.config.realign_steps
            work += _gram(t, d) + Work(products=t * d * e) + _ridge(d, e, _STRENGTHS)
            work += Work(products=2 * steps * t * d * e, elements=20 * steps * t * e)
    return work


def _fitted(tokens: float, rows: float, width: float) -> Work:
    """Moments of a matrix's inputs and targets, and its closed form."""
    moments = _mirrored(tokens, width) + Work(products=tokens * rows * width)
    return moments + Work(elements=10 * tokens * width) + _ridge(width, rows, _STRENGTHS)


def _corrected(width: float, rows: float) -> Work:
    """One solve of `carve.statistics.pulled_towards`, and the products around it."""
    solving = width**3 / 3 + 2 * width * width * rows
    return Work(solving=_SINGLE * solving, products=3 * width * width * rows)


def _rounding(
    rows: float, width: float, method: Method, groups: int = 1, goes: int | None = None
) -> Work:
    """`carve.quantize_units.round_matrices`, for ``groups`` of the rows apart in so many goes."""
    sweeps = method.sweeps_of(int(width))
    visits = (1 if method.gptq else 0) + sweeps
    # Errors by the Gram matrix, of both ways to round, and what panels do to one another.
    products = (2 + sweeps) * rows * width * width + width**3 * groups
    columns = width * visits * (groups if goes is None else goes)
    rounding = Work(columns=columns, rounding=rows * width * visits)
    return rounding + Work(products=products, elements=40 * rows * width, steps=300 * groups)


def _compensate(scene: Scene, p: Pass[Any]) -> Work:
    t = min(scene.layerwise, p.config.tokens)
    work = Work()
    for s, _ in scene.carved:
        work += Work(products=3 * t * s.dense.macs) + scene.judged(scene.tokens.judge)
    return work


def _fit_gates(scene: Scene, tokens: float, blocks: int) -> Work:
    """A walk over blocks, with bridge and scores of each fitted."""
    d = scene.program.sites[0].dense.up.shape[1]
    fit = _gram(tokens, d) * 4 + Work(solving=4 * d**3, elements=40 * tokens * d)
    return scene.body(tokens) * 2 + fit * blocks


def _gate(scene: Scene, p: Pass[Any]) -> Work:
    return _fit_gates(scene, min(scene.layerwise, p.config.tokens), len(scene.gated))


def _place_gates(scene: Scene, p: Pass[Any]) -> Work:
    if p.config.blocks == "deep":
        return Work()
    blocks = len(candidates(scene.program))
    work = _fit_gates(scene, min(scene.layerwise, p.config.tokens), blocks)
    return work + scene.judged(scene.tokens.judge) * blocks


def _choose_widths(scene: Scene, p: Pass[Any]) -> Work:
    program = scene.program
    tokens = p.config.tokens or min(2_048.0, max(128.0, 2e10 / program.num_parameters))
    units = len({n.input for n in scene.others}) + 2 * len(scene.carved)
    return scene.judged(tokens) * (1 + units * len(p.config.probes))


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
    "tune_grids": _tune_grids,
    "gate": _gate,
    "place_gates": _place_gates,
    "choose_widths": _choose_widths,
}
"""Passes whose work is counted; the others are short beside them, or searches with a limit."""


def around(scene: Scene, passes: Sequence[str]) -> dict[str, Work]:
    """What a conversion does besides its passes' own work: after each, before them and at last."""
    t = scene.tokens
    streams = min(STREAM_TOKENS, t.after_pass)
    layers = min(LAYER_TOKENS, t.after_pass) * (len(scene.program.sites) + 1)
    use = min(t.final, 4 * scene.usual)
    rounded = len(passes) - passes.index("quantize") if "quantize" in passes else 0
    carved = len(passes) - passes.index("carve") if "carve" in passes else 0
    last = scene.judged(t.final) + scene.body(use) + scene.judged(layers)
    after, whole = t.after_pass + streams, t.final + use + layers
    return {
        "calibration": scene.forward(scene.layerwise) + scene.told(scene.tokens.told),
        "dense model": scene.judged(t.final) + scene.judged(t.judge),
        "after each pass": (scene.judged(t.after_pass) + scene.body(streams)) * len(passes)
        + scene.routed(after) * carved
        + scene.emulated(after) * rounded,
        "held-out text": last
        + scene.routed(whole) * bool(carved)
        + scene.emulated(whole) * bool(rounded),
    }


def emitting(scene: Scene, target: str) -> Work:
    """Translation of the graph, its weights, and the comparison with the program."""
    weights = scene.program.num_parameters
    work = Work(traces=0 if target in FOREIGN else TRACES, elements=20.0 * weights)
    work += scene.forward(48) * 6 + scene.emulated(48) * 6
    if target == "onnx-split":
        # Which experts each layer takes, and predictors of it.
        d = scene.program.sites[0].dense.up.shape[1]
        work += scene.body(scene.tokens.calibration + scene.tokens.final)
        work += (_gram(scene.tokens.calibration, d) + Work(solving=d**3)) * len(scene.carved)
    return work
