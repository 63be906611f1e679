"""Which experts a token takes, see `carve.dialect.select`; of equal scores the first wins."""

from __future__ import annotations

from tvm import tirx  # type: ignore[import-not-found,unused-ignore]
from tvm.tirx.script import builder as T  # type: ignore[import-not-found,unused-ignore]

from carve.emit.tvm.kernels.spec import RoutedSpec
from carve.emit.tvm.kernels.vector import Buffer, Expr, bind, local

_ZERO, _ONE = tirx.const(0, "int32"), tirx.const(1, "int32")


def chosen(spec: RoutedSpec, scores: Buffer, row: Expr, expert: Expr) -> Expr:
    """Whether a row takes an expert."""
    score = bind(scores[row * spec.num_experts + expert])
    taken = tirx.const(True, "bool")
    if spec.top_k < spec.num_experts:
        before = local(1, "int32")
        T.buffer_store(before, _ZERO, [0])
        with T.serial(0, spec.num_experts) as other:
            rival = bind(scores[row * spec.num_experts + other])
            ahead = tirx.Or(rival > score, tirx.And(rival == score, other < expert))
            T.buffer_store(before, before[0] + tirx.Select(ahead, _ONE, _ZERO), [0])
        taken = before[0] < tirx.const(spec.top_k, "int32")
    if spec.dynamic:
        taken = tirx.And(taken, score > tirx.const(0.0, "float32"))
    return taken


def append(index: Buffer, at: Expr, count: Buffer, value: Expr) -> None:
    """Put ``value`` behind the ``count[0]`` values from ``index[at]`` on."""
    T.buffer_store(index, value, [at + count[0]])
    T.buffer_store(count, count[0] + _ONE, [0])
