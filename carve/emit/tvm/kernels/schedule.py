"""What may be chosen of a kernel without changing what it computes or how weights are packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx  # type: ignore[import-not-found,unused-ignore]
from tvm.tirx.script import builder as T  # type: ignore[import-not-found,unused-ignore]

from carve.emit.tvm.cpu import Cpu
from carve.emit.tvm.kernels.layout import VECTORS
from carve.emit.tvm.kernels.vector import Expr


@dataclass(frozen=True)
class Schedule:
    """What the grid of schedules varies.

    ``unroll``: steps of an fp32 product in a loop's body; ``tile``: rows computed at once;
    ``streams``: panels that one token reads side by side, where they divide (memory answers faster
    when asked in several places); ``ahead``: bytes that it asks for before they are due, or 0;
    ``parallel``: whether one token's work is divided among threads (that of many always is).
    """

    unroll: int = 2
    tile: int = 4
    streams: int = 4
    ahead: int = 2048
    parallel: bool = True

    def heights(self) -> list[int]:
        """Heights of tiles that have code of their own: what is left over takes the next one."""
        found = [self.tile]
        while found[-1] > 1:
            found.append(found[-1] // 2)
        return found

    def side_by_side(self, *panels: int) -> int:
        """Streams that divide these numbers of panels."""
        return max(s for s in range(1, self.streams + 1) if all(p % s == 0 for p in panels))


def default(cpu: Cpu, *, parallel: bool = True) -> Schedule:
    """As many rows as leave registers for the weights and one activation."""
    return Schedule(tile=(cpu.registers - 4) // VECTORS - 2, parallel=parallel)


def loop(schedule: Schedule, extent: Expr) -> Any:
    """A loop over independent parts of one token's work."""
    return T.parallel(0, extent) if schedule.parallel else T.serial(0, extent)


def by_height(schedule: Schedule, left: Expr, body: Callable[[int], None]) -> None:
    """``body(h)`` with the smallest of the heights that holds ``left`` rows."""
    _chain(schedule.heights(), left, body)


def _chain(heights: list[int], left: Expr, body: Callable[[int], None]) -> None:
    if len(heights) == 1:
        body(heights[0])
        return
    with T.If(left > tirx.const(heights[1], "int32")):
        with T.Then():
            body(heights[0])
        with T.Else():
            _chain(heights[1:], left, body)
