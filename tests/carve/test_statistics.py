"""Closed forms: what they are of, and that they are what they say."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carve.statistics import add_gram, mirror, pulled_towards


@settings(max_examples=20, deadline=None)
@given(width=st.integers(1, 700), tokens=st.integers(1, 40), seed=st.integers(0, 10_000))
def test_gram_matrix_in_strips(width: int, tokens: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(tokens, width, generator=g), torch.rand(tokens, 1, generator=g)
    total = torch.zeros(width, width)
    for part in torch.split(torch.arange(tokens), 16):
        add_gram(total, x[part], x[part] * w[part])
    mirror(total)
    assert torch.equal(total, total.T)
    assert torch.allclose(total, (x * w).T @ x, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(
    width=st.sampled_from([8, 64, 300]),
    strength=st.sampled_from([1e-3, 1e-1, 10.0]),
    seed=st.integers(0, 10_000),
)
def test_pull_leaves_nothing_to_gain(width: int, strength: float, seed: int) -> None:
    """``|X W - Y|^2 + l (W - W0)' D (W - W0)`` has no slope there, few tokens or many."""
    g = torch.Generator().manual_seed(seed)
    tokens = int(torch.randint(1, 3 * width, (1,), generator=g))
    x = torch.randn(tokens, width, generator=g) * torch.randn(width, generator=g).exp()
    start, y = torch.randn(width, 5, generator=g), torch.randn(tokens, 5, generator=g)
    gram, right = x.T @ x, x.T @ y
    found = pulled_towards(start, gram, right, strength).double()
    pull = strength * (gram.diagonal() + 0.01 * gram.diagonal().mean()).double()

    def slope(w: torch.Tensor) -> torch.Tensor:
        return gram.double() @ w - right + pull[:, None] * (w - start)

    assert float(slope(found).norm()) < 1e-3 * float(slope(start.double()).norm())


def test_singular_matrices_are_solved_in_double() -> None:
    """A pull too small for fp32 to see."""
    x = torch.ones(3, 40)
    found = pulled_towards(torch.zeros(40, 1), x.T @ x, x.T @ torch.ones(3, 1), 0.0)
    assert torch.allclose(x @ found, torch.ones(3, 1), atol=1e-2)
