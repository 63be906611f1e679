"""Levels of block-wise grids in the byte layout that onnxruntime's kernels read."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


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


def unpack(packed: np.ndarray, bits: int) -> Tensor:
    """Bytes ``[..., n]`` to levels uint8 ``[..., n * 8 / bits]``: what `pack` undoes."""
    parts = [(packed >> (bits * i)) & ((1 << bits) - 1) for i in range(8 // bits)]
    return torch.from_numpy(np.stack(parts, -1).reshape(*packed.shape[:-1], -1))
