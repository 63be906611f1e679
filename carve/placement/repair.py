"""Make a placement fit the devices' memory, or say why none does."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pulp  # type: ignore[import-untyped]
from numpy.typing import NDArray

from carve.errors import CarveError, UserError
from carve.placement.problem import Homes, Problem
from carve.placement.solver import solve

Value = Callable[[int, NDArray[np.intp]], float]


def repair(
    problem: Problem, homes: Homes, value: Value, *, deadline: float, solver: str = "highs"
) -> Homes:
    """Move experts off the devices that are too full, the cheapest by byte first.

    Where moves alone do not do it, a programme over all experts looks for any placement that fits.

    Args:
        problem: what is placed.
        homes: a placement that may exceed memory; not changed.
        value: a layer's cost for given homes.
        deadline: `time.monotonic` at which to stop.
        solver: for the programme.

    Raises:
        UserError: it is proven that nothing fits; by how much, and where.
        CarveError: time was over before either was known.
    """
    homes = [h.copy() for h in homes]
    for d in np.argsort(problem.caps - problem.used(homes)):
        if not _emptied(problem, homes, value, int(d)):
            return _any_placement(problem, deadline, solver)
    return homes


def _emptied(problem: Problem, homes: Homes, value: Value, device: int) -> bool:
    """Move experts off ``device`` until it fits; False where there is no room for them."""
    room = problem.caps - problem.used(homes)
    moves = [_cheapest_move(problem, homes, value, i, device, room) for i in range(len(homes))]
    while room[device] < -1e-6:
        layer = min(range(len(moves)), key=lambda i: moves[i][0])
        cost, expert, to = moves[layer]
        if cost == np.inf:
            return False
        size = problem.nbytes[layer][expert]
        if size <= room[to]:
            homes[layer][expert] = to
            room[device] += size
            room[to] -= size
        # Only this layer's costs have changed; others are asked for room when it is their turn.
        moves[layer] = _cheapest_move(problem, homes, value, layer, device, room)
    return True


def _cheapest_move(
    problem: Problem,
    homes: Homes,
    value: Value,
    layer: int,
    device: int,
    room: NDArray[np.float64],
) -> tuple[float, int, int]:
    """``(cost a byte, expert, device)`` of the layer's best move off ``device``; inf for none."""
    held = homes[layer]
    before, best = value(layer, held), (np.inf, -1, -1)
    for e in np.flatnonzero(held == device):
        size = problem.nbytes[layer][e]
        for to in np.flatnonzero(room >= size):
            if to == device:
                continue
            held[e] = to
            best = min(best, ((value(layer, held) - before) / size, int(e), int(to)))
            held[e] = device
    return best


def _any_placement(problem: Problem, deadline: float, solver: str) -> Homes:
    """``min sum_d over_d``, ``sum_e bytes x <= cap_d + over_d``: zero where something fits."""
    model = pulp.LpProblem("fit", pulp.LpMinimize)
    count = len(problem.devices)
    over = [pulp.LpVariable(f"over_{d}", lowBound=0) for d in range(count)]
    # Experts of one size are alike to memory: counting them keeps the programme small.
    sizes = sorted({float(b) for size in problem.nbytes for b in size}, reverse=True)
    unit = sizes[0]
    number = {b: sum(int((size == b).sum()) for size in problem.nbytes) for b in sizes}
    held = {
        (b, d): pulp.LpVariable(f"n_{i}_{d}", 0, number[b], cat="Integer")
        for i, b in enumerate(sizes)
        for d in range(count)
    }
    for b in sizes:
        model += pulp.lpSum(held[b, d] for d in range(count)) == number[b]
    for d, cap in enumerate(problem.caps):
        used = pulp.lpSum(b / unit * held[b, d] for b in sizes)
        model += used <= max(0.0, float(cap)) / unit + over[d]
    model += pulp.lpSum(over)
    found = solve(model, max(1.0, deadline - time.monotonic()), solver=solver, gap=0.0)
    if found.value is None or (found.value > 1e-9 and found.bound <= 1e-9):
        raise CarveError(
            "solver",
            "no placement that fits in memory was found in time, nor that there is none",
            "give it longer (--set place.seconds=120), or more memory",
        )
    if found.value > 1e-9:
        full = [(v.varValue or 0.0, n) for v, n in zip(over, problem.devices.names, strict=True)]
        most, name = max(full)
        raise UserError(
            "infeasible",
            f"memory of {name!r}: experts fit into all devices together, but not whole ones into "
            f"each; the nearest way is {most * unit:.0f} bytes too large there",
            "give that device more memory, or lower --bits",
        )
    return _deal(problem, {k: round(v.varValue or 0.0) for k, v in held.items()})


def _deal(problem: Problem, number: dict[tuple[float, int], int]) -> Homes:
    """Experts to devices, so many of each size, spread over the layers."""
    homes = []
    for size in problem.nbytes:
        held = np.zeros(len(size), np.intp)
        for e, b in enumerate(size):
            free = [number[float(b), d] for d in range(len(problem.devices))]
            held[e] = int(np.argmax(free))
            number[float(b), int(held[e])] -= 1
        homes.append(held)
    return homes
