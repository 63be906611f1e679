"""Kernels along the sequence: norms, rotary embeddings, and attention with its cache in place.

Written like `carve.emit.tvm.kernels`, whose marks and vectors they share. ``n`` tokens of one
sequence; heads lie one after another, ``[n, H, D]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx  # type: ignore[import-not-found,unused-ignore]
from tvm.tirx.script import builder as T  # type: ignore[import-not-found,unused-ignore]

from carve.emit.tvm import declared
from carve.emit.tvm.cpu import Cpu
from carve.emit.tvm.kernels.activations import activate, exp
from carve.emit.tvm.kernels.pipeline import function
from carve.emit.tvm.kernels.vector import Expr, bind, ceil_div, load, local, splat, store

_BLOCK = 16
"""Keys whose scores are turned into weights at once."""
_SMALL = 1 << 15
"""Products below which a second thread costs more than it saves."""
LEAST = -1e30


def _int(value: int) -> Expr:
    return tirx.const(value, "int32")


def _wide(width: int, cpu: Cpu) -> int:
    """Lanes of the longest vectors that divide ``width``."""
    lanes = cpu.lanes
    while width % lanes:
        lanes //= 2
    return lanes


def _fold(v: Expr, lanes: int, join: Callable[[Expr, Expr], Expr]) -> Expr:
    """All lanes of a vector joined in halves."""
    while lanes > 1:
        half = lanes // 2
        v = bind(v)
        parts = [
            tirx.Shuffle([v], [_int(i) for i in range(start, start + half)]) for start in (0, half)
        ]
        v, lanes = join(*parts), half
    return bind(v)


def _add(a: Expr, b: Expr) -> Expr:
    return a + b


def _each(n: Expr, work: Expr, body: Callable[[Expr], None]) -> None:
    """``body`` for all of ``n``, by all threads where ``work`` is worth it."""
    with T.If(work < _int(_SMALL)):
        with T.Then(), T.serial(0, n) as i:
            body(i)
        with T.Else(), T.parallel(0, n) as i:
            body(i)


def norm(width: int, epsilon: float, kind: str, summed: bool, cpu: Cpu) -> Any:
    """RMSNorm or LayerNorm of rows, of a sum where ``summed``, which is then a result as well.

    A PrimFunc ``(x [n, d], r [n, d]?, weight [d], bias [d]?, total [n, d]?, y [n, d])``. ``kind``:
    ``rms``: ``x / sqrt(mean(x^2) + e) * w``; ``layer``: ``(x - m) / sqrt(mean((x - m)^2) + e) * w
    + b``.
    """
    lanes = _wide(width, cpu)
    with function("norm") as made:
        x, other, weight, bias, total, y, n = declared.norm(width, kind, summed)

        def row(i: Expr) -> None:
            acc = local(lanes)

            def mean(of: Callable[[Expr], Expr]) -> Expr:
                store(acc, 0, splat(0.0, lanes), lanes)
                with T.serial(0, width // lanes) as j:
                    store(acc, 0, load(acc, 0, lanes) + of(j * lanes), lanes)
                whole = _fold(load(acc, 0, lanes), lanes, _add)
                return bind(whole * tirx.const(1.0 / width, "float32"))

            source = x
            if other is not None:
                with T.serial(0, width // lanes) as j:
                    at = j * lanes
                    store(
                        total, [i, at], load(x, [i, at], lanes) + load(other, [i, at], lanes), lanes
                    )
                source = total
            middle: Expr = tirx.const(0.0, "float32")
            if kind == "layer":
                middle = mean(lambda at: load(source, [i, at], lanes))

            def square(at: Expr) -> Expr:
                v = bind(load(source, [i, at], lanes) - splat(middle, lanes))
                return v * v

            spread = mean(square)
            root = bind(
                tirx.const(1.0, "float32") / tirx.sqrt(spread + tirx.const(epsilon, "float32"))
            )
            with T.serial(0, width // lanes) as j:
                at = j * lanes
                v = (load(source, [i, at], lanes) - splat(middle, lanes)) * splat(root, lanes)
                v = v * load(weight, at, lanes)
                if bias is not None:
                    v = v + load(bias, at, lanes)
                store(y, [i, at], v, lanes)

        _each(n, n * width * 4, row)
    return made()


def rotate(heads: int, width: int, turned: int, cpu: Cpu) -> Any:
    """The first ``turned`` of each head's values turned, see `carve.emit.tvm.patterns.Rotary`.

    A PrimFunc ``(x [n, H, D], cos [n, turned], sin [n, turned], y [n, H, D])``.
    """
    with function("rotate") as made:
        x, cos, sin, y, n = declared.rotate(heads, width, turned)

        def row(i: Expr) -> None:
            with T.serial(0, heads) as h:
                _turn(
                    lambda at, lanes: load(x, [i, h, at], lanes),
                    lambda t, at, lanes: load(cos if t == 0 else sin, [i, at], lanes),
                    lambda at, v, lanes: store(y, [i, h, at], v, lanes),
                    width,
                    turned,
                    cpu,
                )

        _each(n, n * heads * width, row)
    return made()


def _turn(
    get: Callable[[int, int], Expr],
    table: Callable[[int, int, int], Expr],
    put: Callable[[int, Expr, int], None],
    width: int,
    turned: int,
    cpu: Cpu,
) -> None:
    """One head; ``table(0, ...)`` are cosines, ``table(1, ...)`` sines."""
    half = turned // 2
    lanes = _wide(half, cpu) if half else 1
    for at in range(0, half, lanes):
        a, b = bind(get(at, lanes)), bind(get(half + at, lanes))
        put(at, a * table(0, at, lanes) - b * table(1, at, lanes), lanes)
        put(half + at, b * table(0, half + at, lanes) + a * table(1, half + at, lanes), lanes)
    rest = width - turned
    lanes = _wide(rest, cpu) if rest else 1
    for at in range(turned, width, lanes):
        put(at, get(at, lanes), lanes)


def enter(heads: int, groups: int, width: int, turned: int, cpu: Cpu) -> Any:
    """Queries turned, keys turned and values into the cache, from one product.

    A PrimFunc ``(qkv [n, (H + 2 KV) D], cos [n, turned], sin [n, turned], position [n],
    key [1, KV, C, D], value [1, KV, C, D], q [n, H, D])``, the caches in place.
    """
    lanes = _wide(width, cpu)
    with function("enter") as made:
        x, cos, sin, position, key, value, q, n = declared.enter(heads, groups, width, turned)

        def row(i: Expr) -> None:
            at = bind(position[i])

            def turn(first: int, count: int, put: Callable[[Expr, int, Expr, int], None]) -> None:
                with T.serial(0, count) as h:
                    start = bind((h + _int(first)) * _int(width))
                    _turn(
                        lambda j, v: load(x, [i, start + _int(j)], v),
                        lambda t, j, v: load(cos if t == 0 else sin, [i, j], v),
                        lambda j, value, v: put(h, j, value, v),
                        width,
                        turned,
                        cpu,
                    )

            turn(0, heads, lambda h, j, v, lanes: store(q, [i, h, j], v, lanes))
            turn(heads, groups, lambda h, j, v, lanes: store(key, [0, h, at, j], v, lanes))
            with T.serial(0, groups) as h:
                start = bind((h + _int(heads + groups)) * _int(width))
                for j in range(0, width, lanes):
                    store(value, [0, h, at, j], load(x, [i, start + _int(j)], lanes), lanes)

        _each(n, n * heads * width, row)
    return made()


def append(heads: int, width: int, cpu: Cpu) -> Any:
    """New keys or values into the cache, in place.

    A PrimFunc ``(new [n, KV, D], position [n], cache [1, KV, C, D])``.
    """
    lanes = _wide(width, cpu)
    with function("append") as made:
        new, position, cache, n = declared.append(heads, width)

        def row(i: Expr) -> None:
            at = bind(position[i])
            with T.serial(0, heads) as h:
                for j in range(0, width, lanes):
                    store(cache, [0, h, at, j], load(new, [i, h, j], lanes), lanes)

        _each(n, n * heads * width, row)
    return made()


def attend(
    heads: int, groups: int, width: int, scale: float, window: int, softcap: float, cpu: Cpu
) -> Any:
    """Attention over the cache, see `carve.dialect.attention`.

    A PrimFunc ``(q [n, H, D], position [n], key [1, KV, C, D], value [1, KV, C, D], y [n, H, D])``:
    the query at position ``p`` sees keys up to ``p``. The heads that share keys are computed
    together, and the softmax runs along (Milakov and Gimelshein, arXiv 1805.02867).
    """
    lanes, each = _wide(width, cpu), heads // groups
    steps = range(0, width, lanes)
    with function("attend") as made:
        q, position, key, value, y, n = declared.attend(heads, groups, width)

        def task(t: Expr) -> None:
            i, g = bind(tirx.floordiv(t, groups)), bind(tirx.floormod(t, groups))
            last = bind(tirx.Cast("int32", position[i]))
            first = bind(tirx.max(last - _int(window - 1), _int(0))) if window > 0 else _int(0)
            scores, acc = local(each * _BLOCK), local(each * width)
            top, total = local(each), local(each)
            for r in range(each):
                T.buffer_store(top, tirx.const(LEAST, "float32"), [r])
                T.buffer_store(total, tirx.const(0.0, "float32"), [r])
            with T.serial(0, each * width // lanes) as j:
                store(acc, j * lanes, splat(0.0, lanes), lanes)
            with T.serial(0, ceil_div(last + _int(1) - first, _BLOCK)) as b:
                start = bind(first + b * _BLOCK)
                count = bind(tirx.min(_int(_BLOCK), last + _int(1) - start))
                for r in range(each):
                    store(scores, r * _BLOCK, splat(LEAST, _BLOCK), _BLOCK)
                with T.serial(0, count) as j, T.serial(0, each) as r:
                    head = g * each + r
                    s = splat(0.0, lanes)
                    for d in steps:
                        k = load(key, [0, g, start + j, d], lanes)
                        s = s + load(q, [i, head, d], lanes) * k
                    s = _fold(s, lanes, _add) * tirx.const(scale, "float32")
                    if softcap > 0:
                        cap = tirx.const(softcap, "float32")
                        s = cap * activate("tanh", s * tirx.const(1 / softcap, "float32"), 1)
                    T.buffer_store(scores, s, [r * _BLOCK + j])
                with T.serial(0, each) as r:
                    v = bind(load(scores, r * _BLOCK, _BLOCK))
                    high = bind(tirx.max(top[r], _fold(v, _BLOCK, tirx.max)))
                    shrink = bind(exp(top[r] - high, 1))
                    p = bind(exp(v - splat(high, _BLOCK), _BLOCK))
                    store(scores, r * _BLOCK, p, _BLOCK)
                    T.buffer_store(total, total[r] * shrink + _fold(p, _BLOCK, _add), [r])
                    T.buffer_store(top, high, [r])
                    for d in steps:
                        at = r * width + d
                        store(acc, at, load(acc, at, lanes) * splat(shrink, lanes), lanes)
                with T.serial(0, count) as j, T.serial(0, each) as r:
                    p = bind(scores[r * _BLOCK + j])
                    for d in steps:
                        at = r * width + d
                        v = splat(p, lanes) * load(value, [0, g, start + j, d], lanes)
                        store(acc, at, load(acc, at, lanes) + v, lanes)
            with T.serial(0, each) as r:
                part = bind(tirx.const(1.0, "float32") / total[r])
                for d in steps:
                    v = load(acc, r * width + d, lanes) * splat(part, lanes)
                    store(y, [i, g * each + r, d], v, lanes)

        longest = bind(tirx.Cast("int32", position[n - _int(1)]) + _int(1))
        _each(n * groups, longest * n * (heads * width * 2), task)
    return made()


def running() -> Any:
    """The tokens whose score is above their bar, in order, and how many they are.

    A PrimFunc ``(score [1, n, 1], bar [1, n, 1], which [n], count [1])``, the last two int64.
    """
    with function("running") as made:
        score, bar, which, count, rows = declared.running()
        T.buffer_store(count, tirx.const(0, "int64"), [0])
        with T.serial(0, rows) as i:
            T.buffer_store(which, tirx.const(0, "int64"), [i])
            with T.If(score[0, i, 0] > bar[0, i, 0]), T.Then():
                at = bind(count[0])
                T.buffer_store(which, i, [at])
                T.buffer_store(count, at + tirx.const(1, "int64"), [0])
    return made()


def put(width: int, cpu: Cpu) -> Any:
    """Rows put over some of a base's, in place.

    A PrimFunc ``(rows [1, r, d], which [n], base [1, n, d])``.
    """
    lanes = _wide(width, cpu)
    with function("put") as made:
        rows, which, base, some = declared.put(width)
        with T.serial(0, some) as i:
            at = bind(which[i])
            with T.serial(0, width // lanes) as j:
                store(base, [0, at, j * lanes], load(rows, [0, i, j * lanes], lanes), lanes)
    return made()
