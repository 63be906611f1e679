"""Arguments of the kernels along the sequence: one form for processors and for GPUs.

What each kernel computes of them: `carve.emit.tvm.sequence`. Called inside of a `function`.
"""

from __future__ import annotations

from tvm import tirx  # type: ignore[import-not-found,unused-ignore]
from tvm.tirx.script import builder as T  # type: ignore[import-not-found,unused-ignore]

from carve.emit.tvm.kernels.vector import Buffer, Expr, bind


def _given(name: str, *shape: Expr | int, dtype: str = "float32") -> Buffer:
    return T.arg(name, T.buffer(shape, dtype))


def _rows() -> Expr:
    return tirx.Var("n", "int64")


def _caches(groups: int, width: int) -> tuple[Buffer, Buffer]:
    capacity = tirx.Var("c", "int64")
    key = _given("key", 1, groups, capacity, width)
    return key, _given("value", 1, groups, capacity, width)


def count(rows: Expr) -> Expr:
    """A number of rows as kernels count."""
    return bind(tirx.Cast("int32", rows))


def norm(
    width: int, kind: str, summed: bool
) -> tuple[Buffer, Buffer | None, Buffer, Buffer | None, Buffer | None, Buffer, Expr]:
    """``x, r?, weight, bias?, total?, y`` and ``n``."""
    rows = _rows()
    x = _given("x", rows, width)
    other = _given("r", rows, width) if summed else None
    weight = _given("weight", width)
    bias = _given("bias", width) if kind == "layer" else None
    total = _given("total", rows, width) if summed else None
    y = _given("y", rows, width)
    return x, other, weight, bias, total, y, count(rows)


def rotate(heads: int, width: int, turned: int) -> tuple[Buffer, Buffer, Buffer, Buffer, Expr]:
    """``x, cos, sin, y`` and ``n``."""
    rows = _rows()
    x = _given("x", rows, heads, width)
    cos, sin = _given("cos", rows, turned), _given("sin", rows, turned)
    return x, cos, sin, _given("y", rows, heads, width), count(rows)


def enter(
    heads: int, groups: int, width: int, turned: int
) -> tuple[Buffer, Buffer, Buffer, Buffer, Buffer, Buffer, Buffer, Expr]:
    """``qkv, cos, sin, position, key, value, q`` and ``n``."""
    rows = _rows()
    x = _given("qkv", rows, (heads + 2 * groups) * width)
    cos, sin = _given("cos", rows, turned), _given("sin", rows, turned)
    position = _given("position", rows, dtype="int64")
    key, value = _caches(groups, width)
    return x, cos, sin, position, key, value, _given("q", rows, heads, width), count(rows)


def append(heads: int, width: int) -> tuple[Buffer, Buffer, Buffer, Expr]:
    """``new, position, cache`` and ``n``."""
    rows, capacity = _rows(), tirx.Var("c", "int64")
    new = _given("new", rows, heads, width)
    position = _given("position", rows, dtype="int64")
    return new, position, _given("cache", 1, heads, capacity, width), count(rows)


def attend(
    heads: int, groups: int, width: int
) -> tuple[Buffer, Buffer, Buffer, Buffer, Buffer, Expr]:
    """``q, position, key, value, y`` and ``n``."""
    rows = _rows()
    q = _given("q", rows, heads, width)
    position = _given("position", rows, dtype="int64")
    key, value = _caches(groups, width)
    return q, position, key, value, _given("y", rows, heads, width), count(rows)


def running() -> tuple[Buffer, Buffer, Buffer, Buffer, Expr]:
    """``score, bar, which, count`` and ``n``, which is not counted yet."""
    rows = _rows()
    score, bar = _given("score", 1, rows, 1), _given("bar", 1, rows, 1)
    which = _given("which", rows, dtype="int64")
    return score, bar, which, _given("count", 1, dtype="int64"), rows


def put(width: int) -> tuple[Buffer, Buffer, Buffer, Expr]:
    """``rows, which, base`` and ``r``, which is not counted yet."""
    some, whole = tirx.Var("r", "int64"), _rows()
    rows = _given("rows", 1, some, width)
    which = _given("which", whole, dtype="int64")
    return rows, which, _given("base", 1, whole, width), some
