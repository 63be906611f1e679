"""One layer as an integer programme, for the objectives that are sums over layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pulp  # type: ignore[import-untyped]
from numpy.typing import NDArray

from carve.placement.problem import Array, Problem, layer_busy, layer_latency

Variables = list[list[Any]]
"""``x[e][d]``: whether a device holds an expert."""
MOST_SETS = 96
"""Most sets of experts a layer that the latency programme tells apart."""


@dataclass(frozen=True)
class LayerModel:
    """One layer in a programme: its objective and its ``x``."""

    objective: Any
    x: Variables


Build = Callable[[Problem, int, pulp.LpProblem], LayerModel]
Value = Callable[[Problem, int, NDArray[np.intp]], float]


def _placed(problem: Problem, layer: int, model: pulp.LpProblem) -> Variables:
    """``x[e, d]`` binary, ``sum_d x[e, d] = 1``; a device too small for an expert is left out."""
    size = problem.nbytes[layer]
    x: Variables = []
    for e in range(len(size)):
        row = [
            pulp.LpVariable(f"x_{layer}_{e}_{d}", cat="Binary") if size[e] <= cap else 0
            for d, cap in enumerate(problem.caps)
        ]
        model += pulp.lpSum(row) == 1
        x.append(row)
    return x


def throughput_layer(problem: Problem, layer: int, model: pulp.LpProblem) -> LayerModel:
    """``min T``, ``T >= base_d + sum_e busy[e, d] x[e, d]`` for every device ``d``."""
    x = _placed(problem, layer, model)
    scale = scale_of(problem, "throughput")
    busy, base = problem.busy[layer] / scale, problem.busy_base[layer] / scale
    t = pulp.LpVariable(f"t_{layer}", lowBound=float(base.max()))
    for d in range(len(problem.devices)):
        work = pulp.lpSum(float(busy[e, d]) * x[e][d] for e in range(len(x)))
        model += t >= float(base[d]) + work
    return LayerModel(t, x)


def latency_layer(problem: Problem, layer: int, model: pulp.LpProblem) -> LayerModel:
    """``min sum_S p_S t_S``, ``t_S`` the slowest device of a set ``S`` of experts in the trace.

    ``t_S >= base_d + sum_(e in S) single[e, d] x[e, d] + trip_d u[S, d]`` for every device ``d``;
    ``u[S, d] >= x[e, d]`` for all ``e`` in ``S``.
    Of the sets beyond `MOST_SETS`, the rarest, each counts with what it costs at the least.
    """
    x = _placed(problem, layer, model)
    scale = scale_of(problem, "latency")
    single, base = problem.single[layer] / scale, problem.single_base[layer] / scale
    trip = problem.trip / scale
    sets, share = problem.sets[layer]
    order = np.argsort(-share)
    rare = order[MOST_SETS:]
    total = [float(share[rare] @ _least(single, base, trip, sets[rare]))]
    sets, share = sets[order[:MOST_SETS]], share[order[:MOST_SETS]]
    for s, (members, p) in enumerate(zip(sets, share, strict=True)):
        chosen = np.flatnonzero(members)
        t = pulp.LpVariable(f"t_{layer}_{s}", lowBound=float(base.max()))
        total.append(float(p) * t)
        for d in range(len(problem.devices)):
            work = [float(single[e, d]) * x[e][d] for e in chosen]
            if trip[d] > 0 and len(chosen):
                u = pulp.LpVariable(f"u_{layer}_{s}_{d}", 0, 1)
                for e in chosen:
                    model += u >= x[e][d]
                work.append(float(trip[d]) * u)
            model += t >= float(base[d]) + pulp.lpSum(work)
    return LayerModel(pulp.lpSum(total), x)


def _least(single: Array, base: Array, trip: Array, sets: NDArray[np.bool_]) -> Array:
    """``[S]`` a bound on each set's time: all on the host, or one expert at least elsewhere."""
    home = sets @ single[:, 0] + base[0]
    away = (single[:, 1:] + trip[1:]).min(1, initial=np.inf)
    one = np.where(sets, away, np.inf).min(1, initial=np.inf)
    least: Array = np.minimum(home, np.maximum(one, base[0]))
    return least


def scale_of(problem: Problem, objective: str) -> float:
    """Seconds that programmes count as 1: the mean cost, for solvers' tolerances are absolute."""
    costs = problem.busy if objective == "throughput" else problem.single
    return float(np.mean([c.mean() for c in costs])) or 1.0


LAYERED: dict[str, tuple[Build, Value]] = {
    "throughput": (throughput_layer, layer_busy),
    "latency": (latency_layer, layer_latency),
}


def start_from(x: Variables, held: NDArray[np.intp]) -> None:
    """Give the variables the values of a placement."""
    for e, row in enumerate(x):
        for d, v in enumerate(row):
            if not isinstance(v, int):
                v.setInitialValue(1 if held[e] == d else 0)


def held_by(x: Variables) -> NDArray[np.intp]:
    """The device of each expert in a solution: in each row, the largest variable's place."""
    values = [[0.0 if isinstance(v, int) else float(v.varValue or 0.0) for v in row] for row in x]
    return np.array([np.argmax(row) for row in values], np.intp)
