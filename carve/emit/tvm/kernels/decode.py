"""A routed FFN on one token: every active weight is read once, in order.

Two passes over panels, each divided among the threads: hidden activations of the shared expert and
of the chosen ones, then the result. The experts' numbers are read inside.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    streams = c.schedule.side_by_side(*(p.inward.panels for p in c.parts))
    shared = 0 if c.shared is None else c.shared.inward.panels // streams
    routed = 0 if c.experts is None else c.experts.inward.panels // streams

    def inward(part: Part, unit: Expr, weights: Expr) -> None:
        """``streams`` panels, counted through the chosen experts and through all of them."""
        x, width = inputs[part.inward.form], VECTORS * c.cpu.lanes
        panels = [bind(weights * streams + i) for i in range(streams)]
        per = part.inward.padded // part.inward.panels
        for i, sums in enumerate(product(c.cpu, part.inward_weights, panels, x, 0, 1, c.schedule)):
            put_hidden(
                c.cpu,
                part.inward,
                c.spec.activation,
                sums,
                part.inward_bias,
                panels[i] * width,
                hidden[id(part)],
                (unit * streams + i) * per,
            )

    def expert(unit: Expr) -> None:
        assert c.experts is not None
        which = taken[tirx.floordiv(unit, routed)]
        inward(c.experts, unit, bind(which * routed + tirx.floormod(unit, routed)))

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
    streams = c.schedule.side_by_side(c.parts[0].down.panels)
    with loop(c.schedule, c.parts[0].down.panels // streams) as unit:
        _result(c, [bind(unit * streams + i) for i in range(streams)], rows, taken, count)


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


def _result(
    c: Call, panels: Sequence[Expr], rows: dict[int, Rows], taken: Buffer, count: Expr
) -> None:
    """Some panels of the result."""
    n, width = c.cpu.lanes, VECTORS * c.cpu.lanes
    totals = [[local(n) for _ in range(VECTORS)] for _ in panels]

    def add(sums: Sequence[Sequence[Buffer]], bias: Buffer | None, at: Sequence[Expr]) -> None:
        for total, two, panel in zip(totals, sums, at, strict=True):
            for v, (t, s) in enumerate(zip(total, two, strict=True)):
                value = load(s, 0, n)
                if bias is not None:
                    value = value + load(bias, panel * width + v * n, n)
                store(t, 0, load(t, 0, n) + value, n)

    for total, panel in zip(totals, panels, strict=True):
        for v, t in enumerate(total):
            bias = c.output_bias
            first = splat(0.0, n) if bias is None else load(bias, panel * width + v * n, n)
            store(t, 0, first, n)
    if c.shared is not None:
        x = rows[id(c.shared)]
        add(product(c.cpu, c.shared.down_weights, panels, x, 0, 1, c.schedule), None, panels)
    if c.experts is not None:
        part, x = c.experts, rows[id(c.experts)]
        with T.serial(0, count) as j:
            start = bind(taken[j] * part.down.panels)
            at = [bind(start + p) for p in panels]
            sums = product(c.cpu, part.down_weights, at, x, j, 1, c.schedule)
            add(sums, part.down_bias, at)
    for total, panel in zip(totals, panels, strict=True):
        c.y.put(0, panel, total)
