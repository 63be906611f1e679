"""What a placement is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carve.storable import storable


@storable
@dataclass(frozen=True)
class Placement:
    """Where every routed expert lives.

    ``devices``: their names; ``layers``: names of the routed FFNs in the order of the graph;
    ``assignment[l][e]``: indices of the devices that hold expert ``e`` of layer ``l``, several
    where it is replicated, the first being its home. ``objective``: what was minimised, ``value``
    its figure on the tokens that were used to place, ``bound`` a proven lower bound on it,
    ``seconds`` what the search took.
    """

    devices: tuple[str, ...]
    layers: tuple[str, ...]
    assignment: tuple[tuple[tuple[int, ...], ...], ...]
    objective: str
    value: float
    bound: float
    seconds: float = 0.0

    @property
    def gap(self) -> float:
        """``(value - bound) / value``: by so much at most could another placement be better."""
        return 0.0 if self.value <= 0.0 else max(0.0, 1.0 - self.bound / self.value)

    @property
    def homes(self) -> list[NDArray[np.intp]]:
        """By layer, the first device of each expert ``[E_l]``."""
        return [np.array([held[0] for held in layer], np.intp) for layer in self.assignment]

    def as_dict(self) -> dict[str, Any]:
        """As ``placement.json`` holds it."""
        return {
            "objective": self.objective,
            "value": self.value,
            "bound": self.bound,
            "gap": self.gap,
            "seconds": round(self.seconds, 2),
            "devices": list(self.devices),
            "assignment": {
                name: [list(held) for held in layer]
                for name, layer in zip(self.layers, self.assignment, strict=True)
            },
        }
