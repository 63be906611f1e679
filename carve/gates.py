"""Closed forms for skip gates: bridges, scores and thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from carve.sites import Gate
from carve.statistics import ridge

_FOLDS = 5
BRIDGES = ("auto", "identity", "mean", "low_rank", "adapter")


@dataclass(frozen=True)
class SkipLesson:
    """What a skipped token of a block should get, fp32, without the tokens that always run.

    ``x`` ``[T, d]``: the block's input; ``target`` ``[T, d_out]``: what the block should add;
    ``y`` ``[T, d_out]``: what it does add; ``weight`` ``[T]``: `carve.statistics.weights_of_size`;
    ``sequence`` ``[T]``: which sequence a token is of. Neighbours know of one another, so what is
    held out is whole sequences: with single tokens held out, a gate skipped five points less on
    other text than it was set to.
    """

    x: Tensor
    target: Tensor
    y: Tensor
    weight: Tensor
    sequence: Tensor

    def fold(self) -> Tensor:
        """``[T]`` 0 to 4 by sequence, or by token where there are fewer than ten sequences."""
        if int(self.sequence.max()) < 9:
            return torch.arange(len(self.x)) % _FOLDS
        return self.sequence % _FOLDS

    def rows(self, index: Tensor) -> SkipLesson:
        """Some of the tokens."""
        parts = (self.x, self.target, self.y, self.weight, self.sequence)
        return SkipLesson(*(p[index] for p in parts))


def reduced_rank(
    x: Tensor, y: Tensor, weight: Tensor, rank: int, strength: float = 1e-3
) -> tuple[Tensor, Tensor, Tensor]:
    """The best ``y = C A x + c`` of a given rank: weighted reduced-rank ridge regression.

    With ``W`` the ridge solution on centred data and ``G = sum w x x'``, ``C`` are the ``rank``
    leading eigenvectors of ``W G W'`` and ``A = C' W`` (Izenman 1975).

    Shapes: ``x`` ``[T, d]``, ``y`` ``[T, d_out]``, ``weight`` ``[T]``; gives ``A`` ``[r, d]``,
    ``C`` ``[d_out, r]``, ``c`` ``[d_out]``, fp32.
    """
    share = (weight / weight.sum())[:, None]
    mx, my = (share * x).sum(0), (share * y).sum(0)
    root = share.sqrt()
    xc, yc = (x - mx) * root, (y - my) * root
    w, _ = ridge(xc, yc, strength)
    fitted = xc @ w.T
    _, vectors = torch.linalg.eigh((fitted.T @ fitted).double())
    c = vectors[:, -min(rank, *w.shape) :].float()
    a = c.T @ w
    return a.contiguous(), c.contiguous(), my - c @ (a @ mx)


def skip_error(gate: Gate, lesson: SkipLesson) -> Tensor:
    """``[T]`` what skipping adds to a token's squared error, weighted; at least zero."""
    missed = (lesson.target - gate.bridge(lesson.x)).square().sum(1)
    kept = (lesson.target - lesson.y).square().sum(1)
    return lesson.weight * (missed - kept).clamp_min(0.0)


def with_rate(gate: Gate, x: Tensor, rate: float) -> Gate:
    """The gate with its threshold moved so that it skips ``rate`` of the tokens ``x``."""
    return _with_threshold(gate, gate.scores(x), rate)


def _with_threshold(gate: Gate, scores: Tensor, rate: float) -> Gate:
    """The gate with the ``rate``-quantile of ``scores`` taken off its own."""
    count = round(rate * len(scores))
    if count <= 0:
        shift = float(scores.min()) - 1.0
    elif count >= len(scores):
        shift = float(scores.max()) + 1e-6
    else:  # between two scores, so that exactly `count` are below
        low, high = (scores.kthvalue(count + i).values for i in (0, 1))
        shift = float((low + high) / 2)
    return replace(gate, bias=gate.bias - shift, skip=count / max(1, len(scores)))


def fit_scores(gate: Gate, lesson: SkipLesson, error: Tensor, strength: float) -> Gate:
    """Linear scores regressed to the logarithm of what skipping costs a token.

    A threshold on them is a logistic gate in all but its scale; the regression needs no rate to be
    chosen before and orders all tokens.
    """
    floor = 1e-6 * error.mean().clamp_min(1e-30)
    label = (error + floor).log()
    w, b = ridge(lesson.x, label[:, None], strength)
    return replace(gate, weight=w[0].contiguous(), bias=b)


def fit_gate(
    lesson: SkipLesson,
    rate: float,
    *,
    kind: str = "auto",
    rank: int = 32,
    always: int = 2,
    strength: float = 1e-2,
    rounds: int = 2,
    label: Tensor | None = None,
) -> Gate:
    """A gate that skips ``rate`` of the tokens, and the bridge for those it skips.

    Bridge and scores are fitted in turn: the bridge on the tokens that the scores skip, the scores
    to what the bridge leaves. Every fifth sequence decides between an identity (nothing is added),
    the mean and the low-rank bridge: the simplest whose error on the skipped tokens is within 5 %
    of the least. The scores are then fitted on all sequences, and the threshold is a quantile of
    each fold's scores by the fit to the others.

    Args:
        lesson: all tokens that may be skipped.
        rate: share of tokens to skip, in [0, 1].
        kind: one of `BRIDGES`; ``adapter`` is trained by the caller and fitted as ``low_rank``.
        rank: width of the bridge.
        always: positions below it always run.
        strength: ridge strength of the scores, relative.
        rounds: turns.
        label: ``[T]`` what skipping a token costs, where it was measured otherwise.
    """
    fold = lesson.fold()
    held, fit = lesson.rows(fold == _FOLDS - 1), lesson.rows(fold != _FOLDS - 1)
    cost = None if label is None else label[fold != _FOLDS - 1]
    chosen = torch.ones(len(fit.x), dtype=torch.bool)
    gate = _empty(lesson.x.shape[1], always)
    kinds = {"auto": ("identity", "mean", "low_rank"), "adapter": ("low_rank",)}.get(kind, (kind,))
    for _ in range(rounds):
        part = fit.rows(chosen)
        scored = []
        for each in (_bridge(gate, part, k, rank) for k in kinds):
            error = skip_error(each, fit) if cost is None else cost
            scored.append(with_rate(fit_scores(each, fit, error, strength), held.x, rate))
        gate = _simplest(scored, held)
        below = gate.scores(fit.x) <= 0
        # Too few tokens tell nothing about a bridge.
        chosen = below if int(below.sum()) >= min(len(below), 4 * rank) else chosen
    error = skip_error(gate, lesson) if label is None else label
    scores = torch.empty(len(lesson.x))
    for i in range(_FOLDS):
        mine = fold == i
        other = fit_scores(gate, lesson.rows(~mine), error[~mine], strength)
        scores[mine] = other.scores(lesson.x[mine])
    return _with_threshold(fit_scores(gate, lesson, error, strength), scores, rate)


def skipped_error(gate: Gate, lesson: SkipLesson) -> float:
    """Share of the block's weighted squared output that its skipped tokens lose."""
    error = skip_error(gate, lesson) * (gate.scores(lesson.x) <= 0)
    whole = (lesson.weight * lesson.target.square().sum(1)).sum()
    return float(error.sum() / whole.clamp_min(1e-30))


def _simplest(gates: Sequence[Gate], held: SkipLesson) -> Gate:
    errors = [skipped_error(g, held) for g in gates]
    return next(g for g, e in zip(gates, errors, strict=True) if e <= 1.05 * min(errors) + 1e-12)


def _empty(width: int, always: int) -> Gate:
    return Gate(torch.zeros(width), torch.zeros(1), None, None, None, None, always)


def _bridge(gate: Gate, lesson: SkipLesson, kind: str, rank: int) -> Gate:
    """The gate with a bridge of that kind, fitted on the lesson's tokens."""
    bare = replace(gate, bridge_in=None, bridge_gate=None, bridge_out=None, bridge_bias=None)
    if kind == "identity":
        return bare
    share = (lesson.weight / lesson.weight.sum())[:, None]
    if kind == "mean":
        return replace(bare, bridge_bias=(share * lesson.target).sum(0))
    a, c, bias = reduced_rank(lesson.x, lesson.target, lesson.weight, rank)
    return replace(bare, bridge_in=a, bridge_out=c, bridge_bias=bias)
