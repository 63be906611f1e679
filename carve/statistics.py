"""Small closed forms that several passes use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from carve.factor import factored, solved
from carve.ffn import RoutedFFN
from carve.sites import FFNSite
from carve.storable import storable

STRIP = 256
"""Rows of a Gram matrix that are computed together."""


def weights_of_size(stream: Tensor) -> Tensor:
    """``w_t = 1 / (|y_t|^2 + median |y|^2)``, scaled to mean 1.

    The next norm divides by the stream's size, so a token's error counts relative to its output,
    and a few tokens with huge outputs (the first of a sequence) do not decide everything.

    Shapes: ``stream`` ``[T, d]`` to ``[T]``.
    """
    size: Tensor = torch.linalg.vector_norm(stream, dim=1).square()
    w = 1.0 / (size + size.median()).clamp_min(1e-30)
    return w / w.mean()


def add_gram(total: Tensor, x: Tensor, scaled: Tensor) -> None:
    """``total += scaled' x`` where that is symmetric: what is on and above the diagonal.

    In strips, so that little of the lower half is computed; `mirror` fills it when all is added.
    Shapes: ``x`` and ``scaled`` ``[T, K]``, ``total`` ``[K, K]``.
    """
    for i in range(0, len(total), STRIP):
        strip = slice(i, i + STRIP)
        total[strip, i:].addmm_(scaled[:, strip].T, x[:, i:])


def mirror(total: Tensor) -> Tensor:
    """``total`` with its lower half set to the upper one, in place."""
    for i in range(0, len(total), STRIP):
        strip, below = slice(i, i + STRIP), slice(i + STRIP, None)
        square = total[strip, strip]
        square.copy_(square.triu() + square.triu(1).T)
        total[below, strip] = total[strip, below].T
    return total


def moments(
    features: Callable[[Tensor], Tensor],
    y: Tensor,
    weight: Tensor,
    chunks: Sequence[Tensor],
    width: int,
) -> tuple[Tensor, Tensor]:
    """``X'wX`` ``[K, K]`` and ``X'wY`` ``[K, N]`` over the tokens of ``chunks``.

    ``features`` gives ``X`` of some tokens, ``K`` = ``width`` columns; ``y`` is ``[T, N]``,
    ``weight`` ``[T]``.
    """
    gram, cross = y.new_zeros(width, width), y.new_zeros(width, y.shape[1])
    for rows in chunks:
        x = features(rows)
        scaled = x * weight[rows, None]
        add_gram(gram, x, scaled)
        cross.addmm_(scaled.T, y[rows])
    return mirror(gram), cross


def ridge(
    x: Tensor, y: Tensor, strength: float, *, intercept: bool = True
) -> tuple[Tensor, Tensor]:
    """Ridge regression: weight ``[E, d]`` and bias ``[E]``, fp32.

    ``W = (X'X + s I)^-1 X'Y`` on ``X`` ``[T, d]`` and ``Y`` ``[T, E]``, ``s`` = ``strength`` times
    the mean diagonal of ``X'X``; the solve is in fp64. With an ``intercept`` both are centred, else
    the bias is zero.
    """
    mx, my = (x.mean(0), y.mean(0)) if intercept else (x.new_zeros(()), y.new_zeros(y.shape[1]))
    xc = x - mx
    gram = (xc.T @ xc).double()
    gram.diagonal().add_(strength * gram.diagonal().mean().clamp_min(1e-30))
    w = torch.linalg.solve(gram, (xc.T @ (y - my)).double()).T.float()
    return w.contiguous(), my - w @ mx if intercept else my


def expert_energy(
    site: FFNSite, groups: Tensor, x: Tensor, *, centred: bool, chunk: int = 4096
) -> Tensor:
    """Squared norm of each expert's contribution on each token, ``[T, E]`` fp32.

    ``|E_e(x_t)|^2``, or ``|E_e(x_t) - mean E_e|^2`` when ``centred``; ``groups`` ``[E, m]`` are the
    experts' neurons in the dense FFN.
    """
    down = [site.dense.down[:, g].float() for g in groups]
    mean = site.dense.hidden(x[:: max(1, len(x) // 8192)]).mean(0) if centred else 0.0
    parts = []
    for part in torch.split(x, chunk):
        h = site.dense.hidden(part) - mean
        norms = [(h[:, g] @ w.T).square().sum(1) for g, w in zip(groups, down, strict=True)]
        parts.append(torch.stack(norms, 1))
    return torch.cat(parts)


@storable
@dataclass(frozen=True)
class Fit:
    """A refitted FFN: relative weighted errors on held-out tokens before and after, and strength.

    ``strength`` is 0 where the weights were better left as they are.
    """

    routed: RoutedFFN
    before: float
    after: float
    strength: float


_JUDGED_WIDTH = 256


def _projection(width: int) -> Tensor | None:
    """A random projection ``[width, 256]`` that keeps squared lengths on average; None if narrow.

    Its relative error on the sum over many tokens and columns is far below the differences between
    strengths that matter.
    """
    if width <= 2 * _JUDGED_WIDTH:
        return None
    generator = torch.Generator().manual_seed(width)
    view: Tensor = torch.randn(width, _JUDGED_WIDTH, generator=generator) / _JUDGED_WIDTH**0.5
    return view


@dataclass(frozen=True)
class Pulled:
    """What `pulled_ridge` found; errors are relative and on held-out tokens.

    ``strength`` is 0, and ``solution`` the start, where the start was better left as it is.
    """

    solution: Tensor
    before: float
    after: float
    strength: float


def pulled_ridge(
    gram: Sequence[Tensor],
    right: Sequence[Tensor],
    start: Tensor,
    strengths: Sequence[float],
    size: Callable[[Callable[[Tensor], Tensor]], float],
) -> Pulled:
    """Ridge regression pulled towards ``start``: ``W = W0 + (G + l D)^-1 (R - G W0)``.

    ``D = diag G`` and its mean / 100. The strength ``l`` is the one of least error on held-out
    tokens, which join the fit once it is known. Where the output is wide, the judging is on a
    random projection of it (Johnson and Lindenstrauss): its squared errors have the same
    expectation, and the solves for each strength cost a fraction.

    Args:
        gram: ``X'X`` ``[K, K]`` of fitted and of held-out tokens, weighted; the first becomes the
            sum of both.
        right: ``X'Y`` ``[K, N]`` of both, as well.
        start: ``W0`` ``[K, N]``.
        strengths: tried.
        size: weighted ``|Y|^2`` of the held-out tokens, seen through the function it is given.
    """
    view = _projection(start.shape[1])

    def seen(t: Tensor) -> Tensor:
        return t if view is None else t @ view

    start_seen, fit_seen, held_seen = seen(start), seen(right[0]), seen(right[1])
    scale = size(seen)

    def held_out(w: Tensor) -> float:
        value = (w * (gram[1] @ w - 2 * held_seen)).double().sum() + scale
        return float(value) / max(scale, 1e-30)

    before = held_out(start_seen)
    errors = {s: held_out(pulled_towards(start_seen, gram[0], fit_seen, s)) for s in strengths}
    best = min(errors, key=errors.__getitem__)
    # In place: the largest matrices that there are.
    every, sums = gram[0].add_(gram[1]), right[0].add_(right[1])
    if not errors[best] < before:
        return Pulled(start, before, before, 0.0)
    solution = pulled_towards(start, every, sums, best)
    return Pulled(solution, before, errors[best], best)


def pulled_towards(start: Tensor, gram: Tensor, right: Tensor, strength: float) -> Tensor:
    """``W0 + (G + l D)^-1 (R - G W0)``, see `pulled_ridge`.

    In fp32, as ``G`` is, for the pull keeps the matrix far from singular; where it cannot be
    factored all the same, in fp64.
    """
    diagonal = gram.diagonal()
    mean = diagonal.mean()
    pull = strength * (diagonal + 0.01 * mean) + 1e-9 * mean
    wanted = torch.addmm(right, gram, start, alpha=-1)

    def pulled(dtype: torch.dtype) -> Tensor:
        a = gram.to(dtype, copy=True)
        a.diagonal().add_(pull)
        return a

    lower, done = factored(pulled(torch.float32))
    if not done:
        lower, wanted = torch.linalg.cholesky(pulled(torch.float64)), wanted.double()
    return start + solved(lower, wanted).float()


def refit_down(
    routed: RoutedFFN,
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    strengths: Sequence[float],
    *,
    biases: bool = True,
    chunk: int = 1024,
) -> Fit:
    """The down-projections and biases that fit ``target`` best, given the hidden activations.

    With ``phi_t = [h_s, h_e m_e, m, 1]`` (``h`` the hidden activations of shared and routed
    neurons, ``m`` the mask of chosen experts) the FFN is ``phi W``; the fit is `pulled_ridge` with
    ``G = sum w phi phi'`` and ``R = sum w phi y'``, towards the present weights. Mean compensation
    is the part of it that moves the biases alone. Every fifth token judges the strength. Without
    ``biases`` it is ``phi_t = [h_s, h_e m_e]``, for engines that hold none.

    Shapes: ``x`` ``[T, d]``, ``target`` ``[T, d_out]``, ``weight`` ``[T]``.
    """
    merged = routed.merged()
    parts = [torch.arange(i, len(x), 5) for i in range(5)]
    start = down_matrix(routed)
    size = len(start) if biases else routed.intermediate_size
    start = start[:size]
    gram, right = [], []

    def features(rows: Tensor) -> Tensor:
        h = merged.hidden(x[rows]).float()
        return down_features(h, routed.chosen(x[rows]), routed)[:, :size]

    for index in (torch.cat(parts[:-1]), parts[-1]):
        g, r = moments(features, target, weight, torch.split(index, chunk), size)
        gram.append(g)
        right.append(r)
    judged = torch.split(parts[-1], chunk)
    fit = pulled_ridge(
        gram,
        right,
        start,
        strengths,
        lambda view: sum(float((weight[r, None] * view(target[r]).square()).sum()) for r in judged),
    )
    if fit.strength == 0.0:
        return Fit(routed, fit.before, fit.before, 0.0)
    new = with_down_matrix(routed, fit.solution)
    return Fit(new, fit.before, fit.after, fit.strength)


def down_features(hidden: Tensor, chosen: Tensor, routed: RoutedFFN) -> Tensor:
    """``[h_s, h_e m_e, m, 1]``, which `down_matrix` maps to the FFN's result.

    Shapes: ``hidden`` ``[T, s + E m]`` (shared neurons first), ``chosen`` ``[T, E]``.
    """
    mask = chosen.to(hidden.dtype)
    h = hidden.clone()
    h[:, routed.shared_size :] *= mask.repeat_interleave(routed.expert_size, 1)
    return torch.cat((h, mask, torch.ones(len(h), 1, dtype=h.dtype)), 1)


def down_matrix(routed: RoutedFFN) -> Tensor:
    """All down-projections and biases as one matrix fp32 ``[s + E m + E + 1, d_out]``."""
    down = routed.merged().down.float().T
    bias = down.new_zeros(routed.num_experts + 1, down.shape[1])
    if routed.expert_bias is not None:
        bias[:-1] = routed.expert_bias
    if routed.output_bias is not None:
        bias[-1] = routed.output_bias
    return torch.cat((down, bias))


def with_down_matrix(routed: RoutedFFN, matrix: Tensor) -> RoutedFFN:
    """The FFN with the down-projections and biases of a `down_matrix`, or of its first rows alone.

    Without the rows of biases the FFN has none.
    """
    shared, experts = routed.shared_size, routed.num_experts
    size = shared + experts * routed.expert_size
    down, biases = matrix[:size].T, matrix[size:]
    return replace(
        routed,
        shared_down=None
        if routed.shared_down is None
        else down[:, :shared].to(routed.shared_down.dtype).contiguous(),
        expert_down=down[:, shared:]
        .unflatten(1, (experts, -1))
        .transpose(0, 1)
        .to(routed.expert_down.dtype)
        .contiguous(),
        expert_bias=biases[:-1].contiguous() if len(biases) else None,
        output_bias=biases[-1].contiguous() if len(biases) else None,
    )
