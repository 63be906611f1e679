"""Exact balanced assignment of many items to few groups."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

_STEPS = 2.0**40
"""Costs are whole multiples of the largest one's this many parts."""


def balanced_assignment(cost: Tensor, capacity: int) -> Tensor:
    """Assign ``n = E * capacity`` items to ``E`` groups of equal size at the least total cost.

    The transport problem ``min sum c[i, g] x[i, g]``, each item once, each group ``capacity``
    times, by successive shortest paths: every item starts at its cheapest group; while a group is
    over capacity, items move along the cheapest path of groups to one that is under it. The graph
    has one node a group, so a path costs ``O(E^2)`` and memory is ``O(n E)`` where assignment on
    an n x n matrix needs ``O(n^2)``.

    Args:
        cost: ``[n, E]``, any real dtype.
        capacity: items a group.

    Returns:
        The group of each item, int64 ``[n]``; the best for costs rounded to 1e-12 of the largest.

    Raises:
        ValueError: ``n`` is not ``E * capacity``, or a cost is not finite.
    """
    c = cost.detach().double().numpy()
    n, groups = c.shape
    if n != groups * capacity:
        raise ValueError(f"{n} items do not fill {groups} groups of {capacity}")
    if not np.isfinite(c).all():
        raise ValueError("a cost is not finite")
    # Whole numbers, whose sums are exact in fp64: rounding makes cycles of negative length out of
    # equal costs, and a search for the shortest path never ends on one.
    largest = np.abs(c).max(initial=0.0)
    if largest > 0:
        c = np.rint(c / largest * _STEPS)
    owner = c.argmin(1)
    members = [set(np.flatnonzero(owner == g).tolist()) for g in range(groups)]
    # step[g, h]: least extra cost of moving one member of g to h, and that member.
    step = np.full((groups, groups), np.inf)
    mover = np.zeros((groups, groups), np.int64)

    def refresh(g: int) -> None:
        step[g] = np.inf
        if members[g]:
            ids = np.fromiter(members[g], np.int64)
            extra = c[ids] - c[ids, g][:, None]
            best = extra.argmin(0)
            step[g] = extra[best, np.arange(groups)]
            mover[g] = ids[best]
        step[g, g] = np.inf

    for g in range(groups):
        refresh(g)
    size = np.array([len(m) for m in members])
    while (size > capacity).any():
        path = _cheapest_path(step, size > capacity, size < capacity)
        for g, h in pairwise(path):
            item = int(mover[g, h])
            members[g].remove(item)
            members[h].add(item)
            owner[item] = h
        size[path[0]] -= 1
        size[path[-1]] += 1
        for g in path:
            refresh(g)
    return torch.from_numpy(owner)


def _cheapest_path(step: np.ndarray, start: np.ndarray, stop: np.ndarray) -> list[int]:
    """Bellman-Ford from all of ``start`` at once to the nearest of ``stop``."""
    distance = np.where(start, 0.0, np.inf)
    before = np.full(len(distance), -1)
    for _ in range(len(distance)):
        through = distance[:, None] + step
        best = through.argmin(0)
        value = through[best, np.arange(len(distance))]
        better = value < distance
        if not better.any():
            break
        distance[better] = value[better]
        before[better] = best[better]
    node = int(np.where(stop, distance, np.inf).argmin())
    path = [node]
    while before[path[-1]] >= 0:
        path.append(int(before[path[-1]]))
    return path[::-1]
