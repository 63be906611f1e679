"""How fast this machine is at what passes spend their time on; measured in a few seconds.

What can be run in miniature is: the program itself on a few tokens and on more, a step of training
one of its FFNs, rounding a matrix as wide as its own. The rest are rates of plain kinds of work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from carve.calibration import Batch, head_of
from carve.grid import BLOCK
from carve.quantizer import Method, solve
from carve.tuning import MaskedFFN, mixed_precision

if TYPE_CHECKING:
    from carve.workload import Scene

Clock = Callable[[], float]
_SECONDS = 0.5
"""A thing is repeated for so long, and done twice at least."""
_LASTING = 1.08
"""Time of a pass over its fastest goes, for it lasts and slices and sorts besides: the mean of
28 conversions by ``tools/plan_check.py``."""
_MACS = 1e10
"""Multiply-accumulates of the larger of two miniatures, at the most."""


@dataclass(frozen=True)
class Work:
    """What a pass does, by kind.

    ``products``: multiply-accumulates in fp32; ``solving``: in fp64, of factorizations;
    ``elements``: that pass through the processor once, as in an activation; ``steps``: operators
    that are called, whatever their size; ``runs`` of the dense program and ``positions`` in them;
    ``training``: tokens times weights, forward and backward, and ``updates``: weights that an
    optimizer moves; ``columns`` that are rounded one after another, and ``rounding``: weights that
    are visited by it; ``traces`` of the program's graph.
    """

    products: float = 0.0
    solving: float = 0.0
    elements: float = 0.0
    steps: float = 0.0
    runs: float = 0.0
    positions: float = 0.0
    training: float = 0.0
    updates: float = 0.0
    columns: float = 0.0
    rounding: float = 0.0
    traces: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * getattr(self, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Rates:
    """Seconds that one of each kind of `Work` takes."""

    products: float
    solving: float
    elements: float
    steps: float
    runs: float
    positions: float
    training: float
    updates: float
    columns: float
    rounding: float
    traces: float

    def seconds(self, work: Work) -> float:
        """The time that some work takes."""
        kinds = (f.name for f in fields(self))
        return sum(float(getattr(work, k)) * float(getattr(self, k)) for k in kinds)

    @classmethod
    def measure(
        cls,
        scene: Scene,
        batches: Sequence[Batch],
        passes: Sequence[str],
        tracing: float,
        clock: Clock = time.perf_counter,
    ) -> Rates:
        """Time each kind that ``passes`` need, in sizes as the program has them.

        The program is run on that of ``batches`` which is nearest to the mean in size: an encoder's
        differ, and a small one does not say how long a position takes in a large one.
        ``tracing``: seconds that capturing the program took, which is not done again.
        The fastest of several goes counts: what else the machine does may be over in a minute.
        """
        timer = _Timer(clock)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            with torch.no_grad():
                plain = _plain(scene, timer)
                batch = min(batches, key=lambda b: abs(b.positions - scene.usual))
                forward = _forward(scene, batch, timer)
                rounding = _rounding(scene, timer) if "quantize" in passes else (0.0, 0.0)
            trains = {"distill", "finetune"} & {*passes} and scene.carved
            training = _training(scene, timer) if trains else (0.0, 0.0)
        return cls(*plain, *forward, training[1], training[0], *rounding, tracing)


class _Timer:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def best(self, run: Callable[[], object]) -> float:
        """Seconds of the fastest go, and what comes on top where it lasts."""
        run()
        least, end = float("inf"), self.clock() + _SECONDS
        while True:
            began = self.clock()
            run()
            now = self.clock()
            least = min(least, now - began)
            if now >= end:
                # A clock may be coarser than what it times.
                return _LASTING * max(least, 1e-9)

    def line(
        self, prepare: Callable[[int], tuple[Callable[[], object], float]], few: int, many: int
    ) -> tuple[float, float]:
        """Seconds of a go whatever its size, and of each unit in it."""
        (small, a), (large, b) = prepare(few), prepare(many)
        first = self.best(small)
        if b <= a:
            return 0.0, first / a
        each = max(0.0, self.best(large) - first) / (b - a)
        return max(0.0, first - a * each), each


def _plain(scene: Scene, timer: _Timer) -> tuple[float, float, float, float]:
    """Seconds of a product, of solving, of an element and of a step."""
    site = scene.program.sites[0].dense
    d, m = site.up.shape[1], site.intermediate_size
    n = min(2048, scene.usual)
    x, w = torch.randn(n, d), torch.randn(min(m, 2048), d)
    hidden, small = torch.randn(n, len(w)), torch.zeros(4)
    size = min(m, 512)
    square = torch.randn(size, size).double()
    gram = square @ square.T + torch.eye(size, dtype=torch.float64)
    side = torch.randn(size, min(d, size)).double()

    def dispatch() -> None:
        for _ in range(100):
            small.add(1.0)

    def factor() -> None:
        torch.cholesky_solve(side, torch.linalg.cholesky(gram))

    return (
        timer.best(lambda: x @ w.T) / (n * d * len(w)),
        timer.best(factor) / (size**3 / 3 + 2 * size * size * side.shape[1]),
        timer.best(lambda: torch.nn.functional.silu(hidden)) / hidden.numel(),
        timer.best(dispatch) / 100,
    )


def _forward(scene: Scene, batch: Batch, timer: _Timer) -> tuple[float, float]:
    """Seconds of a run of the program, and of a position in it."""
    program = scene.program

    def prepare(positions: int) -> tuple[Callable[[], object], float]:
        rows, length = max(1, positions // scene.length), min(scene.length, max(4, positions))
        inputs = head_of(program, batch, rows, length)
        count = inputs[0].shape[0] * (inputs[0].shape[1] if inputs[0].ndim > 1 else 1)
        return lambda: program.run(*inputs), float(count)

    each = sum(p.numel() for p in program.module.parameters())
    most = int(min(scene.usual, max(32, _MACS / each)))
    return timer.line(prepare, min(8, most), most)


def _training(scene: Scene, timer: _Timer) -> tuple[float, float]:
    """Seconds of a step for each weight, and for each weight and token."""
    from carve.passes.carve import assemble

    site, split = scene.carved[0]
    m, n = site.dense.intermediate_size, split.num_experts * split.expert_size
    groups = torch.arange(m - n, m).view(split.num_experts, -1)
    model = MaskedFFN(assemble(site.dense, torch.arange(m - n), groups, split.num_experts))
    optimizer = torch.optim.Adam(model.groups(0.0, 0.0), betas=(0.9, 0.95))
    weights = float(site.dense.macs)

    def prepare(tokens: int) -> tuple[Callable[[], object], float]:
        x = torch.randn(tokens, site.dense.up.shape[1])

        def step() -> None:
            with mixed_precision():
                y: Any = model(x)
            optimizer.zero_grad(set_to_none=True)
            y.square().mean().backward()
            optimizer.step()

        return step, tokens * weights

    most = int(min(2048, scene.layerwise, max(256, _MACS / (3 * weights))))
    fixed, each = timer.line(prepare, min(64, most), most)
    return fixed / weights, each


def _rounding(scene: Scene, timer: _Timer) -> tuple[float, float]:
    """Seconds of a column, and of a weight, each time that `solve` visits it."""
    method = Method()
    d = scene.program.sites[0].dense.up.shape[1]
    width = max(BLOCK, min(256, d // BLOCK * BLOCK))
    x = torch.randn(4 * width, width)
    gram, bits = (x.T @ x)[None], torch.full((width // BLOCK,), 4)
    rounds = 1 + method.sweeps

    def prepare(rows: int) -> tuple[Callable[[], object], float]:
        weight = torch.randn(1, rows, width)
        return lambda: solve(weight, gram, bits, method), float(rows * width * rounds)

    fixed, each = timer.line(prepare, BLOCK, 512)
    return fixed / (width * rounds), each
