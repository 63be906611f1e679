"""State of a training run, so that a killed run goes on where it was."""

from __future__ import annotations

import logging
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
    """Weights by name, Adam's moments by parameter, steps done and their losses."""

    model: dict[str, Tensor]
    moments: dict[int, dict[str, Tensor]]
    step: int
    losses: list[float]


def save(
    partial: Partial,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    losses: list[float],
) -> None:
    """Keep the state after ``step`` steps."""
    moments = {int(i): dict(m) for i, m in optimizer.state_dict()["state"].items()}
    partial.put(_KEY, TrainingState(dict(model.state_dict()), moments, step, list(losses)))


def load(
    partial: Partial, model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]
) -> int:
    """Take over a kept state; gives its step, or 0 where there is none.

    Raises:
        RuntimeError: it is of another model.
    """
    state = partial.get(_KEY)
    if not isinstance(state, TrainingState):
        return 0
    model.load_state_dict(state.model)
    whole: dict[str, Any] = optimizer.state_dict()
    optimizer.load_state_dict({**whole, "state": state.moments})
    losses[:] = state.losses
    log.info("going on from step %d", state.step)
    return state.step
