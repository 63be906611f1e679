"""Rounding one matrix: never worse than what it starts from, and always on the grid."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from carve.grid import BLOCK
from carve.quantizer import GPTQ, RTN, Method, _root, error_of, solve, values


def problem(seed: int, rows: int = 24, columns: int = 64, count: int = 1) -> tuple[Tensor, Tensor]:
    """Weights and the Gram matrix of correlated inputs of very different sizes."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(count, columns, columns, generator=g) * 0.3 + torch.eye(columns)
    size = torch.randn(count, 1, columns, generator=g).exp()
    x = (torch.randn(count, 400, columns, generator=g) @ mix) * size
    return torch.randn(count, rows, columns, generator=g), x.transpose(1, 2) @ x / 400


def loss(w: Tensor, gram: Tensor, bits: Tensor, method: Method) -> Tensor:
    return error_of(w, values(*solve(w, gram, bits, method)), gram)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_each_part_pays(bits: int) -> None:
    w, gram = problem(0, count=3)
    widths = torch.full((2,), bits)
    plain = loss(w, gram, widths, RTN)
    search = loss(w, gram, widths, Method(gptq=False, sweeps=0))
    gptq = loss(w, gram, widths, GPTQ)
    whole = loss(w, gram, widths, Method())
    assert bool((search < plain).all())
    assert bool((gptq < plain).all())
    assert bool((whole < 0.9 * gptq).all())
    assert bool((whole < 0.5 * plain).all())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.sampled_from([2, 4, 8]), start=st.booleans())
def test_descent_never_raises_the_loss(seed: int, bits: int, start: bool) -> None:
    w, gram = problem(seed, rows=5)
    widths = torch.full((2,), bits)
    # The loss that is minimized has the damping in it.
    damped = gram.clone()
    diagonal = damped.diagonal(dim1=1, dim2=2)
    diagonal += 0.01 * diagonal.mean() + 1e-12
    losses = [
        float(error_of(w, values(*solve(w, gram, widths, Method(gptq=start, sweeps=n))), damped))
        for n in (0, 1, 2, 6)
    ]
    assert all(b <= a * (1 + 1e-4) for a, b in pairwise(losses))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), low=st.sampled_from([2, 4]), high=st.sampled_from([4, 8]))
def test_levels_are_within_each_blocks_width(seed: int, low: int, high: int) -> None:
    w, gram = problem(seed, rows=4)
    z, scale = solve(w, gram, torch.tensor([low, high]))
    for block, bits in enumerate((low, high)):
        own = z[..., block * BLOCK : (block + 1) * BLOCK]
        assert torch.equal(own, own.round())
        assert float(own.min()) >= -(2 ** (bits - 1))
        assert float(own.max()) <= 2 ** (bits - 1) - 1
    assert bool(torch.isfinite(scale).all())


def test_columns_that_nothing_reached_are_still_rounded_well() -> None:
    w, gram = problem(1)
    gram[:, :8] = 0
    gram[:, :, :8] = 0
    new = values(*solve(w, gram, torch.full((2,), 4)))
    dead = (new - w)[..., :8].square().mean() / w[..., :8].square().mean()
    assert float(dead) < 0.03
    assert bool(torch.isfinite(new).all())


def test_zero_weights_and_singular_inputs() -> None:
    w, _ = problem(2)
    w[:, 0] = 0
    rank_one = torch.ones(1, 64, 64)
    new = values(*solve(w, rank_one, torch.full((2,), 4)))
    assert bool(torch.isfinite(new).all())
    assert not new[:, 0].any()
    assert not values(*solve(w, torch.zeros(1, 64, 64), torch.full((2,), 8)))[:, 0].any()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), columns=st.sampled_from([32, 64, 288, 544]))
def test_root_of_the_inverse(seed: int, columns: int) -> None:
    gram = problem(seed, columns=columns, count=2)[1] + 0.1 * torch.eye(columns)
    order = gram.diagonal(dim1=1, dim2=2).argsort(-1, descending=True)
    root = _root(gram, order)
    assert torch.equal(root, root.tril())
    for m, g, o in zip(root.double(), gram.double(), order, strict=True):
        back = m.T @ m @ g[o][:, o]
        assert float((back - torch.eye(columns)).abs().max()) < 0.02


def test_a_gram_matrix_without_an_inverse_is_damped() -> None:
    gram = torch.ones(1, 64, 64)
    assert bool(_root(gram, torch.arange(64)[None]).isfinite().all())


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.sampled_from([2, 4, 8]))
def test_matrices_side_by_side_are_rounded_as_alone(seed: int, bits: int) -> None:
    w, gram = problem(seed, rows=7, count=3)
    widths, shrink = torch.full((2,), bits), torch.tensor([0.0, 0.5, 2.0])
    together = solve(w, gram, widths, shrink=shrink)
    for i in range(3):
        z, scale = solve(w[i : i + 1], gram[i : i + 1], widths, shrink=shrink[i])
        # Sums in another order may tip what lies between two levels.
        assert float((z[0] != together[0][i]).float().mean()) < 0.02
        assert torch.allclose(scale[0], together[1][i], rtol=1e-3)
