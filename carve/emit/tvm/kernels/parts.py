"""What the kernels of a routed FFN are made from."""

from __future__ import annotations

from dataclasses import dataclass

from carve.emit.tvm.cpu import Cpu
from carve.emit.tvm.kernels.layout import Panels
from carve.emit.tvm.kernels.product import Weights
from carve.emit.tvm.kernels.results import Result
from carve.emit.tvm.kernels.schedule import Schedule
from carve.emit.tvm.kernels.spec import RoutedSpec
from carve.emit.tvm.kernels.vector import Buffer


@dataclass(frozen=True)
class Part:
    """The shared expert, or all routed ones: layouts, arrays and biases of both projections."""

    inward: Panels
    inward_weights: Weights
    inward_bias: Buffer | None
    down: Panels
    down_weights: Weights
    down_bias: Buffer | None


@dataclass(frozen=True)
class Call:
    """A kernel's specification with its arguments, activations and scores read flat."""

    spec: RoutedSpec
    cpu: Cpu
    schedule: Schedule
    x: Buffer
    scores: Buffer | None
    shared: Part | None
    experts: Part | None
    output_bias: Buffer | None
    y: Result

    @property
    def parts(self) -> list[Part]:
        """Those that are there, the shared expert first."""
        return [p for p in (self.shared, self.experts) if p is not None]
