"""The best placement of one layer, for given prices of memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pulp  # type: ignore[import-untyped]
from numpy.typing import NDArray

from carve.placement.layered import LAYERED, held_by, scale_of, start_from
from carve.placement.problem import Array, Problem
from carve.placement.solver import WITHIN, solve

MOST_COUNTED = 1 << 17
"""Placements of one layer up to which all of them are tried instead of a search."""


@dataclass(frozen=True)
class Column:
    """A placement of one layer: its homes ``[E]``, value, and bytes ``[D]`` on each device."""

    homes: NDArray[np.intp]
    value: float
    used: Array


class Oracle:
    """Solves layers one by one; values are in units of `scale_of`.

    A layer with few enough placements is solved by trying them all, once for all prices, else by
    its programme in `carve.placement.layered`.
    """

    def __init__(self, problem: Problem, objective: str, solver: str) -> None:
        self.problem, self.solver = problem, solver
        self.build, self._value = LAYERED[objective]
        self.scale = scale_of(problem, objective)
        self._all: dict[int, tuple[NDArray[np.intp], Array, Array]] = {}

    def counted(self, layer: int) -> bool:
        """Whether all placements of the layer are tried."""
        experts = len(self.problem.nbytes[layer])
        return bool(len(self.problem.devices) ** experts <= MOST_COUNTED)

    def value(self, layer: int, homes: NDArray[np.intp]) -> Any:
        """The layer's cost for homes ``[..., E]``."""
        return self._value(self.problem, layer, homes) / self.scale

    def column(self, layer: int, homes: NDArray[np.intp]) -> Column:
        """A placement as a column."""
        used = self.problem.used_by(layer, homes)
        return Column(homes, self.value(layer, homes), used)

    def best(
        self,
        layer: int,
        prices: Array,
        seconds: float,
        *,
        room: Array | None = None,
        start: NDArray[np.intp] | None = None,
    ) -> tuple[Column | None, float]:
        """``min f(x) + sum_d prices_d bytes_d(x)``, within ``room`` bytes where it is given.

        Returns:
            The best placement found, if any was, and a lower bound on the priced cost.
        """
        if self.counted(layer):
            held, value, used = self._try_all(layer)
            priced = value + used @ prices
            if room is not None:
                priced = np.where((used <= room + 1e-6).all(1), priced, np.inf)
            if not np.isfinite(priced).any():
                return None, np.inf
            i = int(np.argmin(priced))
            return Column(held[i], float(value[i]), used[i]), float(priced[i])
        return self._search(layer, prices, seconds, room, start)

    def near(self, layer: int, prices: Array, count: int) -> list[Column]:
        """The ``count`` placements of least priced cost, where all are tried; else none."""
        if not self.counted(layer):
            return []
        held, value, used = self._try_all(layer)
        priced = value + used @ prices
        count = min(count, len(priced))
        return [
            Column(held[i], float(value[i]), used[i])
            for i in np.argpartition(priced, count - 1)[:count]
        ]

    def _try_all(self, layer: int) -> tuple[NDArray[np.intp], Array, Array]:
        """Every placement ``[N, E]`` of the layer that fits alone, its value and bytes."""
        if layer not in self._all:
            size = self.problem.nbytes[layer]
            count = len(self.problem.devices)
            grids = np.indices((count,) * len(size)).reshape(len(size), -1).T
            used = np.stack([(grids == d) @ size for d in range(count)], axis=1)
            fits = (used <= self.problem.caps + 1e-6).all(1)
            held, used = grids[fits], used[fits]
            self._all[layer] = held, self.value(layer, held), used
        return self._all[layer]

    def _search(
        self,
        layer: int,
        prices: Array,
        seconds: float,
        room: Array | None,
        start: NDArray[np.intp] | None,
    ) -> tuple[Column | None, float]:
        problem = self.problem
        model = pulp.LpProblem(f"layer_{layer}", pulp.LpMinimize)
        built = self.build(problem, layer, model)
        size = problem.nbytes[layer]
        paid = [
            float(prices[d] * b) * built.x[e][d]
            for e, b in enumerate(size)
            for d in range(len(prices))
            if prices[d] > 0
        ]
        model += built.objective + pulp.lpSum(paid)
        if room is not None:
            unit = float(size.max())
            for d, cap in enumerate(room):
                used = pulp.lpSum(float(b) / unit * built.x[e][d] for e, b in enumerate(size))
                model += used <= max(0.0, float(cap)) / unit * WITHIN
        if start is not None:
            start_from(built.x, start)
        found = solve(model, seconds, solver=self.solver, warm=start is not None)
        if found.value is None:
            return None, found.bound
        return self.column(layer, held_by(built.x)), found.bound
