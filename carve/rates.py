"""How fast this machine is at what passes spend their time on; measured in about a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from carve.tuning import mixed_precision

_SECONDS = 0.2


@dataclass(frozen=True)
class Work:
    """What a pass does, by kind.

    ``products``: multiply-accumulates in fp32; ``training``: in the precision that training takes;
    ``solving``: in fp64, of factorizations; ``elements``: that pass through the processor once, as
    in an activation; ``steps``: operators that are called, whatever their size.
    """

    products: float = 0.0
    training: float = 0.0
    solving: float = 0.0
    elements: float = 0.0
    steps: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * getattr(self, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Rates:
    """A second's worth of each kind of `Work`."""

    products: float
    training: float
    solving: float
    elements: float
    steps: float

    def seconds(self, work: Work) -> float:
        """The time that some work takes."""
        kinds = (f.name for f in fields(self))
        return sum(float(getattr(work, k)) / float(getattr(self, k)) for k in kinds)

    @classmethod
    def measure(cls, clock: Callable[[], float] = time.perf_counter) -> Rates:
        """Time each kind for a fifth of a second, in sizes as passes have them.

        The fastest of several goes counts: what else the machine does may be over in a minute.
        """
        generator = torch.Generator().manual_seed(0)
        n, k, m = 2048, 256, 1024
        x, w = (torch.randn(r, k, generator=generator) for r in (n, m))
        square = torch.randn(512, 512, generator=generator).double()
        gram = square @ square.T + torch.eye(512, dtype=torch.float64)
        wide, small = torch.randn(n, m, generator=generator), torch.zeros(4)

        def training() -> None:
            with mixed_precision():
                torch.nn.functional.linear(x, w)

        def dispatch() -> None:
            for _ in range(100):
                small.add(1.0)

        def best(run: Callable[[], object], amount: float) -> float:
            run()
            least, end = float("inf"), clock() + _SECONDS
            while clock() < end:
                began = clock()
                run()
                least = min(least, clock() - began)
            return amount / max(least, 1e-9)

        with torch.no_grad():
            return cls(
                best(lambda: x @ w.T, n * k * m),
                best(training, n * k * m),
                best(lambda: torch.linalg.cholesky(gram), 512**3 / 3),
                best(lambda: torch.nn.functional.silu(wide), wide.numel()),
                best(dispatch, 100),
            )
