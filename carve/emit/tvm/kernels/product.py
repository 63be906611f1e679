"""Products of a few rows of activations with a panel of weights: what every kernel is made of.

A panel is two vectors of output columns. Its weights lie in the order in which they are read, one
after another: fp32 as ``[K, 2 lanes]``, levels as ``[K / 4, 2 lanes, 4]`` bytes (4 bits:
``[K / 8, 2 lanes, 4]``, the first of two groups in the low bits), scales as ``[K / block,
2 lanes]``. Decoding a token is one pass over the panels, at the speed of memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.tirx.script import builder as T  # type: ignore[import-not-found,unused-ignore]

from carve.emit.tvm.cpu import Cpu
from carve.emit.tvm.kernels.dot import dot, has_offset, nibbles
from carve.emit.tvm.kernels.layout import VECTORS
from carve.emit.tvm.kernels.spec import Format
from carve.emit.tvm.kernels.vector import Buffer, Expr, bind, load, local, of, splat, store

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
    cpu: Cpu, w: Weights, panel: Expr, x: Rows, tile: Expr, height: int, unroll: int
) -> list[Buffer]:
    """The first ``height`` rows of a tile times a panel: fp32 vectors, two a row.

    Args:
        cpu: whose vectors.
        w: the weights; ``panel`` counts through all matrices.
        panel: which panel.
        x: activations in the weights' form.
        tile: which tile.
        height: rows to compute.
        unroll: steps of an fp32 product that are unrolled.
    """
    if w.form.quantized:
        return _levels(cpu, w, panel, x, tile, height)
    return _float(cpu, w, panel, x, tile, height, unroll)


def _zeros(n: int, count: int) -> list[Buffer]:
    """Vectors that are buffers of their own: TVM's passes are quadratic in a buffer's accesses."""
    found = [local(n) for _ in range(count)]
    for a in found:
        store(a, 0, splat(0.0, n), n)
    return found


def _float(
    cpu: Cpu, w: Weights, panel: Expr, x: Rows, tile: Expr, height: int, unroll: int
) -> list[Buffer]:
    n, width = cpu.lanes, VECTORS * cpu.lanes
    # A lone row has too few sums to hide an addition's latency: a set of them a step.
    sets = [_zeros(n, height * VECTORS) for _ in range(unroll if height == 1 else 1)]
    first = bind(panel * (w.columns * width))

    def step(k: Expr, which: int) -> None:
        at = first + k * width
        columns = [bind(load(w.data, at + v * n, n)) for v in range(VECTORS)]
        for m in range(height):
            value = bind(splat(x.values[x.value(tile, k, m)], n))
            for v in range(VECTORS):
                acc = sets[which % len(sets)][m * VECTORS + v]
                store(acc, 0, load(acc, 0, n) + value * columns[v], n)

    with T.serial(0, w.columns // unroll) as k:
        for u in range(unroll):
            step(k * unroll + u, u)
    for u in range(w.columns % unroll):
        step(w.columns // unroll * unroll + u, u)
    for other in sets[1:]:
        for acc, more in zip(sets[0], other, strict=True):
            store(acc, 0, load(acc, 0, n) + load(more, 0, n), n)
    return sets[0]


def _levels(cpu: Cpu, w: Weights, panel: Expr, x: Rows, tile: Expr, height: int) -> list[Buffer]:
    n, width, form = cpu.lanes, VECTORS * cpu.lanes, w.form
    assert w.scale is not None
    assert x.scale is not None
    assert x.sums is not None
    sums = _zeros(n, height * VECTORS)
    parts = [local(n, "int32") for _ in sums]
    per = 2 if form.bits == 4 else 1  # groups that a byte of each weight holds
    first = bind(panel * (w.columns // 4 // per * width * 4))
    scales = bind(panel * (w.columns // form.block * width))

    def step(group: Expr) -> None:
        """``per`` groups of four weights of every column."""
        at = first + group * (width * 4)
        loaded = [bind(load(w.data, at + v * n * 4, 4 * n)) for v in range(VECTORS)]
        columns = [nibbles(c, n) if per == 2 else (c,) for c in loaded]
        for g in range(per):
            for m in range(height):
                four = bind(x.values[x.value(tile, group * per + g, m)])
                for v in range(VECTORS):
                    part = parts[m * VECTORS + v]
                    store(part, 0, dot(cpu, load(part, 0, n), columns[v][g], four, form), n)

    with T.serial(0, w.columns // form.block) as b:
        for m in range(height):
            start = splat(0, n, "int32")
            if has_offset(cpu, form):
                start = bind(splat(x.sums[x.block(tile, b, m)] * -form.zero, n))
            for v in range(VECTORS):
                store(parts[m * VECTORS + v], 0, start, n)
        groups = form.block // 4 // per
        # Many rows have work enough for a plain loop; a lone one has none to spare.
        together = _GROUPS // per if height == 1 else 1
        with T.serial(0, groups // together) as g:
            for u in range(together):
                step(b * groups + g * together + u)
        weights = [bind(load(w.scale, scales + b * width + v * n, n)) for v in range(VECTORS)]
        for m in range(height):
            scale = bind(splat(x.scale[x.block(tile, b, m)], n))
            for v in range(VECTORS):
                total, part = sums[m * VECTORS + v], parts[m * VECTORS + v]
                value = load(part, 0, n).astype(of("float32", n)) * (scale * weights[v])
                store(total, 0, load(total, 0, n) + value, n)
    return sums
