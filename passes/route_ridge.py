"""Ridge router: a linear map, in closed form, to what each expert would contribute."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from carve.dialect import select
from carve.passbase import Context, Pass, need_notes, need_routed
from carve.program import Program
from carve.sites import FFNSite
from carve.statistics import expert_energy, ridge, weights_of_size
from carve.tuning import calibrated


@dataclass(frozen=True)
class RouteRidgeConfig:
    """Settings of `RouteRidge`.

    ``tokens``: calibration tokens at the most. ``strengths``: ridge strengths tried, as a multiple
    of the mean diagonal of the Gram matrix; the one of least held-out loss wins. ``power``: the
    target is the norm to this power. ``held_out``: share of the tokens that judge. ``dynamic``:
    choose by an absolute threshold, else always ``top_k``. ``most``: with ``dynamic``, a token
    takes at most so many times the mean number of experts.
    """

    RANGES: ClassVar = {"tokens": (2, math.inf), "held_out": (0.001, 1)}

    tokens: int = 32768
    strengths: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    power: float = 1.0
    held_out: float = 0.2
    dynamic: bool = True
    most: float = 3.0


@dataclass(frozen=True)
class RouteRidgeMetrics:
    """By site.

    ``captured``: energy of the chosen experts as a share of the oracle's, on tokens held out from
    the fit; ``agreement``: share of the oracle's experts chosen there, when they have joined it;
    ``strength``: the ridge strength that won; ``load_max``: largest share of tokens that one expert
    takes, over the mean; ``k_deviation``: standard deviation of the number of experts a token
    takes.
    """

    captured: dict[str, float]
    agreement: dict[str, float]
    strength: dict[str, float]
    load_max: dict[str, float]
    k_deviation: dict[str, float]


class RouteRidge(Pass[RouteRidgeConfig]):
    """Regress each expert's centred contribution on the FFN's input, and choose the largest.

    Target ``n_e(t) = (w_t |E_e(x_t) - mean E_e|^2)^(power/2)`` (D2DMoE, arXiv 2310.04361,
    regresses the norm; centring is carve's own, for what is left out leaves its mean behind, and
    so are the weights ``w_t``, `carve.statistics.weights_of_size`: an absolute threshold compares
    tokens with one another, and an error counts relative to the token's size). With ``X``
    ``[T, d]`` and ``N`` ``[T, E]``, both centred, ``W = (X'X + lambda I)^-1 X'N`` and
    ``b = mean N - W mean X``; logits ``x W + b`` ``[T, E]`` in fp32.

    With ``dynamic`` the bias is then lowered by the score that ``top_k`` experts a token exceed on
    average, and a token takes the experts of positive score: easy tokens take fewer. Where an
    engine's router has no bias, nothing is centred and ``b`` is zero.
    """

    name = "route_ridge"

    def requires(self, program: Program, context: Context) -> None:
        """Needs carved sites."""
        need_notes(program, "carve", self.name)

    def call(self, program: Program, context: Context) -> RouteRidgeMetrics:
        """Fit the router of every carved site."""
        metrics = RouteRidgeMetrics({}, {}, {}, {}, {})
        for site in context.progress(program.carved, self.name):
            self._route(program, site, context, metrics)
        return metrics

    def _route(
        self, program: Program, site: FFNSite, context: Context, metrics: RouteRidgeMetrics
    ) -> None:
        routed = need_routed(site, self.name)
        top_k = context.split(site).top_k
        _, groups = program.notes["carve"][site.name]
        x = context.inputs.of(site, self.config.tokens)
        weight = weights_of_size(torch.cat([site.dense(p) for p in torch.split(x, 8192)]))
        energy = expert_energy(site, groups, x, centred=True) * weight[:, None]
        target = energy.pow(self.config.power / 2)
        judge = torch.zeros(len(x), dtype=torch.bool)
        judge[:: max(2, round(1 / self.config.held_out))] = True
        biased = not context.request.form.unbiased_router
        fitted = [
            (s, *ridge(x[~judge], target[~judge], s, intercept=biased))
            for s in self.config.strengths
        ]

        def captured(w: Tensor, b: Tensor) -> float:
            chosen = (x[judge] @ w.T + b).topk(top_k, 1).indices
            best = energy[judge].topk(top_k, 1).values.sum()
            return float(energy[judge].gather(1, chosen).sum() / best.clamp_min(1e-30))

        strength, w, b = max(fitted, key=lambda f: captured(f[1], f[2]))
        metrics.captured[site.name] = captured(w, b)
        # The judged tokens join the fit once the strength is known.
        w, b = ridge(x, target, strength, intercept=biased)
        # Scores of size 1, so that a soft mask over them has one temperature everywhere.
        scale = float((x @ w.T).std().clamp_min(1e-12))
        new = replace(
            routed,
            router=w / scale,
            router_bias=b / scale if biased else None,
            router_gate=None,
            top_k=top_k,
            dynamic=False,
        )
        oracle = select(energy, top_k)
        metrics.agreement[site.name] = float(
            (new.chosen(x) & oracle)[judge].sum() / oracle[judge].sum()
        )
        if self.config.dynamic:
            most = min(routed.num_experts, max(top_k, round(self.config.most * top_k)))
            new = replace(new, top_k=most, dynamic=True)
            # What the model told itself does not say how many experts text takes.
            given = x
            if context.given is not None:
                given = context.inputs.of(site, self.config.tokens, context.given)
            new = calibrated(new, given, context.experts(site))
        program.set_routed(site, new)
        metrics.strength[site.name] = strength
        chosen = new.chosen(x).float()
        metrics.load_max[site.name] = float(chosen.mean(0).max() / chosen.mean())
        metrics.k_deviation[site.name] = float(chosen.sum(1).std())
