"""PuLP's solvers, with the bound that each proved."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pulp  # type: ignore[import-untyped]

from carve.errors import UserError

SOLVERS = ("highs", "cbc")
GAP = 1e-3
"""Relative gap at which a search ends."""
WITHIN = 1 - 2e-6
"""Share of a limit for programmes to use: they keep rows within 1e-6, memory is kept exactly."""


@dataclass(frozen=True)
class Solved:
    """``value`` of the best solution, None where none was found; a lower ``bound``."""

    value: float | None
    bound: float


def solve(
    model: pulp.LpProblem,
    seconds: float,
    *,
    solver: str = "highs",
    warm: bool = False,
    relaxed: bool = False,
    gap: float = GAP,
) -> Solved:
    """Minimise; the variables hold the best values that were found.

    Args:
        model: what to minimise.
        seconds: time limit.
        solver: ``highs`` (in process, one thread) or ``cbc`` (PuLP's bundled binary).
        warm: start from the values that the variables have, which have to be a solution. CBC only:
            HiGHS 1.16 loses a start's objective in presolve and calls it optimal at 0.
        relaxed: leave out that variables are whole.
        gap: relative gap at which to stop.

    Raises:
        UserError: CBC does not run here.
    """
    seconds = max(0.05, seconds)
    if solver == "cbc":
        return _cbc(model, seconds, warm, relaxed, gap)
    _let_highs_greet()
    chosen = pulp.HiGHS(mip=not relaxed, msg=False, timeLimit=seconds, threads=1, gapRel=gap)
    model.solve(chosen)
    info = model.solverModel.getInfo()
    status = model.solverModel.getModelStatus().name
    # A time limit during presolve leaves no solution, and PuLP then reports zeros as one.
    found = info.primal_solution_status == 2 and status != "kInfeasible"
    constant = float(model.objective.constant or 0.0)
    value = float(info.objective_function_value) + constant if found else None
    if relaxed:
        proven = value is not None and status == "kOptimal"
        return Solved(value, value if proven else -math.inf)  # type: ignore[arg-type]
    return Solved(value, float(info.mip_dual_bound) + constant)


@functools.cache
def _let_highs_greet() -> None:
    """HiGHS writes a banner to standard output when it is first made, where a result may go."""
    from highspy import Highs

    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    libc.fflush(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        Highs()  # type: ignore[no-untyped-call]
        libc.fflush(None)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _cbc(model: Any, seconds: float, warm: bool, relaxed: bool, gap: float) -> Solved:
    with tempfile.TemporaryDirectory(prefix="carve-cbc-") as folder:
        log = Path(folder, "cbc.log")
        chosen = pulp.PULP_CBC_CMD(
            mip=not relaxed,
            msg=False,
            timeLimit=seconds,
            threads=1,
            gapRel=gap,
            warmStart=warm,
            logPath=str(log),
            keepFiles=False,
        )
        if not chosen.available():
            raise UserError("solver", "PuLP's CBC does not run here", "choose highs")
        chosen.tmpDir = folder
        model.solve(chosen)
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    if model.status == pulp.LpStatusInfeasible:
        return Solved(None, math.inf)
    found = model.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
    value = float(pulp.value(model.objective)) if found else None
    early = "time limit" in text or model.sol_status != pulp.LpSolutionOptimal
    if value is not None and not early:
        return Solved(value, value - gap * abs(value))
    # CBC states its bound only where it stopped early, and without the objective's constant.
    stated = re.findall(r"^Lower bound:\s+(\S+)", text, re.MULTILINE)
    constant = float(model.objective.constant or 0.0)
    return Solved(value, float(stated[-1]) + constant if stated else -math.inf)
