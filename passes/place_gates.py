"""PlaceGates: which blocks are gated, where a skip rate is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from carve.allocate import Option, allocate
from carve.budget import plan_widths
from carve.calibration import limit_batches
from carve.config import AT_LEAST_ONE
from carve.errors import UserError
from carve.passbase import Context, ContractError, Pass
from carve.program import Program
from carve.sites import Block
from carve.skip_cost import candidates, measure_skips

WORK = "multiply-accumulates not saved"


@dataclass(frozen=True)
class PlaceGatesConfig:
    """Settings of `PlaceGates`.

    ``blocks``: ``measured``, or ``deep`` for the deep half without the last layer. ``tokens``:
    calibration tokens to fit gates on for the measurement.
    """

    RANGES: ClassVar = {"tokens": AT_LEAST_ONE}

    blocks: str = "measured"
    tokens: int = 8192


@dataclass(frozen=True)
class PlaceGatesMetrics:
    """``sensitivity``: by candidate, the program's loss with a gate at the asked rate on it alone.

    ``skips``: rate by chosen block; ``predicted`` and ``predicted_deep``: sums of the losses of the
    chosen blocks, and of the deep half.
    """

    sensitivity: dict[str, float]
    skips: dict[str, float]
    predicted: float
    predicted_deep: float


class PlaceGates(Pass[PlaceGatesConfig]):
    """Gate the blocks that cost least, as many as save what the deep half would.

    ``min sum_b L_b z_b`` with ``sum_b m_b z_b >= sum over the deep half of m_b``: ``L_b`` is the
    program's measured loss with a gate on block ``b`` alone at the asked rate, ``m_b`` what the
    block costs a token, ``z_b`` in {0, 1} (`carve.allocate`). That deep blocks matter least is a
    rule of thumb for deep models (Men et al., arXiv 2403.03853); the measurement takes seconds.
    """

    name = "place_gates"

    def requires(self, program: Program, context: Context) -> None:
        """Needs a judge to measure by."""
        if self.config.blocks not in ("measured", "deep"):
            raise UserError(
                "config", f"place_gates.blocks {self.config.blocks!r} is not 'measured' or 'deep'"
            )
        if context.judge is None:
            raise ContractError("contract", f"{self.name} needs a judge")

    def call(self, program: Program, context: Context) -> PlaceGatesMetrics:
        """Measure, choose, and plan the widths anew."""
        judge = context.judge
        assert judge is not None
        if self.config.blocks == "deep" or not context.skips:
            return PlaceGatesMetrics({}, dict(context.skips), 0.0, 0.0)
        rate = max(context.skips.values())

        def progress(items: Sequence[Block]) -> Iterator[Block]:
            return context.progress(items, self.name)

        batches = limit_batches(context.batches, self.config.tokens)
        costs = measure_skips(program, batches, judge, rate, progress)
        loss = {name: c.sensitivity for name, c in costs.items()}
        blocks = candidates(program)
        saved = sum(b.skippable_macs for b in blocks if b.name in context.skips)
        found = allocate(
            {
                b.name: [
                    Option(0.0, {WORK: b.skippable_macs}, False),
                    Option(loss[b.name], {WORK: 0.0}, True),
                ]
                for b in blocks
            },
            {WORK: sum(b.skippable_macs for b in blocks) - saved},
        )
        deep = sum(loss[n] for n in context.skips)
        context.skips.clear()
        context.skips.update({n: rate for n, o in found.chosen.items() if o.value})
        context.splits.update(plan_widths(program, context.request, context.skips))
        return PlaceGatesMetrics(loss, dict(context.skips), found.loss, deep)
