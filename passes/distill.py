"""Distill: every routed FFN trained to do what the dense one did, site after site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from carve.config import AT_LEAST_ONE
from carve.ffn import RoutedFFN
from carve.passbase import Context, Pass, need_notes, need_routed, unless_worse
from carve.program import Program
from carve.statistics import Fit, refit_down
from carve.tuning import MaskedFFN, calibrated, cosine, mixed_precision, short_warmup, shuffled
from carve.walk import Lesson, walk


@dataclass(frozen=True)
class DistillConfig:
    """Settings of `Distill`.

    ``steps``: at the most, for each site; 0 takes as many as ``work`` and ``site_work`` allow.
    ``work``: multiply-accumulates of all sites together. ``site_work``: of one site. ``batch``:
    tokens a step. ``rate``: step size of Adam relative to the size of each tensor. ``strengths``:
    of the closed form after the steps. ``judge``: keep the whole pass only where the program's loss
    against the dense one, end to end, gets lower.
    """

    RANGES: ClassVar = {"batch": AT_LEAST_ONE}

    steps: int = 0
    batch: int = 2048
    rate: float = 0.03
    work: float = 3e13
    site_work: float = 3e12
    strengths: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    judge: bool = True

    def steps_for(self, macs: Sequence[int]) -> int:
        """Steps a site, for sites of so many multiply-accumulates a token."""
        if self.steps:
            return self.steps
        # Forward and backward are three products for each weight.
        each = [3 * m * self.batch for m in macs] or [1]
        allowed = min(self.work / sum(each), self.site_work / max(each))
        return int(min(300, max(12, allowed)))


@dataclass(frozen=True)
class DistillMetrics:
    """By site: relative weighted error on held-out tokens before, after the steps, and at the end.

    ``tokens``: distinct calibration tokens; ``steps``: a site; ``kept``: whether the program got
    better end to end.
    """

    error_before: dict[str, float]
    error_trained: dict[str, float]
    error_after: dict[str, float]
    tokens: int
    steps: int
    kept: bool


class Distill(Pass[DistillConfig]):
    """Layer-wise distillation after LaDiMo (arXiv 2408.04278), with carve's targets.

    For each site in order, ``min sum_t w_t |y(x_t) - target_t|^2`` over all its weights and
    biases, the router fixed: ``x``, ``target`` and ``w`` are those of `carve.walk`, so a site is
    taught on the inputs that the carved sites before it leave, and learns to undo their errors.
    Adam with a cosine, in bf16 products with fp32 weights; then the closed form of
    `carve.statistics.refit_down`, which finds the best down-projection for the hidden activations
    that training ended with.
    """

    name = "distill"

    def requires(self, program: Program, context: Context) -> None:
        """Needs carved sites with linear routers."""
        need_notes(program, "carve", self.name)

    def call(self, program: Program, context: Context) -> DistillMetrics:
        """Train every carved site."""
        before: dict[str, float] = {}
        trained: dict[str, float] = {}
        after: dict[str, float] = {}
        seen = 0
        steps = self.config.steps_for([s.dense.macs for s in program.carved])

        def rewrite() -> None:
            nonlocal seen
            for lesson in walk(program, context.batches, lambda s: context.progress(s, self.name)):
                site = lesson.site
                seen = len(lesson.x)
                fit, before[site.name], trained[site.name] = context.partial.once(
                    site.name, self._learn, lesson, steps, context
                )
                after[site.name] = fit.after
                program.set_routed(site, fit.routed)
                site.tuned = True
                del lesson  # or it stands beside the next one

        kept = unless_worse(program, context if self.config.judge else None, rewrite)
        return DistillMetrics(before, trained, after, seen, steps, kept)

    def _learn(self, lesson: Lesson, steps: int, context: Context) -> tuple[Fit, float, float]:
        """Steps, then the closed form; the error on held-out tokens before and after the steps."""
        site = lesson.site
        routed = calibrated(
            need_routed(site, self.name), lesson.x[: context.given], context.experts(site)
        )
        generator = context.generator(f"distill {site.name}")
        form = context.request.form
        model = MaskedFFN(routed, form=form)
        new, before, trained = self._train(model, lesson, steps, generator)
        fit = refit_down(
            new,
            lesson.x,
            lesson.target,
            lesson.weight,
            self.config.strengths,
            biases=not form.plain,
        )
        return fit, before, trained

    def _train(
        self, model: MaskedFFN, lesson: Lesson, steps: int, generator: torch.Generator
    ) -> tuple[RoutedFFN, float, float]:
        """The trained FFN and its error on held-out tokens, before and after."""
        x, target, weight = lesson.x, lesson.target, lesson.weight
        index = torch.arange(len(x))
        judged = index % 20 == 19
        rows, held = index[~judged], index[judged]

        def error(ffn: RoutedFFN) -> float:
            return relative_error(ffn, x[held], target[held], weight[held])

        routed = model.source
        optimizer = torch.optim.Adam(model.groups(self.config.rate, 0.0), betas=(0.9, 0.95))
        scale = (weight[:, None] * (target - target.mean(0)).square()).mean().clamp_min(1e-30)
        warmup = short_warmup(steps)
        picks = shuffled(len(rows), self.config.batch, steps, generator)
        for step, pick in enumerate(picks):
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * cosine(step, steps, warmup)
            at = rows[pick]
            with mixed_precision():
                y = model(x[at])
            loss = (weight[at, None] * (y - target[at]).square()).mean() / scale
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        before, new = error(routed), model.export()
        after = error(new)
        return (new, before, after) if after < before else (routed, before, before)


def relative_error(ffn: RoutedFFN, x: Tensor, target: Tensor, weight: Tensor) -> float:
    """``sum w |y - target|^2 / sum w |target|^2``."""
    with torch.no_grad():
        miss = (weight[:, None] * (ffn(x) - target).square()).sum()
    return float(miss / (weight[:, None] * target.square()).sum().clamp_min(1e-30))
