"""State of a training run on disk, so that a killed run goes on where it was."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

log = logging.getLogger(__name__)


class TrainingState:
    """One file, ``folder/state.safetensors``: weights, Adam's moments, step and losses.

    Written beside and renamed. A state with another ``key`` is of another run and is not used.

    Args:
        folder: where it lies; made when first saved.
        key: tells runs apart; whatever decides the result has to be part of it.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.file, self.key = folder / "state.safetensors", key

    def save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, losses: list[float]
    ) -> None:
        """Write the state after ``step`` steps."""
        tensors = {f"model:{k}": v.contiguous() for k, v in model.state_dict().items()}
        for i, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"adam:{i}:{k}": v.reshape(v.shape) for k, v in moments.items()}
        facts = {"key": self.key, "step": str(step), "losses": json.dumps(losses)}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        save_file(tensors, part, metadata=facts)
        os.replace(part, self.file)

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]) -> int:
        """Take over a saved state of the same run; gives its step, or 0 where there is none."""
        if not self.file.is_file():
            return 0
        try:
            facts = self._facts()
            if facts.get("key") != self.key:
                return 0
            step, past = _history(facts)
            weights, moments = _sorted(load_file(self.file))
            whole: dict[str, Any] = optimizer.state_dict()
            _check_fits(model, optimizer, weights, moments)
        except (SafetensorError, OSError, LookupError, ValueError, TypeError, RecursionError) as e:
            log.warning("%s cannot be used and is left out: %s", self.file, e)
            return 0
        # Nothing fails from here: half a state would be a run of its own.
        model.load_state_dict(weights)
        optimizer.load_state_dict({**whole, "state": moments})
        losses[:] = past
        log.info("going on from step %d of %s", step, self.file)
        return step

    def _facts(self) -> dict[str, str]:
        from safetensors import safe_open

        with safe_open(self.file, framework="pt") as f:
            return dict(f.metadata() or {})


def _history(facts: dict[str, str]) -> tuple[int, list[float]]:
    step, losses = int(facts["step"]), [float(v) for v in json.loads(facts["losses"])]
    if step < 0 or not all(map(math.isfinite, losses)):
        raise ValueError("step or losses are out of range")
    return step, losses


def _sorted(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
    """Weights by name, and Adam's moments by parameter and name."""
    weights = {k[6:]: v for k, v in tensors.items() if k.startswith("model:")}
    moments: dict[int, dict[str, Tensor]] = {}
    for k, v in tensors.items():
        if k.startswith("adam:"):
            _, index, name = k.split(":")
            moments.setdefault(int(index), {})[name] = v
    return weights, moments


def _check_fits(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    weights: dict[str, Tensor],
    moments: dict[int, dict[str, Tensor]],
) -> None:
    """Check names, shapes, dtypes and values before any of them is taken over.

    Raises:
        ValueError: they are not this model's and its optimizer's.
    """
    want = {k: (v.shape, v.dtype) for k, v in model.state_dict().items()}
    have = {k: (v.shape, v.dtype) for k, v in weights.items()}
    if have != want:
        raise ValueError("its weights are another model's")
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for index, of in moments.items():
        shapes = {k: v.shape for k, v in of.items()}
        p = trained[index] if 0 <= index < len(trained) else torch.empty(0)
        if shapes != {"step": torch.Size([]), "exp_avg": p.shape, "exp_avg_sq": p.shape}:
            raise ValueError(f"the moments of parameter {index} do not fit")
    tensors = [*weights.values(), *(v for of in moments.values() for v in of.values())]
    if not all(bool(torch.isfinite(v).all()) for v in tensors):
        raise ValueError("it holds NaN or infinity")
