"""What the split form is laid out by: how hot experts are, predictors, and what a cache finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from carve.arithmetic import as_emitted
from carve.calibration import Batch, limit_batches
from carve.dialect import select
from carve.emit.split import Predictor
from carve.executor import Pauses
from carve.ffn import RoutedFFN
from carve.placement import locality
from carve.program import Program
from carve.sites import AtSite
from carve.statistics import ridge

_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
_SHARES = (0.25, 0.5, 0.75)
_SEGMENT = 16
_MOST_BYTES = 1 << 29
_MOST_TOKENS = 16_384


@dataclass(frozen=True)
class Watched:
    """What routers saw and did, by carved site in the order of the graph.

    ``chosen`` bool ``[T, E]``, of a token that a gate leads round the FFN none; ``scores``
    ``[T, E]`` fp32; ``streams`` ``[T, d]`` bf16 or fp32, the stream after the FFN divided by its
    root mean square, None where the FFN adds to none, or not for every token: a runtime has only
    its experts' sums to make it of.
    """

    chosen: list[np.ndarray]
    scores: list[Tensor]
    streams: list[Tensor | None]


@dataclass(frozen=True)
class LocalityMetrics:
    """Local routing consistency on held-out tokens, see `carve.placement.locality`.

    By share of the experts that a cache holds: ``hit_rate`` and ``bytes_per_token`` of each policy.
    ``srp`` and ``sch`` at runs of 16 tokens; ``recall`` and ``precision`` of the predictors, by
    site, where there is one.
    """

    hit_rate: dict[str, dict[str, float]]
    bytes_per_token: dict[str, dict[str, float]]
    srp: float
    sch: float
    recall: dict[str, float]
    precision: dict[str, float]
    tokens: int


def watch(program: Program, batches: Sequence[Batch]) -> Watched:
    """Run the program, in the target's arithmetic, over as many tokens as memory is spared for."""
    sites = program.carved
    width = max(int(s.routed.expert_up.shape[-1]) for s in sites if s.routed)
    tokens = min(_MOST_TOKENS, _MOST_BYTES // (2 * width * len(sites)))
    dtype = torch.float32 if 4 * tokens * width * len(sites) <= _MOST_BYTES else torch.bfloat16
    found: dict[str, list[tuple[Tensor, Tensor, Tensor | None]]] = {s.name: [] for s in sites}
    for batch in limit_batches(batches, tokens):

        def keep(at: AtSite, batch: Batch = batch) -> Tensor:
            y, site = at.y, at.block
            assert y is not None
            r: RoutedFFN = site.routed  # type: ignore[attr-defined]
            scores = r.logits(batch.counted(at.x))
            chosen = select(scores, r.top_k, r.dynamic)
            stream = None
            if site.gate is not None:
                position = batch.inputs[program.inputs.index("position_ids")]
                running = site.gate.running(at.x, position)
                chosen &= batch.counted(running[..., None])
                y = site.gate(y, at.x, position)
            elif at.residual is not None:
                h = batch.counted(at.residual).float() + batch.counted(y).float()
                h = h / (h.square().mean(1, keepdim=True) + 1e-6).sqrt()
                stream = h.to(dtype)
            found[site.name].append((scores, chosen, stream))
            return y

        with torch.no_grad(), as_emitted(program):
            program.answered(
                *batch.inputs, pauses=Pauses(after=sites), answer=keep, only_first=True
            )
    streams: list[Tensor | None] = []
    for s in sites:
        parts = [h for _, _, h in found[s.name] if h is not None]
        streams.append(torch.cat(parts) if parts else None)
    return Watched(
        [torch.cat([c for _, c, _ in found[s.name]]).numpy() for s in sites],
        [torch.cat([z for z, _, _ in found[s.name]]) for s in sites],
        streams,
    )


def hotness(watched: Watched) -> list[list[float]]:
    """By site and expert, the share of tokens that chose it."""
    return [c.mean(0).tolist() for c in watched.chosen]


def _guess(p: Predictor, stream: Tensor, r: RoutedFFN) -> np.ndarray:
    scores = stream.float() @ torch.from_numpy(p.weight).T + torch.from_numpy(p.bias)
    return select(scores, r.top_k, r.dynamic).numpy()


def fit_predictors(program: Program, watched: Watched) -> dict[int, Predictor]:
    """Ridge regressions from the stream before a site's attention to the site's router scores.

    Read-ME (arXiv 2410.19123) and SmallThinker (arXiv 2507.20984) route from there. The strength is
    the one with the best recall on the last eighth of the tokens.
    """
    found = {}
    for i in range(1, len(program.carved)):
        stream, r = watched.streams[i - 1], program.carved[i].routed
        if stream is not None and r is not None:
            found[i] = _fit(stream.float(), watched.scores[i].float(), watched.chosen[i], r)
    return found


def _fit(x: Tensor, y: Tensor, chosen: np.ndarray, r: RoutedFFN) -> Predictor:
    held = max(1, len(x) // 8)

    def fit(count: int, strength: float) -> Predictor:
        weight, bias = ridge(x[:count], y[:count], strength)
        return Predictor(weight.numpy(), bias.numpy())

    def judged(strength: float) -> float:
        guess = _guess(fit(len(x) - held, strength), x[-held:], r)
        return locality.recall([guess], [chosen[-held:]])

    return fit(len(x), max(_STRENGTHS, key=judged))


def measure_locality(
    program: Program,
    watched: Watched,
    predictors: dict[int, Predictor],
    sizes: Sequence[Sequence[int]],
) -> LocalityMetrics:
    """Figures on tokens that nothing was fitted to; ``sizes``: bytes by site and expert."""
    chosen = watched.chosen
    rates: dict[str, dict[str, float]] = {}
    read: dict[str, dict[str, float]] = {}
    for share in _SHARES:
        key = f"{share:.0%}"
        rates[key] = {p: locality.hit_rate(chosen, share, p) for p in locality.POLICIES}
        read[key] = {
            p: locality.bytes_per_token(chosen, share, p, sizes) for p in locality.POLICIES
        }
    recalls, precisions = {}, {}
    for i, p in predictors.items():
        site, stream = program.carved[i], watched.streams[i - 1]
        if stream is not None and site.routed is not None:
            guess = _guess(p, stream, site.routed)
            recalls[site.name] = locality.recall([guess], [chosen[i]])
            precisions[site.name] = locality.recall([chosen[i]], [guess])
    return LocalityMetrics(
        rates,
        read,
        locality.srp(chosen, _SEGMENT),
        locality.sch(chosen, _SEGMENT),
        recalls,
        precisions,
        len(chosen[0]),
    )
