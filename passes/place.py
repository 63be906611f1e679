"""Place: which device holds which expert, from a trace of who is needed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from carve.arithmetic import as_emitted
from carve.calibration import limit_batches
from carve.config import AT_LEAST_ONE
from carve.passbase import Context, ContractError, Pass
from carve.placement.devices import Devices, read_devices
from carve.placement.place import PlaceSettings, place
from carve.placement.problem import Homes, scores
from carve.placement.sizes import planned_sizes, sizes_of
from carve.placement.trace import collect_trace
from carve.program import Program


@dataclass(frozen=True)
class PlaceConfig(PlaceSettings):
    """Settings of `Place`, beside those of `carve.placement.place.PlaceSettings`.

    ``devices``: a TOML file, or the name of a preset. ``tokens``: calibration tokens to trace, half
    of them to place and half to score. ``batch``: tokens served at a time, for throughput;
    ``context``: tokens in each of their caches, for the host's memory.
    """

    RANGES: ClassVar = {"tokens": (2, math.inf), "batch": AT_LEAST_ONE}

    devices: str = ""
    tokens: int = 16_384
    batch: int = 8
    context: int = 2_048


@dataclass(frozen=True)
class PlaceMetrics:
    """``value`` and ``bound`` of the ``objective`` on the half that placed, ``gap`` between them.

    ``scores``: every objective on the other half, for this placement and for experts dealt out in
    turn (``round-robin``; seconds and hops a token). ``memory``: by device, bytes of experts and
    room for them; ``load``: by device, mean experts a token that it runs.
    """

    objective: str
    value: float
    bound: float
    gap: float
    seconds: float
    scores: dict[str, dict[str, float]]
    memory: dict[str, list[float]]
    load: dict[str, float]


class Place(Pass[PlaceConfig]):
    """Give every routed expert a device (`carve.placement.place` has formulations and sources).

    Leaves ``notes["placement"]``: `carve.placement.result.Placement`, ``notes["trace"]``:
    `carve.placement.trace.Trace`, and ``notes["sizes"]``: `carve.placement.sizes.Sizes`.
    """

    name = "place"

    @cached_property
    def devices(self) -> Devices:
        """The devices, read once: the file may be gone when the passes before are done."""
        return read_devices(self.config.devices)

    def foresee(self, program: Program, context: Context) -> None:
        """Needs room for what is planned, as far as widths are known before they are chosen."""
        c = self.config
        devices = self.devices
        if not context.limits:
            sizes, trace = planned_sizes(program, context.splits, context.bits)
            sizes.problem(devices, trace, context=c.context, batch=c.batch).check()

    def requires(self, program: Program, context: Context) -> None:
        """Needs devices, and experts to place."""
        if not self.config.devices:
            raise ContractError("contract", "place needs devices")
        if not program.carved:
            raise ContractError("contract", "place needs routed FFNs, and there is none")

    def call(self, program: Program, context: Context) -> PlaceMetrics:
        """Trace, place and score."""
        c = self.config
        devices = self.devices
        sizes = sizes_of(program, context.bits)
        batches = limit_batches(context.stream or context.batches, c.tokens)
        with as_emitted(program):
            trace = collect_trace(program, list(context.progress(batches, self.name)))
        to_place, to_score = trace.halves()
        problem = sizes.problem(devices, to_place, context=c.context, batch=c.batch)
        placed = place(problem, c)
        program.notes["placement"], program.notes["trace"] = placed, trace
        program.notes["sizes"] = sizes
        scored = sizes.problem(devices, to_score, context=c.context, batch=c.batch)
        homes = placed.homes
        turns: Homes = [np.arange(len(h)) % len(devices) for h in homes]
        loads = to_score.loads()
        return PlaceMetrics(
            placed.objective,
            placed.value,
            placed.bound,
            placed.gap,
            placed.seconds,
            {"placed": scores(scored, homes), "round-robin": scores(scored, turns)},
            scored.memory(homes),
            {
                n: float(sum(p[h == d].sum() for p, h in zip(loads, homes, strict=True)))
                for d, n in enumerate(devices.names)
            },
        )
