"""Compensate: what an expert that is left out leaves behind."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from carve.config import AT_LEAST_ONE
from carve.ffn import RoutedFFN
from carve.passbase import Context, Pass, need_notes, need_routed
from carve.program import Program
from carve.sites import FFNSite
from carve.statistics import weights_of_size


@dataclass(frozen=True)
class CompensateConfig:
    """Settings of `Compensate`.

    ``tokens``: calibration tokens at the most. ``shrink``: pull of each mean towards the expert's
    conditional mean, as a share of the mean diagonal of the normal equations. ``judge``: keep a
    site's compensation only where it helps end to end.
    """

    RANGES: ClassVar = {"tokens": AT_LEAST_ONE, "shrink": (1e-6, math.inf)}

    tokens: int = 16384
    shrink: float = 0.02
    judge: bool = True


@dataclass(frozen=True)
class CompensateMetrics:
    """By site: relative squared error of the FFN without and with it, and what was kept."""

    error_before: dict[str, float]
    error_after: dict[str, float]
    kept: dict[str, bool]


class Compensate(Pass[CompensateConfig]):
    """Fit the means ``c_e`` after the router is fixed, all experts of a site together.

    ``y(x) = E_s(x) + C + sum_{e in T(x)} (E_e(x) - c_e)`` with ``C = sum_e c_e``: left-out expert
    ``e`` leaves ``c_e``. With ``D[t, e] = 1`` where ``e`` is left out, and ``M[t]`` the sum of the
    left-out experts' outputs, ``c = (D'WD + s I)^-1 (D'WM + s c0)``: weighted least squares, ``W``
    the token weights of the profile, shrunk to the conditional means ``c0_e = E[E_e(x) | e left
    out]``. There is no intercept, so every expert on is the dense FFN exactly.

    A lower error of one layer is not a better model: with ``judge`` a site keeps its
    compensation only if the whole program's KL to the dense program gets lower with it.
    """

    name = "compensate"

    def requires(self, program: Program, context: Context) -> None:
        """Needs carved sites with their routers."""
        need_notes(program, "carve", self.name)

    def call(self, program: Program, context: Context) -> CompensateMetrics:
        """Fit and judge every site."""
        metrics = CompensateMetrics({}, {}, {})
        judge = context.judge if self.config.judge else None
        best = judge(program) if judge is not None else float("inf")
        for site in context.progress(program.carved, self.name):
            plain = need_routed(site, self.name)
            program.set_routed(site, self._fit(site, program, context, metrics))
            metrics.kept[site.name] = True
            if judge is None:
                continue
            loss = judge(program)
            if loss < best:
                best = loss
            else:
                program.set_routed(site, plain)
                metrics.kept[site.name] = False
        return metrics

    def _fit(
        self, site: FFNSite, program: Program, context: Context, metrics: CompensateMetrics
    ) -> RoutedFFN:
        routed = need_routed(site, self.name)
        _, groups = program.notes["carve"][site.name]
        x = context.inputs.of(site, self.config.tokens)
        left_out = 1.0 - routed.chosen(x).float()
        missing, prior = _left_out(site, groups, x, left_out)
        dense = site.dense(x)
        w = weights_of_size(dense)[:, None]
        gram = (left_out * w).T @ left_out
        pull = self.config.shrink * gram.diagonal().mean()
        right = (left_out * w).T @ missing + pull * prior
        gram.diagonal().add_(pull)
        c = torch.linalg.solve(gram.double(), right.double()).float()
        scale = (w * dense.square()).sum().clamp_min(1e-30)
        metrics.error_before[site.name] = float((w * missing.square()).sum() / scale)
        metrics.error_after[site.name] = float(
            (w * (missing - left_out @ c).square()).sum() / scale
        )
        base = routed.output_bias
        return replace(
            routed,
            output_bias=c.sum(0) if base is None else base.float() + c.sum(0),
            expert_bias=-c,
        )


def _left_out(
    site: FFNSite, groups: Tensor, x: Tensor, left_out: Tensor, chunk: int = 4096
) -> tuple[Tensor, Tensor]:
    """Sum of the left-out experts' outputs ``[T, d]``, and each one's mean over them ``[E, d]``."""
    down = [site.dense.down[:, g].float() for g in groups]
    sums = torch.zeros(len(groups), down[0].shape[0])
    rows = []
    for part, mask in zip(torch.split(x, chunk), torch.split(left_out, chunk), strict=True):
        h = site.dense.hidden(part)
        total = torch.zeros(len(part), down[0].shape[0])
        for e, (g, w) in enumerate(zip(groups, down, strict=True)):
            out = (h[:, g] * mask[:, e : e + 1]) @ w.T
            total += out
            sums[e] += out.sum(0)
        rows.append(total)
    return torch.cat(rows), sums / left_out.sum(0).clamp_min(1.0)[:, None]
