"""How many experts of each layer every device holds, where an objective does not say."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from carve.errors import UserError
from carve.placement.problem import Array, Problem

Counts = NDArray[np.intp]
"""``[D]`` experts of one layer on each device."""


def equal_counts(problem: Problem) -> list[Counts]:
    """The same number of experts on every device, layer by layer (ExFlow, arXiv 2401.08383).

    Raises:
        UserError: the experts of a layer cannot be dealt out evenly, or memory does not hold it.
    """
    count = len(problem.devices)
    for name, size in zip(problem.trace.layers, problem.nbytes, strict=True):
        if len(size) % count:
            raise UserError(
                "infeasible",
                f"{name}: {len(size)} experts cannot be dealt out evenly to {count} devices",
                "choose another objective, or num_experts",
            )
    return [np.full(count, len(size) // count) for size in problem.nbytes]


def counts_by_speed(problem: Problem) -> list[Counts]:
    """Experts of each layer on each device: in proportion to its bandwidth, within memory.

    Bandwidth, for that bounds one token. Where memory is short the rest goes to those with room.

    Raises:
        UserError: nothing fits; see `Problem.check`.
    """
    problem.check()
    speed = np.array([d.bandwidth for d in problem.devices.devices])
    room = problem.caps.copy()
    counts = []
    for i, size in enumerate(problem.nbytes):
        largest = float(size.max())
        # What each device may take of this layer, if it shares its room with the layers to come.
        later = sum(float(b.sum()) for b in problem.nbytes[i:])
        fair = np.floor(room / later * len(size) + 1e-9)
        most = np.floor(np.maximum(room, 0) / largest)
        want = _rounded(speed / speed.sum() * len(size), len(size))
        held = np.minimum(np.minimum(want, fair), most)
        while held.sum() < len(size):
            free = np.where(held < most, room - held * largest, -np.inf)
            d = int(np.argmax(free))
            if free[d] < largest:
                raise UserError(
                    "infeasible",
                    f"{problem.trace.layers[i]}: no device has room left for an expert of "
                    f"{largest:.0f} bytes",
                    "add memory, or choose throughput or latency, which pack more tightly",
                )
            held[d] += 1
        counts.append(held.astype(np.intp))
        room -= held * largest
    return counts


def _rounded(parts: Array, total: int) -> Array:
    """Whole numbers of that total, by largest remainder."""
    whole: Array = np.floor(parts)
    rest = np.argsort(whole - parts)[: total - int(whole.sum())]
    whole[rest] += 1
    return whole
