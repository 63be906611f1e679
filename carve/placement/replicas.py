"""Replicas: copies of busy experts in memory that is left over."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog  # type: ignore[import-untyped]

from carve.placement.problem import Array, Problem
from carve.placement.search import Found

Held = list[list[tuple[int, ...]]]


def replicate(problem: Problem, found: Found, most: int) -> tuple[Held, float, float]:
    """Copy experts to other devices while it saves time and fits, most saved by byte first.

    With copies a layer's time is ``min T``, ``T >= base_d + sum_e busy[e, d] y[e, d]``, ``y`` the
    share of an expert's tokens that each copy serves (EPLB has copies too, for equal devices).
    Greedy over copies, each judged by that linear programme.

    Returns:
        Devices of each expert, the home first; the value with copies; a lower bound on any
        placement's with copies everywhere, memory not asked.
    """
    held: Held = [[(int(d),) for d in layer] for layer in found.homes]
    room = problem.caps - problem.used(found.homes)
    times = [_shared_time(problem, i, layer) for i, layer in enumerate(held)]
    bound = 0.0
    everywhere = tuple(range(len(problem.devices)))
    for i, layer in enumerate(held):
        bound += _shared_time(problem, i, [everywhere] * len(layer))
    gains = [_best_copy(problem, i, held[i], times[i], room, most) for i in range(len(held))]
    while True:
        i = int(np.argmax([g[0] for g in gains]))
        gain, expert, device = gains[i]
        if gain <= 0:
            break
        size = problem.nbytes[i][expert]
        if size <= room[device]:
            held[i][expert] = (*held[i][expert], device)
            room[device] -= size
            times[i] = _shared_time(problem, i, held[i])
        gains[i] = _best_copy(problem, i, held[i], times[i], room, most)
    return held, sum(times), min(bound, sum(times))


def _best_copy(
    problem: Problem, layer: int, held: list[tuple[int, ...]], now: float, room: Array, most: int
) -> tuple[float, int, int]:
    """``(seconds saved a byte, expert, device)``; only the slowest device's experts can save."""
    best = (0.0, -1, -1)
    busy = problem.busy_base[layer].copy()
    for e, devices in enumerate(held):
        busy[list(devices)] += problem.busy[layer][e, list(devices)] / len(devices)
    slowest = int(np.argmax(busy))
    for e, devices in enumerate(held):
        if slowest not in devices or len(devices) >= most:
            continue
        size = float(problem.nbytes[layer][e])
        for d in np.flatnonzero(room >= size):
            if d in devices:
                continue
            tried = [*held[:e], (*devices, int(d)), *held[e + 1 :]]
            saved = now - _shared_time(problem, layer, tried)
            best = max(best, (saved / size if saved > 1e-6 * now else 0.0, e, int(d)))
    return best


def _shared_time(problem: Problem, layer: int, held: list[tuple[int, ...]]) -> float:
    """Least time of a layer whose experts' tokens may be shared out among their copies."""
    busy, base = problem.busy[layer], problem.busy_base[layer]
    fixed = base.copy()
    for e, devices in enumerate(held):
        if len(devices) == 1:
            fixed[devices[0]] += busy[e, devices[0]]
    free = [(e, d) for e, devices in enumerate(held) if len(devices) > 1 for d in devices]
    if not free:
        return float(fixed.max())
    scale = float(fixed.max()) or 1.0
    rows = np.zeros((len(base), len(free) + 1))
    rows[:, -1] = -1.0
    experts = sorted({e for e, _ in free})
    whole: NDArray[np.float64] = np.zeros((len(experts), len(free) + 1))
    for j, (e, d) in enumerate(free):
        rows[d, j] = busy[e, d] / scale
        whole[experts.index(e), j] = 1.0
    cost = np.zeros(len(free) + 1)
    cost[-1] = 1.0
    found = linprog(cost, rows, -fixed / scale, whole, np.ones(len(experts)))
    return float(found.fun) * scale
