"""State of a training run, so that a killed run goes on where it was."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from carve.passbase import Partial
from carve.storable import storable

log = logging.getLogger(__name__)
_KEY = "training"


@storable
@dataclass(frozen=True)
class TrainingState:
    """Weights by name, moments by optimizer and parameter, steps done and their losses."""

    model: dict[str, Tensor]
    moments: list[dict[int, dict[str, Tensor]]]
    step: int
    losses: list[float]


def save(
    partial: Partial,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    step: int,
    losses: list[float],
) -> None:
    """Keep the state after ``step`` steps."""
    moments = [{int(i): dict(m) for i, m in o.state_dict()["state"].items()} for o in optimizers]
    partial.put(_KEY, TrainingState(dict(model.state_dict()), moments, step, list(losses)))


def load(
    partial: Partial,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    losses: list[float],
) -> int:
    """Take over a kept state; gives its step, or 0 where there is none that fits."""
    state = partial.get(_KEY)
    if state is None:
        return 0
    try:
        if not isinstance(state, TrainingState):
            raise TypeError("it is something else")  # noqa: TRY301
        _check_fits(model, optimizers, state)
    except (TypeError, ValueError) as e:
        log.warning("the state of training cannot be used and is left out: %s", e)
        return 0
    # Nothing fails from here: half a state would be a run of its own.
    model.load_state_dict(state.model)
    for optimizer, moments in zip(optimizers, state.moments, strict=True):
        whole: dict[str, Any] = optimizer.state_dict()
        optimizer.load_state_dict({**whole, "state": moments})
    losses[:] = state.losses
    log.info("going on from step %d", state.step)
    return state.step


def _check_fits(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], state: TrainingState
) -> None:
    """Check names, shapes, dtypes and values before any of them is taken over.

    Raises:
        ValueError: they are not this model's and its optimizers'.
    """
    if state.step < 0 or not all(map(math.isfinite, state.losses)):
        raise ValueError("step or losses are out of range")
    want = {k: (v.shape, v.dtype) for k, v in model.state_dict().items()}
    have = {k: (v.shape, v.dtype) for k, v in state.model.items()}
    if have != want:
        raise ValueError("its weights are another model's")
    if len(state.moments) != len(optimizers):
        raise ValueError("it is of other optimizers")
    for optimizer, moments in zip(optimizers, state.moments, strict=True):
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        for index, of in moments.items():
            p = trained[index] if 0 <= index < len(trained) else torch.empty(0)
            if {k: v.shape for k, v in of.items()} != _moment_shapes(optimizer, p):
                raise ValueError(f"the moments of parameter {index} do not fit")
            if "step" in of and not 0 <= float(of["step"]) <= state.step:
                raise ValueError(f"parameter {index} has other steps behind it")
    moved = [v for moments in state.moments for of in moments.values() for v in of.values()]
    if not all(bool(torch.isfinite(v).all()) for v in [*state.model.values(), *moved]):
        raise ValueError("it holds NaN or infinity")


def _moment_shapes(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, torch.Size]:
    if isinstance(optimizer, torch.optim.Muon):
        return {"momentum_buffer": p.shape}
    return {"step": torch.Size([]), "exp_avg": p.shape, "exp_avg_sq": p.shape}
