"""How held-out tokens are routed: load of the experts, and how sure the routers are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from carve.dialect import select
from carve.ffn import RoutedFFN
from carve.program import Program
from carve.sites import FFNSite

TOKENS = 4_096
"""Tokens a layer whose scores are kept; loads are of all tokens."""


class RouterStats:
    """Counts by routed FFN, filled a batch at a time."""

    def __init__(self, program: Program) -> None:
        self._routed = {s.name: s.routed for s in program.carved if s.routed is not None}
        self._taken = {n: torch.zeros(r.num_experts) for n, r in self._routed.items()}
        self._seen = dict.fromkeys(self._routed, 0)
        self._scores: dict[str, list[Tensor]] = {n: [] for n in self._routed}
        self._kept = dict.fromkeys(self._routed, 0)

    def add(self, site: FFNSite, x: Tensor) -> Tensor:
        """Count the tokens ``x`` ``[T, d]``; gives the mask ``[T, E]`` of the experts they take."""
        routed = self._routed[site.name]
        scores = routed.logits(x)
        chosen = routed_mask(scores, routed)
        self._taken[site.name] += chosen.sum(0)
        self._seen[site.name] += len(x)
        room = TOKENS - self._kept[site.name]
        if room > 0:
            kept = scores[:room].float()
            self._scores[site.name].append(kept)
            self._kept[site.name] += len(kept)
        return chosen

    def of(self, name: str) -> dict[str, Any]:
        """The figures of one routed FFN, for JSON.

        ``load``: by expert, the share of tokens that take it, with ``load_min`` and ``load_max``.
        ``balance``: entropy of the load over that of equal loads, in [0, 1]. ``entropy``: mean over
        tokens of ``H(softmax(z / s)) / log E`` with ``z`` ``[E]`` a token's scores and ``s`` their
        standard deviation over tokens and experts: 0 where the router is sure, 1 where all experts
        are alike to it. ``margin``: by percentile over tokens, see `margins`, in units of ``s``.
        ``experts_per_token``: mean and percentiles of how many a token takes.
        """
        routed = self._routed[name]
        if not self._seen[name]:
            return {}
        load = self._taken[name] / self._seen[name]
        scores = torch.cat(self._scores[name])
        spread = scores.std().clamp_min(1e-12) if scores.numel() > 1 else torch.tensor(1.0)
        p = (scores / spread).log_softmax(-1)
        count = routed.num_experts
        even = math.log(count) if count > 1 else 1.0
        margin = margins(scores, routed) / spread
        taken = routed_mask(scores, routed).sum(1).float()
        return {
            "load": load.tolist(),
            "load_min": float(load.min()),
            "load_max": float(load.max()),
            "balance": float(_entropy(load / load.sum().clamp_min(1e-30)) / even),
            "entropy": float((-(p.exp() * p).sum(1)).mean() / even),
            "margin": _percentiles(margin),
            "experts_per_token": {"mean": float(load.sum()), **_percentiles(taken, (5, 95))},
        }


def routed_mask(scores: Tensor, routed: RoutedFFN) -> Tensor:
    """The experts ``[T, E]`` that tokens with these scores take."""
    return select(scores, routed.top_k, routed.dynamic)


def margins(scores: Tensor, routed: RoutedFFN) -> Tensor:
    """``[T]`` lowest score of a token's experts less the highest of the others.

    With a threshold (``dynamic``), which is 0, a token of no expert or of all has its distance from
    that; without one it has no margin and is left out.
    """
    chosen = routed_mask(scores, routed)
    low = scores.masked_fill(~chosen, torch.inf).amin(1)
    high = scores.masked_fill(chosen, -torch.inf).amax(1)
    if routed.dynamic:
        low = torch.where(low.isinf(), 0.0, low)
        high = torch.where(high.isinf(), 0.0, high)
    found = low - high
    return found[found.isfinite()]


def _entropy(p: Tensor) -> Tensor:
    return -(p * p.clamp_min(1e-30).log()).sum()


def _percentiles(values: Tensor, which: Sequence[int] = (5, 50, 95)) -> dict[str, float | None]:
    if not len(values):
        return dict.fromkeys((f"p{q}" for q in which), None)
    return {f"p{q}": float(values.quantile(q / 100)) for q in which}
