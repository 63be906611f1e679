"""Analytical router: one representative neuron an expert, nothing fitted."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from carve.passbase import Context, ContractError, Pass, need_notes, need_routed
from carve.program import Program
from carve.sites import FFNSite
from carve.statistics import expert_energy


@dataclass(frozen=True)
class RouteAnalyticalConfig:
    """Settings of `RouteAnalytical`. ``tokens``: calibration tokens to find representatives."""

    tokens: int = 4096


@dataclass(frozen=True)
class RouteAnalyticalMetrics:
    """``agreement``: by site, share of the oracle's experts (largest norms) that are chosen."""

    agreement: dict[str, float]


class RouteAnalytical(Pass[RouteAnalyticalConfig]):
    """CMoE's router (arXiv 2502.04416, section 3.3).

    The representative of an expert is the member whose contribution is nearest the group's mean
    contribution over tokens; the score is its hidden activation ``act(x W_g,r) * (x W_u,r)`` (plain
    FFNs: ``x W_u,r``, which orders as the activation does where that is monotone). The ``top_k``
    largest scores are on, each with weight 1.
    """

    name = "route_analytical"

    def requires(self, program: Program, context: Context) -> None:
        """Needs carved sites."""
        need_notes(program, "carve", self.name)

    def call(self, program: Program, context: Context) -> RouteAnalyticalMetrics:
        """Set the router of every site."""
        agreement = {}
        for site in context.progress(program.carved, self.name):
            agreement[site.name] = self._route(program, site, context)
        return RouteAnalyticalMetrics(agreement)

    def _route(self, program: Program, site: FFNSite, context: Context) -> float:
        routed = need_routed(site, self.name)
        dense = site.dense
        if dense.gate_bias is not None:
            raise ContractError(
                "contract", f"{site.name}: the analytical router takes no gate bias"
            )
        _, groups = program.notes["carve"][site.name]
        x = context.inputs.of(site, self.config.tokens)
        c = dense.hidden(x).abs() * dense.down.float().norm(dim=0)
        member = c[:, groups.flatten()].view(len(x), *groups.shape)
        distance = (member - member.mean(2, keepdim=True)).square().sum(0)
        chosen = groups.gather(1, distance.argmin(1, keepdim=True)).squeeze(1)
        top_k = context.split(site).top_k
        new = replace(
            routed,
            router=dense.up[chosen].float(),
            router_bias=None if dense.up_bias is None else dense.up_bias[chosen].float(),
            router_gate=None if dense.gate is None else dense.gate[chosen].float(),
            top_k=top_k,
        )
        program.set_routed(site, new)
        norm = expert_energy(site, groups, x, centred=False)
        hit = torch.zeros_like(norm).scatter_(1, norm.topk(top_k, 1).indices, 1.0)
        return float(hit.gather(1, new.logits(x).topk(top_k, 1).indices).mean())
