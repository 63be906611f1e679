"""Affinity: experts that follow one another on the same device, so that tokens hop less."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pulp  # type: ignore[import-untyped]
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment, linprog  # type: ignore[import-untyped]
from scipy.sparse import csr_array, vstack  # type: ignore[import-untyped]

from carve.errors import UserError
from carve.placement.chain import MOST_STATES, best_chain, states_of
from carve.placement.counts import Counts
from carve.placement.layered import Variables, held_by, start_from
from carve.placement.problem import Array, Homes, Problem, hops, one_hot
from carve.placement.search import Found
from carve.placement.solver import WITHIN, solve


def forward_assignment(problem: Problem, counts: Sequence[Counts]) -> Homes:
    """Layer after layer, each by linear assignment to where its predecessors' tokens are."""
    homes: Homes = [np.repeat(np.arange(len(counts[0])), counts[0])]
    for i, weights in enumerate(problem.transitions):
        homes.append(_assign(_arrivals(weights, homes[i], len(counts[0])), counts[i + 1]))
    return homes


def _arrivals(weights: Array, held: NDArray[np.intp], devices: int) -> Array:
    """``[F, D]``: how much each next expert is reached from each device."""
    found: Array = weights.T @ one_hot(held, devices)
    return found


def _assign(gain: Array, counts: Counts) -> NDArray[np.intp]:
    """Experts to devices' places, most ``gain [E, D]`` in all."""
    places = np.repeat(np.arange(len(counts)), counts)
    rows, columns = linear_sum_assignment(gain[:, places], maximize=True)
    held: NDArray[np.intp] = np.zeros(len(gain), np.intp)
    held[rows] = places[columns]
    return held


def improve(problem: Problem, homes: Homes, counts: Sequence[Counts]) -> Homes:
    """Give every layer its best assignment between its neighbours' until none gains."""
    weights = problem.transitions
    devices = len(problem.devices)
    homes = [h.copy() for h in homes]
    best = hops(problem, homes)
    while True:
        for i in [*range(len(homes)), *reversed(range(len(homes)))]:
            gain = np.zeros((len(homes[i]), devices))
            if i:
                gain += _arrivals(weights[i - 1], homes[i - 1], devices)
            if i + 1 < len(homes):
                gain += _arrivals(weights[i].T, homes[i + 1], devices)
            homes[i] = _assign(gain, counts[i])
        now = hops(problem, homes)
        if now > best * (1 - 1e-9):
            return homes
        best = now


def _first(problem: Problem, counts: Sequence[Counts], seed: int, tries: int) -> Homes:
    """The best of the forward assignment and random starts, each improved."""
    generator = np.random.default_rng(seed)
    starts = [forward_assignment(problem, counts)]
    starts += [
        [generator.permutation(np.repeat(np.arange(len(c)), c)) for c in counts]
        for _ in range(tries)
    ]
    improved = [improve(problem, s, counts) for s in starts]
    fitting = [h for h in improved if problem.fits(h)]
    return min(fitting, key=lambda h: hops(problem, h)) if fitting else []


def affinity(
    problem: Problem,
    counts: Sequence[Counts],
    seconds: float,
    solver: str = "highs",
    seed: int = 0,
) -> Found:
    """``min sum_l sum_(e, f) w[l, e, f] (1 - sum_d y[l, e, f, d])``: pairs on different devices.

    ``x[l, e, d]`` binary with ``sum_e x[l, e, d] = K[l, d]``; ``w`` the mean pairs a token of
    experts taken in adjacent layers. ``y[l, e, f, d] <= x[l, e, d], x[l + 1, f, d]`` says that both
    are on ``d``; the cuts ``sum_f y[l, e, f, d] = K[l + 1, d] x[l, e, d]`` and ``sum_e y[l, e, f,
    d] = K[l, d] x[l + 1, f, d]`` make the relaxation tight (without them its bound is near 0).
    After ExFlow (arXiv 2401.08383), which has ``z >= |x - x'|`` and equal ``K``. Where a layer has
    few placements the problem is solved exactly as a chain (`carve.placement.chain`). Else a
    placement is found by linear assignment between neighbours from several starts, and the
    programme proves the bound and improves on it.

    Raises:
        UserError: the counts do not fit into memory.
    """
    began = time.monotonic()
    known = matching_bound(problem, counts)
    if max(states_of(c) for c in counts) <= MOST_STATES:
        homes = best_chain(problem, counts)
        known = hops(problem, homes)  # without memory: a bound with it
        if problem.fits(homes):
            return Found(homes, known, known)
    homes = _first(problem, counts, seed, 24)
    model, x = _programme(problem, counts)
    if homes:
        for layer, held in zip(x, homes, strict=True):
            start_from(layer, held)
    left = seconds - (time.monotonic() - began)
    found = solve(model, left, solver=solver, warm=bool(homes))
    if found.value is not None:
        tuned = improve(problem, [held_by(layer) for layer in x], counts)
        other = tuned if problem.fits(tuned) else [held_by(layer) for layer in x]
        if not homes or hops(problem, other) < hops(problem, homes):
            homes = other
    if not homes:
        raise UserError(
            "infeasible",
            "no placement with these counts of experts fits into memory",
            "choose throughput or latency, which choose the counts themselves",
        )
    value = hops(problem, homes)
    return Found(homes, value, min(max(known, found.bound), value))


def _programme(
    problem: Problem, counts: Sequence[Counts]
) -> tuple[pulp.LpProblem, list[Variables]]:
    """The programme of `affinity`, and its ``x`` by layer."""
    devices = len(problem.devices)
    weights = problem.transitions
    model = pulp.LpProblem("affinity", pulp.LpMinimize)
    x = [
        [
            [pulp.LpVariable(f"x_{i}_{e}_{d}", cat="Binary") for d in range(devices)]
            for e in range(len(size))
        ]
        for i, size in enumerate(problem.nbytes)
    ]
    for layer, count in zip(x, counts, strict=True):
        for row in layer:
            model += pulp.lpSum(row) == 1
        for d in range(devices):
            model += pulp.lpSum(row[d] for row in layer) == int(count[d])
    unit = max(float(b.max()) for b in problem.nbytes)
    for d, cap in enumerate(problem.caps):
        used = [
            float(b / unit) * layer[e][d]
            for layer, size in zip(x, problem.nbytes, strict=True)
            for e, b in enumerate(size)
        ]
        model += pulp.lpSum(used) <= float(cap) / unit * WITHIN
    together = []
    for i, w in enumerate(weights):
        y = [
            [
                [pulp.LpVariable(f"y_{i}_{e}_{f}_{d}", 0, 1) for d in range(devices)]
                for f in range(w.shape[1])
            ]
            for e in range(w.shape[0])
        ]
        for d in range(devices):
            for e in range(w.shape[0]):
                here = pulp.lpSum(y[e][f][d] for f in range(w.shape[1]))
                model += here == int(counts[i + 1][d]) * x[i][e][d]
            for f in range(w.shape[1]):
                here = pulp.lpSum(y[e][f][d] for e in range(w.shape[0]))
                model += here == int(counts[i][d]) * x[i + 1][f][d]
        for e in range(w.shape[0]):
            for f in range(w.shape[1]):
                for d in range(devices):
                    model += y[e][f][d] <= x[i][e][d]
                    model += y[e][f][d] <= x[i + 1][f][d]
                    together.append(float(w[e, f]) * y[e][f][d])
    total = float(sum(w.sum() for w in weights))
    model += total - pulp.lpSum(together)
    if _alike(problem, counts):  # devices then differ by name only: the first layer gives them
        for e, row in enumerate(x[0]):
            for v in row[e + 1 :]:
                model += v == 0
    return model, x


def matching_bound(problem: Problem, counts: Sequence[Counts]) -> float:
    """A lower bound on hops that costs milliseconds: each pair of layers alone.

    An expert shares its device with ``max_d K_d`` of the next layer's at the most, and with as many
    of the former's; ``sum_d K[l, d] K[l + 1, d]`` pairs share one in all. Which pairs those are is
    a transport problem.
    """
    total = 0.0
    for w, before, after in zip(problem.transitions, counts, counts[1:], strict=False):
        rows, columns = w.shape
        index = np.arange(rows * columns)
        of_row = csr_array((np.ones(index.size), (index // columns, index)))
        of_column = csr_array((np.ones(index.size), (index % columns, index)))
        found = linprog(
            -w.ravel(),
            vstack([of_row, of_column]),
            np.r_[np.full(rows, after.max()), np.full(columns, before.max())],
            np.ones((1, index.size)),
            [float(before @ after)],
            bounds=(0, 1),
        )
        total += float(w.sum()) + (float(found.fun) if found.status == 0 else -float(w.sum()))
    return total


def _alike(problem: Problem, counts: Sequence[Counts]) -> bool:
    """Whether any two devices may change places: equal counts, and memory that holds any."""
    most = sum(float(b.max()) * int(c.max()) for b, c in zip(problem.nbytes, counts, strict=True))
    return all(len(set(c.tolist())) == 1 for c in counts) and most <= float(problem.caps.min())
