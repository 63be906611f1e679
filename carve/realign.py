"""Routers led back to the experts they chose before quantization changed their inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from carve.dialect import select
from carve.ffn import RoutedFFN
from carve.quantize_units import folds
from carve.statistics import ridge
from carve.tuning import calibrated


def agreement(got: Tensor, want: Tensor) -> float:
    """Share of tokens with exactly the same experts; masks ``[T, E]``."""
    return float((got == want).all(1).float().mean())


def margins(scores: Tensor, top_k: int, dynamic: bool) -> Tensor:
    """How far each score lies from where it decides, ``[T, E]``: positive exactly where chosen.

    The bar of a token is midway between its ``top_k``-th and next score; with ``dynamic`` it is
    zero at least.
    """
    if top_k < scores.shape[1]:
        bar = scores.topk(top_k + 1, 1).values[:, -2:].mean(1, keepdim=True)
    else:
        bar = torch.full_like(scores[:, :1], float("-inf"))
    return scores - bar.clamp_min(0.0) if dynamic else scores - bar


@dataclass(frozen=True)
class Realigned:
    """The FFN with the router that agrees most, and the `agreement` of each that was tried.

    ``agreement``: of the router as it was (``former``), after ``ridge`` and after ``kl``; empty
    where a router of this kind is left alone.
    """

    routed: RoutedFFN
    agreement: dict[str, float]


def realigned(
    routed: RoutedFFN, x: Tensor, former: Tensor, *, steps: int = 30, strength: float = 0.1
) -> Realigned:
    """Fit the router to choose on ``x`` what it chooses on ``former``; both ``[T, d]``.

    First ``min |X W' + b' - Z|^2`` by ridge regression, ``Z`` ``[T, E]`` the former scores, pulled
    towards the router that is there: towards zero it agreed less than the router it replaced. Then
    `kl_fit` from there, with ``steps``. With a threshold, it is set anew each time so that as many
    experts a token are on. Fitted on four fifths of the tokens; a router takes the place of the one
    before only if on the other fifth more tokens have the former set of experts.
    """
    if routed.router_gate is not None:
        return Realigned(routed, {})
    fit, held = folds(len(x))
    scores = routed.logits(former)
    want = select(scores, routed.top_k, routed.dynamic)
    mean = float(want[fit].sum(1).float().mean())
    found = {"former": agreement(routed.chosen(x[held]), want[held])}
    best, most = routed, found["former"]

    def offer(name: str, new: RoutedFFN) -> None:
        nonlocal best, most
        new = calibrated(new, x[fit], mean)
        found[name] = agreement(new.chosen(x[held]), want[held])
        if found[name] > most:
            best, most = new, found[name]

    w, b = ridge(x[fit], (scores - routed.logits(x))[fit], strength)
    if routed.router_bias is not None:
        b = b + routed.router_bias
    nearer = replace(routed, router=routed.router + w, router_bias=b)
    offer("ridge", nearer)
    if steps:
        offer("kl", kl_fit(nearer, x[fit], scores[fit], steps=steps))
    return Realigned(best, found)


def kl_fit(
    routed: RoutedFFN,
    x: Tensor,
    scores: Tensor,
    *,
    temperature: float = 0.2,
    steps: int = 30,
    strength: float = 1e-2,
) -> RoutedFFN:
    """The router that chooses on ``x`` most nearly what ``scores`` choose, by their divergence.

    ``min sum_t sum_e KL(B(m_te / T) | B(m'_te / T)) + pull``: ``B`` Bernoulli with a logistic
    probability, ``m`` the `margins` of the ``scores`` ``[T, E]``, ``m'`` those of ``x W' + b'``,
    and ``T`` the ``temperature`` times the spread of the scores (EAQuant, arXiv 2506.13329, takes
    the divergence of softmaxes; here experts are chosen each for itself). Scores that do not decide
    hardly count, so what the inputs have lost is spent on those that do.

    The logistic loss bends by ``X'X / 4T^2`` at the most (Boehning and Lindsay 1988), so a step
    along the gradient divided by that never overshoots, needs no rate, and all steps share one
    factorization; Nesterov's momentum on top. ``strength`` pulls towards the router that is there,
    as in `carve.statistics.ridge`. Shapes: ``x`` ``[T, d]``.
    """
    mean = x.mean(0)
    centred = torch.cat((x - mean, x.new_ones(len(x), 1)), 1)
    gram = (centred.T @ centred).double()
    pull = torch.full((len(gram),), strength * float(gram.diagonal()[:-1].mean().clamp_min(1e-30)))
    pull[-1] = 0.0
    factor = torch.linalg.cholesky(gram + pull.double().diag())
    t = temperature * float(scores.std().clamp_min(1e-12))
    want = torch.sigmoid(margins(scores, routed.top_k, routed.dynamic) / t)
    router = routed.router.float()
    bias = router @ mean
    if routed.router_bias is not None:
        bias = bias + routed.router_bias
    start = torch.cat((router, bias[:, None]), 1)
    at = former = start
    pace = 1.0
    for _ in range(steps):
        got = torch.sigmoid(margins(centred @ at.T, routed.top_k, routed.dynamic) / t)
        slope = 4.0 * t * (centred.T @ (want - got)) - pull[:, None] * (at - start).T
        new = at + torch.cholesky_solve(slope.double(), factor).T.float()
        following = 0.5 * (1.0 + (1.0 + 4.0 * pace**2) ** 0.5)
        at, former = new + (pace - 1.0) / following * (new - former), new
        pace = following
    w = former[:, :-1].contiguous()
    return replace(routed, router=w, router_bias=former[:, -1] - w @ mean)
