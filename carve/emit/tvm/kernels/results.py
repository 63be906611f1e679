"""Writing a panel's sums to rows of a result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx  # type: ignore[import-not-found,unused-ignore]
from tvm.tirx.script import builder as T  # type: ignore[import-not-found,unused-ignore]

from carve.emit.tvm.cpu import Cpu
from carve.emit.tvm.kernels.layout import VECTORS
from carve.emit.tvm.kernels.vector import Buffer, Expr, load, store


@dataclass(frozen=True)
class Result:
    """A result ``[n, width]``, flat; the last panel may reach beyond ``width``."""

    cpu: Cpu
    values: Buffer
    width: int

    def put(
        self,
        row: Expr,
        panel: Expr,
        sums: Sequence[Buffer],
        bias: Buffer | None = None,
        bias_at: Expr = 0,
        *,
        add: bool = False,
    ) -> None:
        """Write (``add``: add) a panel's two vectors and a bias to a row."""
        n, size = self.cpu.lanes, VECTORS * self.cpu.lanes
        first, bias_first = row * self.width + panel * size, bias_at + panel * size

        def whole() -> None:
            for v, total in enumerate(sums):
                value = load(total, 0, n)
                if bias is not None:
                    value = value + load(bias, bias_first + v * n, n)
                if add:
                    value = value + load(self.values, first + v * n, n)
                store(self.values, first + v * n, value, n)

        def part() -> None:
            for v, total in enumerate(sums):
                with T.serial(0, min(max(self.width % size - v * n, 0), n)) as i:
                    value = total[i]
                    if bias is not None:
                        value = value + bias[bias_first + v * n + i]
                    if add:
                        value = value + self.values[first + v * n + i]
                    T.buffer_store(self.values, value, [first + v * n + i])

        if self.width % size == 0:
            whole()
            return
        with T.If(panel < tirx.const(self.width // size, "int32")):
            with T.Then():
                whole()
            with T.Else():
                part()
