"""What leaving tokens out of a block costs the whole program, by measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from carve.calibration import Batch
from carve.gates import fit_gate, skip_error
from carve.program import Program
from carve.sites import Block, Gate
from carve.walk import walk_blocks


@dataclass(frozen=True)
class SkipCost:
    """What a gate on one block costs the program.

    ``sensitivity``: the measured loss where a share ``probe`` of the tokens is skipped; ``error``:
    ``[T]`` squared error added by skipping the ``t`` tokens of lowest score.
    """

    sensitivity: float
    probe: float
    error: Tensor

    def loss(self, rate: float) -> float:
        """``L e(rate) / e(probe)``; 0 where nothing is skipped."""

        def at(share: float) -> float:
            return float(self.error[max(0, round(share * len(self.error)) - 1)])

        return self.sensitivity * at(rate) / max(at(self.probe), 1e-30) if rate else 0.0


def candidates(program: Program) -> list[Block]:
    """Every block that can be gated but the last layer's, which write what is read out."""
    last = {program.sites[-1].name, *(a.name for a in program.attention[-1:])}
    return [b for b in program.blocks if b.name not in last and b.gateable]


def measure_skips(
    program: Program,
    batches: Sequence[Batch],
    judge: Callable[[Program], float],
    probe: float,
    progress: Callable[[Sequence[Block]], Iterator[Block]] = iter,
) -> dict[str, SkipCost]:
    """By candidate, the program's loss with a fitted gate on it alone, at the rate ``probe``."""
    blocks = candidates(program)
    gates: dict[str, tuple[Gate, Tensor]] = {}
    for block, lesson in walk_blocks(program, batches, blocks, always=2):
        gate = fit_gate(lesson, probe)
        order = gate.scores(lesson.x).argsort()
        gates[block.name] = gate, skip_error(gate, lesson)[order].cumsum(0)
    found: dict[str, SkipCost] = {}
    for block in progress(blocks):
        gate, error = gates[block.name]
        program.set_gate(block, gate)
        found[block.name] = SkipCost(max(0.0, judge(program)), gate.skip, error)
        program.set_gate(block, None)
    return found
