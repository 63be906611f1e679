"""Tune grids: scales and levels of all together, by the dense program's own predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carve.arithmetic import as_emitted, grids_of, rounded
from carve.calibration import Batch
from carve.dialect import LinearRule, linear_rule
from carve.end_to_end import LEAST_STEPS, TrainingConfig, divergence, quarters, train
from carve.grid import Grid
from carve.passbase import Context, ContractError, Pass, need_dense
from carve.program import Program
from carve.retell import lacking, more, tokens_in

_INSIDE, _END = 0.49, 0.499
"""Of a level, how far from its middle a weight may start, and how far out it may go at the ends."""


@dataclass(frozen=True)
class TuneGridsConfig(TrainingConfig):
    """Settings of `TuneGrids`, besides those of `carve.end_to_end.TrainingConfig`.

    At 4 bits ``tokens`` are as here, and more below (`tokens_at`). ``distinct``: different tokens,
    of which the dense program tells those that the text lacks (`carve.retell`, decoders alone).
    ``rate``: of Adam at 4 bits, relative to a scale. ``level_rate``: of Adam, in levels.
    """

    tokens: int = 131_072
    distinct: int = 98_304
    rounds: int = 8
    work: float = 3e13
    batch: int = 2048
    rate: float = 0.003
    level_rate: float = 0.001

    @classmethod
    def tokens_at(cls, bits: float) -> int:
        """Tokens at so many bits a weight: three times as many for each bit less than 4."""
        return round(cls.tokens * 3 ** max(0.0, 4.0 - bits))

    def told(self, dense: Program, given: int) -> int:
        """Distinct tokens to be told besides the given ones."""
        wanted = min(self.distinct, self.tokens_for(dense.num_parameters, self.distinct))
        return 0 if wanted < LEAST_STEPS * self.batch else lacking(dense, given, wanted)


@dataclass(frozen=True)
class TuneGridsMetrics:
    """``loss``: training loss over quarters of the steps; ``tokens``: seen.

    ``told``: distinct ones that the dense program made; ``scales``: trained.
    ``moved``: root mean square of what they changed by, relative to themselves; ``changed``: share
    of the levels that are others; ``before`` and ``after``: the program's loss on calibration text
    that is not trained on, None where nothing judges; ``kept``: whether the new grids were taken.
    """

    loss: list[float]
    tokens: int
    told: int
    scales: int
    moved: float
    changed: float
    before: float | None
    after: float | None
    kept: bool


class Grids(nn.Module):
    """The scales and levels of a quantized program's products, as parameters.

    A scale is times ``exp`` of one, which keeps it from changing its sign, with which the levels
    would change. Where a grid knows its `rest`, a level is the rounded value of one that starts
    where the weight lay before it was rounded, or as near as leaves the level as it is. Parameters
    are fp32 of the shapes of the grid's ``scale`` and of the weight ``[N, K]``.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self._of: dict[int, tuple[Grid, nn.Parameter, Tensor]] = {}
        self._kept: list[Tensor] = []  # what is known by its address has to stay there
        for linear in program.linears:
            if linear.grid is not None:
                self._add(linear.weight, linear.grid)
        for site in program.carved:
            for _, weight, grid in site.routed.on_grids() if site.routed is not None else ():
                self._add(weight, grid)
        self.logs = nn.ParameterList(log for _, log, _ in self._of.values())
        places = (p for *_, p in self._of.values() if isinstance(p, nn.Parameter))
        self.places = nn.ParameterList(places)

    def _add(self, weight: Tensor, grid: Grid) -> None:
        if weight.data_ptr() not in self._of:
            log = nn.Parameter(torch.zeros_like(grid.scale))
            place = grid.levels(weight).float()
            if grid.rest is not None:
                place = nn.Parameter(place + grid.rest * (_INSIDE / 127))
            self._of[weight.data_ptr()] = (grid, log, place)
            self._kept.append(weight)

    def groups(self, rate: float, level_rate: float) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer; scales have steps of ``rate * 2^(4 - bits)``.

        A weight at the end of its grid so moves by the same part of the distance to the next level
        whatever the width.
        """
        by_bits: dict[int, list[nn.Parameter]] = {}
        for grid, log, _ in self._of.values():
            by_bits.setdefault(grid.bits, []).append(log)
        steps = [(p, rate * 2.0 ** (4 - bits)) for bits, p in by_bits.items()]
        if len(self.places):
            steps.append((list(self.places), level_rate))
        return [{"params": p, "lr": step, "base": step} for p, step in steps]

    def rule(self) -> LinearRule:
        """Products with int8 activations whose gradient passes to ``x`` and to the parameters.

        ``y = x' W'^T``, ``W' = round(u) s exp(l)`` with ``x'`` the rounded activations and ``u``
        and ``l`` the parameters. Rounding passes the gradient straight through (Bengio et al.,
        arXiv 1308.3432).
        """
        # Queries, keys and values read the same input, and so do gate and up.
        last: tuple[Tensor, int, Tensor] | None = None

        def apply(x: Tensor, weight: Tensor) -> Tensor:
            nonlocal last
            found = self._of.get(weight.data_ptr())
            if found is None:
                return F.linear(x.float(), weight.float())
            grid, log, place = found
            if last is None or last[0] is not x or last[1] != grid.block:
                seen: Tensor = _Rounded.apply(x.float(), grid.block)  # type: ignore[no-untyped-call]
                last = x, grid.block, seen
            made: Tensor = _Made.apply(place, log, grid)  # type: ignore[no-untyped-call]
            return F.linear(last[2], made)

        return apply

    @torch.no_grad()
    def bound(self) -> None:
        """Hold places to where the lowest level begins and the highest one ends."""
        for grid, _, place in self._of.values():
            place.clamp_(-_END, 2 * grid.zero - 1 + _END)

    @torch.no_grad()
    def write(self, program: Program) -> None:
        """Give the program, or a copy of it, its weights with scales and levels as they are now."""
        _regrid(program, self._trained)

    def _trained(self, weight: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        _, log, place = self._of[weight.data_ptr()]
        new = Grid(grid.bits, grid.scale * log.exp(), grid.block)
        return new.values(place.round()).to(weight.dtype), new

    @property
    def moved(self) -> float:
        """Root mean square of the scales' relative changes."""
        changes = torch.cat([log.detach().expm1().flatten() for log in self.logs])
        return float(changes.square().mean().sqrt())

    @property
    def changed(self) -> float:
        """Share of the levels that are others now."""
        other = count = 0
        with torch.no_grad():
            for weight in self._kept:
                grid, _, place = self._of[weight.data_ptr()]
                count += weight.numel()
                other += int((place.round() != grid.levels(weight)).sum())
        return other / max(1, count)


class _Rounded(torch.autograd.Function):
    """Activations as int8 kernels see them, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: int) -> Tensor:
        return rounded(x, block)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Made(torch.autograd.Function):
    """Weights ``(round(u) - zero) s exp(log)`` of places ``u``.

    Their gradient is as if they were not rounded. In one piece, for what elementwise operators
    would read, write and keep for the way back is several times the weights.
    """

    @staticmethod
    def forward(ctx: Any, place: Tensor, log: Tensor, grid: Grid) -> Tensor:
        scale = grid.scale * log.exp()
        made = place.round().sub_(grid.zero).unflatten(-1, (-1, grid.block))
        made *= scale[..., None]
        ctx.save_for_backward(made, scale)
        flat: Tensor = made.flatten(-2)
        return flat

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None]:
        made, scale = ctx.saved_tensors
        gradient = grads[0].view_as(made)
        by_place = None
        if ctx.needs_input_grad[0]:
            by_place = (gradient * scale[..., None]).flatten(-2)
        return by_place, (gradient * made).sum(-1), None


class TuneGrids(Pass[TuneGridsConfig]):
    """End-to-end training of scales (second phase of EfficientQAT, arXiv 2407.11062) and levels.

    ``min E_t KL(p(. | x_<t) || q(. | x_<t))`` over the grids of all linears and experts, ``p`` the
    dense program's next-token distribution and ``q`` that of this one in the target's arithmetic;
    for encoders the squared error of the hidden states relative to their size. Widths, routers and
    biases stay, so nothing that is emitted changes its size. A level starts where rounding put it
    and knows how near the next one its weight was (`carve.grid.Grid.rest`), so with small steps
    those turn first that hardly mattered before. Rounding weight after weight sees only
    what one weight does to its own result; this sees what all do together to the last one, and wins
    back a part of what carving lost as well. With ``labels`` the text's own tokens teach too, see
    `carve.passes.Finetune`. 2-bit experts learn in int8 activations and are judged by their
    kernel's own arithmetic.
    """

    name = "tune_grids"
    needs_dense = True

    def requires(self, program: Program, context: Context) -> None:
        """Needs a quantized program, and the dense one."""
        if next(grids_of(program), None) is None:
            raise ContractError(
                "contract", f"{self.name} needs weights on grids", "run the quantize pass before"
            )
        need_dense(context, self.name)

    def call(self, program: Program, context: Context) -> TuneGridsMetrics:
        """Train, and take the new grids where they are better."""
        c = self.config
        dense = need_dense(context, self.name)
        batches = [*(context.stream or context.batches)]
        told = c.told(dense, tokens_in(batches))
        batches += more(
            dense,
            batches,
            told,
            context.generator("told"),
            lambda rows: context.progress(rows, f"{self.name}: text told again"),
            context.partial.once,
        )
        plan = c.plan(dense, batches, context.generator(self.name))
        grids = Grids(program)
        count = sum(log.numel() for log in grids.logs)
        if not plan:
            _forget(program)
            return TuneGridsMetrics([], 0, told, count, 0.0, 0.0, None, None, kept=False)
        losses = self._train(program, dense, grids, plan, context)
        before = after = None
        kept = True
        if c.judge and context.judge is not None:
            trial = program.copy()
            grids.write(trial)
            before, after = (_loss_as_emitted(p, context, c.labels) for p in (program, trial))
            kept = after < before
        moved, changed = grids.moved, grids.changed
        if kept:
            grids.write(program)
        else:
            _forget(program)
        return TuneGridsMetrics(
            quarters(losses),
            tokens_in(plan),
            told,
            count,
            moved,
            changed,
            before,
            after,
            kept=kept,
        )

    def _train(
        self,
        program: Program,
        dense: Program,
        grids: Grids,
        plan: Sequence[Batch],
        context: Context,
    ) -> list[float]:
        c, rule = self.config, grids.rule()
        # Called as they are, not as operators of the graph, their weights' gradients pass.
        routed = {s.name: s.routed for s in program.carved if s.routed is not None}

        # In fp32: in bf16 every count of rows that an expert gets has a kernel made for it, which
        # takes longer than it saves, and hundreds of MB.
        def loss(batch: Batch) -> Tensor:
            with torch.no_grad():
                want = dense.differentiable(*batch.inputs, only_first=True)[0]
            with linear_rule(rule):
                have = program.differentiable(*batch.inputs, replace=routed, only_first=True)[0]
            return divergence(program.kind, want, have, batch, c.labels)

        optimizer = torch.optim.Adam(grids.groups(c.rate, c.level_rate), betas=(0.9, 0.95))
        return train(
            grids,
            [optimizer],
            plan,
            loss,
            context,
            self.name,
            save_seconds=c.save_seconds,
            after_step=lambda _: grids.bound(),
        )


def _regrid(program: Program, change: Callable[[Tensor, Grid], tuple[Tensor, Grid]]) -> None:
    """Give every product what ``change`` makes of its weight and grid."""
    for linear in list(program.linears):
        if linear.grid is not None:
            weight, grid = change(linear.weight, linear.grid)
            program.set_linear(linear, weight, linear.bias, grid)
    for site in program.carved:
        if site.routed is not None and site.routed.grids:
            program.set_routed(site, site.routed.regridded(change))
            site.tuned = True


def _forget(program: Program) -> None:
    """Drop what nobody needs any more: where weights lay before they were rounded."""
    if any(g.rest is not None for g in grids_of(program)):
        _regrid(program, lambda w, g: (w, replace(g, rest=None)))


def _loss_as_emitted(program: Program, context: Context, labels: float) -> float:
    assert context.judge is not None
    with as_emitted(program):
        return context.judge(program, None, labels)
