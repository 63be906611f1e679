"""State of a training run on disk, so that a killed run goes on where it was."""

from __future__ import annotations

import json
import logging
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
            step, past = int(facts["step"]), [float(v) for v in json.loads(facts["losses"])]
            tensors = load_file(self.file)
            weights = {k[6:]: v for k, v in tensors.items() if k.startswith("model:")}
            moments: dict[int, dict[str, Tensor]] = {}
            for k, v in tensors.items():
                if k.startswith("adam:"):
                    _, index, name = k.split(":")
                    moments.setdefault(int(index), {})[name] = v
            model.load_state_dict(weights)
            whole: dict[str, Any] = optimizer.state_dict()
            optimizer.load_state_dict({**whole, "state": moments})
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as e:
            log.warning("%s cannot be used and is left out: %s", self.file, e)
            return 0
        losses[:] = past
        log.info("going on from step %d of %s", step, self.file)
        return step

    def _facts(self) -> dict[str, str]:
        from safetensors import safe_open

        with safe_open(self.file, framework="pt") as f:
            return dict(f.metadata() or {})
