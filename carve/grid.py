"""Block-wise grids that weights are rounded to, as block-wise kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from carve.storable import storable

BLOCK = 32
"""Weights of a row that share one scale, unless asked otherwise."""
WIDTHS = (2, 4, 8)
"""Bits a weight that onnxruntime's block-wise kernels know."""


TABLE_BITS = 8
"""Width of embedding tables: one row is read a token, and its error reaches every layer."""


def in_blocks(*widths: int, block: int = BLOCK) -> bool:
    """Whether rows of these widths are whole blocks."""
    return all(w % block == 0 for w in widths)


def large_table(weight: Tensor) -> bool:
    """Whether an embedding's table ``[V, d]`` is worth a grid; positions and types are few."""
    return weight.shape[0] >= 1024 and in_blocks(weight.shape[1])


@storable
@dataclass(frozen=True)
class Grid:
    """The values that the weights of a matrix may have: ``w = (q - 2^(bits-1)) * s``.

    ``scale`` ``[..., N, K / block]`` fp32, of either sign: there is one more level below zero than
    above, and the sign says on which side. ``q`` in ``[0, 2^bits)``. ``rest`` int8 ``[..., N, K]``:
    how far above its level each weight was before it was rounded, in 1/254 of a level, at most a
    half; None where nobody asked for it.
    """

    bits: int
    scale: Tensor
    block: int = BLOCK
    rest: Tensor | None = None

    @property
    def zero(self) -> int:
        """The level that stands for 0."""
        return 1 << (self.bits - 1)

    @property
    def bytes(self) -> int:
        """Size of levels and scales."""
        return self.scale.numel() * (self.block * self.bits // 8 + 4)

    @classmethod
    def nearest(cls, weight: Tensor, bits: int, block: int = BLOCK) -> Grid:
        """The grid of round-to-nearest: ``s = w* / -2^(bits-1)``, ``w*`` the block's extreme.

        The weight of largest magnitude, sign kept, so falls on the lowest level.

        Args:
            weight: ``[..., N, K]``, ``K`` a multiple of ``block``.
            bits: 2, 4 or 8.
            block: weights a scale.
        """
        blocks = weight.float().unflatten(-1, (-1, block))
        low, high = blocks.amin(-1), blocks.amax(-1)
        return cls(bits, torch.where(-low > high, low, high) / -(1 << (bits - 1)), block)

    def levels(self, weight: Tensor) -> Tensor:
        """The nearest levels uint8 ``[..., N, K]``, clipped to the grid."""
        blocks = weight.float().unflatten(-1, (-1, self.block))
        safe = torch.where(self.scale == 0, torch.ones_like(self.scale), self.scale)
        q = (blocks / safe[..., None]).round_().add_(self.zero).clamp_(0, 2 * self.zero - 1)
        levels: Tensor = q.to(torch.uint8).flatten(-2)
        return levels

    def values(self, levels: Tensor) -> Tensor:
        """The weights fp32 ``[..., N, K]`` that levels stand for."""
        blocks = levels.unflatten(-1, (-1, self.block)).float() - self.zero
        weight: Tensor = (blocks * self.scale[..., None]).flatten(-2)
        return weight

    def round(self, weight: Tensor) -> Tensor:
        """``weight`` on the grid, fp32.

        A weight that is on the grid already comes back exactly, also from bf16, which moves no
        level by as much as a half.
        """
        return self.values(self.levels(weight))

    def __getitem__(self, index: int) -> Grid:
        """The grid of one matrix of a stack."""
        rest = None if self.rest is None else self.rest[index]
        return Grid(self.bits, self.scale[index], self.block, rest)
