"""Tune scales: those of all grids together, by the dense program's own predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carve.arithmetic import as_emitted, grids_of, rounded
from carve.calibration import Batch
from carve.dialect import LinearRule, linear_rule
from carve.end_to_end import divergence, in_order, in_parts, quarters, train
from carve.grid import Grid
from carve.passbase import Context, ContractError, Pass
from carve.program import Program

_LEAST_STEPS = 8


@dataclass(frozen=True)
class TuneScalesConfig:
    """Settings of `TuneScales`.

    ``tokens``: seen in all at the most. ``rounds``: times that short text is repeated at the most.
    ``work``: multiply-accumulates at the most, which leaves a large program fewer tokens; where
    they make fewer than 8 steps, nothing is done. ``batch``: tokens a step. ``rate``: of Adam at 4
    bits, relative to a scale. ``save_seconds``: time between states to go on from. ``judge``: keep
    the pass only where the program's loss gets lower.
    """

    tokens: int = 98_304
    rounds: int = 4
    work: float = 3e13
    batch: int = 2048
    rate: float = 0.003
    save_seconds: float = 60.0
    judge: bool = True

    def tokens_for(self, parameters: int, distinct: int) -> int:
        """Tokens for so many parameters, each in two products forward and two backward.

        ``distinct``: tokens that there are.
        """
        return min(self.tokens, self.rounds * distinct, int(self.work / (4 * parameters)))


@dataclass(frozen=True)
class TuneScalesMetrics:
    """``loss``: training loss over quarters of the steps; ``tokens``: seen; ``scales``: trained.

    ``moved``: root mean square of what they changed by, relative to themselves; ``before`` and
    ``after``: the program's loss on calibration text that is not trained on, None where nothing
    judges; ``kept``: whether the new scales were taken.
    """

    loss: list[float]
    tokens: int
    scales: int
    moved: float
    before: float | None
    after: float | None
    kept: bool


class Scales(nn.Module):
    """The scales of a quantized program's products, each times ``exp`` of a parameter; levels stay.

    Parameters are fp32 of the shape of their grid's ``scale``. Raising to ``exp`` keeps a scale
    from changing its sign, with which the levels would change.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self._logs: dict[int, tuple[Grid, nn.Parameter]] = {}
        self._kept: list[Tensor] = []  # what is known by its address has to stay there
        for linear in program.linears:
            if linear.grid is not None:
                self._add(linear.weight, linear.grid)
        for site in program.carved:
            for _, weight, grid in site.routed.on_grids() if site.routed is not None else ():
                self._add(weight, grid)
        self.logs = nn.ParameterList(log for _, log in self._logs.values())

    def _add(self, weight: Tensor, grid: Grid) -> None:
        if weight.data_ptr() not in self._logs:
            self._logs[weight.data_ptr()] = (grid, nn.Parameter(torch.zeros_like(grid.scale)))
            self._kept.append(weight)

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer, with steps of ``rate * 2^(4 - bits)``.

        A weight at the end of its grid so moves by the same part of the distance to the next level
        whatever the width.
        """
        by_bits: dict[int, list[nn.Parameter]] = {}
        for grid, log in self._logs.values():
            by_bits.setdefault(grid.bits, []).append(log)
        steps = {bits: rate * 2.0 ** (4 - bits) for bits in by_bits}
        return [{"params": by_bits[b], "lr": step, "base": step} for b, step in steps.items()]

    def rule(self) -> LinearRule:
        """Products with int8 activations whose gradient passes to ``x`` and to the scales.

        ``y = x' (W exp(l))^T`` with ``x'`` the rounded activations and ``l`` the parameters, one
        for each row and block. Rounding passes the gradient straight through (Bengio et al., arXiv
        1308.3432).
        """

        def apply(x: Tensor, weight: Tensor) -> Tensor:
            x = x.float()
            found = self._logs.get(weight.data_ptr())
            if found is None:
                return F.linear(x, weight.float())
            grid, log = found
            seen = x + (rounded(x.detach(), grid.block) - x.detach())
            blocks = weight.float().unflatten(-1, (-1, grid.block))
            return F.linear(seen, (blocks * log.exp()[..., None]).flatten(-2))

        return apply

    @torch.no_grad()
    def write(self, program: Program) -> None:
        """Give the program, or a copy of it, its weights with the scales as they are now."""
        for linear in list(program.linears):
            if linear.grid is not None:
                weight, grid = self._scaled(linear.weight, linear.grid)
                program.set_linear(linear, weight, linear.bias, grid)
        for site in program.carved:
            if site.routed is not None and site.routed.grids:
                program.set_routed(site, site.routed.regridded(self._scaled))
                site.tuned = True

    def _scaled(self, weight: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        _, log = self._logs[weight.data_ptr()]
        new = Grid(grid.bits, grid.scale * log.exp(), grid.block)
        return new.values(grid.levels(weight)).to(weight.dtype), new

    @property
    def moved(self) -> float:
        """Root mean square of the relative changes."""
        changes = torch.cat([log.detach().expm1().flatten() for log in self.logs])
        return float(changes.square().mean().sqrt())


class TuneScales(Pass[TuneScalesConfig]):
    """End-to-end training of the scales alone: the second phase of EfficientQAT (arXiv 2407.11062).

    ``min E_t KL(p(. | x_<t) || q(. | x_<t))`` over the scales of all linears and experts, ``p`` the
    dense program's next-token distribution and ``q`` that of this one in the target's arithmetic;
    for encoders the squared error of the hidden states relative to their size. Levels, routers and
    biases stay, so nothing that is emitted changes its size. Rounding weight after weight sees only
    what one weight does to its own result; this sees what all do together to the last one, and wins
    back a part of what carving lost as well. 2-bit experts learn in int8 activations and are judged
    by their kernel's own arithmetic.
    """

    name = "tune_scales"
    needs_dense = True

    def requires(self, program: Program, context: Context) -> None:
        """Needs a quantized program, and the dense one."""
        if next(grids_of(program), None) is None:
            raise ContractError(
                "contract", f"{self.name} needs weights on grids", "run the quantize pass before"
            )
        if context.dense is None:
            raise ContractError("contract", f"{self.name} needs the dense program")

    def call(self, program: Program, context: Context) -> TuneScalesMetrics:
        """Train, and take the new scales where they are better."""
        c = self.config
        dense = context.dense
        assert dense is not None
        parts = in_parts(context.stream or context.batches, c.batch)
        tokens = c.tokens_for(dense.num_parameters, sum(b.tokens for b in parts))
        plan = in_order(parts, tokens, context.generator(self.name))
        scales = Scales(program)
        count = sum(log.numel() for log in scales.logs)
        if len(plan) < _LEAST_STEPS:
            return TuneScalesMetrics([], 0, count, 0.0, None, None, kept=False)
        losses = self._train(program, dense, scales, plan, context)
        before = after = None
        kept = True
        if c.judge and context.judge is not None:
            trial = program.copy()
            scales.write(trial)
            before, after = (_loss_as_emitted(p, context) for p in (program, trial))
            kept = after < before
        if kept:
            scales.write(program)
        seen = sum(b.tokens for b in plan)
        return TuneScalesMetrics(
            quarters(losses), seen, count, scales.moved, before, after, kept=kept
        )

    def _train(
        self,
        program: Program,
        dense: Program,
        scales: Scales,
        plan: Sequence[Batch],
        context: Context,
    ) -> list[float]:
        rule = scales.rule()
        # Called as they are, not as operators of the graph, their weights' gradients pass.
        routed = {s.name: s.routed for s in program.carved if s.routed is not None}

        # In fp32: in bf16 every count of rows that an expert gets has a kernel made for it, which
        # takes longer than it saves, and hundreds of MB.
        def loss(batch: Batch) -> Tensor:
            with torch.no_grad():
                want = dense.differentiable(*batch.inputs, only_first=True)[0]
            with linear_rule(rule):
                have = program.differentiable(*batch.inputs, replace=routed, only_first=True)[0]
            return divergence(program.kind, want, have, batch)

        c = self.config
        optimizer = torch.optim.Adam(scales.groups(c.rate), betas=(0.9, 0.95))
        return train(
            scales, [optimizer], plan, loss, context, self.name, save_seconds=c.save_seconds
        )


def _loss_as_emitted(program: Program, context: Context) -> float:
    assert context.judge is not None
    with as_emitted(program):
        return context.judge(program)
