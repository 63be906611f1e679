"""The budget as an integer programme: one option a site, the least loss within the limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp  # type: ignore[import-untyped]
from scipy.sparse import csr_array  # type: ignore[import-untyped]

from carve.errors import CarveError, UserError


@dataclass(frozen=True)
class Option:
    """Something a site may become.

    ``loss``: what it adds to the program's loss. ``cost``: what it uses of each resource by name
    (multiply-accumulates, bytes, ...). ``value``: what the chooser gets back, for example a
    `carve.budget.Split` or None for dense.
    """

    loss: float
    cost: Mapping[str, float]
    value: Any = field(default=None, compare=False)


@dataclass(frozen=True)
class Allocation:
    """The chosen option of each site, their losses' sum, and the solver's lower bound on it."""

    chosen: dict[str, Option]
    loss: float
    bound: float


def allocate(
    options: Mapping[str, Sequence[Option]],
    limits: Mapping[str, float],
    *,
    seconds: float = 30.0,
) -> Allocation:
    """``min sum_s sum_o loss[s, o] x[s, o]``: one ``x`` a site, each resource within its limit.

    ``x`` is binary; ``sum_o x[s, o] = 1`` for every site, ``sum cost[r, s, o] x[s, o] <= limit[r]``
    for every resource. Solved by HiGHS through scipy. Losses of different sites are taken to add
    up; a report holds the predicted sum beside what came of it.

    Raises:
        UserError: no choice keeps the limits; the message names the first that cannot be kept.
        CarveError: the solver failed.
    """
    for resource, limit in limits.items():
        least = sum(min(o.cost[resource] for o in each) for each in options.values())
        if least > limit * (1 + 1e-9):
            raise UserError(
                "budget",
                f"the least {resource} that any choice reaches is {least:.4g}, "
                f"the limit is {limit:.4g}",
                "raise the budget",
            )
    sites = list(options)
    pairs = [(i, o) for i, s in enumerate(sites) for o in options[s]]
    count = len(pairs)
    # Scaled, for the solver's tolerances are absolute.
    largest = max((o.loss for _, o in pairs), default=0.0) or 1.0
    owner = np.array([i for i, _ in pairs])
    one_each = csr_array((np.ones(count), (owner, np.arange(count))), (len(sites), count))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for resource, limit in limits.items():
        used = [o.cost[resource] / max(limit, 1e-30) for _, o in pairs]
        constraints.append(LinearConstraint(np.array([used]), -np.inf, 1 + 1e-9))
    found = milp(
        np.array([o.loss for _, o in pairs]) / largest,
        integrality=np.ones(count),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"time_limit": seconds, "mip_rel_gap": 1e-6},
    )
    if found.x is None:
        raise CarveError("solver", f"the allocation was not solved: {found.message}")
    chosen = {sites[i]: o for (i, o), x in zip(pairs, found.x, strict=True) if x > 0.5}
    loss = sum(o.loss for o in chosen.values())
    bound = loss if found.mip_dual_bound is None else float(found.mip_dual_bound) * largest
    return Allocation(chosen, loss, min(bound, loss))
