"""Rounding one linear, or one routed FFN with all its experts, on what it sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from carve_runtime.heap import trim_heap
from torch import Tensor

from carve.arithmetic import rounded
from carve.ffn import RoutedFFN
from carve.grid import Grid
from carve.rounding import Rounded, Rounding, joined, round_matrices, round_matrix
from carve.sites import Linear
from carve.statistics import (
    add_gram,
    down_features,
    down_matrix,
    mirror,
    moments,
    pulled_ridge,
    pulled_towards,
    with_down_matrix,
)
from carve.twin import UnitLesson

_STRENGTHS = (1e-2, 1e-1, 1.0, 10.0)
_CHUNK, _WIDE_CHUNK = 4096, 1024
"""Tokens at a time, of inputs and of hidden activations."""
TOGETHER = 1 << 24
"""Numbers in the Gram matrices of experts that are rounded side by side."""
_FLOOR = 0.03
"""Weight of a token that gives a group of logits no probability."""


def folds(count: int) -> tuple[Tensor, Tensor]:
    """Tokens to fit and, every fifth, to judge."""
    index = torch.arange(count)
    held = index % 5 == 4
    return index[~held], index[held]


def _gram(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """``X'wX`` over the tokens ``index``."""
    gram = x.new_zeros(x.shape[1], x.shape[1])
    for rows in torch.split(index, _CHUNK):
        part = x[rows]
        add_gram(gram, part, part * weight[rows, None])
    return mirror(gram)


def _moments(x: Tensor, y: Tensor, weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """``X'wX`` and ``X'wY`` over the tokens ``index``."""
    return moments(x.__getitem__, y, weight, torch.split(index, _CHUNK), x.shape[1])


def _size(view: Callable[[Tensor], Tensor], y: Tensor, weight: Tensor, index: Tensor) -> float:
    """Weighted sum of squares of ``view(y)`` over the tokens ``index``."""
    parts = torch.split(index, _CHUNK)
    return sum(float((weight[rows, None] * view(y[rows]).square()).sum()) for rows in parts)


def _pulled(
    grams: Sequence[Tensor],
    rights: Sequence[Tensor],
    start: Tensor,
    target: Tensor,
    weight: Tensor,
    held: Tensor,
    how: Rounding,
) -> Tensor:
    """`pulled_ridge` from ``start`` where errors are corrected; the first matrix is the sum."""
    if not how.correct:
        grams[0].add_(grams[1])
        return start
    size = partial(_size, y=target, weight=weight, index=held)
    return pulled_ridge(grams, rights, start, _STRENGTHS, size).solution


def round_linear(
    lesson: UnitLesson, bits: int, how: Rounding, *, is_head: bool = False
) -> tuple[Tensor, Tensor | None, Grid]:
    """Weight on its grid, bias, and grid of a linear.

    Its weight first moves to ``W + (R - G W)(G + l D)^-1`` with ``G`` the Gram matrix of the
    rounded inputs and ``R`` their products with the target, see `pulled_ridge`; so it undoes what
    it can of the errors before it (GPTAQ, arXiv 2504.02692, for the idea).
    """
    unit = lesson.unit
    assert isinstance(unit, Linear)
    x, target = rounded(lesson.x, how.block), lesson.target
    if unit.bias is not None:
        target = target - unit.bias.float()
    parts = folds(len(x))
    grams, rights = zip(*(_moments(x, target, lesson.weight, i) for i in parts), strict=True)
    start = unit.weight.float().T
    start = _pulled(grams, rights, start, target, lesson.weight, parts[1], how)
    wanted, widths = start.T.contiguous(), _widths(bits, start.shape[0], how)
    found: list[Rounded] = []
    order: list[Tensor] = []
    for rows, importance in _row_groups(lesson, how, is_head):
        gram, held = grams
        if importance is not None:
            gram, held = (_gram(x, importance, i) for i in parts)
            gram += held
        found.append(round_matrix(wanted[rows], gram, held, widths, how, len(x)))
        order.append(rows)
    new = joined(found, torch.cat(order))
    bias = unit.bias
    if bias is not None and how.correct:
        w = lesson.weight / lesson.weight.sum()
        bias = bias.float() + w @ (target - x @ new.weight.T)
    return new.weight.to(unit.weight.dtype), bias, new.grid(bits, how.block)


def _row_groups(
    lesson: UnitLesson, how: Rounding, is_head: bool
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Rows that share token weights ``[T]``: all of them, or for logits groups of like tokens.

    ``KL(p || p')`` is ``sum_n p_n (1 - p_n) dz_n^2 / 2`` and cross terms to second order, so an
    error in the logit of token ``n`` counts where ``n`` is likely. A Gram matrix for every row
    would be too many: rows are grouped by direction (k-means on cosine), and a group's tokens are
    weighted by the mean of ``p_n (1 - p_n)`` over it, with a floor.
    """
    assert isinstance(lesson.unit, Linear)
    weight = lesson.unit.weight.float()
    rows, width = weight.shape
    count = head_groups(rows, width) if is_head and how.head_groups else 1
    if count < 2:
        yield torch.arange(rows), None
        return
    group = _directions(weight, count)
    member = torch.nn.functional.one_hot(group, count).float()
    parts = []
    for part in torch.split(lesson.target, 1024):
        p = part.softmax(-1)
        parts.append((p * (1 - p)) @ member)
    mass = torch.cat(parts)
    for g in range(count):
        index = (group == g).nonzero().squeeze(1)
        if len(index):
            share = mass[:, g] / mass[:, g].mean().clamp_min(1e-30)
            yield index, share + _FLOOR


def _directions(rows: Tensor, count: int, rounds: int = 12) -> Tensor:
    """The group of each row by k-means on the cosine of rows about their mean."""
    unit = torch.nn.functional.normalize(rows - rows.mean(0), dim=1)
    generator = torch.Generator().manual_seed(count)
    centre = unit[torch.randperm(len(unit), generator=generator)[:count]]
    for _ in range(rounds):
        group = (unit @ centre.T).argmax(1)
        centre = torch.nn.functional.normalize(
            torch.zeros_like(centre).index_add_(0, group, unit), dim=1
        )
    return group


def head_groups(rows: int, width: int) -> int:
    """Groups of like tokens that the rows of a head ``[rows, width]`` are rounded in."""
    return min(64, 16_384 // width, rows // 32)


def sorted_neurons(routed: RoutedFFN, x: Tensor) -> RoutedFFN:
    """Neurons of the shared expert and of every expert in order of falling size on ``x``.

    The size is the root mean square of the hidden activation over a few thousand tokens. The
    function is the same: only the order within experts changes.
    """
    size = routed.merged().hidden(x[:: -(-len(x) // _CHUNK)]).square().mean(0).sqrt()
    s, experts = routed.shared_size, routed.num_experts
    changes: dict[str, Any] = {}
    if s:
        order = size[:s].argsort(descending=True)
        for name in ("shared_gate", "shared_gate_bias", "shared_up", "shared_up_bias"):
            t = getattr(routed, name)
            if t is not None:
                changes[name] = t[order]
        assert routed.shared_down is not None
        changes["shared_down"] = routed.shared_down[:, order]
    orders = size[s:].reshape(experts, -1).argsort(-1, descending=True)
    for name in ("expert_gate", "expert_gate_bias", "expert_up", "expert_up_bias"):
        t = getattr(routed, name)
        if t is not None:
            index = orders if t.ndim == 2 else orders[..., None].expand_as(t)
            changes[name] = t.gather(1, index)
    down = routed.expert_down
    changes["expert_down"] = down.gather(2, orders[:, None].expand_as(down))
    return replace(routed, **{k: v.contiguous() for k, v in changes.items()})


def round_ffn(
    routed: RoutedFFN,
    lesson: UnitLesson,
    shared_bits: int,
    expert_bits: Sequence[int],
    how: Rounding,
) -> RoutedFFN:
    """A routed FFN with every matrix on a grid; the router stays fp32.

    In-projections first: experts each by the tokens they get, ``G = G_e + n0 P / T`` with ``P`` the
    Gram matrix of all ``T`` tokens, scaled to the expert's own mean diagonal, and ``n0`` =
    ``prior`` times the width (a Hessian of few tokens has no rank, EAQuant, arXiv 2506.13329, feeds
    such experts more text; this needs none). Then all down-projections as one matrix on the masked
    hidden activations that the rounded in-projections give (`down_features`), so that the error of
    one expert's column is made up for by the columns of others that run beside it.
    """
    x, former, weight = rounded(lesson.x, how.block), lesson.reference, lesson.weight
    chosen = routed.chosen(lesson.x)
    routed = _round_in(routed, x, former, weight, chosen, shared_bits, expert_bits, how)
    trim_heap()
    return _round_down(routed, x, lesson.target, weight, chosen, shared_bits, expert_bits, how)


def _widths(bits: int, columns: int, how: Rounding) -> Tensor:
    return torch.full((columns // how.block,), bits)


def _round_in(
    r: RoutedFFN,
    x: Tensor,
    former: Tensor,
    weight: Tensor,
    chosen: Tensor,
    shared_bits: int,
    expert_bits: Sequence[int],
    how: Rounding,
) -> RoutedFFN:
    parts = folds(len(x))
    every = [_moments(x, former, weight, i) for i in parts]
    gram, cross = (every[0][j] + every[1][j] for j in (0, 1))
    changes: dict[str, Any] = {}
    grids: dict[str, Grid | tuple[Grid, ...]] = dict(r.grids)

    def corrected(w: Tensor, g: Tensor, c: Tensor) -> Tensor:
        """Where rounded inputs give what the former ones gave: ``c`` is ``X' X_former``."""
        if not how.correct:
            return w
        strength = max(0.1, how.shrink * x.shape[1] / len(x))
        return pulled_towards(w.T, g, c @ w.T, strength).T.contiguous()

    def pair(gate: Tensor | None, up: Tensor) -> Tensor:
        return up.float() if gate is None else torch.cat((gate.float(), up.float()))

    total = float(weight.sum())
    names = ("up",) if r.expert_gate is None else ("gate", "up")
    if r.shared_up is not None:
        w = corrected(pair(r.shared_gate, r.shared_up), gram, cross)
        widths = _widths(shared_bits, w.shape[1], how)
        new = round_matrix(w, gram, every[1][0], widths, how, total)
        for name, one in zip(names, new.chunks(len(names)), strict=True):
            changes[f"shared_{name}"] = one.weight.to(r.shared_up.dtype)
            grids[f"shared_{name}"] = one.grid(shared_bits, how.block)
    pseudo = how.prior * x.shape[1]

    def lesson_of(e: int) -> tuple[Tensor, Tensor, Tensor, float]:
        """An expert's weights to be rounded, both Gram matrices and the tokens behind them."""
        w = pair(None if r.expert_gate is None else r.expert_gate[e], r.expert_up[e])
        if pseudo == float("inf"):
            return corrected(w, gram, cross), gram, every[1][0], total
        rows = [
            _at_most(i[chosen[i, e]], how.balance * float(chosen[i].sum()) / r.num_experts)
            for i in parts
        ]
        by_fold = [_moments(x, former, weight, i) for i in rows]
        own, own_cross = (by_fold[0][j] + by_fold[1][j] for j in (0, 1))
        count = float(weight[chosen[:, e]].sum())
        mean = own.diagonal().sum() / max(count, 1.0)
        share = pseudo / total * (mean / (gram.diagonal().sum() / total) if count else 1.0)
        own, own_cross = own + share * gram, own_cross + share * cross
        own_held = by_fold[1][0] + share * every[1][0]
        return corrected(w, own, own_cross), own, own_held, count + pseudo

    found: dict[int, Rounded] = {}
    side_by_side = max(1, TOGETHER // gram.numel())
    for bits in {*expert_bits}:
        same = [e for e, b in enumerate(expert_bits) if b == bits]
        for first in range(0, len(same), side_by_side):
            some = same[first : first + side_by_side]
            *matrices, seen = zip(*map(lesson_of, some), strict=True)
            w, own, own_held = map(torch.stack, matrices)
            del matrices  # or they stand beside their stacks
            widths = _widths(bits, w.shape[2], how)
            each = round_matrices(w, own, own_held, widths, how, seen).matrices()
            found.update(zip(some, each, strict=True))
    by_expert = [found[e].chunks(len(names)) for e in range(r.num_experts)]
    for name, stack in zip(names, zip(*by_expert, strict=True), strict=True):
        changes[f"expert_{name}"] = torch.stack([p.weight for p in stack]).to(r.expert_up.dtype)
        grids[f"expert_{name}"] = tuple(
            p.grid(b, how.block) for b, p in zip(expert_bits, stack, strict=True)
        )
    return replace(r, grids=grids, **changes)


def _at_most(index: Tensor, count: float) -> Tensor:
    """The first ``count`` of some tokens."""
    return index if count >= len(index) else index[: int(count)]


def _down_moments(
    r: RoutedFFN,
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    chosen: Tensor,
    parts: Sequence[Tensor],
    how: Rounding,
) -> tuple[list[Tensor], list[Tensor]]:
    """`moments` of what the down-projections see and of the target, over each of ``parts``."""
    merged = r.merged()

    def features(rows: Tensor) -> Tensor:
        h = rounded(merged.hidden(x[rows]).float(), how.block)
        return down_features(h, chosen[rows], r)

    width = r.intermediate_size + r.num_experts + 1
    chunks = [torch.split(index, _WIDE_CHUNK) for index in parts]
    grams, rights = zip(*(moments(features, target, weight, c, width) for c in chunks), strict=True)
    return [*grams], [*rights]


def _round_down(
    r: RoutedFFN,
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    chosen: Tensor,
    shared_bits: int,
    expert_bits: Sequence[int],
    how: Rounding,
) -> RoutedFFN:
    parts = folds(len(x))
    start = down_matrix(r)
    n = len(start) - r.num_experts - 1
    grams, rights = _down_moments(r, x, target, weight, chosen, parts, how)
    trim_heap()
    start = _pulled(grams, rights, start, target, weight, parts[1], how)
    gram, held = grams
    right = rights[0]  # by now the sum of both, where it is read
    bits = torch.cat(
        (
            _widths(shared_bits, r.shared_size, how),
            *(_widths(b, r.expert_size, how) for b in expert_bits),
        )
    )
    new = round_matrix(start[:n].T.contiguous(), gram[:n, :n], held[:n, :n], bits, how, len(x))
    matrix = torch.cat((new.weight.T, start[n:]))
    if how.correct:
        # The biases take what is left of the mean, by expert.
        left = right[n:] - gram[n:, :n] @ matrix[:n]
        matrix[n:] = pulled_towards(matrix[n:], gram[n:, n:], left, 1e-2)
    grids = dict(r.grids)
    shared, *experts = new.columns([r.shared_size, *[r.expert_size] * r.num_experts], how.block)
    if r.shared_size:
        grids["shared_down"] = shared.grid(shared_bits, how.block)
    grids["expert_down"] = tuple(
        e.grid(b, how.block) for b, e in zip(expert_bits, experts, strict=True)
    )
    return replace(with_down_matrix(r, matrix), grids=grids)
