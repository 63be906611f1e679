"""MoETuner's two programmes: balanced clusters of experts, then clusters to devices."""

from __future__ import annotations

import time

import numpy as np
import pulp  # type: ignore[import-untyped]
from numpy.typing import NDArray

from carve.errors import UserError
from carve.placement.layered import held_by
from carve.placement.problem import Array, Homes, Problem, one_hot
from carve.placement.solver import solve


def moetuner(problem: Problem, seconds: float, solver: str = "highs") -> Homes:
    """Place experts as MoETuner (arXiv 2502.06643) does, for devices taken to be equal.

    First, layer by layer: experts to clusters, ``min sum_c |T_c - mean T|`` with ``T_c`` the tokens
    that a cluster's experts serve. Then clusters to devices, one each in every layer: ``min sum_l
    max_(d, d') traffic[l, d, d']``, ``traffic`` the pairs of experts in adjacent layers that a
    token takes on ``d`` and then on ``d'``. The second programme is solved from layer to layer,
    each with the former's devices known, which makes it small. Memory is in the second.

    Raises:
        UserError: the clusters do not fit into the devices' memory.
    """
    began = time.monotonic()
    each = 0.5 * seconds / problem.num_layers
    clusters = [_clusters(p, len(problem.devices), each, solver) for p in problem.trace.loads()]
    weights = problem.transitions
    room = problem.caps.copy()
    homes: Homes = []
    for i, cluster in enumerate(clusters):
        left = (seconds - (time.monotonic() - began)) / (problem.num_layers - i)
        size = problem.used_by(i, cluster)
        later = [problem.nbytes[j] for j in range(i + 1, problem.num_layers)]
        traffic = _traffic(weights[i - 1], homes[-1], cluster, len(room)) if homes else None
        device = _devices(traffic, size, room - _reserve(room, later), left, solver)
        if device is None:
            device = _devices(traffic, size, room, left, solver)
        if device is None:
            raise UserError(
                "infeasible",
                f"{problem.trace.layers[i]}: MoETuner's clusters, one a device, do not fit into "
                "the devices' memory",
                "choose throughput, latency or affinity, which know unequal devices",
            )
        homes.append(device[cluster])
        room -= problem.used_by(i, homes[-1])
    return homes


def _reserve(room: Array, later: list[Array]) -> Array:
    """Room that later layers need on each device if each fills all devices alike."""
    need = sum(float(b.sum()) for b in later)
    reserve: Array = np.minimum(room, need / len(room))
    return reserve


def _clusters(loads: Array, count: int, seconds: float, solver: str) -> NDArray[np.intp]:
    """``[E]`` the cluster of each expert, ``sum_c |T_c - mean T|`` least."""
    scale = float(loads.mean()) or 1.0
    model = pulp.LpProblem("clusters", pulp.LpMinimize)
    y = [
        [pulp.LpVariable(f"y_{e}_{c}", cat="Binary") for c in range(count)]
        for e in range(len(loads))
    ]
    for row in y:
        model += pulp.lpSum(row) == 1
    off = [pulp.LpVariable(f"off_{c}", lowBound=0) for c in range(count)]
    mean = float(loads.sum()) / count / scale
    for c in range(count):
        tokens = pulp.lpSum(float(p / scale) * y[e][c] for e, p in enumerate(loads))
        model += off[c] >= tokens - mean
        model += off[c] >= mean - tokens
    model += pulp.lpSum(off)
    found = solve(model, seconds, solver=solver, gap=1e-2)
    if found.value is None:  # no time: the busiest first, to the least busy
        total, cluster = np.zeros(count), np.zeros(len(loads), np.intp)
        for e in np.argsort(-loads):
            cluster[e] = int(np.argmin(total))
            total[cluster[e]] += loads[e]
        return cluster
    return held_by(y)


def _traffic(weights: Array, held: NDArray[np.intp], cluster: NDArray[np.intp], n: int) -> Array:
    """``[D, C]`` pairs a token from each device to each cluster of the next layer."""
    found: Array = one_hot(held, n).T @ weights @ one_hot(cluster, n)
    return found


def _devices(
    traffic: Array | None, size: Array, room: Array, seconds: float, solver: str
) -> NDArray[np.intp] | None:
    """``[C]`` the device of each cluster: the worst pair's traffic least; None where none fits."""
    count = len(room)
    model = pulp.LpProblem("devices", pulp.LpMinimize)
    y = [
        [
            pulp.LpVariable(f"y_{c}_{d}", cat="Binary") if size[c] <= room[d] else 0
            for d in range(count)
        ]
        for c in range(count)
    ]
    for c in range(count):
        model += pulp.lpSum(y[c]) == 1
        model += pulp.lpSum(y[k][c] for k in range(count)) == 1
    worst = pulp.LpVariable("worst", lowBound=0)
    if traffic is not None:
        for d in range(count):
            for to in range(count):
                if to != d:
                    model += worst >= pulp.lpSum(
                        float(traffic[d, c]) * y[c][to] for c in range(count)
                    )
    model += worst
    found = solve(model, seconds, solver=solver)
    return None if found.value is None else held_by(y)
