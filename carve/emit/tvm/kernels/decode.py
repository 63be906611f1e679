"""A routed FFN on one token: every active weight is read once, in order.

Two passes over panels, each divided among the threads: hidden activations of the shared expert and
of the chosen ones, then the result. The experts' numbers are read inside.
"""

from __future__ import annotations

from tvm import tirx  # type: ignore[import-not-found,unused-ignore]
from tvm.tirx.script import builder as T  # type: ignore[import-not-found,unused-ignore]

from carve.emit.tvm.kernels.hidden import put_hidden
from carve.emit.tvm.kernels.layout import VECTORS
from carve.emit.tvm.kernels.parts import Call, Part
from carve.emit.tvm.kernels.product import Rows, product
from carve.emit.tvm.kernels.rounding import arrange, make_rows
from carve.emit.tvm.kernels.schedule import loop
from carve.emit.tvm.kernels.selection import append, chosen
from carve.emit.tvm.kernels.spec import Format
from carve.emit.tvm.kernels.vector import Buffer, Expr, bind, load, local, scratch, splat, store

_ZERO = tirx.const(0, "int32")


def decode(c: Call) -> None:
    """``y = FFN(x)`` for one row."""
    taken, count = _select(c)
    inputs: dict[Format, Rows] = {}
    for part in c.parts:
        form = part.inward.form
        if form not in inputs:
            inputs[form] = _inputs(c, form)
    room = {id(p): c.spec.top_k if p is c.experts else 1 for p in c.parts}
    hidden = {id(p): scratch(room[id(p)] * p.inward.padded) for p in c.parts}
    shared = 0 if c.shared is None else c.shared.inward.panels
    routed = 0 if c.experts is None else c.experts.inward.panels

    def inward(part: Part, panel: Expr, weights: Expr) -> None:
        x, width = inputs[part.inward.form], VECTORS * c.cpu.lanes
        sums = product(c.cpu, part.inward_weights, weights, x, 0, 1, c.schedule.unroll)
        put_hidden(
            c.cpu,
            part.inward,
            c.spec.activation,
            sums,
            part.inward_bias,
            weights * width,
            hidden[id(part)],
            panel * (part.inward.padded // part.inward.panels),
        )

    def expert(panel: Expr) -> None:
        assert c.experts is not None
        which = taken[tirx.floordiv(panel, routed)]
        inward(c.experts, panel, bind(which * routed + tirx.floormod(panel, routed)))

    with loop(c.schedule, shared + count * routed) as i:
        if c.shared is None:
            expert(i)
        elif c.experts is None:
            inward(c.shared, i, i)
        else:
            with T.If(i < tirx.const(shared, "int32")):
                with T.Then():
                    inward(c.shared, i, i)
                with T.Else():
                    expert(bind(i - shared))
    rows = {
        id(p): _rows(c, p, hidden[id(p)], count if p is c.experts else 1, room[id(p)])
        for p in c.parts
    }
    with loop(c.schedule, c.parts[0].down.panels) as p:
        _result(c, p, rows, taken, count)


def _inputs(c: Call, form: Format) -> Rows:
    width = c.spec.hidden_size
    if not form.quantized:
        return Rows(form, width, 1, c.x)
    rows = make_rows(form, width, 1, 1)
    arrange(c.cpu, rows, 0, 0, c.x, 0)
    return rows


def _rows(c: Call, part: Part, hidden: Buffer, count: Expr, room: int) -> Rows:
    """Hidden activations as the down-projection reads them, a tile an expert."""
    form, width = part.down.form, part.down.columns
    if not form.quantized and part.inward.padded == width:
        return Rows(form, width, 1, hidden)
    rows = make_rows(form, width, 1, room)
    with T.serial(0, count) as j:
        arrange(c.cpu, rows, j, 0, hidden, j * part.inward.padded)
    return rows


def _select(c: Call) -> tuple[Buffer, Expr]:
    """Numbers of the chosen experts, and how many."""
    taken = scratch(max(c.spec.top_k, 1), "int32")
    if c.scores is None or c.spec.top_k == 0:
        return taken, _ZERO
    count = local(1, "int32")
    T.buffer_store(count, _ZERO, [0])
    with (
        T.serial(0, c.spec.num_experts) as e,
        T.If(chosen(c.spec, c.scores, 0, e)),
        T.Then(),
    ):
        append(taken, 0, count, e)
    return taken, bind(count[0])


def _result(c: Call, p: Expr, rows: dict[int, Rows], taken: Buffer, count: Expr) -> None:
    """One panel of the result."""
    n, width = c.cpu.lanes, VECTORS * c.cpu.lanes
    total = [local(n) for _ in range(VECTORS)]
    for v, t in enumerate(total):
        bias = c.output_bias
        store(t, 0, splat(0.0, n) if bias is None else load(bias, p * width + v * n, n), n)
    if c.shared is not None:
        x = rows[id(c.shared)]
        sums = product(c.cpu, c.shared.down_weights, p, x, 0, 1, c.schedule.unroll)
        for t, s in zip(total, sums, strict=True):
            store(t, 0, load(t, 0, n) + load(s, 0, n), n)
    if c.experts is not None:
        part, x = c.experts, rows[id(c.experts)]
        with T.serial(0, count) as j:
            at = bind(taken[j] * part.down.panels + p)
            sums = product(c.cpu, part.down_weights, at, x, j, 1, c.schedule.unroll)
            for v, (t, s) in enumerate(zip(total, sums, strict=True)):
                value = load(s, 0, n)
                if part.down_bias is not None:
                    value = value + load(part.down_bias, at * width + v * n, n)
                store(t, 0, load(t, 0, n) + value, n)
    c.y.put(0, p, total)
