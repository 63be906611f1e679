"""Finetune: the routed FFNs of all layers together, by the dense program's own predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from carve.calibration import Batch, limit_batches
from carve.dialect import select
from carve.end_to_end import TrainingConfig, divergence, quarters, train
from carve.passbase import Context, Pass, need_dense, need_notes, need_routed, unless_worse
from carve.program import Program
from carve.retell import redrawn, tokens_in
from carve.tuning import Balance, MaskedFFN, mixed_precision

_FAR = 0.04
"""Loss from which on steps have their full size."""


@dataclass(frozen=True)
class FinetuneConfig(TrainingConfig):
    """Settings of `Finetune`, besides those of `carve.end_to_end.TrainingConfig`.

    ``rate`` and ``router_rate``: step sizes relative to the size of each tensor, where 0.04 or more
    is lost. ``rank``: of low-rank corrections to the matrices; 0 trains the matrices themselves.
    ``redrawn``: share of the steps, 0 to 1, on text that comes again with half of its tokens drawn
    anew by the dense program (`carve.retell.redrawn`, decoders alone). ``decoders_only``: nothing
    is done for other models, to whose last hidden states `distill` leads already.
    """

    RANGES: ClassVar = {**TrainingConfig.RANGES, "redrawn": (0, 1)}

    rate: float = 0.01
    router_rate: float = 0.001
    rank: int = 0
    redrawn: float = 0.0
    decoders_only: bool = False

    def serves(self, program: Program) -> bool:
        """Whether anything is done for a program."""
        return program.kind == "decoder" or not self.decoders_only


@dataclass(frozen=True)
class FinetuneMetrics:
    """``loss``: training loss over quarters of the steps; ``tokens``: seen.

    ``distinct``: of them, as given; ``redrawn``: of those seen, in rows that the dense program drew
    in part; ``kept``: whether the program got better.
    """

    loss: list[float]
    tokens: int
    distinct: int
    redrawn: int
    kept: bool


class Finetune(Pass[FinetuneConfig]):
    """Short end-to-end distillation (Hinton et al., arXiv 1503.02531), temperature 1.

    ``min E_t KL(p(. | x_<t) || q(. | x_<t))`` over experts, compensation and routers, ``p`` the
    dense program's next-token distribution and ``q`` the routed one's; for encoders the squared
    error of the hidden states relative to their size. Everything else of the program stays. The
    routers learn by a straight-through mask, and their biases hold what all experts together cost a
    token; how the sites share it is learnt too (`carve.tuning.Balance`). Any text serves, for no
    label of it is used unless ``labels`` asks for a share of them: a model that has seen little
    text learns more of it so, and parts from the dense one. Text that is seen several times is
    learnt by heart in the end; half of its tokens drawn anew (``redrawn``) it is other text each
    time, of which no label is used. Matrices take the steps of Muon (Jordan et al., 2024), which
    wins about a tenth of the loss over Adam's; all else takes Adam's. With the loss ``L`` at the
    beginning steps are ``min(1, sqrt(L / 0.04))`` of their size: the loss goes with the square of
    the way to go, and longer steps lead away from what layer-wise work found.

    A state is kept every ``save_seconds``; a conversion that is resumed goes on from it.
    """

    name = "finetune"
    needs_dense = True

    def requires(self, program: Program, context: Context) -> None:
        """Needs carved sites with linear routers, and the dense program."""
        need_notes(program, "carve", self.name)
        need_dense(context, self.name)

    def call(self, program: Program, context: Context) -> FinetuneMetrics:
        """Train, then set the thresholds anew and keep what is better."""
        c = self.config
        dense = need_dense(context, self.name)
        batches = context.stream or context.batches
        # Gates alone may have met the budget, and nothing was carved.
        plan = c.plan(dense, batches, context.generator(self.name)) if program.carved else []
        if not plan:
            return FinetuneMetrics([], 0, 0, 0, kept=False)
        given = plan
        if dense.kind == "decoder":
            plan = redrawn(
                dense,
                given,
                c.redrawn,
                context.generator("redrawn"),
                lambda items: context.progress(items, f"{self.name}: text drawn again"),
                context.partial.once,
            )
        losses: list[float] = []

        def rewrite() -> None:
            models = {
                s.name: MaskedFFN(
                    need_routed(s, self.name),
                    straight_through=True,
                    rank=c.rank,
                    form=context.request.form,
                )
                for s in program.carved
            }
            share = self._steps(program, dense, models, plan[:2])
            rates = c.rate * share, c.router_rate * share
            balance = Balance(models, {s.name: context.experts(s) for s in program.carved})
            losses[:] = train(
                nn.ModuleDict({n.replace(".", "/"): m for n, m in models.items()}),
                _optimizers([g for m in models.values() for g in m.groups(*rates)]),
                plan,
                lambda batch: self._loss(program, dense, models, batch, c.labels),
                context,
                self.name,
                save_seconds=c.save_seconds,
                # Padding has no say in what experts cost.
                after_step=lambda batch: balance.hold(
                    [batch.counted(x) for x in balance.last()], 0.02
                ),
            )
            real = context.batches
            if context.given is not None:
                real = limit_batches(real, context.given)
            means = self._settle(program, models, balance, real)
            for site in program.carved:
                routed = models[site.name].export()
                program.set_routed(site, replace(routed, mean_top_k=means.get(site.name)))
                site.tuned = True

        kept = unless_worse(program, context if c.judge else None, rewrite, c.labels)
        seen = tokens_in(plan)
        made = tokens_in([b for b, old in zip(plan, given, strict=True) if b is not old])
        distinct = min(tokens_in(batches), seen)
        return FinetuneMetrics(quarters(losses), seen, distinct, made, kept)

    @torch.no_grad()
    def _steps(
        self,
        program: Program,
        dense: Program,
        models: dict[str, MaskedFFN],
        batches: Sequence[Batch],
    ) -> float:
        """Share of their full size that steps take."""
        losses = [float(self._loss(program, dense, models, b)) for b in batches]
        # Rounding leaves a KL of nothing a little below 0.
        return min(1.0, math.sqrt(max(0.0, sum(losses) / len(losses)) / _FAR))

    def _loss(
        self,
        program: Program,
        dense: Program,
        models: dict[str, MaskedFFN],
        batch: Batch,
        labels: float = 0.0,
    ) -> Tensor:
        taught = {s.name: s.dense for s in dense.sites}
        with mixed_precision():
            with torch.no_grad():
                want = dense.differentiable(*batch.inputs, replace=taught, only_first=True)[0]
            have = program.differentiable(*batch.inputs, replace=models, only_first=True)[0]
        return divergence(program.kind, want, have, batch, labels)

    @torch.no_grad()
    def _settle(
        self,
        program: Program,
        models: dict[str, MaskedFFN],
        balance: Balance,
        batches: Sequence[Batch],
    ) -> dict[str, float]:
        """Set the biases on ``batches``; gives the mean experts a token by site."""
        found: dict[str, list[Tensor]] = {n: [] for n, m in models.items() if m.source.dynamic}
        for batch in batches:
            program.differentiable(*batch.inputs, replace=models, only_first=True)
            for name, parts in found.items():
                logits = models[name].last_logits
                assert logits is not None
                parts.append(batch.counted(logits))
        scores = {n: torch.cat(parts) for n, parts in found.items()}
        shift = balance.hold([*scores.values()])
        chosen = {n: select(x - shift, models[n].source.top_k, True) for n, x in scores.items()}
        return {n: float(mask.sum(1).float().mean()) for n, mask in chosen.items()}


def _optimizers(groups: Sequence[dict[str, object]]) -> list[torch.optim.Optimizer]:
    """Muon for matrices, Adam for all else."""
    matrices = [g for g in groups if g["matrix"]]
    others = [g for g in groups if not g["matrix"]]
    found: list[torch.optim.Optimizer] = []
    if matrices:
        found.append(
            torch.optim.Muon(
                matrices, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"
            )
        )
    if others:
        found.append(torch.optim.Adam(others, betas=(0.9, 0.95)))
    return found
