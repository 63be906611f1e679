"""Rounding a matrix so that its products change least: GPTQ, then descent on levels and scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from carve.factor import factored
from carve.grid import BLOCK

_GPTQ_PANEL, _DESCENT_PANEL = 64, 256
"""Columns kept up one by one; the rest of a matrix follows a panel at a time."""
_WIDE = 1024
"""Columns above which half the sweeps are done: they cost by the square and gain little."""
_CACHED = 1 << 16
"""Weights that scales are tried on at a time."""
_TRIANGLE = 256
"""Columns of a triangle that is inverted in one piece."""
_SHRINK = tuple(1.0 - 0.05 * i for i in range(9))


@dataclass(frozen=True)
class Method:
    """How `solve` rounds.

    ``search``: choose scales by weighted squared error instead of the block's extreme; ``gptq``:
    feed each column's error to the columns after it; ``sweeps``: rounds of coordinate descent on
    levels and scales; ``damping``: added to the Gram matrix's diagonal, times its mean.
    """

    search: bool = True
    gptq: bool = True
    sweeps: int = 4
    damping: float = 0.01

    def sweeps_of(self, columns: int) -> int:
        """Sweeps that a matrix of so many columns gets."""
        return -(-self.sweeps // 2) if columns > _WIDE else self.sweeps


RTN = Method(search=False, gptq=False, sweeps=0)
GPTQ = Method(search=False, gptq=True, sweeps=0)


def error_of(weight: Tensor, rounded: Tensor, gram: Tensor) -> Tensor:
    """``tr((W - W') G (W - W')')`` by matrix: ``[B]`` for ``[B, N, K]`` and ``[B, K, K]``."""
    off = weight - rounded
    return ((off @ gram) * off).sum((-2, -1))


def solve(
    weight: Tensor,
    gram: Tensor,
    bits: Tensor,
    method: Method | None = None,
    block: int = BLOCK,
    shrink: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Levels and scales that keep ``X W'`` for inputs with ``gram = X'X``.

    The loss is ``tr((W - W') G (W - W')')``. Scales: by block, the factor of the extreme (and its
    sign) of least squared error weighted by ``diag G``. GPTQ (arXiv 2210.17323) with the columns in
    order of falling ``diag G`` and the scales fixed before: ``W_j' = round(W_j)``, and
    ``(W_j - W_j') U_jk / U_jj`` is taken from every later column ``k`` (``U'U = G^-1``, ``U``
    upper; here all is turned round, so that it is lower).
    Then coordinate descent (QuantEase, arXiv 2309.01885) from there, the scales with the levels:
    with ``R = (W - W') G``, a block's scale moves by ``(z R_b') / (z G_bb z')`` for its levels
    ``z``, and a weight to the level nearest ``w'_j + R_j / G_jj``. No step raises the loss.

    Args:
        weight: ``[B, N, K]`` fp32.
        gram: ``[B, K, K]`` fp32.
        bits: width of each block, ``[K / block]`` integers.
        method: what of it to do.
        block: weights a scale.
        shrink: share by which the diagonal is raised before, of all matrices or ``[B]``.

    Returns:
        Levels centred on zero, fp32 ``[B, N, K]``, and scales fp32 ``[B, N, K / block]``.
    """
    method = method or Method()
    more = torch.as_tensor(shrink, dtype=gram.dtype).reshape(-1, 1)
    diagonal = gram.diagonal(dim1=-2, dim2=-1) * (1.0 + more)
    # A column that nothing ever reached still has to be rounded well: other text may reach it.
    diagonal = diagonal + method.damping * diagonal.mean(-1, keepdim=True) + 1e-12
    top = (2.0 ** (bits.float() - 1)).to(weight)
    scale = _scales(weight, diagonal, top, block, search=method.search)
    sweeps = method.sweeps_of(weight.shape[-1])
    if not (method.gptq or sweeps):
        return _nearest(weight, scale, top, block), scale
    # In place and put back, for a copy of the largest matrix that there is would stand beside it.
    own = gram.diagonal(dim1=-2, dim2=-1)
    before = own.clone()
    own.copy_(diagonal)
    start = (weight, scale, top, block)
    z = _gptq(*start, gram) if method.gptq else _nearest(*start)
    _descend(weight, gram, z, scale, top, block, sweeps)
    own.copy_(before)
    return z, scale


def values(z: Tensor, scale: Tensor, block: int = BLOCK) -> Tensor:
    """The weights that centred levels stand for."""
    result: Tensor = (z.unflatten(-1, (-1, block)) * scale[..., None]).flatten(-2)
    return result


def rest_of(weight: Tensor, rounded: Tensor, scale: Tensor, block: int = BLOCK) -> Tensor:
    """`carve.grid.Grid.rest` of ``weight`` ``[..., N, K]`` that became ``rounded``."""
    off = (weight - rounded).unflatten(-1, (-1, block)) / _divisor(scale)[..., None]
    rest: Tensor = (off * 254).round_().clamp_(-127, 127).to(torch.int8).flatten(-2)
    return rest


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _nearest(weight: Tensor, scale: Tensor, top: Tensor, block: int) -> Tensor:
    z = (weight.unflatten(-1, (-1, block)) / _divisor(scale)[..., None]).round_()
    limit = top[:, None]
    result: Tensor = torch.minimum(torch.maximum(z, -limit), limit - 1).flatten(-2)
    return result


def _scales(weight: Tensor, diagonal: Tensor, top: Tensor, block: int, *, search: bool) -> Tensor:
    """A few rows at a time: what is tried on them stays in the processor's cache."""
    rows = max(1, _CACHED // (weight.shape[0] * weight.shape[2]))
    parts = torch.split(weight, rows, 1)
    return torch.cat([_scales_of(w, diagonal, top, block, search=search) for w in parts], 1)


def _scales_of(
    weight: Tensor, diagonal: Tensor, top: Tensor, block: int, *, search: bool
) -> Tensor:
    blocks = weight.unflatten(-1, (-1, block))
    low, high = blocks.amin(-1), blocks.amax(-1)
    best = torch.where(-low > high, low, high) / -top
    if not search:
        return best
    importance = diagonal.unflatten(-1, (-1, block))[:, None]
    least = torch.full_like(best, torch.inf)
    base = best.clone()
    for sign in (1.0, -1.0):
        for factor in _SHRINK:
            # The other sign has one level less on the extreme's side.
            trial = base * (sign * factor * (1.0 if sign > 0 else 1.0 + 1.0 / float(top.max())))
            off = (values(_nearest(weight, trial, top, block), trial, block) - weight).square_()
            error = (off.unflatten(-1, (-1, block)) * importance).sum(-1)
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, trial, best)
    return best


def _root(gram: Tensor, order: Tensor) -> Tensor:
    """``M`` lower with ``M'M = G^-1`` for ``G`` in some ``order``; damped until it can be factored.

    ``L L' = G`` and ``M`` is ``L^-1``: one factorization and the inverse of a triangle, both in
    place of one copy of ``G``.
    """
    each = torch.arange(len(gram))[:, None, None]
    mean, extra = gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True), 0.0
    while True:
        ordered = gram[each, order[:, :, None], order[:, None]]
        ordered.diagonal(dim1=-2, dim2=-1).add_(extra * mean)
        lower, done = factored(ordered)
        if done:
            _invert_lower(lower)
            return lower
        del ordered, lower
        extra = max(2 * extra, 1e-4)


def _invert_lower(lower: Tensor) -> None:
    """The inverse of triangles ``[B, K, K]`` in place of them, half by half."""
    size = lower.shape[-1]
    if size <= _TRIANGLE:
        eye = torch.eye(size, dtype=lower.dtype)
        lower.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
        return
    half = size // 2
    first, second = lower[..., :half, :half], lower[..., half:, half:]
    between = lower[..., half:, :half]
    _invert_lower(first)
    _invert_lower(second)
    between.copy_(-(second @ (between @ first)))


def _gptq(weight: Tensor, scale: Tensor, top: Tensor, block: int, gram: Tensor) -> Tensor:
    """Centred levels; columns in order of rising diagonal, from the last to the first.

    Each of them is a row here.
    """
    order = gram.diagonal(dim1=-2, dim2=-1).argsort(-1)
    root = _root(gram, order)
    pick = order[:, :, None].expand(weight.mT.shape)
    w = weight.mT.gather(1, pick)
    s = _divisor(scale).mT.gather(1, (order // block)[:, :, None].expand(weight.mT.shape))
    high = top[order // block]
    z = torch.empty_like(w)
    for stop in range(weight.shape[-1], 0, -_GPTQ_PANEL):
        start = max(0, stop - _GPTQ_PANEL)
        panel = w[:, start:stop]
        errors = torch.empty_like(panel)
        for at in reversed(range(start, stop)):
            j = at - start
            column, step, most = panel[:, j], s[:, at], high[:, at, None]
            level = torch.div(column, step, out=z[:, at]).round_()
            torch.minimum(torch.maximum(level, -most), most - 1, out=level)
            error = errors[:, j]
            torch.addcmul(column, level, step, value=-1, out=error).div_(root[:, at, at, None])
            panel[:, :j].addcmul_(root[:, at, start:at, None], error[:, None], value=-1)
        w[:, :start].baddbmm_(root[:, start:stop, :start].mT, errors, alpha=-1)
    return torch.empty_like(z).scatter_(1, pick, z).mT.contiguous()


def _descend(
    weight: Tensor,
    gram: Tensor,
    z: Tensor,
    scale: Tensor,
    top: Tensor,
    block: int,
    sweeps: int,
) -> None:
    """Coordinate descent on levels and scales, in place."""
    if not sweeps:
        return
    rest = (weight - values(z, scale, block)) @ gram
    columns = weight.shape[-1]
    width = max(1, _DESCENT_PANEL // block) * block
    for _ in range(sweeps):
        for first in range(0, columns, width):
            # What a panel's blocks do to one another is kept up as they move; what they do to all
            # other columns is one product when the panel is done.
            panel = slice(first, min(first + width, columns))
            local, before = rest[..., panel].clone(), values_of(z, scale, panel, block)
            for start in range(panel.start, panel.stop, block):
                at = slice(start, start + block)
                inside = slice(start - first, start - first + block)
                _descend_block(gram[:, at, panel], local, z[..., at], scale, top, start, inside)
            moved = values_of(z, scale, panel, block) - before
            rest.baddbmm_(moved, gram[:, panel], alpha=-1)


def values_of(z: Tensor, scale: Tensor, columns: slice, block: int) -> Tensor:
    """`values` of some whole blocks."""
    own = slice(columns.start // block, columns.stop // block)
    return values(z[..., columns], scale[..., own], block)


def _descend_block(
    gram: Tensor,
    local: Tensor,
    level: Tensor,
    scale: Tensor,
    top: Tensor,
    start: int,
    inside: slice,
) -> None:
    """One block's scale, then its levels, in place.

    ``gram`` ``[B, block, panel]``: its rows; ``local`` ``[B, N, panel]``: ``(W - W') G`` of the
    panel, in which the block stands at ``inside``.
    """
    index = start // level.shape[-1]
    own = gram[..., inside]
    diagonal = own.diagonal(dim1=-2, dim2=-1)
    high = float(top[index])
    part, before = local[..., inside], level * scale[..., index, None]
    pull = level @ own
    weightiness = (pull * level).sum(-1)
    move = (level * part).sum(-1) / weightiness.clamp_min(1e-30)
    move = torch.where(weightiness > 0, move, torch.zeros_like(move))
    scale[..., index] += move
    step = _divisor(scale[..., index])
    # A column is a row here, so that it lies together.
    rest = torch.addcmul(part, move[..., None], pull, value=-1).mT.contiguous()
    rows, divisor = level.mT.contiguous(), diagonal[..., None] * step[:, None]
    for j in range(len(rows[0])):
        former = rows[:, j]
        new = torch.addcdiv(former, rest[:, j], divisor[:, j]).round_().clamp_(-high, high - 1)
        moved = new.sub(former).mul_(step)
        rest[:, j + 1 :].addcmul_(own[:, j, j + 1 :, None], moved[:, None], value=-1)
        former.copy_(new)
    level.copy_(rows.mT)
    local.baddbmm_(level * scale[..., index, None] - before, gram, alpha=-1)
