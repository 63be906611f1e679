"""Place experts: one function for every objective."""

from __future__ import annotations

import time
from dataclasses import dataclass

from carve.config import nearest
from carve.errors import UserError
from carve.placement.affinity import affinity
from carve.placement.counts import counts_by_speed, equal_counts
from carve.placement.moetuner import moetuner
from carve.placement.problem import OBJECTIVES, Problem
from carve.placement.replicas import Held, replicate
from carve.placement.result import Placement
from carve.placement.search import Found, LayeredSearch
from carve.placement.solver import SOLVERS

METHODS = (*OBJECTIVES, "exflow", "moetuner")


@dataclass(frozen=True)
class PlaceSettings:
    """How to place.

    ``objective``: ``throughput`` (seconds a token of a batch, devices side by side), ``latency``
    (of one token alone), ``affinity`` (hops between devices, experts in proportion to the devices'
    bandwidth), or as published: ``exflow`` (hops, equal counts), ``moetuner`` (two stages).
    ``seconds``: time limit. ``replicas``: most devices that hold the same expert, where memory is
    left over (``throughput`` only). ``solver``: ``highs`` or ``cbc``.
    """

    objective: str = "throughput"
    seconds: float = 30.0
    replicas: int = 1
    solver: str = "highs"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("objective", self.objective, METHODS),
            ("solver", self.solver, SOLVERS),
        ):
            if value not in known:
                raise UserError("config", f"unknown {name} {value!r}{nearest(value, known)}")
        if self.replicas < 1 or self.seconds <= 0:
            raise UserError("config", "place needs replicas >= 1 and seconds > 0")
        if self.replicas > 1 and self.objective != "throughput":
            raise UserError("config", "replicas are chosen for the objective throughput only")


def place(problem: Problem, settings: PlaceSettings) -> Placement:
    """The best placement found in time, and a bound that no other can beat.

    Raises:
        UserError: nothing fits, and which constraint says so.
        CarveError: no placement was found in time.
    """
    began = time.monotonic()
    problem.check()
    objective = settings.objective
    if objective in ("throughput", "latency"):
        found = LayeredSearch(problem, objective, settings.seconds, settings.solver)()
    elif objective in ("affinity", "exflow"):
        counts = (equal_counts if objective == "exflow" else counts_by_speed)(problem)
        found = affinity(problem, counts, settings.seconds, settings.solver)
        objective = "affinity"
    else:
        homes = moetuner(problem, settings.seconds, settings.solver)
        # It bounds neither of its stages together; what it is worth is said as throughput.
        objective = "throughput"
        found = Found(homes, OBJECTIVES[objective](problem, homes), 0.0)
    held: Held = [[(int(d),) for d in layer] for layer in found.homes]
    value, bound = found.value, found.bound
    if settings.replicas > 1:
        held, value, bound = replicate(problem, found, settings.replicas)
    return Placement(
        problem.devices.names,
        problem.trace.layers,
        tuple(tuple(layer) for layer in held),
        objective,
        value,
        bound,
        time.monotonic() - began,
    )
