"""GPU kernels along the sequence, with the names and arguments of `carve.emit.tvm.sequence`'s."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx  # type: ignore[import-not-found,unused-ignore]
from tvm.tirx.script import builder as T  # type: ignore[import-not-found,unused-ignore]

from carve.emit.tvm import declared
from carve.emit.tvm.cuda.device import Gpu
from carve.emit.tvm.cuda.threads import (
    WARP,
    divided,
    elements,
    launch,
    number,
    real,
    registers,
    shared,
    wait,
    warp_sums,
    zeros,
)
from carve.emit.tvm.kernels.activations import activate
from carve.emit.tvm.kernels.pipeline import function
from carve.emit.tvm.kernels.vector import Buffer, Expr, bind, ceil_div
from carve.emit.tvm.sequence import LEAST

_WARPS = 8


def norm(width: int, epsilon: float, kind: str, summed: bool, gpu: Gpu) -> Any:
    """See `carve.emit.tvm.sequence.norm`; a block for each row."""
    del gpu
    size = _WARPS * WARP
    with function("norm") as made:
        x, other, weight, bias, total, y, n = declared.norm(width, kind, summed)
        with launch(n, _WARPS) as (i, warp, lane):
            tid = bind(warp * WARP + lane)
            count = ceil_div(width, size)
            mine, acc, parts = registers(count), registers(1), shared(_WARPS)

            def each(body: Callable[[int, Expr], None]) -> None:
                for c in range(count):
                    at = bind(tid + number(c * size))
                    if (c + 1) * size <= width:
                        body(c, at)
                    else:
                        with T.If(at < number(width)), T.Then():
                            body(c, at)

            def read(c: int, at: Expr) -> None:
                value = x[i, at]
                if other is not None:
                    value = value + other[i, at]
                T.buffer_store(mine, value, [c])
                if total is not None:
                    T.buffer_store(total, mine[c], [i, at])

            def mean(of: Callable[[int], Expr]) -> Expr:
                zeros(acc, 1)
                each(lambda c, at: T.buffer_store(acc, acc[0] + of(c), [0]))
                warp_sums(acc, 1)
                wait()  # until the former sums have been read
                with T.If(lane == number(0)), T.Then():
                    T.buffer_store(parts, acc[0], [warp])
                wait()
                zeros(acc, 1)
                for w in range(_WARPS):
                    T.buffer_store(acc, acc[0] + parts[w], [0])
                return bind(acc[0] * real(1.0 / width))

            each(read)
            middle = mean(lambda c: mine[c]) if kind == "layer" else real(0.0)
            spread = mean(lambda c: (mine[c] - middle) * (mine[c] - middle))
            root = bind(real(1.0) / tirx.sqrt(spread + real(epsilon)))

            def write(c: int, at: Expr) -> None:
                value = (mine[c] - middle) * root * weight[at]
                T.buffer_store(y, value if bias is None else value + bias[at], [i, at])

            each(write)
    return made()


def _turned(
    get: Callable[[Expr], Expr], cos: Buffer, sin: Buffer, i: Expr, j: Expr, turned: int
) -> Expr:
    """Value ``j`` of a turned head; ``get`` reads it."""
    half = turned // 2
    cell = registers(1)
    T.buffer_store(cell, get(j), [0])
    with T.If(j < number(turned)), T.Then(), T.If(j < number(half)):
        with T.Then():
            value = cell[0] * cos[i, j] - get(j + number(half)) * sin[i, j]
            T.buffer_store(cell, value, [0])
        with T.Else():
            value = cell[0] * cos[i, j] + get(j - number(half)) * sin[i, j]
            T.buffer_store(cell, value, [0])
    return cell[0]


def rotate(heads: int, width: int, turned: int, gpu: Gpu) -> Any:
    """See `carve.emit.tvm.sequence.rotate`."""
    del gpu
    with function("rotate") as made:
        x, cos, sin, y, n = declared.rotate(heads, width, turned)

        def one(e: Expr) -> None:
            i, rest = divided(e, heads * width)
            h, j = divided(rest, width)
            T.buffer_store(y, _turned(lambda at: x[i, h, at], cos, sin, i, j, turned), [i, h, j])

        elements(n * (heads * width), one)
    return made()


def enter(heads: int, groups: int, width: int, turned: int, gpu: Gpu) -> Any:
    """See `carve.emit.tvm.sequence.enter`."""
    del gpu
    every = heads + 2 * groups
    with function("enter") as made:
        x, cos, sin, position, key, value, q, n = declared.enter(heads, groups, width, turned)

        def one(e: Expr) -> None:
            i, rest = divided(e, every * width)
            h, j = divided(rest, width)
            at = bind(position[i])

            def get(j: Expr) -> Expr:
                return x[i, h * width + j]

            with T.If(h < number(heads + groups)):
                with T.Then():
                    result = bind(_turned(get, cos, sin, i, j, turned))
                    with T.If(h < number(heads)):
                        with T.Then():
                            T.buffer_store(q, result, [i, h, j])
                        with T.Else():
                            T.buffer_store(key, result, [0, h - number(heads), at, j])
                with T.Else():
                    T.buffer_store(value, get(j), [0, h - number(heads + groups), at, j])

        elements(n * (every * width), one)
    return made()


def append(heads: int, width: int, gpu: Gpu) -> Any:
    """See `carve.emit.tvm.sequence.append`."""
    del gpu
    with function("append") as made:
        new, position, cache, n = declared.append(heads, width)

        def one(e: Expr) -> None:
            i, rest = divided(e, heads * width)
            h, j = divided(rest, width)
            T.buffer_store(cache, new[i, h, j], [0, h, position[i], j])

        elements(n * (heads * width), one)
    return made()


def attend(
    heads: int, groups: int, width: int, scale: float, window: int, softcap: float, gpu: Gpu
) -> Any:
    """See `carve.emit.tvm.sequence.attend`; a block for each query and head.

    Every warp takes each eighth key with a running softmax of its own; they are joined at the end.
    """
    del gpu
    each, count = heads // groups, ceil_div(width, WARP)
    with function("attend") as made:
        q, position, key, value, y, n = declared.attend(heads, groups, width)
        with launch(n * heads, _WARPS) as (block, warp, lane):
            i, head = divided(block, heads)
            g = bind(tirx.floordiv(head, each))
            last = bind(tirx.Cast("int32", position[i]))
            first = number(0)
            if window > 0:
                first = bind(tirx.max(last - number(window - 1), number(0)))
            query, acc, score = registers(count), registers(count), registers(1)
            top, total = registers(1), registers(1)
            tops, totals = shared(_WARPS), shared(_WARPS)
            sums = shared(_WARPS * width)

            def parts(body: Callable[[int, Expr], None]) -> None:
                for c in range(count):
                    d = bind(lane + number(c * WARP))
                    if (c + 1) * WARP <= width:
                        body(c, d)
                    else:
                        with T.If(d < number(width)), T.Then():
                            body(c, d)

            zeros(acc, count)
            parts(lambda c, d: T.buffer_store(query, q[i, head, d] * real(scale), [c]))
            T.buffer_store(top, real(LEAST), [0])
            T.buffer_store(total, real(0.0), [0])
            with T.serial(0, ceil_div(last + number(1) - first, _WARPS)) as s:
                j = bind(first + s * _WARPS + warp)
                with T.If(j <= last), T.Then():
                    zeros(score, 1)
                    parts(
                        lambda c, d: T.buffer_store(
                            score, score[0] + query[c] * key[0, g, j, d], [0]
                        )
                    )
                    warp_sums(score, 1)
                    found = bind(score[0])
                    if softcap > 0:
                        found = real(softcap) * activate("tanh", found * real(1 / softcap), 1)
                    found = bind(found)
                    high = bind(tirx.max(top[0], found))
                    shrink, p = bind(tirx.exp(top[0] - high)), bind(tirx.exp(found - high))
                    T.buffer_store(total, total[0] * shrink + p, [0])
                    T.buffer_store(top, high, [0])
                    parts(
                        lambda c, d: T.buffer_store(
                            acc, acc[c] * shrink + p * value[0, g, j, d], [c]
                        )
                    )
            with T.If(lane == number(0)), T.Then():
                T.buffer_store(tops, top[0], [warp])
                T.buffer_store(totals, total[0], [warp])
            parts(lambda c, d: T.buffer_store(sums, acc[c], [warp * width + d]))
            wait()
            with T.serial(0, ceil_div(width, _WARPS * WARP)) as c:
                d = bind(c * (_WARPS * WARP) + warp * WARP + lane)
                with T.If(d < number(width)), T.Then():
                    T.buffer_store(top, tops[0], [0])
                    for w in range(1, _WARPS):
                        T.buffer_store(top, tirx.max(top[0], tops[w]), [0])
                    T.buffer_store(total, real(0.0), [0])
                    T.buffer_store(score, real(0.0), [0])
                    for w in range(_WARPS):
                        share = bind(tirx.exp(tops[w] - top[0]))
                        T.buffer_store(total, total[0] + totals[w] * share, [0])
                        T.buffer_store(score, score[0] + sums[w * width + d] * share, [0])
                    T.buffer_store(y, score[0] / total[0], [i, head, d])
    return made()


def running() -> Any:
    """See `carve.emit.tvm.sequence.running`; one thread counts."""
    with function("running") as made:
        score, bar, which, count, rows = declared.running()
        n = declared.count(rows)

        def one(_: Expr) -> None:
            seen = registers(1, "int32")
            T.buffer_store(seen, number(0), [0])
            with T.serial(0, n) as i:
                T.buffer_store(which, tirx.const(0, "int64"), [i])
                with T.If(score[0, i, 0] > bar[0, i, 0]), T.Then():
                    T.buffer_store(which, tirx.Cast("int64", i), [seen[0]])
                    T.buffer_store(seen, seen[0] + number(1), [0])
            T.buffer_store(count, tirx.Cast("int64", seen[0]), [0])

        elements(number(1), one)
    return made()


def put(width: int, gpu: Gpu) -> Any:
    """See `carve.emit.tvm.sequence.put`."""
    del gpu
    with function("put") as made:
        rows, which, base, some = declared.put(width)
        n = declared.count(some)

        def one(e: Expr) -> None:
            i, j = divided(e, width)
            T.buffer_store(base, rows[0, i, j], [0, which[i], j])

        elements(n * width, one)
    return made()
