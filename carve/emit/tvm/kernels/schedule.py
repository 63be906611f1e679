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

_ALONE = 128 << 10
"""Bytes that one thread reads sooner than another one is woken."""
_LEAST = 4
"""Rows below which too little is done with a weight that is loaded."""


@dataclass(frozen=True)
class Schedule:
    """One way to compute a kernel.

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


def default(cpu: Cpu, read: int, *, quantized: bool) -> Schedule:
    """The schedule of a kernel.

    As many rows at once as leave registers for weights and an activation; rows of integer products
    want twice as many, for the sums of a block and of the whole. No other choice was found to be
    faster by more than timings differ.

    Args:
        cpu: what to compile for.
        read: bytes of weights that one token reads.
        quantized: whether products are integer ones.
    """
    fp32 = (cpu.registers - 4) // VECTORS - 2
    tile = max((cpu.registers - 4) // (2 * VECTORS) - 1, _LEAST) if quantized else fp32
    return Schedule(tile=tile, parallel=read >= _ALONE)


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
