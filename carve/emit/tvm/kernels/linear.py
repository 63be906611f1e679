"""Dense products ``y = x W^T + b``."""

from __future__ import annotations

from typing import Any

from tvm import tirx  # type: ignore[import-not-found,unused-ignore]
from tvm.tirx.script import builder as T  # type: ignore[import-not-found,unused-ignore]

from carve.emit.tvm.cpu import Cpu
from carve.emit.tvm.kernels.arguments import Arguments
from carve.emit.tvm.kernels.layout import VECTORS, linear_layout
from carve.emit.tvm.kernels.pipeline import function
from carve.emit.tvm.kernels.product import Rows, product
from carve.emit.tvm.kernels.results import Result
from carve.emit.tvm.kernels.rounding import arrange, blank, make_rows
from carve.emit.tvm.kernels.schedule import Schedule, by_height, default, loop
from carve.emit.tvm.kernels.spec import LinearSpec
from carve.emit.tvm.kernels.vector import bind, ceil_div


def linear(spec: LinearSpec, cpu: Cpu, schedule: Schedule | None = None) -> Any:
    """A PrimFunc ``(x [n, K], weight, scale?, bias?, y [n, N])``, fp32, ``n`` symbolic.

    Args:
        spec: what to compute; weights as `carve.emit.tvm.weights.pack_linear` packs them.
        cpu: what to compile for.
        schedule: None: the default.
    """
    layout = linear_layout(spec, cpu)
    read = sum(a.nbytes for a in layout.arrays())
    s = schedule or default(cpu, read, quantized=spec.format.quantized)
    with function("linear") as made:
        given = Arguments()
        x = given.rows("x", spec.in_features)
        weights, bias = given.weights(layout)
        result = given.rows("y", spec.out_features)
        x, n = given.flat(x), bind(given.n)
        y = Result(cpu, given.flat(result), spec.out_features)
        with T.If(n == tirx.const(1, "int32")):
            with T.Then():
                one = Rows(spec.format, spec.in_features, 1, x)
                if spec.format.quantized:
                    one = make_rows(spec.format, spec.in_features, 1, 1)
                    arrange(cpu, one, 0, 0, x, 0)
                streams = s.side_by_side(weights.panels)
                with loop(s, weights.panels // streams) as unit:
                    panels = [bind(unit * streams + i) for i in range(streams)]
                    sums = product(cpu, weights, panels, one, 0, 1, s)
                    for p, two in zip(panels, sums, strict=True):
                        y.put(0, p, two, bias)
            with T.Else():
                tiles = bind(ceil_div(n, s.tile))
                rows = make_rows(spec.format, spec.in_features, s.tile, tiles)
                with T.parallel(0, tiles) as t, T.serial(0, s.tile) as i:
                    at = bind(t * s.tile + i)
                    with T.If(at < n):
                        with T.Then():
                            arrange(cpu, rows, t, i, x, at * spec.in_features)
                        with T.Else():
                            blank(rows, t, i)
                with T.parallel(0, weights.panels) as p, T.serial(0, tiles) as t:
                    left = bind(n - t * s.tile)

                    def tile(h: int, p: Any = p, t: Any = t, left: Any = left) -> None:
                        (sums,) = product(cpu, weights, [p], rows, t, h, s)
                        for i in range(h):
                            with T.If(left > tirx.const(i, "int32")), T.Then():
                                y.put(t * s.tile + i, p, sums[i * VECTORS :][:VECTORS], bias)

                    by_height(s, left, tile)
    return made()
