"""Choose widths: how many bits each weight gets, by measurement and an integer programme."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from carve.allocate import Option, allocate
from carve.budget import Widths
from carve.calibration import limit_batches
from carve.dialect import LinearRule, linear_rule, stored_product
from carve.evaluate import Evaluator
from carve.ffn import RoutedFFN
from carve.grid import BLOCK, WIDTHS, Grid, in_blocks, large_table
from carve.passbase import Context, ContractError, Pass
from carve.program import Program
from carve.sites import FFNSite, Linear

BYTES, BITS, READS = "bytes", "bits a weight", "bytes read a token"
"""The resources of `Context.limits`."""


@dataclass(frozen=True)
class ChooseWidthsConfig:
    """Settings of `ChooseWidths`.

    ``tokens``: calibration tokens on which a unit's effect on the whole program is measured; by
    default from the model's size. ``probes``: widths at which it is measured, the others follow
    from the squared error of the weights. ``pairs``: offer two widths among a layer's experts.
    """

    tokens: int = 0
    probes: tuple[int, ...] = (2, 4)
    pairs: bool = True


@dataclass(frozen=True)
class ChooseWidthsMetrics:
    """``widths``: bits by unit; of a routed FFN ``[shared, number of experts by width]``.

    ``sensitivity``: the program's loss (KL, or 1 - cosine) with the unit alone at the lowest probe;
    ``predicted``: sum over the choice, before anything is fitted; ``bound``: the solver's lower
    bound on it; ``average``: bits a weight; ``bytes``: levels and scales.
    """

    widths: dict[str, list[int]]
    sensitivity: dict[str, float]
    predicted: float
    bound: float
    average: float
    bytes: int


@dataclass(frozen=True)
class _Unit:
    """Weights that share a width: matrices ``[N, K]``, and how much of them a token reads."""

    names: tuple[str, ...]
    weights: tuple[Tensor, ...]
    share: float = 1.0
    widths: tuple[int, ...] = WIDTHS

    @property
    def numel(self) -> int:
        return sum(w.numel() for w in self.weights)

    def cost(self, bits: int) -> dict[str, float]:
        size = self.numel * (bits / 8 + 4 / BLOCK)
        return {BYTES: size, BITS: float(bits * self.numel), READS: size * self.share}


class ChooseWidths(Pass[ChooseWidthsConfig]):
    """``min sum_u D_u(b_u)`` over the widths ``b_u`` of all units, within size and reads.

    ``D_u(b)`` is the loss of the whole program against itself with unit ``u`` alone rounded to
    ``b`` bits (round-to-nearest; fitting lowers all by a similar factor), measured at the probes.
    Units: the linears that share an input (they are one product), an output projection, the head,
    an embedding, a shared expert, and each expert of a layer, whose parts of the layer's loss are
    those of the squared error of their weights times the tokens they see. A layer's experts have
    equal sizes and at most two widths (a kernel runs one), so with ``n`` of them at the higher one,
    the ``n`` that gain most are the best: an option for every pair and ``n`` is exact. Sources:
    GEMQ and MxMoE for the programme, QuantMoE-Bench (arXiv 2406.08155) for what deserves bits.
    """

    name = "choose_widths"

    def requires(self, program: Program, context: Context) -> None:
        """Needs a limit."""
        if not context.limits:
            raise ContractError("contract", f"{self.name} needs a limit on bits, size or reads")

    def call(self, program: Program, context: Context) -> ChooseWidthsMetrics:
        """Measure, solve, and set the context's widths."""
        parameters = sum(p.numel() for p in program.module.parameters())
        tokens = self.config.tokens or int(min(2_048, max(128, 2e10 / parameters)))
        judge = Evaluator(program, limit_batches(context.batches, tokens)).loss
        units, layers = units_to_choose(program, context)
        total = sum(u.numel for u in (*units, *(u for _, e in layers for u in e)))
        options: dict[str, list[Option]] = {}
        sensitivity: dict[str, float] = {}

        def losses(weights: Sequence[Tensor], name: str) -> dict[int, float]:
            found = {}
            for bits in self.config.probes:
                with linear_rule(_rounding(weights, bits)):
                    found[bits] = max(0.0, judge(program))
            sensitivity[name] = found[min(found)]
            known = max(found)
            for bits in WIDTHS:
                if bits not in found:
                    found[bits] = found[known] * _error(weights, bits) / _error(weights, known)
            return found

        for unit in context.progress(units, self.name):
            by_width = losses(unit.weights, unit.names[0])
            options[unit.names[0]] = [Option(by_width[b], unit.cost(b), b) for b in unit.widths]
        for site, experts in context.progress(layers, f"{self.name} experts"):
            by_width = losses([w for u in experts for w in u.weights], f"{site.name} experts")
            options[f"{site.name} experts"] = self._layer(experts, by_width)
        fixed = {BYTES: _rest(program, total), BITS: 0.0, READS: 0.0}
        limits = {k: v * total if k == BITS else v - fixed[k] for k, v in context.limits.items()}
        found = allocate(options, limits)
        shown: dict[str, list[int]] = {}
        for unit in units:
            bits = found.chosen[unit.names[0]].value
            for name in unit.names:
                context.widths[name] = Widths(bits)
                shown[name] = [bits]
        for site, _ in layers:
            each = found.chosen[f"{site.name} experts"].value
            shared = context.widths.get(site.name, Widths(max(each))).shared
            context.widths[site.name] = Widths(shared, tuple(each))
            shown[site.name] = [shared, *(each.count(b) for b in WIDTHS)]
        cost = [o.cost for o in found.chosen.values()]
        return ChooseWidthsMetrics(
            shown,
            sensitivity,
            found.loss,
            found.bound,
            sum(c[BITS] for c in cost) / total,
            round(sum(c[BYTES] for c in cost)),
        )

    def _layer(self, experts: Sequence[_Unit], by_width: dict[int, float]) -> list[Option]:
        """Every choice of at most two widths that no other beats."""
        parts = {b: torch.tensor([u.share * _error(u.weights, b) for u in experts]) for b in WIDTHS}
        loss = {b: by_width[b] * p / p.sum().clamp_min(1e-30) for b, p in parts.items()}
        options = []
        for low in WIDTHS:
            for high in WIDTHS:
                if high < low or (high > low and not self.config.pairs):
                    continue
                gain = (loss[low] - loss[high]).argsort(descending=True)
                for n in range(1, len(experts)) if high > low else (0,):
                    widths = torch.full((len(experts),), low)
                    widths[gain[:n]] = high
                    value = [int(b) for b in widths]
                    costs = [u.cost(b) for u, b in zip(experts, value, strict=True)]
                    options.append(
                        Option(
                            sum(float(loss[b][e]) for e, b in enumerate(value)),
                            {k: sum(c[k] for c in costs) for k in (BYTES, BITS, READS)},
                            value,
                        )
                    )
        return options


def _rest(program: Program, chosen: int) -> float:
    """Bytes of everything else: tables as `Quantize` leaves them, fp32 tensors, and the graph.

    The graph's part is a bound: 250 bytes a node, 512 of alignment a tensor, and the rotary
    tables of the longest sequence.
    """
    tables = {w.weight.data_ptr(): w.weight for w in program.lookups if large_table(w.weight)}
    table = sum(w.numel() for w in tables.values())
    # A tied head is a weight of its own once it is on a grid.
    tied = sum(w.weight.numel() for w in program.linears if w.weight.data_ptr() in tables)
    small = sum(p.numel() for p in program.module.parameters()) - chosen - table + tied
    rotary = program.max_length * program.example[2].shape[3] if program.kind == "decoder" else 0
    tensors = sum(1 for _ in program.module.parameters())
    graph = 250.0 * len(program.module.graph.nodes) + 512.0 * tensors
    return table * (1 + 4 / BLOCK) + 4.0 * (small + rotary) + graph


def units_to_choose(
    program: Program, context: Context
) -> tuple[list[_Unit], list[tuple[FFNSite, list[_Unit]]]]:
    """Units of one width each, and the experts of every carved site."""
    together: dict[object, list[Linear]] = {}
    for linear in program.linears:
        if in_blocks(linear.weight.shape[1]):
            together.setdefault(linear.input, []).append(linear)
    units = [_Unit(tuple(n.name for n in g), tuple(n.weight for n in g)) for g in together.values()]
    layers = []
    for site in program.carved:
        r = site.routed
        assert r is not None
        if not in_blocks(r.expert_up.shape[-1], r.shared_size, r.expert_size):
            continue
        named = ("shared_gate", "shared_up", "shared_down")
        shared = tuple(getattr(r, n) for n in named if getattr(r, n) is not None)
        if shared:
            units.append(_Unit((site.name,), shared))
        layers.append((site, _experts(r, context.inputs.of(site, 4_096))))
    return units, layers


def _experts(r: RoutedFFN, x: Tensor) -> list[_Unit]:
    share = r.chosen(x).float().mean(0).clamp_min(1.0 / len(x))
    stacks = [t for t in (r.expert_gate, r.expert_up, r.expert_down) if t is not None]
    return [
        _Unit((str(e),), tuple(t[e] for t in stacks), float(share[e])) for e in range(r.num_experts)
    ]


def _error(weights: Sequence[Tensor], bits: int) -> float:
    """Squared error of round-to-nearest."""
    return sum(float((Grid.nearest(w, bits).round(w) - w.float()).square().sum()) for w in weights)


def _rounding(weights: Sequence[Tensor], bits: int) -> LinearRule:
    """The products of these weights alone with rounded ones."""
    mine = {w.data_ptr() for w in weights}

    def rule(x: Tensor, weight: Tensor) -> Tensor:
        if weight.data_ptr() in mine:
            return F.linear(x.float(), Grid.nearest(weight, bits).round(weight))
        return stored_product(x, weight)

    return rule
