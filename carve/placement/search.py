"""Placement where only memory couples the layers: columns, priced until the bound meets them."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pulp  # type: ignore[import-untyped]
from numpy.typing import NDArray

from carve.placement.layered import held_by, start_from
from carve.placement.oracle import Column, Oracle
from carve.placement.problem import Array, Homes, Problem
from carve.placement.repair import repair
from carve.placement.solver import GAP, WITHIN, solve

NEAR = 64
"""Columns a layer that are offered beside those found, where all placements are known."""


@dataclass(frozen=True)
class Found:
    """A placement, its ``value`` and a lower ``bound`` on any other's, in the objective's unit."""

    homes: Homes
    value: float
    bound: float


class LayeredSearch:
    """Least ``sum_l f_l(x_l)`` within memory, by Dantzig-Wolfe decomposition.

    For prices ``a >= 0`` of the devices' memory, ``g(a) = sum_l min_x [f_l(x) + sum_d a_d
    bytes_d(x)] - sum_d a_d cap_d`` is a lower bound, and each layer is a small problem of its own
    (`Oracle`). Every layer's solution is a column; the programme that chooses one column a layer
    within memory gives, relaxed, the next prices, and whole, a placement. The best bound and the
    best placement are kept.

    Raises:
        UserError: no placement fits, with the constraint.
    """

    def __init__(
        self, problem: Problem, objective: str, seconds: float, solver: str = "highs"
    ) -> None:
        problem.check()
        self.problem, self.solver = problem, solver
        self.oracle = Oracle(problem, objective, solver)
        self.began = time.monotonic()
        self.seconds = seconds
        self.columns: list[list[Column]] = [[] for _ in problem.nbytes]
        self.bound, self.best_prices = -np.inf, np.zeros(len(problem.devices))
        self.homes: Homes = []
        self.value = np.inf

    def __call__(self) -> Found:
        """Search until the gap is `carve.placement.solver.GAP` or time is over."""
        each = 0.3 * self.seconds / self.problem.num_layers
        heavy = not all(self.oracle.counted(i) for i in range(self.problem.num_layers))
        prices = self._relaxed_prices() if heavy else self.best_prices
        while True:
            gained = self._price(prices, each)
            if not self.homes:
                self._repair()
            if self._done() or self._left() < 0.25 * self.seconds:
                break
            master = self._master_prices()
            # Between the best prices so far and the master's, which swing wildly at first.
            following = 0.6 * self.best_prices + 0.4 * master
            if not gained and np.allclose(following, prices, rtol=1e-2):
                break
            prices = following
        self._choose(self._left() * 0.6)
        self._polish()
        value = self.value * self.oracle.scale
        return Found(self.homes, value, min(self.bound * self.oracle.scale, value))

    def _left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    def _done(self) -> bool:
        return self.value - self.bound <= GAP * self.value

    def _price(self, prices: Array, each: float) -> bool:
        """Solve every layer at these prices; whether bound or columns gained by it."""
        bound = -float(prices @ self.problem.caps)
        gained = False
        for i, columns in enumerate(self.columns):
            column, least = self.oracle.best(i, prices, min(each, max(0.1, self._left())))
            bound += least
            if column is not None and not any(
                np.array_equal(column.homes, c.homes) for c in columns
            ):
                columns.append(column)
                gained = True
        if bound > self.bound:
            gained |= bound > self.bound + 1e-6 * abs(bound)
            self.bound, self.best_prices = bound, prices
        return gained

    def _relaxed_prices(self) -> Array:
        """Duals of the memory rows where every layer's programme is relaxed."""
        model = pulp.LpProblem("relaxed", pulp.LpMinimize)
        layers = [self.oracle.build(self.problem, i, model) for i in range(self.problem.num_layers)]
        model += pulp.lpSum(layer.objective for layer in layers)
        rows = []
        for d, cap in enumerate(self.problem.caps):
            used = pulp.lpSum(
                float(b / max(cap, 1.0)) * layer.x[e][d]
                for layer, size in zip(layers, self.problem.nbytes, strict=True)
                for e, b in enumerate(size)
            )
            row = used <= 1
            model += row
            rows.append(row)
        solve(model, 0.2 * self.seconds, solver=self.solver, relaxed=True)
        return self._duals(rows)

    def _duals(self, rows: list[pulp.LpConstraint]) -> Array:
        """Prices a byte from rows ``bytes / cap <= 1``."""
        duals = np.array([max(0.0, -(row.pi or 0.0)) for row in rows])
        return duals / np.maximum(self.problem.caps, 1.0)

    def _master(
        self, columns: list[list[Column]], *, whole: bool
    ) -> tuple[pulp.LpProblem, list[list[pulp.LpVariable]], list[pulp.LpConstraint]]:
        """One column a layer, memory kept; relaxed, at a price that no memory is worth."""
        model = pulp.LpProblem("master", pulp.LpMinimize)
        cat = "Binary" if whole else "Continuous"
        y = [
            [pulp.LpVariable(f"y_{i}_{j}", 0, 1, cat=cat) for j in range(len(c))]
            for i, c in enumerate(columns)
        ]
        pairs = [p for cs, vs in zip(columns, y, strict=True) for p in zip(cs, vs, strict=True)]
        cost = [c.value * v for c, v in pairs]
        for row in y:
            model += pulp.lpSum(row) == 1
        rows = []
        worth = 10.0 * sum(max(c.value for c in cs) for cs in columns)
        for d, cap in enumerate(self.problem.caps):
            room = max(float(cap), 1.0)
            used = [float(c.used[d] / room) * v for c, v in pairs if c.used[d] > 0]
            if not whole:
                over = pulp.LpVariable(f"over_{d}", lowBound=0)
                used.append(-1.0 * over)
                cost.append(worth * over)
            row = pulp.lpSum(used) <= (WITHIN if whole else 1)
            model += row
            rows.append(row)
        model += pulp.lpSum(cost)
        return model, y, rows

    def _master_prices(self) -> Array:
        model, _, rows = self._master(self.columns, whole=False)
        solve(model, max(1.0, self._left()), solver=self.solver, relaxed=True)
        return self._duals(rows)

    def _choose(self, seconds: float) -> None:
        """The best placement that the columns make."""
        if self._done():
            return
        offered = [
            [*c, *self.oracle.near(i, self.best_prices, NEAR), self._now(i)]
            for i, c in enumerate(self.columns)
        ]
        model, y, _ = self._master(offered, whole=True)
        # The last column of each layer is what there is.
        start_from(y, np.array([len(row) - 1 for row in y]))
        found = solve(model, seconds, solver=self.solver, warm=True)
        if found.value is None:
            return
        self._keep([cs[j].homes for cs, j in zip(offered, held_by(y), strict=True)])

    def _now(self, layer: int) -> Column:
        return self.oracle.column(layer, self.homes[layer])

    def _repair(self) -> None:
        """A first placement that fits, from the columns at the first prices."""
        first = [c[-1].homes if c else self._alone(i) for i, c in enumerate(self.columns)]
        deadline = self.began + self.seconds
        self._keep(
            repair(self.problem, first, self.oracle.value, deadline=deadline, solver=self.solver)
        )
        for i, columns in enumerate(self.columns):
            columns.append(self._now(i))

    def _alone(self, layer: int) -> NDArray[np.intp]:
        """Every expert on the largest device: where a search found nothing in time."""
        return np.full(len(self.problem.nbytes[layer]), int(np.argmax(self.problem.caps)))

    def _keep(self, homes: Homes) -> None:
        value = sum(self.oracle.value(i, h) for i, h in enumerate(homes))
        if value < self.value and self.problem.fits(homes):
            self.homes, self.value = [h.copy() for h in homes], value

    def _polish(self) -> None:
        """Solve one layer after another again with the memory that the others leave it."""
        improved = bool(self.best_prices.any())
        free = np.zeros(len(self.problem.devices))
        while improved and not self._done():
            improved = False
            for i in range(self.problem.num_layers):
                if self._left() < 0.2:
                    return
                now = self._now(i)
                room = self.problem.caps - self.problem.used(self.homes) + now.used
                each = min(1.0, self._left())
                column, _ = self.oracle.best(i, free, each, room=room, start=now.homes)
                if column is not None and column.value < now.value * (1 - 1e-6):
                    self._keep([*self.homes[:i], column.homes, *self.homes[i + 1 :]])
                    improved = True
