"""Products of a few rows of activations with a panel of weights: what every kernel is made of.

A panel is two vectors of output columns. Its weights lie in the order in which they are read, one
after another: fp32 as ``[K, 2 lanes]``, levels as ``[K / 4, 2 lanes, 4]`` bytes (4 bits:
``[K / 8, 2 lanes, 4]``, the first of two groups in the low bits; 2 bits: ``[K / 16, 2 lanes, 4]``,
of four), scales as ``[K / block, 2 lanes]``. Decoding a token is one pass over the panels, at the
speed of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx  # type: ignore[import-not-found,unused-ignore]
from tvm.tirx.script import builder as T  # type: ignore[import-not-found,unused-ignore]

from carve.emit.tvm.cpu import Cpu
from carve.emit.tvm.kernels.dot import dot, has_offset, unpacked
from carve.emit.tvm.kernels.layout import VECTORS
from carve.emit.tvm.kernels.schedule import Schedule
from carve.emit.tvm.kernels.spec import Format
from carve.emit.tvm.kernels.vector import (
    Buffer,
    Expr,
    bind,
    load,
    local,
    of,
    prefetch,
    splat,
    store,
)

LINE = 64
"""Bytes of a cache line."""
_GROUPS = 8
"""Groups of four weights that are unrolled: 32, which divides every block."""


@dataclass(frozen=True)
class Weights:
    """Packed matrices ``[count, out, columns]`` of one shape: ``panels`` of each."""

    form: Format
    columns: int
    panels: int
    data: Buffer
    scale: Buffer | None = None


@dataclass(frozen=True)
class Rows:
    """Activations of tiles of ``height`` rows, an element of every row beside the other.

    fp32: ``values`` ``[tiles, K, height]``. Rounded to int8: ``values`` ``[tiles, K / 4, height]``
    int32, four to each; ``scale`` and ``sums`` (of the levels, int32) ``[tiles, K / block,
    height]``.
    """

    form: Format
    columns: int
    height: int
    values: Buffer
    scale: Buffer | None = None
    sums: Buffer | None = None

    def value(self, tile: Expr, k: Expr, row: Expr) -> Expr:
        """Index of an element (of four, where they are int8)."""
        per = self.columns // 4 if self.form.quantized else self.columns
        return (tile * per + k) * self.height + row

    def block(self, tile: Expr, b: Expr, row: Expr) -> Expr:
        """Index of a block's scale and sum."""
        return (tile * (self.columns // self.form.block) + b) * self.height + row


def product(
    cpu: Cpu,
    w: Weights,
    panels: Sequence[Expr],
    x: Rows,
    tile: Expr,
    height: int,
    schedule: Schedule,
) -> list[list[Buffer]]:
    """The first ``height`` rows of a tile times some panels: of each, fp32 vectors, two a row.

    Args:
        cpu: whose vectors.
        w: the weights; panels are counted through all matrices.
        panels: which ones, read side by side.
        x: activations in the weights' form.
        tile: which tile.
        height: rows to compute.
        schedule: how.
    """
    if w.form.quantized:
        return _levels(cpu, w, panels, x, tile, height, schedule)
    return _float(cpu, w, panels, x, tile, height, schedule)


def _zeros(n: int, count: int) -> list[Buffer]:
    """Vectors that are buffers of their own: TVM's passes are quadratic in a buffer's accesses."""
    found = [local(n) for _ in range(count)]
    for a in found:
        store(a, 0, splat(0.0, n), n)
    return found


def _ask(data: Buffer, at: Expr, size: int, each: int, ahead: int) -> None:
    """Prefetch ``size`` elements of ``each`` bytes, ``ahead`` bytes further on."""
    for i in range(0, size, LINE // each):
        prefetch(data, at + (i + ahead // each))


def _float(
    cpu: Cpu,
    w: Weights,
    panels: Sequence[Expr],
    x: Rows,
    tile: Expr,
    height: int,
    schedule: Schedule,
) -> list[list[Buffer]]:
    n, width, unroll = cpu.lanes, VECTORS * cpu.lanes, schedule.unroll
    # A lone row has too few sums to hide an addition's latency: a set of them a step.
    count = unroll if height == 1 else 1
    sets = [[_zeros(n, height * VECTORS) for _ in range(count)] for _ in panels]
    firsts = [bind(p * (w.columns * width)) for p in panels]

    def step(k: Expr, which: int, first: Expr, sums: list[Buffer]) -> None:
        at = first + k * width
        columns = [bind(load(w.data, at + v * n, n)) for v in range(VECTORS)]
        for m in range(height):
            value = bind(splat(x.values[x.value(tile, k, m)], n))
            for v in range(VECTORS):
                acc = sums[m * VECTORS + v]
                store(acc, 0, load(acc, 0, n) + value * columns[v], n)

    def steps(k: Expr, number: int) -> None:
        for first, mine in zip(firsts, sets, strict=True):
            for u in range(number):
                step(k + u, u, first, mine[u % count])

    with T.serial(0, w.columns // unroll) as k:
        if height == 1 and schedule.ahead:
            for first in firsts:
                _ask(w.data, first + k * (unroll * width), unroll * width, 4, schedule.ahead)
        steps(k * unroll, unroll)
    steps(tirx.const(w.columns // unroll * unroll, "int32"), w.columns % unroll)
    for mine in sets:
        for other in mine[1:]:
            for acc, more in zip(mine[0], other, strict=True):
                store(acc, 0, load(acc, 0, n) + load(more, 0, n), n)
    return [mine[0] for mine in sets]


def _levels(
    cpu: Cpu,
    w: Weights,
    panels: Sequence[Expr],
    x: Rows,
    tile: Expr,
    height: int,
    schedule: Schedule,
) -> list[list[Buffer]]:
    sums = [_zeros(cpu.lanes, height * VECTORS) for _ in panels]
    width, form = VECTORS * cpu.lanes, w.form
    firsts = [bind(p * (w.columns * form.bits // 8 * width)) for p in panels]
    scales = [bind(p * (w.columns // form.block * width)) for p in panels]
    with T.serial(0, w.columns // form.block) as b:
        for first, scale, mine in zip(firsts, scales, sums, strict=True):
            ahead = schedule.ahead if height == 1 else 0
            _block(cpu, w, first, scale, b, x, tile, mine, ahead)
    return sums


def _block(
    cpu: Cpu,
    w: Weights,
    first: Expr,
    scale: Expr,
    b: Expr,
    x: Rows,
    tile: Expr,
    sums: list[Buffer],
    ahead: int,
) -> None:
    """Add one block's products with the levels from ``first`` on to a panel's sums."""
    n, width, form = cpu.lanes, VECTORS * cpu.lanes, w.form
    height = len(sums) // VECTORS
    assert w.scale is not None
    assert x.scale is not None
    assert x.sums is not None
    parts = [local(n, "int32") for _ in sums]
    per = 8 // form.bits  # groups that a byte of each weight holds
    for m in range(height):
        start = splat(0, n, "int32")
        if has_offset(cpu, form):
            start = bind(splat(x.sums[x.block(tile, b, m)] * -form.zero, n))
        for v in range(VECTORS):
            store(parts[m * VECTORS + v], 0, start, n)

    def step(group: Expr) -> None:
        """``per`` groups of four weights of every column."""
        at = first + group * (width * 4)
        loaded = [bind(load(w.data, at + v * n * 4, 4 * n)) for v in range(VECTORS)]
        columns = [unpacked(c, form.bits, n) for c in loaded]
        for g in range(per):
            for m in range(height):
                four = bind(x.values[x.value(tile, group * per + g, m)])
                for v in range(VECTORS):
                    part = parts[m * VECTORS + v]
                    store(part, 0, dot(cpu, load(part, 0, n), columns[v][g], four, form), n)

    groups = form.block // 4 // per
    # Many rows have work enough for a plain loop; a lone one has none to spare.
    together = _GROUPS // per if height == 1 else 1
    with T.serial(0, groups // together) as g:
        group = b * groups + g * together
        if ahead:
            _ask(w.data, first + group * (width * 4), together * width * 4, 1, ahead)
        for u in range(together):
            step(group + u)
    weights = [bind(load(w.scale, scale + b * width + v * n, n)) for v in range(VECTORS)]
    for m in range(height):
        mine = bind(splat(x.scale[x.block(tile, b, m)], n))
        for v in range(VECTORS):
            total, part = sums[m * VECTORS + v], parts[m * VECTORS + v]
            value = load(part, 0, n).astype(of("float32", n)) * (mine * weights[v])
            store(total, 0, load(total, 0, n) + value, n)
