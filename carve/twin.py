"""Walking every product with weights, the program as it was beside the program as rewritten."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from carve_runtime.heap import trim_heap
from torch import Tensor

from carve.calibration import Batch
from carve.dialect import LinearRule, linear, linear_rule
from carve.executor import Pauses
from carve.program import Program
from carve.sites import AtSite, FFNSite, Linear
from carve.statistics import weights_of_size

Unit = Linear | FFNSite


@dataclass(frozen=True)
class UnitLesson:
    """What one linear or routed FFN sees, fp32, counted tokens only.

    ``x`` ``[T, K]``: its input in the rewritten program; ``reference``: in the program as it was.
    ``target`` ``[T, N]``: what its result should be there: the former result, and where that is
    added to a stream, also what leads the rewritten stream back to the former one. ``weight``
    ``[T]``: see `carve.statistics.weights_of_size`.
    """

    unit: Unit
    x: Tensor
    reference: Tensor
    target: Tensor
    weight: Tensor


def units_of(program: Program) -> list[Unit]:
    """Linears of the graph and routed FFNs in the order they run."""
    order = {n: i for i, n in enumerate(program.module.graph.nodes)}
    units: list[Unit] = [*program.linears, *program.carved]
    return sorted(units, key=lambda u: order[u.output])


def twin_walk(
    program: Program,
    batches: Sequence[Batch],
    rule: Callable[[], LinearRule],
    progress: Callable[[Sequence[Unit]], Iterator[Unit]] = iter,
) -> Generator[UnitLesson, Unit, None]:
    """One `UnitLesson` a unit in order; takes the unit as it is after its rewrite.

    Two copies of every batch are held at the same unit, as in `carve.walk.walk`: one computed with
    the weights as they were, one with those that were sent in, in the arithmetic that ``rule``
    gives (asked anew at every unit). Gates are heard in both.
    """
    units = units_of(program)

    def start() -> list[Generator[AtSite, Tensor, tuple[Tensor, ...]]]:
        return [program.steps(*b.inputs, pauses=Pauses(units), only_first=True) for b in batches]

    former, other = start(), start()
    with torch.no_grad():
        at_former, at_other = [next(s) for s in former], [next(s) for s in other]
    for i, unit in enumerate(progress(units)):
        with torch.no_grad():
            answers = [run_unit(unit, a.x) for a in at_former]
        rewritten = yield _lesson(unit, batches, at_former, at_other, answers)
        if i + 1 == len(units):
            return
        with torch.no_grad():
            at_former = [s.send(y) for s, y in zip(former, answers, strict=True)]
            with linear_rule(rule()):
                answers = [run_unit(rewritten, a.x) for a in at_other]
                at_other = [s.send(y) for s, y in zip(other, answers, strict=True)]
        trim_heap()


def run_unit(unit: Unit, x: Tensor) -> Tensor:
    """A unit's result for its input."""
    if isinstance(unit, Linear):
        return linear(x, unit.weight, unit.bias)
    assert unit.routed is not None
    return unit.routed(x)


def _lesson(
    unit: Unit,
    batches: Sequence[Batch],
    at_former: Sequence[AtSite],
    at_other: Sequence[AtSite],
    answers: Sequence[Tensor],
) -> UnitLesson:
    def gather(parts: Sequence[Any]) -> Tensor:
        return torch.cat([b.counted(p).float() for p, b in zip(parts, batches, strict=True)])

    y = gather(answers)
    if unit.residual is None:
        weight = torch.ones(len(y))
    else:
        # In place: with many tokens these are most of what a conversion holds.
        stream = gather([a.residual for a in at_former])
        weight = weights_of_size(stream + y)
        y += stream.sub_(gather([a.residual for a in at_other]))
        del stream
    x, reference = gather([a.x for a in at_other]), gather([a.x for a in at_former])
    return UnitLesson(unit, x, reference, y, weight)
