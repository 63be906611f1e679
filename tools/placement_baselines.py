"""Placements that need no solver, for `tools/placement.py` to compare with.

All take a `carve.placement.problem.Problem` and give the device of every expert, by layer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from carve.placement.affinity import forward_assignment
from carve.placement.counts import counts_by_speed
from carve.placement.problem import Homes, Problem


def contiguous(problem: Problem) -> Homes:
    """Equal blocks of consecutive experts, as expert-parallel engines deal them out."""
    count = len(problem.devices)
    return [np.arange(len(b)) * count // len(b) for b in problem.nbytes]


def round_robin(problem: Problem) -> Homes:
    """Experts dealt out in turn."""
    return [np.arange(len(b)) % len(problem.devices) for b in problem.nbytes]


def greedy(problem: Problem) -> Homes:
    """Speed-aware greedy: the busiest expert first, where its layer then finishes soonest."""
    room = problem.caps.copy()
    homes: Homes = []
    for i, (size, load) in enumerate(zip(problem.nbytes, problem.trace.loads(), strict=True)):
        busy, done = problem.busy[i], problem.busy_base[i].copy()
        held = np.zeros(len(size), np.intp)
        # What later layers need is kept free on each device in proportion to its room.
        later = sum(float(b.sum()) for b in problem.nbytes[i + 1 :])
        keep = later * room / room.sum()
        for e in np.argsort(-load):
            open_ = room - keep >= size[e]
            if not open_.any():
                open_ = room >= size[e]
            d = int(np.argmin(np.where(open_, done + busy[e], np.inf)))
            held[e] = d
            done[d] += busy[e, d]
            room[d] -= size[e]
        homes.append(held)
    return homes


def eplb(problem: Problem) -> Homes:
    """DeepSeek's EPLB without replicas: balanced packing, equal counts, devices taken as equal."""
    count = len(problem.devices)
    homes: Homes = []
    for load in problem.trace.loads():
        most = -(-len(load) // count)
        total: NDArray[np.float64] = np.zeros(count)
        number = np.zeros(count, np.intp)
        held = np.zeros(len(load), np.intp)
        for e in np.argsort(-load):
            d = int(np.argmin(np.where(number < most, total, np.inf)))
            held[e] = d
            total[d] += load[e]
            number[d] += 1
        homes.append(held)
    return homes


def forward(problem: Problem) -> Homes:
    """Layer by layer, linear assignment to where the tokens come from, counts by speed."""
    return forward_assignment(problem, counts_by_speed(problem))


BASELINES = {
    "contiguous": contiguous,
    "round-robin": round_robin,
    "speed-aware greedy": greedy,
    "EPLB": eplb,
    "forward assignment": forward,
}
