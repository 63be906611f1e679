"""Quantize: every weight on a block-wise grid, fitted to the arithmetic of what will run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from carve.arithmetic import Precision, grids_of, rounded
from carve.budget import Widths
from carve.calibration import limit_batches
from carve.codec import settled
from carve.config import AT_LEAST_ONE
from carve.dialect import hidden, linear_rule
from carve.errors import UserError
from carve.ffn import RoutedFFN
from carve.grid import BLOCK, TABLE_BITS, Grid, in_blocks, large_table
from carve.passbase import Context, ContractError, Pass
from carve.program import Program
from carve.quantize_units import folds, round_ffn, round_linear, sorted_neurons
from carve.quantizer import GPTQ, RTN, Method
from carve.realign import agreement, realigned
from carve.rounding import Rounding
from carve.sites import FFNSite, Linear, Lookup
from carve.storable import storable
from carve.twin import UnitLesson, twin_walk

_PLAIN = Rounding(
    GPTQ, correct=False, prior=0.0, fall_back=False, sort=False, head_groups=False, shrink=0.0
)
METHODS = {
    "carve": Rounding(),
    "gptq": _PLAIN,
    "gptq-all": replace(_PLAIN, prior=float("inf")),
    "gptq-fallback": replace(_PLAIN, fall_back=True),
    "eaquant": replace(_PLAIN, balance=2.0),
    "rtn": replace(_PLAIN, method=RTN),
}


@dataclass(frozen=True)
class QuantizeConfig:
    """Settings of `Quantize`.

    ``method``: ``carve``, or to compare with ``rtn`` (round-to-nearest), ``gptq`` (each expert by
    its own tokens), ``gptq-all`` (every token through every expert), ``gptq-fallback``
    (round-to-nearest where that is better) or ``eaquant`` (balanced tokens; with the smoothing of
    `carve.passes.Smooth` before). ``tokens``: calibration tokens. ``prior``: pseudo-tokens,
    as a share of the input width, by which an expert leans on what all tokens show. ``sweeps``:
    rounds of coordinate descent on levels and scales. ``realign``: fit the routers again
    to what quantized inputs they see, where held-out agreement gets better; ``realign_steps``: of
    the fit by divergence that follows the ridge regression, 0 for none. ``block``: weights a scale,
    32, or 128 where all widths of a unit are multiples of it (4.25 bits a weight, not 5). ``rest``:
    keep where each weight lay within its level, which `carve.passes.TuneGrids` goes on from.
    """

    RANGES: ClassVar = {"tokens": AT_LEAST_ONE}

    method: str = "carve"
    tokens: int = 24_576
    prior: float = 0.5
    sweeps: int = 4
    realign: bool = True
    realign_steps: int = 30
    block: int = BLOCK
    rest: bool = False


@storable
@dataclass(frozen=True)
class ExpertRecord:
    """Signal to noise in dB of each expert's result, rounded weights and activations apart.

    ``tokens``: that reached it in calibration; ``prior``: share of the other tokens in its Gram
    matrix; ``bits``: its width.
    """

    sqnr: list[float] = field(default_factory=list)
    sqnr_weights: list[float] = field(default_factory=list)
    sqnr_activations: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    prior: list[float] = field(default_factory=list)
    bits: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class QuantizeMetrics:
    """What quantizing did, on calibration tokens held out from the fit.

    ``bits`` of each linear and shared expert; ``error``: relative squared error of each unit's
    result; by routed FFN: ``experts``; ``agreement``: share of tokens whose set of experts is the
    one before quantization, ``agreement_clean`` with the router given the inputs as they were;
    ``jaccard``: mean overlap of the sets; ``margin``: median distance of a flipped score from where
    it decides, over the scores' own spread, ``margin_clean`` the same for the inputs as they were;
    ``realigned``: whether the router was fitted again; ``alignment``: agreement with the router as
    it was (``former``), after ``ridge`` and after ``kl``, where they were tried.
    ``effective_bits``: size of levels and scales over the number of weights.
    """

    bits: dict[str, int] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    experts: dict[str, ExpertRecord] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    agreement_clean: dict[str, float] = field(default_factory=dict)
    jaccard: dict[str, float] = field(default_factory=dict)
    margin: dict[str, float] = field(default_factory=dict)
    margin_clean: dict[str, float] = field(default_factory=dict)
    realigned: dict[str, bool] = field(default_factory=dict)
    alignment: dict[str, dict[str, float]] = field(default_factory=dict)
    effective_bits: list[float] = field(default_factory=list)


class Quantize(Pass[QuantizeConfig]):
    """Round weight after weight, each on the inputs that the rounded ones before it leave.

    Two copies of the calibration text run side by side (`carve.twin`), one through the program as
    it was, one through the rounded program in the arithmetic of the target (`carve.arithmetic`):
    block-wise int8 activations and signed scales. How one unit is rounded: `carve.quantize_units`
    and `carve.quantizer`. Routers stay fp32 and are realigned (`carve.realign`), accepted only if
    the set of experts is the former one on more held-out tokens. Tables of embeddings are rounded
    to the nearest of 8 bits.

    Linears whose rows are no whole blocks stay as they are, and so do routed FFNs with any such
    width, which are rounded to the nearest of 8 bits where they can be as they are written.
    """

    name = "quantize"

    def requires(self, program: Program, context: Context) -> None:
        """Needs widths, and a program that is not quantized yet."""
        if context.bits >= 16 and not context.widths:
            raise ContractError("contract", f"{self.name} needs a width below 16 bits")
        if self.config.method not in METHODS:
            raise UserError(
                "config",
                f"quantize.method {self.config.method!r} is not one of {', '.join(METHODS)}",
            )
        if self.config.block not in (BLOCK, 128):
            raise UserError("config", f"quantize.block {self.config.block} is neither 32 nor 128")

    def call(self, program: Program, context: Context) -> QuantizeMetrics:
        """Quantize every linear and routed FFN."""
        c = self.config
        how = METHODS[c.method]
        if c.method == "carve":
            how = replace(how, prior=c.prior, method=Method(sweeps=c.sweeps))
        how = replace(how, rest=c.rest)
        metrics = QuantizeMetrics()
        head = program.module.graph.output_node().args[0]
        logits = head[0] if isinstance(head, (tuple, list)) else head
        batches = limit_batches(context.batches, c.tokens)
        walk = twin_walk(
            program,
            batches,
            lambda: Precision(program, 16).rule(),
            lambda units: context.progress(units, self.name),
        )
        with torch.no_grad():
            for lookup in program.lookups:
                self._lookup(program, lookup, metrics)
            try:
                lesson = next(walk)
                while True:
                    unit = lesson.unit
                    if isinstance(unit, Linear):
                        is_head = unit.output is logits
                        unit = self._linear(program, unit, lesson, context, how, metrics, is_head)
                    else:
                        self._ffn(program, unit, lesson, context, how, metrics)
                    del lesson  # or it stands beside the next one
                    lesson = walk.send(unit)
            except StopIteration:
                pass
        metrics.effective_bits.append(effective_bits(program))
        return metrics

    def _block(self, *widths: int) -> int:
        """The asked block where every width is a multiple of it, else the smallest."""
        asked = self.config.block
        return asked if in_blocks(*widths, block=asked) else BLOCK

    def _lookup(self, program: Program, lookup: Lookup, metrics: QuantizeMetrics) -> None:
        if not large_table(lookup.weight):
            return
        grid = Grid.nearest(lookup.weight, TABLE_BITS)
        # fp32, for look-ups give the stored values as they are.
        program.set_lookup(lookup, grid.round(lookup.weight), grid)
        metrics.bits[lookup.name] = TABLE_BITS

    def _linear(
        self,
        program: Program,
        unit: Linear,
        lesson: UnitLesson,
        context: Context,
        how: Rounding,
        metrics: QuantizeMetrics,
        is_head: bool,
    ) -> Linear:
        if not in_blocks(unit.weight.shape[1]):
            return unit
        bits = context.widths_of(unit).shared
        how = replace(how, block=self._block(unit.weight.shape[1]))

        def make() -> tuple[Tensor, Tensor | None, Grid, float]:
            weight, bias, grid = round_linear(lesson, bits, how, is_head=is_head)
            held = folds(len(lesson.x))[1]
            y = rounded(lesson.x[held], grid.block) @ grid.round(weight).T
            error = _relative(y if bias is None else y + bias, lesson.target[held])
            return weight, bias, grid, error

        # Several products may stand in one module.
        key = f"{unit.name} {unit.output.name}"
        weight, bias, grid, error = context.partial.once(key, make)
        metrics.bits[unit.name], metrics.error[unit.name] = bits, error
        return program.set_linear(unit, weight, bias, grid)

    def _ffn(
        self,
        program: Program,
        site: FFNSite,
        lesson: UnitLesson,
        context: Context,
        how: Rounding,
        metrics: QuantizeMetrics,
    ) -> None:
        before = site.routed
        assert before is not None
        sizes = (lesson.x.shape[1], before.shared_size, before.expert_size)
        if not in_blocks(*sizes):
            return
        how = replace(how, block=self._block(*sizes))
        widths = context.widths_of(site)

        def make() -> tuple[RoutedFFN, dict[str, Any]]:
            return self._rounded(program, site, lesson, widths, how)

        new, found = context.partial.once(site.name, make)
        if site.routed is not new:
            program.set_routed(site, new)
        site.tuned = True
        metrics.bits[site.name] = widths.shared
        for name, value in found.items():
            getattr(metrics, name)[site.name] = value

    def _rounded(
        self, program: Program, site: FFNSite, lesson: UnitLesson, widths: Widths, how: Rounding
    ) -> tuple[RoutedFFN, dict[str, Any]]:
        """The FFN on its grids, put in place, and by field of `QuantizeMetrics` how it fares."""
        before = site.routed
        assert before is not None
        held = folds(len(lesson.x))[1]
        routed, found = before, dict[str, Any]()
        if self.config.realign and self.config.method == "carve":
            fit = realigned(before, lesson.x, lesson.reference, steps=self.config.realign_steps)
            routed = fit.routed
            found["realigned"], found["alignment"] = routed is not before, fit.agreement
        if how.sort:
            routed = sorted_neurons(routed, lesson.x)
        # Weights on grids are known by where they lie, so they may not move any more.
        new = settled(round_ffn(routed, lesson, widths.shared, widths.experts, how))
        program.set_routed(site, new)
        x, former = lesson.x[held], lesson.reference[held]
        want = before.chosen(former)
        got = new.chosen(x)
        either = (got | want).sum(1)
        shared = torch.where(either > 0, (got & want).sum(1) / either.clamp_min(1), 1.0)
        found["agreement"] = agreement(got, want)
        clean = new.chosen(former)
        found["agreement_clean"] = agreement(clean, want)
        found["margin_clean"] = _margin(before, former, clean ^ want)
        found["jaccard"] = float(shared.mean())
        found["margin"] = _margin(before, former, got ^ want)
        found["experts"] = _record(routed, new, lesson.x, new.chosen(lesson.x), how, widths.experts)
        with linear_rule(Precision(program, 16).rule()):
            found["error"] = _relative(new(x), lesson.target[held])
        return new, found


def _relative(y: Tensor, target: Tensor) -> float:
    return float((y - target).square().sum() / target.square().sum().clamp_min(1e-30))


def _margin(routed: RoutedFFN, x: Tensor, flipped: Tensor) -> float:
    scores = routed.logits(x)
    if not flipped.any():
        return 0.0
    bar = scores.topk(routed.top_k, 1).values[:, -1:]
    away = (
        torch.minimum(scores.abs(), (scores - bar).abs())
        if routed.dynamic
        else (scores - bar).abs()
    )
    return float(away[flipped].median() / scores.std().clamp_min(1e-12))


def _expert(r: RoutedFFN, e: int, x: Tensor, see: Callable[[Tensor], Tensor]) -> Tensor:
    """An expert's result ``[T, d]`` with activations as ``see`` gives them."""
    gate = None if r.expert_gate is None else r.expert_gate[e].float()
    gate_bias = None if r.expert_gate_bias is None else r.expert_gate_bias[e]
    up_bias = None if r.expert_up_bias is None else r.expert_up_bias[e]
    h = hidden(see(x), gate, gate_bias, r.expert_up[e].float(), up_bias, r.activation)
    return see(h) @ r.expert_down[e].float().T


def _as_is(x: Tensor) -> Tensor:
    return x


def _decibel(y: Tensor, want: Tensor) -> float:
    ratio = want.square().sum() / (y - want).square().sum().clamp_min(1e-30)
    return float(10 * ratio.clamp_min(1e-12).log10())


def _record(
    before: RoutedFFN,
    after: RoutedFFN,
    x: Tensor,
    chosen: Tensor,
    how: Rounding,
    bits: Sequence[int],
) -> ExpertRecord:
    """Signal to noise of each expert: both roundings, weights alone, activations alone."""
    record = ExpertRecord()
    see = partial(rounded, block=how.block)
    pseudo = how.prior * x.shape[1]
    for e in range(after.num_experts):
        rows = chosen[:, e].nonzero().squeeze(1)
        seen = x[rows[:512]] if len(rows) else x[:64]
        want = _expert(before, e, seen, _as_is)
        record.sqnr.append(_decibel(_expert(after, e, seen, see), want))
        record.sqnr_weights.append(_decibel(_expert(after, e, seen, _as_is), want))
        record.sqnr_activations.append(_decibel(_expert(before, e, seen, see), want))
        record.tokens.append(len(rows))
        own = len(rows) + pseudo
        record.prior.append(1.0 if own in (0.0, float("inf")) else pseudo / own)
        record.bits.append(bits[e])
    return record


def effective_bits(program: Program) -> float:
    """Bits a weight, scales counted, over all quantized weights."""
    size = weights = 0
    for grid in grids_of(program):
        size += grid.bytes
        weights += grid.scale.numel() * grid.block
    return 8 * size / max(1, weights)
