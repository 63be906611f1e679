"""Block-wise round-to-nearest weights in the layout that onnxruntime's kernels read."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BLOCK = 32
"""Weights of a row that share one scale."""


def quantize(weight: Tensor, bits: int, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Round to the nearest level, symmetric, one signed scale a block.

    ``s = w* / -2^(bits-1)`` with ``w*`` the weight of largest magnitude in the block, sign kept,
    so that it falls on the lowest level, of which there is one more than of positive ones;
    ``q = clip(round(w / s) + 2^(bits-1), 0, 2^bits - 1)`` and ``w' = (q - 2^(bits-1)) * s``.

    Args:
        weight: ``[..., N, K]``; ``K`` is padded with zeros to a multiple of ``block``.
        bits: 2, 4 or 8.
        block: weights a scale.

    Returns:
        Levels uint8 ``[..., N, K', ]`` with ``K'`` the padded width, scales fp32
        ``[..., N, K' / block]``.
    """
    w = weight.float()
    if pad := -w.shape[-1] % block:
        w = torch.nn.functional.pad(w, (0, pad))
    blocks = w.unflatten(-1, (-1, block))
    low, high = blocks.amin(-1), blocks.amax(-1)
    extreme = torch.where(-low > high, low, high)
    zero = 1 << (bits - 1)
    scale = extreme / -zero
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    q = (blocks / safe[..., None]).round_().add_(zero).clamp_(0, 2 * zero - 1)
    return q.to(torch.uint8).flatten(-2), scale


def dequantize(levels: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The weights that `quantize`'s result stands for, fp32 ``[..., N, K']``."""
    blocks = levels.unflatten(-1, (scale.shape[-1], -1)).float() - (1 << (bits - 1))
    weight: Tensor = (blocks * scale[..., None]).flatten(-2)
    return weight


def pack(levels: Tensor, bits: int) -> np.ndarray:
    """Levels ``[..., K]`` to bytes ``[..., K * bits / 8]``, the first in the lowest bits."""
    per_byte = 8 // bits
    q = levels.numpy().reshape(*levels.shape[:-1], -1, per_byte)
    packed = q[..., 0].copy()
    for i in range(1, per_byte):
        packed |= q[..., i] << (i * bits)
    return packed


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Rows gate, up, gate, up of ``[..., m, d]`` pairs: ``[..., 2m, d]``."""
    return torch.stack((gate, up), -2).flatten(-3, -2)


def emulate(x: Tensor, weight: Tensor, bits: int, block: int = BLOCK) -> Tensor:
    """``x @ weight.T`` as onnxruntime's CPU kernels compute it at ``accuracy_level`` 4.

    Activations are rounded to int8 for each row and block, ``scale = max|x| / 127``; products and
    sums are exact in integers, and so in fp32 here up to the order of summation.

    Args:
        x: ``[..., K]`` fp32.
        weight: ``[N, K]``; ``K`` a multiple of ``block`` or the product stays fp32.
        bits: 16 or more gives the fp32 product.
        block: weights a scale.
    """
    if bits >= 16 or weight.shape[-1] % block:
        return torch.nn.functional.linear(x, weight.float())
    blocks = x.unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    rounded = (blocks / torch.where(scale == 0, torch.ones_like(scale), scale)).round() * scale
    return torch.nn.functional.linear(
        rounded.flatten(-2), dequantize(*quantize(weight, bits, block), bits)
    )
