"""Cholesky factors in place of large matrices, which many copies of would not fit beside them."""

from __future__ import annotations

import torch
from torch import Tensor


def factored(gram: Tensor) -> tuple[Tensor, bool]:
    """``L`` with ``L L' = G`` in place of ``G`` ``[..., K, K]``, and whether that can be done.

    ``G`` is symmetric and contiguous, and is lost.
    """
    # Its transpose is the same matrix, and lies as LAPACK wants it.
    lower = gram.mT
    failed = torch.empty(gram.shape[:-2], dtype=torch.int32)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    return lower, not failed.any()


def solved(lower: Tensor, right: Tensor) -> Tensor:
    """``(L L')^-1 R`` for ``R`` ``[..., K, N]``, without the copy that `cholesky_solve` makes."""
    half = torch.linalg.solve_triangular(lower, right, upper=False)
    found: Tensor = torch.linalg.solve_triangular(lower.mT, half, upper=True)
    return found
