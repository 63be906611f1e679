"""How matrices are rounded, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from carve.grid import BLOCK, Grid
from carve.quantizer import RTN, Method, error_of, rest_of, solve, values


@dataclass(frozen=True)
class Rounding:
    """How units are rounded.

    ``method``: see `carve.quantizer.solve`; ``correct``: move the weights first to where the inputs
    that quantization leaves give the former results (closed form), else round them as they are;
    ``prior``: pseudo-tokens, as a share of the input width, by which an expert's Gram matrix is
    shrunk towards that of all tokens (0: its own tokens alone; infinity: all tokens alone);
    ``fall_back``: keep round-to-nearest where its error on held-out tokens is lower; ``sort``:
    order an expert's neurons by size, so that those that share a scale are alike; ``head_groups``:
    weigh the tokens of each group of logits by its share in the divergence; ``balance``: an expert
    learns from at most so many times its even share of the tokens (EAQuant); ``block``: weights a
    scale; ``shrink``: how far few tokens are mistrusted, see `round_matrices`; ``rest``: keep where
    each weight lay within its level.
    """

    method: Method = field(default_factory=Method)
    correct: bool = True
    prior: float = 0.5
    fall_back: bool = True
    sort: bool = True
    head_groups: bool = True
    balance: float = float("inf")
    shrink: float = 2.0
    block: int = BLOCK
    rest: bool = False


class Rounded(NamedTuple):
    """Weights on their grids fp32 ``[..., N, K]``, scales, and `carve.grid.Grid.rest` if asked."""

    weight: Tensor
    scale: Tensor
    rest: Tensor | None

    def grid(self, bits: int, block: int) -> Grid:
        """The grid of one matrix."""
        rest = None if self.rest is None else self.rest.contiguous()
        return Grid(bits, self.scale.contiguous(), block, rest)

    def matrices(self) -> list[Rounded]:
        """The matrices of a stack."""
        return self._parts(lambda t: t.unbind(0))

    def chunks(self, count: int) -> list[Rounded]:
        """A matrix in so many chunks of as many rows."""
        return self._parts(lambda t: t.chunk(count))

    def columns(self, sizes: Sequence[int], block: int) -> list[Rounded]:
        """A matrix in parts of so many columns, whole blocks each."""
        blocks = [n // block for n in sizes]
        return self._parts(lambda t: t.split(blocks if t is self.scale else sizes, 1))

    def _parts(self, split: Callable[[Tensor], Sequence[Tensor]]) -> list[Rounded]:
        weight, scale = split(self.weight), split(self.scale)
        rest = [None] * len(weight) if self.rest is None else split(self.rest)
        return [Rounded(*p) for p in zip(weight, scale, rest, strict=True)]


def joined(parts: Sequence[Rounded], order: Tensor) -> Rounded:
    """The matrix whose rows ``order`` stand in ``parts``, one after the other."""
    back = order.argsort()
    rest = [p.rest for p in parts if p.rest is not None]
    return Rounded(
        torch.cat([p.weight for p in parts])[back],
        torch.cat([p.scale for p in parts])[back],
        torch.cat(rest)[back] if rest else None,
    )


def round_matrices(
    weight: Tensor,
    gram: Tensor,
    held: Tensor,
    bits: Tensor,
    how: Rounding,
    tokens: Sequence[float],
) -> Rounded:
    """`solve`, or round-to-nearest where its error by ``held`` is lower, matrix by matrix.

    What few ``tokens`` tell of ``K`` columns holds for them alone: the diagonal is raised by the
    share ``shrink K / T``.

    Shapes as there, ``[B, N, K]`` and so on.
    """
    shrink = how.shrink * gram.shape[-1] / torch.tensor(tokens).clamp_min(1.0)
    z, scale = solve(weight, gram, bits, how.method, how.block, shrink)
    new = values(z, scale, how.block)
    if how.fall_back and how.method != RTN:
        z, plain_scale = solve(weight, gram, bits, RTN, how.block)
        plain = values(z, plain_scale, how.block)
        worse = error_of(weight, new, held) > error_of(weight, plain, held)
        new = torch.where(worse[:, None, None], plain, new)
        scale = torch.where(worse[:, None, None], plain_scale, scale)
    return Rounded(new, scale, rest_of(weight, new, scale, how.block) if how.rest else None)


def round_matrix(
    weight: Tensor, gram: Tensor, held: Tensor, bits: Tensor, how: Rounding, tokens: float
) -> Rounded:
    """`round_matrices` of one, ``[N, K]``."""
    (found,) = round_matrices(weight[None], gram[None], held[None], bits, how, [tokens]).matrices()
    return found
