"""Activations in the order in which products read them, rounded to int8 where weights are levels.

The rounding is that of `carve.arithmetic.rounded`: one scale ``s = max|x| / 127`` for each row and
block, levels ``round(x / s)``, ties to even.
"""

from __future__ import annotations

from tvm import tirx  # type: ignore[import-not-found,unused-ignore]
from tvm.tirx.script import builder as T  # type: ignore[import-not-found,unused-ignore]

from carve.emit.tvm.cpu import Cpu
from carve.emit.tvm.kernels.product import Rows
from carve.emit.tvm.kernels.spec import Format
from carve.emit.tvm.kernels.vector import (
    Buffer,
    Expr,
    bind,
    bits_of,
    llvm,
    load,
    local,
    of,
    scratch,
    splat,
    store,
)


def make_rows(form: Format, columns: int, height: int, tiles: Expr) -> Rows:
    """Room for activations of tiles."""
    if not form.quantized:
        return Rows(form, columns, height, scratch(tiles * (columns * height)))
    blocks = tiles * (columns // form.block * height)
    return Rows(
        form,
        columns,
        height,
        scratch(tiles * (columns // 4 * height), "int32"),
        scratch(blocks),
        scratch(blocks, "int32"),
    )


def arrange(cpu: Cpu, rows: Rows, tile: Expr, row: Expr, source: Buffer, at: Expr) -> None:
    """Put ``source[at : at + columns]`` into a row of a tile."""
    if rows.form.quantized:
        _round(cpu, rows, tile, row, source, at)
        return
    with T.serial(0, rows.columns) as k:
        T.buffer_store(rows.values, source[at + k], [rows.value(tile, k, row)])


def blank(rows: Rows, tile: Expr, row: Expr) -> None:
    """Put zeros into a row of a tile."""
    zero = tirx.const(0, "int32" if rows.form.quantized else "float32")
    with T.serial(0, rows.columns // 4 if rows.form.quantized else rows.columns) as k:
        T.buffer_store(rows.values, zero, [rows.value(tile, k, row)])
    if rows.scale is not None and rows.sums is not None:
        with T.serial(0, rows.columns // rows.form.block) as b:
            at = rows.block(tile, b, row)
            T.buffer_store(rows.scale, tirx.const(0.0, "float32"), [at])
            T.buffer_store(rows.sums, tirx.const(0, "int32"), [at])


def _round(cpu: Cpu, rows: Rows, tile: Expr, row: Expr, source: Buffer, at: Expr) -> None:
    n, block = cpu.lanes, rows.form.block
    assert rows.scale is not None
    assert rows.sums is not None
    with T.serial(0, rows.columns // block) as b:
        start = bind(at + b * block)
        most, total = local(n), local(n, "int32")
        store(most, 0, splat(0.0, n), n)
        store(total, 0, splat(0, n, "int32"), n)
        with T.serial(0, block // n) as i:
            size = tirx.abs(load(source, start + i * n, n))
            store(most, 0, tirx.max(load(most, 0, n), size), n)
        scale = bind(llvm("float32", "llvm.vector.reduce.fmax", load(most, 0, n)) / T.float32(127))
        zero = tirx.const(0.0, "float32")
        safe = bind(splat(tirx.Select(scale == zero, tirx.const(1.0, "float32"), scale), n))
        with T.serial(0, block // n) as i:
            level = tirx.nearbyint(load(source, start + i * n, n) / safe)
            level = bind(level.astype(of("int32", n)))
            store(total, 0, load(total, 0, n) + level, n)
            _put(rows, tile, row, b * (block // 4) + i * (n // 4), level, n)
        place = bind(rows.block(tile, b, row))
        T.buffer_store(rows.scale, scale, [place])
        T.buffer_store(
            rows.sums, llvm("int32", "llvm.vector.reduce.add", load(total, 0, n)), [place]
        )


def _put(rows: Rows, tile: Expr, row: Expr, group: Expr, level: Expr, n: int) -> None:
    """Store levels as bytes, four to an int32."""
    fours = bits_of(level.astype(of("int8", n)), of("int32", n // 4))
    if rows.height == 1:
        value = rows.value(tile, group, row)
        if n == 4:
            T.buffer_store(rows.values, fours, [value])
        else:
            store(rows.values, value, fours, n // 4)
        return
    at = rows.value(tile, group, row)
    index = at if n == 4 else tirx.Ramp(at, rows.height, n // 4)
    T.buffer_store(rows.values, fours, [index])
