"""Balanced assignment against the general solver."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment

from carve.assign import balanced_assignment

COSTS = st.one_of(
    st.floats(-100, 100, width=32),
    st.integers(-3, 3).map(float),  # many ties
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    groups = draw(st.integers(1, 6))
    capacity = draw(st.integers(1, 40 // groups))
    return draw(arrays(np.float64, (groups * capacity, groups), elements=COSTS)), capacity


@settings(max_examples=150, deadline=None)
@given(problems())
def test_balanced_and_as_cheap_as_the_general_solver(problem: tuple[np.ndarray, int]) -> None:
    cost, capacity = problem
    n, groups = cost.shape
    owner = balanced_assignment(torch.from_numpy(cost), capacity)
    assert owner.dtype == torch.int64
    assert torch.bincount(owner, minlength=groups).tolist() == [capacity] * groups
    repeated = np.repeat(cost, capacity, axis=1)
    best = repeated[linear_sum_assignment(repeated)].sum()
    got = cost[np.arange(n), owner.numpy()].sum()
    assert got == pytest.approx(best, rel=1e-9, abs=1e-6)


def test_larger_random_problem() -> None:
    cost = torch.randn(160, 8, generator=torch.Generator().manual_seed(0))
    owner = balanced_assignment(cost, 20)
    assert torch.bincount(owner).tolist() == [20] * 8
    repeated = np.repeat(cost.double().numpy(), 20, axis=1)
    best = repeated[linear_sum_assignment(repeated)].sum()
    got = float(cost.double()[torch.arange(160), owner].sum())
    assert got == pytest.approx(best, abs=1e-6)
    # A greedy choice is dearer, so the comparison says something.
    assert float(cost[torch.arange(160), torch.arange(160) % 8].double().sum()) > best + 1


def test_costs_near_any_tolerance_end() -> None:
    """Differences about the size of a float tolerance once made a cycle that had no end."""
    values = np.array([-9e-13, 0.0, 1.1e-12, 3e-12], np.float32).astype(np.float64)
    rows = [
        "032213",
        "202121",
        "131220",
        "033030",
        "212133",
        "232022",
        "220231",
        "303232",
        "311332",
        "003123",
        "223022",
        "130230",
    ]
    cost = values[[[int(v) for v in row] for row in rows]]
    owner = balanced_assignment(torch.from_numpy(cost), 2).numpy()
    repeated = np.repeat(cost, 2, axis=1)
    best = repeated[linear_sum_assignment(repeated)].sum()
    assert cost[np.arange(12), owner].sum() == pytest.approx(best, rel=1e-9)


def test_input_is_not_changed() -> None:
    cost = torch.randn(12, 3, dtype=torch.float64)
    kept = cost.clone()
    balanced_assignment(cost, 4)
    assert torch.equal(cost, kept)


@pytest.mark.parametrize("capacity", [1, 3, 5])
def test_wrong_capacity(capacity: int) -> None:
    with pytest.raises(ValueError, match="do not fill"):
        balanced_assignment(torch.zeros(8, 4), capacity)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_cost_that_is_not_finite(bad: float) -> None:
    cost = torch.zeros(8, 4)
    cost[3, 1] = bad
    with pytest.raises(ValueError, match="finite"):
        balanced_assignment(cost, 2)
