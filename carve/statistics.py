"""Small closed forms that several passes use."""

from __future__ import annotations

import torch
from torch import Tensor

from carve.program import FFNSite


def token_weights(output: Tensor) -> Tensor:
    """``w_t = 1 / (|y_t|^2 + median |y|^2)``, scaled to mean 1.

    The next norm divides by the stream's size, so a token's error counts relative to its output,
    and a few tokens with huge outputs (the first of a sequence) do not decide everything.

    Shapes: ``output`` ``[T, d]`` to ``[T]``.
    """
    size = output.square().sum(1)
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
