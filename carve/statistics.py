"""Small closed forms that several passes use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from carve.ffn import RoutedFFN
from carve.sites import FFNSite


def weights_of_size(stream: Tensor) -> Tensor:
    """``w_t = 1 / (|y_t|^2 + median |y|^2)``, scaled to mean 1.

    The next norm divides by the stream's size, so a token's error counts relative to its output,
    and a few tokens with huge outputs (the first of a sequence) do not decide everything.

    Shapes: ``stream`` ``[T, d]`` to ``[T]``.
    """
    size = stream.square().sum(1)
    w = 1.0 / (size + size.median()).clamp_min(1e-30)
    return w / w.mean()


def ridge(x: Tensor, y: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Ridge regression with intercept: weight ``[E, d]`` and bias ``[E]``, fp32.

    ``W = (X'X + s I)^-1 X'Y`` on centred ``X`` ``[T, d]`` and ``Y`` ``[T, E]``, ``s`` =
    ``strength`` times the mean diagonal of ``X'X``; the solve is in fp64.
    """
    mx, my = x.mean(0), y.mean(0)
    xc = x - mx
    gram = (xc.T @ xc).double()
    gram.diagonal().add_(strength * gram.diagonal().mean().clamp_min(1e-30))
    w = torch.linalg.solve(gram, (xc.T @ (y - my)).double()).T.float()
    return w.contiguous(), my - w @ mx


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


def refit_down(
    routed: RoutedFFN,
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    strengths: Sequence[float],
    *,
    chunk: int = 4096,
) -> Fit:
    """The down-projections and biases that fit ``target`` best, given the hidden activations.

    With ``phi_t = [h_s, h_e m_e, m, 1]`` (``h`` the hidden activations of shared and routed
    neurons, ``m`` the mask of chosen experts) the FFN is ``phi W``; the fit is
    ``W = W0 + (G + l D)^-1 (R - G W0)``, ``G = sum w phi phi'``, ``R = sum w phi y'``,
    ``D = diag G`` and its mean / 100: ridge regression pulled towards the present weights ``W0``,
    on the scale of each feature. Mean compensation is the part of it that moves the biases alone.
    Every fifth token judges the strength ``l``; all join the fit once it is known. Where the output
    is wide, the judging is on a random projection of it (Johnson and Lindenstrauss): its squared
    errors have the same expectation, and the solves for each strength cost a fraction.

    Shapes: ``x`` ``[T, d]``, ``target`` ``[T, d_out]``, ``weight`` ``[T]``.
    """
    shared, experts = routed.shared_size, routed.num_experts
    size = shared + experts * routed.expert_size
    merged = routed.merged()
    parts = [torch.arange(i, len(x), 5) for i in range(5)]
    gram, right = [], []
    for index in (torch.cat(parts[:-1]), parts[-1]):
        g = x.new_zeros((size + experts + 1,) * 2)
        r = x.new_zeros((size + experts + 1, target.shape[1]))
        for rows in torch.split(index, chunk):
            mask = routed.chosen(x[rows]).float()
            h = merged.hidden(x[rows]).float()
            h[:, shared:] *= mask.repeat_interleave(routed.expert_size, 1)
            phi = torch.cat((h, mask, torch.ones(len(rows), 1)), 1)
            scaled = phi * weight[rows, None]
            g += scaled.T @ phi
            r += scaled.T @ target[rows]
        gram.append(g)
        right.append(r)
    start = torch.zeros_like(right[0])
    start[:size] = merged.down.float().T
    if routed.expert_bias is not None:
        start[size:-1] = routed.expert_bias
    if routed.output_bias is not None:
        start[-1] = routed.output_bias
    view = _projection(target.shape[1])

    def seen(t: Tensor) -> Tensor:
        return t if view is None else t @ view

    start_seen, fit_seen, held_seen = seen(start), seen(right[0]), seen(right[1])
    judged = torch.split(parts[-1], chunk)
    scale = sum(float((weight[r, None] * seen(target[r]).square()).sum()) for r in judged)

    def held_out(w: Tensor) -> float:
        value = (w * (gram[1] @ w - 2 * held_seen)).double().sum() + scale
        return float(value) / max(scale, 1e-30)

    def solve(g: Tensor, r: Tensor, origin: Tensor, strength: float) -> Tensor:
        a = g.double()
        pull = a.diagonal() + 0.01 * a.diagonal().mean()
        a.diagonal().add_(strength * pull + 1e-9 * a.diagonal().mean())
        change = torch.cholesky_solve((r - g @ origin).double(), torch.linalg.cholesky(a))
        return origin + change.float()

    before = held_out(start_seen)
    errors = {s: held_out(solve(gram[0], fit_seen, start_seen, s)) for s in strengths}
    best = min(errors, key=errors.__getitem__)
    if not errors[best] < before:
        return Fit(routed, before, before, 0.0)
    w = solve(gram[0] + gram[1], right[0] + right[1], start, best)
    down = w[:size].T
    new = replace(
        routed,
        shared_down=None
        if routed.shared_down is None
        else down[:, :shared].to(routed.shared_down.dtype).contiguous(),
        expert_down=down[:, shared:]
        .unflatten(1, (experts, -1))
        .transpose(0, 1)
        .to(routed.expert_down.dtype)
        .contiguous(),
        expert_bias=w[size:-1].contiguous(),
        output_bias=w[-1].contiguous(),
    )
    return Fit(new, before, errors[best], best)
